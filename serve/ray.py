"""The service on a Ray cluster: doors that speak OpenAI's API, and behind them replicas that each own their engines.

    serve run himap_export.serve.ray:build_app bundle=/models/shapes replicas=2
    HIMAP_BUNDLE=/models/shapes serve build himap_export.serve.ray:app -o serve.yaml

Deployments of Ray Serve, and nothing else of it. Every node needs this package, and the bundle at the same path.
"""

import argparse
import asyncio
import math
import os
import sys
import time
from collections.abc import AsyncGenerator
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from himap_export.engines.answer import Request
from himap_export.engines.cli import open_bundle
from himap_export.engines.extras import missing_extra
from himap_export.engines.processor import load_processor
from himap_export.graphs.errors import Exit, HimapError
from himap_export.serve import MODEL_NAME
from himap_export.serve.cli import service_of, watched_service_of
from himap_export.serve.messages import Ended, Event, Question
from himap_export.serve.remote import Asked, Lost, RemoteService
from himap_export.serve.scheduler import key_of
from himap_export.serve.service import Draining, QueueFull, Service

try:
    from ray import serve
    from ray.exceptions import RayError, RayTaskError
    from ray.serve.exceptions import DeploymentUnavailableError
    from ray.serve.handle import DeploymentHandle
except ModuleNotFoundError as problem:
    raise missing_extra(problem) or problem from None

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field  # Ray Serve's own

LOOK_S = 2.0  # between two looks at a replica's health
CALLS = 4  # to a replica beside its questions: whether it is there
AT_THE_DOOR = 10_000  # requests that a door may have open; how many questions it takes in, it says itself


def _listed(given: object) -> object:
    """On command lines and in the environment, a list is text."""
    return [word for word in given.split(",") if word] if isinstance(given, str) else given


Words = Annotated[list[str], BeforeValidator(_listed)]
Place = Annotated[Path, AfterValidator(Path.absolute)]  # other nodes work elsewhere
Count = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0)]


class Arguments(BaseModel, extra="forbid", frozen=True):
    """What `build_app` takes, and `app` finds in the environment as HIMAP_BUNDLE, HIMAP_REPLICAS and so on.

    Of each replica Ray sets aside `cpus`, which are also its threads, and `gpus`; `doors` take in and prepare what
    the `replicas` answer. The rest are the options of `himap-serve`, by their names, for each replica and door.
    """

    bundle: Place
    replicas: Count = 1
    cpus: Count = 1
    gpus: Annotated[float, Field(ge=0)] = 0
    doors: Count = 1
    model_name: Annotated[str | None, Field(pattern=f"^{MODEL_NAME}$")] = None
    plan: Words = []
    backend: str | None = None
    device: str | None = None
    max_batch: Count | None = None
    max_queue: Count = 64
    prefills: Count = 1
    request_timeout: Seconds = 300
    drain_timeout: Seconds = 60
    api_key_file: Place | None = None
    max_image_bytes: Count | None = None
    max_image_pixels: Count | None = None
    allow_image_host: Words = []
    log_prompts: bool = False
    weights: Annotated[list[Place], BeforeValidator(_listed)] = []
    expect_sha256: str | None = None
    no_verify: bool = False

    def as_options(self, **others: object) -> argparse.Namespace:
        """Returns what himap-serve's command line would say, but for `others`."""
        return argparse.Namespace(**self.model_dump() | {"threads": self.cpus} | others)


class Engine:
    """A replica: a service and its engines, which takes in as many questions as Ray sends at a time, `most`.

    HimapError for another bundle than the one of `digest`.
    """

    def __init__(self, arguments: Arguments, digest: str, most: int) -> None:
        options = arguments.as_options(expect_sha256=digest, max_queue=most)
        bundle = open_bundle("himap-serve", options)
        self._processors = {name: load_processor(bundle, image) for name, image in bundle.manifest.images.items()}
        self._service = service_of(options, bundle, Service)
        self._specs = {key_of(spec): spec for spec in self._service.variants}
        self._service.open()

    async def answer(self, asked: Asked) -> AsyncGenerator[list[Event], None]:
        """Yields what came of a question since the last time; it is cancelled if nobody reads on."""
        loop, events, now = asyncio.get_running_loop(), asyncio.Queue[Event](), time.monotonic()
        question = Question(
            asked.id, asked.model, self._request(asked), max_new_tokens=asked.max_new_tokens, asked=now,
            sampling=asked.sampling, stop=asked.stop, deadline=now + asked.seconds,
        )  # fmt: skip

        def deliver(event: Event) -> None:
            loop.call_soon_threadsafe(events.put_nowait, event)

        try:
            cancel = self._service.submit(question, deliver)
        except (QueueFull, Draining) as problem:
            yield [Ended("error", 0, time.monotonic(), problem=problem)]
            return
        try:
            came = list[Event]()
            while not (came and isinstance(came[-1], Ended)):
                came = [await events.get()]
                came += [events.get_nowait() for _ in range(events.qsize())]
                yield came
        finally:
            cancel()

    def _request(self, asked: Asked) -> Request:
        spec = self._specs[asked.variant]
        return Request(asked.inputs, spec, processor=self._processors[spec.variant.image])

    async def ping(self) -> None:
        """Returns, which is all that is asked."""

    def check_health(self) -> None:
        """Raises HimapError where the engines stand still: Ray then puts another replica in this one's place."""
        if not self._service.ready:
            raise HimapError("the engines do not answer")


