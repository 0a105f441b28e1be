"""A stand-in of cuda.core over host memory: addresses, copies, their order and errors are real.

Each of its classes is held against cuda.core's own of that name: a method that is not there, or a call that its
signature does not take, fails the test.
"""

import ctypes
import inspect
from collections.abc import Callable
from functools import wraps
from types import SimpleNamespace
from typing import Any

import cuda.core


class CUDAError(Exception):
    """As cuda.core raises it."""


def like(real: Any) -> Callable[[type], type]:
    """A class whose public methods are `real`'s, called as `real`'s can be."""

    def check(fake: type) -> type:
        for name, method in list(vars(fake).items()):
            if name.startswith("_"):
                continue
            assert hasattr(real, name), f"cuda.core's {real.__name__} has no {name}"
            if isinstance(method, staticmethod):
                setattr(fake, name, staticmethod(checked(method.__func__, getattr(real, name))))
            elif callable(method):
                setattr(fake, name, checked(method, getattr(real, name)))
        return fake

    return check


def checked(fake: Callable[..., Any], real: Callable[..., Any]) -> Callable[..., Any]:
    """`fake`, which refuses arguments that `real` would."""
    signature = inspect.signature(real)

    @wraps(fake)
    def call(*arguments: Any, **named: Any) -> Any:
        signature.bind(*arguments, **named)
        return fake(*arguments, **named)

    return call


class FakeCuda(SimpleNamespace):
    """cuda.core, its one stream as late as can be: what is enqueued happens when it is waited for.

    `log` has every call that the stream sees, and every wait for it. A call in `failing` fails.
    """

    def __init__(self, major: int = 8, minor: int = 9, count: int = 1, limit: int = 1 << 30) -> None:
        self.capability, self.count, self.limit = (major, minor), count, limit
        self.memory: dict[int, Any] = {}
        self.pinned: dict[int, Any] = {}
        self.allocated = 0
        self.log: list[str] = []
        self.failing: set[str] = set()
        self.queue: list[Callable[[], object]] = []
        self.recording: list[Callable[[], object]] | None = None
        self.graphs = 0  # instantiated and not closed
        self.stream: Any = None
        self.StreamOptions = cuda.core.StreamOptions
        for name, made in classes(self).items():
            setattr(self, name, made)

    def enqueue(self, name: str, action: Callable[[], object]) -> None:
        self.log.append(name)
        (self.queue if self.recording is None else self.recording).append(action)

    def wait(self, *name: str) -> None:
        assert self.recording is None, "a wait spoils a capture"
        self.log.extend(name)
        while self.queue:
            self.queue.pop(0)()

    def fail(self, name: str) -> None:
        if name in self.failing:
            raise CUDAError("CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED: unsupported")

    def keep(self, kind: dict[int, Any], size: int) -> int:
        made = ctypes.create_string_buffer(b"\xff" * size, size)
        kind[ctypes.addressof(made)] = made
        return ctypes.addressof(made)


def classes(fake: FakeCuda) -> dict[str, type]:  # noqa: C901  seven classes of a few lines each
    """cuda.core's classes over the state of `fake`."""

    @like(cuda.core.Buffer)
    class Buffer:
        def __init__(
            self, handle: int, size: int, free: Callable[[], object] = lambda: None, owner: Any = None
        ) -> None:
            self._handle, self._size, self._free, self._owner = handle, size, free, owner

        handle = property(lambda self: self._handle)
        size = property(lambda self: self._size)

        @staticmethod
        def from_handle(ptr: int, size: int, mr: Any = None, owner: Any = None, *, stream: Any = None) -> "Buffer":
            return Buffer(ptr, size, owner=owner)

        def fill(self, value: int, *, stream: Any) -> None:
            where, size = self._handle, self._size
            stream._enqueue("set", lambda: ctypes.memset(where, value, size))

        def copy_from(self, src: "Buffer", *, stream: Any, options: Any = None) -> None:
            assert src.size == self._size, "cuda.core copies between buffers of one size"
            to, source, size = self._handle, src.handle, self._size
            stream._enqueue("copy in", lambda: ctypes.memmove(to, source, size))

        def copy_to(self, dst: "Buffer | None" = None, *, stream: Any, options: Any = None) -> "Buffer":
            assert dst is not None and dst.size == self._size
            to, source, size = dst.handle, self._handle, self._size
            stream._enqueue("copy out", lambda: ctypes.memmove(to, source, size))
            return dst

        def close(self, stream: Any = None) -> None:
            self._free()
            self._free = lambda: None

        def __del__(self) -> None:
            self._free()

    @like(cuda.core.LegacyPinnedMemoryResource)
    class LegacyPinnedMemoryResource:
        def allocate(self, size: int, *, stream: Any = None) -> Buffer:
            address = fake.keep(fake.pinned, size)
            return Buffer(address, size, lambda: fake.pinned.pop(address))

    @like(cuda.core.graph.Graph)
    class Graph:
        def __init__(self, actions: list[Callable[[], object]]) -> None:
            fake.graphs += 1
            self._actions = actions

        def launch(self, stream: Any) -> None:
            stream._enqueue("launch", lambda: [act() for act in self._actions])

        def close(self) -> None:
            fake.graphs -= 1
            fake.log.append("destroy")

    @like(cuda.core.graph.GraphBuilder)
    class GraphBuilder:
        _actions: list[Callable[[], object]] | None = None

        def begin_building(self, mode: str | None = "relaxed") -> "GraphBuilder":
            assert mode == "thread_local"
            fake.log.append("begin")
            fake.fail("begin_building")
            fake.recording = []
            return self

        def end_building(self) -> "GraphBuilder":
            fake.log.append("end")
            self._actions, fake.recording = fake.recording, None
            fake.fail("end_building")
            return self

        def complete(self, options: Any = None) -> Graph:
            fake.fail("complete")
            assert self._actions is not None, "it has not ended building"
            return Graph(self._actions)

        def close(self) -> None:
            if fake.recording is not None:
                fake.log.append("end")
                fake.recording = None

    @like(cuda.core.Stream)
    class Stream:
        handle = property(lambda self: 77)

        @staticmethod
        def from_handle(handle: int) -> "Stream":
            assert handle == 77
            return Stream()

        def sync(self) -> None:
            fake.wait("wait")

        def create_graph_builder(self) -> GraphBuilder:
            return GraphBuilder()

        def _enqueue(self, name: str, action: Callable[[], object]) -> None:
            fake.enqueue(name, action)

    @like(cuda.core.Device)
    class Device:
        name = property(lambda self: "NVIDIA Fake")
        compute_capability = property(lambda self: SimpleNamespace(major=fake.capability[0], minor=fake.capability[1]))

        @staticmethod
        def get_all_devices() -> "tuple[Device, ...]":
            return (Device(),) * fake.count

        def set_current(self, ctx: Any = None) -> None:
            fake.log.append("current")

        def create_stream(self, obj: Any = None, options: Any = None) -> Stream:
            assert options.nonblocking
            return Stream()

        def allocate(self, size: int, *, stream: Any) -> Buffer:
            fake.allocated += size
            if fake.allocated > fake.limit:
                raise CUDAError("CUDA_ERROR_OUT_OF_MEMORY: out of memory")
            address = fake.keep(fake.memory, size)
            return Buffer(address, size, lambda: (fake.wait(), fake.memory.pop(address)))

    return {
        "Buffer": Buffer, "Device": Device, "Stream": Stream,
        "LegacyPinnedMemoryResource": LegacyPinnedMemoryResource,
    }  # fmt: skip
