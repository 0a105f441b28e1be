"""The model repository that is written, and its models over a stand-in; test_tritonserver.py has the real Triton."""

import py_compile
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import triton_stand_in as stand_in
from commands import QUESTIONS_64, call
from triton_stand_in import CorruptingTensor, Request, Sender, TritonError, model_args

from himap_export.engines.backends import Opening
from himap_export.engines.bundle import Bundle
from himap_export.graphs.errors import HimapError
from himap_export.serve.cli import main as serve_main
from himap_export.serve.service import Draining, Settings
from himap_export.serve.triton import batching, streaming
from himap_export.serve.triton.repository import write_repository

LETTER, QUESTION = QUESTIONS_64.parent / "letter.png", "which letter is in the yellow box?"
COUNT, OTHER = QUESTIONS_64.parent / "count.png", "how many circles?"
FILES = [
    "README.md",
    "shapes-batch/1/model.py",
    "shapes-batch/config.pbtxt",
    "shapes-stream/1/model.py",
    "shapes-stream/config.pbtxt",
]


@pytest.fixture(scope="module")
def utils() -> Iterator[Any]:
    """What `import triton_python_backend_utils` finds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "triton_python_backend_utils", module := stand_in.backend())
        yield module


@pytest.fixture(scope="module")
def models(shapes: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("triton") / "new" / 'mo"d\\els ü'
    settings = Settings(max_queue=8)
    write_repository(
        shapes, folder, name="shapes", plans=("himap", "none"), opening=Opening(threads=1), settings=settings
    )
    return folder


@pytest.fixture(scope="module")
def stream(models: Path, utils: Any) -> Iterator[streaming.TritonPythonModel]:
    model = streaming.TritonPythonModel()
    model.initialize(model_args(models / "shapes-stream" / "config.pbtxt"))
    yield model
    model.finalize()


def request(image: Path | bytes = LETTER, prompt: str = QUESTION, **more: Any) -> Request:
    """A request of the model that streams: one question, and inputs by name."""
    content = image if isinstance(image, bytes) else image.read_bytes()
    inputs = {"PROMPT": np.array([prompt.encode()], object), "IMAGE": np.frombuffer(content, np.uint8)}
    dtypes = {"MAX_NEW_TOKENS": np.int32, "TEMPERATURE": np.float32, "TOP_P": np.float32, "SEED": np.uint32}
    made = {name: np.array([value], dtypes.get(name, object)) for name, value in more.items() if name.isupper()}
    return Request(inputs | made, **{name: value for name, value in more.items() if name.islower()})


def answered(sender: Sender) -> str:
    """The answer, when its last response has come; that and no other says how it ended."""
    assert sender.final.wait(20)
    *pieces, last = sender.sent
    assert last.error is None and all(piece.output("FINISH_REASON") is None for piece in pieces)
    return "".join(text for piece in sender.sent for text in piece.output("TEXT") or [])


def refused(sender: Sender) -> TritonError:
    assert sender.final.wait(20)
    error = sender.sent[-1].error
    assert error is not None and "\n" not in error.message
    return error


def test_the_repository_is_whole_and_says_what_was_asked(models: Path, shapes: Bundle) -> None:
    assert sorted(str(path.relative_to(models)) for path in models.rglob("*") if path.is_file()) == FILES
    assert [path.name for path in models.parent.iterdir()] == [models.name]  # nothing is left beside it
    for kind in ("stream", "batch"):
        py_compile.compile(str(models / f"shapes-{kind}" / "1" / "model.py"), doraise=True)
    batch = (models / "shapes-batch" / "config.pbtxt").read_text()
    assert (
        f"max_batch_size: {shapes.select().budget.slots}\n" in batch
        and "max_queue_size: 8" in batch
        and "decoupled" not in batch
    )
    assert "decoupled: true" in (models / "shapes-stream" / "config.pbtxt").read_text()
    readme = (models / "README.md").read_text()
    assert str(shapes.folder) in readme and "shapes-stream/generate_stream" in readme and "qa, none" in readme
    (mounts,) = re.findall(r"^ +(-v .*) \\$", readme, re.M)
    place = shapes.folder.resolve()
    assert shlex.split(mounts) == ["-v", f"{models}:/models:ro", "-v", f"{place}:{place}:ro"]
    (example,) = re.findall(r"```python\n(.*?)```", readme, re.S)
    compile(example, "README.md", "exec")


def test_nothing_of_the_users_is_touched(models: Path, shapes: Bundle, several: Bundle, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in models.rglob("*") if path.is_file()}
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    for place in (models, tmp_path, tmp_path / "file", tmp_path / "link", shapes.folder / "in", tmp_path / ("x" * 300)):
        with pytest.raises(HimapError, match="cannot"):
            write_repository(shapes, place, name="shapes")
    for name in ("", "a b", "../up"):
        with pytest.raises(HimapError, match="cannot have this name"):
            write_repository(shapes, tmp_path / "new", name=name)
    with pytest.raises(HimapError, match="holds no plan nix"):
        write_repository(shapes, tmp_path / "new", name="shapes", plans=("nix",))
    with pytest.raises(HimapError, match="takes no prompt of one image: its plan qa is for 2 or 3"):
        write_repository(several, tmp_path / "new", name="shapes")
    assert {path: path.read_bytes() for path in models.rglob("*") if path.is_file()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link"]


def test_a_full_disk_leaves_nothing(shapes: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, *_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(HimapError, match="No space left"):
        write_repository(shapes, tmp_path / "a" / "b", name="shapes")
    assert not any(tmp_path.iterdir())


def test_the_command_writes_one(shapes: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    words = [shapes.folder, "--triton", tmp_path / "empty", "--plan", "none", "--max-batch", 2, "--model-name", "mine"]
    assert call(serve_main, *words) == 0
    assert "README.md says how" in capsys.readouterr().out
    config = (tmp_path / "empty" / "mine-batch" / "config.pbtxt").read_text()
    assert "max_batch_size: 2" in config and '"[\\"none\\"]"' in config
    assert call(serve_main, *words) == 2
    assert "it is not empty" in capsys.readouterr().err


def test_answers_are_the_sessions(shapes: Bundle, stream: streaming.TritonPythonModel) -> None:
    for plan in ("qa", "none"):
        with shapes.session(plan=plan, threads=1) as session:
            for image, prompt in ((LETTER, QUESTION), (COUNT, OTHER)):
                stream.execute([asked := request(image, prompt, PLAN=plan.encode())])
                assert answered(asked.sender) == session.ask(image, prompt).text
                last = asked.sender.sent[-1]
                assert last.output("FINISH_REASON") == ["stop"]
                assert last.output("IMAGE_TOKENS_KEPT") == [*shapes.select(plan).budget.visual]


def test_answers_stream_side_by_side_as_alone(stream: streaming.TritonPythonModel) -> None:
    def asked() -> list[Request]:
        return [request(TEMPERATURE=50.0, SEED=seed, TOP_P=0.9, MAX_NEW_TOKENS=9) for seed in range(7)]

    stream.execute(together := asked())
    texts = [answered(sent.sender) for sent in together]
    for text, alone in zip(texts, asked(), strict=True):
        stream.execute([alone])
        assert answered(alone.sender) == text
    assert len(set(texts)) == 7 and any(len(sent.sender.sent) > 5 for sent in together)


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (request(b"no image"), "not an image that is PNG, JPEG: IMAGE"),
        (request(b""), "not an image"),
        (request(LETTER.read_bytes()[:90]), "image is damaged: IMAGE"),
        (request(prompt="what " * 99), "text tokens: the budget is"),
        (request(PLAN=b"non"), "there is no plan non: there are qa, none; did you mean none?"),
        (request(MAX_NEW_TOKENS=99), "MAX_NEW_TOKENS is 99: the bundle's budget allows 1 to"),
        (request(MAX_NEW_TOKENS=0), "MAX_NEW_TOKENS is 0"),
        (request(TEMPERATURE=np.nan), "temperature nan"),
        (request(TOP_P=0.0), "top_p 0.0 is outside"),
        (request(PLAN=b"\xff"), "PLAN is no UTF-8"),
    ],
)
def test_what_cannot_be_answered_is_one_line(stream: streaming.TritonPythonModel, bad: Request, said: str) -> None:
    stream.execute([bad, good := request()])
    error = refused(bad.sender)
    assert error.code == TritonError.INVALID_ARG and said in error.message
    assert answered(good.sender) == "C"


def test_who_left_is_cancelled_waiting_or_not(stream: streaming.TritonPythonModel, utils: Any) -> None:
    endless = {"TEMPERATURE": 50.0, "SEED": 3}
    running = [request(**endless, cancelled=lambda: True) for _ in range(4)]
    waiting = [request(**endless, cancelled=lambda: True), request(**endless, timeout_us=1)]
    stream.execute([*running, *waiting])
    for sent in (*running, *waiting):
        assert refused(sent.sender).code == TritonError.CANCELLED
    assert "timeout has passed after 0 tokens" in refused(waiting[1].sender).message
    assert sum("cancelled" in line for line in utils.logged) == 5


def test_a_full_queue_and_a_closed_service_are_unavailable(
    stream: streaming.TritonPythonModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [request(TEMPERATURE=50.0, SEED=n) for n in range(40)]
    stream.execute(requests)
    assert all(sent.sender.final.wait(20) for sent in requests)
    errors = [sent.sender.sent[-1].error for sent in requests]
    assert {error.code for error in errors if error} == {TritonError.UNAVAILABLE} and errors.count(None) >= 8

    def closed(*_: Any) -> None:
        raise Draining("the server takes no questions now")

    monkeypatch.setattr(stream._service, "submit", closed)
    stream.execute([late := request()])
    assert refused(late.sender).code == TritonError.UNAVAILABLE


def test_a_bug_is_told_and_its_traceback_logged(
    stream: streaming.TritonPythonModel, utils: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(stream._service, "prepare", lambda *_: 1 // 0)
        stream.execute([bad := request()])
    assert refused(bad.sender) == TritonError("a bug: ZeroDivisionError", TritonError.INTERNAL)
    assert "1 // 0" in utils.logged[-1]
    with monkeypatch.context() as patch:  # one reply that cannot be sent holds up no other
        broken = request()
        patch.setattr(broken.sender, "send", lambda *_, **__: 1 // 0)
        stream.execute([broken, good := request()])
        assert answered(good.sender) == "C"


def test_a_batch_is_answered_whole(models: Path, shapes: Bundle, utils: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = batching.TritonPythonModel()
    model.initialize(model_args(models / "shapes-batch" / "config.pbtxt"))
    one, two = LETTER.read_bytes(), COUNT.read_bytes()
    files = np.zeros((2, max(len(one), len(two))), np.uint8)
    for row, content in zip(files, (one, two), strict=True):
        row[: len(content)] = np.frombuffer(content, np.uint8)
    rows = Request(
        {
            "PROMPT": np.array([[QUESTION.encode()], [OTHER.encode()]], object),
            "IMAGE": files,
            "PLAN": np.array([[b"qa"], [b"none"]], object),
        }
    )
    late = request(TEMPERATURE=50.0, SEED=3, timeout_us=1)
    gone = request(TEMPERATURE=50.0, SEED=3, cancelled=lambda: True)
    found = model.execute([request(), request(b"no image"), rows, late])
    assert [said.error and said.error.code for said in found] == [
        None, TritonError.INVALID_ARG, None, TritonError.CANCELLED,
    ]  # fmt: skip
    with shapes.session(plan="none", threads=1) as session:
        assert found[2].output("TEXT") == ["C", session.ask(COUNT, OTHER).text]
    assert found[0].output("TEXT") == ["C"] and found[2].output("FINISH_REASON") == ["stop", "stop"]
    pruned, whole = (list(shapes.select(plan).budget.visual) for plan in ("qa", "none"))
    assert found[2].output("IMAGE_TOKENS_KEPT") == [pruned, whole + [-1] * (len(pruned) - 1)]
    monkeypatch.setattr(batching, "POLL_S", 0.0)
    (left,) = model.execute([gone])
    assert left.error is not None and left.error.code == TritonError.CANCELLED
    model.finalize()


def test_a_stub_that_corrupts_arrays_is_refused(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", stand_in.backend(CorruptingTensor))
    with pytest.raises(HimapError, match=r"\[0, 1, 2, 3\] comes back \[0, 0, 0, 0\] \(use Triton 24.11"):
        streaming.TritonPythonModel().initialize(model_args(models / "shapes-stream" / "config.pbtxt"))