class Handle:
    """Replicas by Ray Serve's handle, which spreads questions over those that live."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._answer, self._ping = handle.answer.options(stream=True), handle.ping

    async def answer(self, asked: Asked) -> AsyncGenerator[Event, None]:
        """Yields a replica's events; Lost if it is gone."""
        answer = self._answer.remote(asked)
        try:
            async for events in answer:
                for event in events:
                    yield event
        except RayTaskError:  # what a replica raised itself
            raise
        except (RayError, DeploymentUnavailableError) as problem:
            raise Lost(type(problem).__name__) from problem
        finally:
            answer.cancel()

    async def ping(self) -> None:
        """Waits for a replica's word; Lost if there is none."""
        try:
            await self._ping.remote()
        except (RayError, DeploymentUnavailableError) as problem:
            raise Lost(type(problem).__name__) from problem


class Door:
    """The OpenAI door, over the replicas that `handle` leads to, of which each has `rows` slots."""

    def __init__(self, handle: DeploymentHandle, arguments: Arguments, digest: str, rows: int) -> None:
        self._options = arguments.as_options(expect_sha256=digest, no_verify=True)  # it reads only the tokenizer
        share = arguments.replicas / arguments.doors
        bounds = {"slots": math.ceil(rows * share), "queue": math.ceil(arguments.max_queue * share)}
        self._make = partial(RemoteService, replicas=Handle(handle), **bounds)

    def __serve_build_asgi_app__(self) -> Any:
        """What `serve.ingress` asks for, when the door is made."""
        from himap_export.serve.app import make_app
        from himap_export.serve.logs import RequestLog

        log = RequestLog(sys.stderr, self._options.log_prompts)
        service, options = watched_service_of(self._options, open_bundle("himap-serve", self._options), log, self._make)
        self._service = service
        return make_app(service, options)

    async def check_health(self) -> None:
        """Looks for replicas; that there are none is not this door's fault, and no reason to replace it."""
        await self._service.look()


def build_app(arguments: Arguments) -> serve.Application:
    """Returns the deployments Door and Engine. HimapError if the bundle does not lie here as on every node."""
    options = arguments.as_options(no_verify=True)
    bundle = open_bundle("himap-serve", options)
    most = arguments.max_batch or math.inf
    rows = sum(min(spec.budget.slots or 1, most) for spec in service_of(options, bundle, Service).variants)
    common = {
        "graceful_shutdown_timeout_s": arguments.drain_timeout, "health_check_period_s": LOOK_S,
        "logging_config": {"enable_access_log": False},
    }  # fmt: skip
    digest, most = bundle.manifest.digest, rows + arguments.max_queue + CALLS
    engine = serve.deployment(
        Engine, name="Engine", num_replicas=arguments.replicas, max_ongoing_requests=most,
        ray_actor_options={"num_cpus": arguments.cpus, "num_gpus": arguments.gpus}, **common,
    )  # fmt: skip
    door = serve.deployment(
        serve.ingress()(Door), name="Door", num_replicas=arguments.doors, max_ongoing_requests=AT_THE_DOOR,
        ray_actor_options={"num_cpus": 0.1}, **common,
    )  # fmt: skip
    return door.bind(engine.bind(arguments, digest, most), arguments, digest, rows)


def _environment() -> Arguments:
    named = {name: f"HIMAP_{name.upper()}" for name in Arguments.model_fields}
    if named["bundle"] not in os.environ:
        raise HimapError("HIMAP_BUNDLE is not set", hint="it names the bundle's folder on every node", code=Exit.USAGE)
    return Arguments.model_validate({name: os.environ[key] for name, key in named.items() if key in os.environ})


def __getattr__(name: str) -> Any:
    """Makes `app` when it is asked for, as only then the environment has to say of which bundle."""
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return build_app(_environment())
