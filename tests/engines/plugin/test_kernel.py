"""The plugin's kernel, run by Triton's interpreter on the CPU, against NumPy and against the standard operators."""

import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from typing import IO, Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from commands import blocked_python
from frames import give, give_integers, take
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from himap_export.engines.plugin.ptx import GatherShape
from himap_export.graphs.build import Frame
from himap_export.graphs.gather import top_k_gather
from himap_export.graphs.spec import Dtype

Floats = NDArray[np.float32]
INF, NAN = float("inf"), float("nan")
BITS = {"fp16": np.uint16, "bf16": np.uint16, "fp32": np.uint32}
UNTOUCHED = 0x5A5A  # what lies around and in the outputs before the launch
GUARD = 64  # elements around every buffer

# A process of its own: TRITON_INTERPRET acts when Triton is imported, on everything that imports it later.
CHILD = """
import functools, pickle, sys
import numpy as np
import torch
from triton.runtime import interpreter
from himap_export.engines.plugin.kernel import top_k_gather
from himap_export.engines.plugin.ptx import GatherShape, tiling

# The interpreter walks Triton's language again, to no effect, at each call of a device function: half of its time.
anew = interpreter._patch_lang
once = functools.cache(anew)
interpreter._patch_lang = lambda function: (anew if function.__name__ == "top_k_gather" else once)(function)

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
while True:
    try:
        guard, shape, buffers = pickle.load(sys.stdin.buffer)
    except EOFError:
        break
    shape = GatherShape(*shape)
    pointers = [torch.from_numpy(buffer)[guard:-guard] for buffer in buffers]
    for i in (0, 4):
        pointers[i] = pointers[i].view(DTYPES[shape.dtype])
    plan = tiling(shape)
    top_k_gather[plan.grid](*pointers, **plan.constants)
    pickle.dump(buffers[4:], sys.stdout.buffer)
    sys.stdout.buffer.flush()
"""


@dataclass
class Interpreter:
    requests: IO[bytes]
    replies: IO[bytes]

    def __call__(self, shape: GatherShape, *buffers: NDArray[Any]) -> list[NDArray[Any]]:
        pickle.dump((GUARD, astuple(shape), buffers), self.requests)
        self.requests.flush()
        outputs: list[NDArray[Any]] = pickle.load(self.replies)
        return outputs


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Interpreter]:
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command, pipe = [sys.executable, "-c", CHILD], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, env=environment) as child:
        assert child.stdin and child.stdout
        yield Interpreter(child.stdin, child.stdout)
        child.stdin.close()


def top_k(scores: Floats, keep: int) -> NDArray[np.int64]:
    """Indices [B,keep] of the best, ascending: of equals the lowest index first; NaN counts as -inf, the worst."""
    rank = np.where(np.isnan(scores), np.float32(-INF), scores)
    best: NDArray[np.int64] = np.sort(np.argsort(-rank, axis=1, kind="stable")[:, :keep], axis=1)
    return best


def guarded(array: NDArray[Any], around: Any) -> NDArray[Any]:
    return np.pad(array.reshape(-1), GUARD, constant_values=around)


def launch(
    interpreter: Interpreter, scores: Floats, keep: int, hidden: int, dtype: Dtype
) -> tuple[tuple[NDArray[Any], ...], tuple[NDArray[Any], ...]]:
    """(x, position, token_type) of random bits, and (y, kept_position, kept_type); writes elsewhere are refused."""
    batch, tokens = scores.shape
    random = np.random.default_rng(tokens + keep)
    bits = BITS[dtype]
    x = random.integers(0, np.iinfo(bits).max, (batch, tokens, hidden), bits, endpoint=True)
    position, token_type = random.integers(-(1 << 62), 1 << 62, (2, batch, tokens))
    inputs = (
        guarded(x, 0),
        guarded(scores, INF),
        guarded(position, 0),
        guarded(token_type, 0),
    )  # reads outside would win
    shapes = ((batch, keep, hidden), bits), ((batch, keep), np.int64), ((batch, keep), np.int64)
    blank = (guarded(np.full(shape, UNTOUCHED, dtype), UNTOUCHED) for shape, dtype in shapes)
    outputs = interpreter(GatherShape(batch, tokens, keep, hidden, dtype), *inputs, *blank)
    for output in outputs:
        assert (output[:GUARD] == UNTOUCHED).all() and (output[-GUARD:] == UNTOUCHED).all()
    results = tuple(o[GUARD:-GUARD].reshape(shape) for o, (shape, _) in zip(outputs, shapes, strict=True))
    return (x, position, token_type), results


def check(interpreter: Interpreter, scores: Floats, keep: int, hidden: int = 3, dtype: Dtype = "fp16") -> None:
    """Bit for bit."""
    inputs, outputs = launch(interpreter, scores, keep, hidden, dtype)
    chosen = top_k(scores, keep)
    for given_, kept in zip(inputs, outputs, strict=True):
        index = chosen if given_.ndim == 2 else chosen[:, :, None]
        np.testing.assert_array_equal(kept, np.take_along_axis(given_, index, 1))


# Few distinct values, so that ties at the cut are the rule; some differ in the last bit only, or not at all (-0.0).
VALUES = (0.0, -0.0, 1.0, float(np.nextafter(np.float32(1), np.float32(2))), -1.0, 1e-45, -1e-45, 3e38, INF, -INF, NAN)


@st.composite
def cuts(draw: st.DrawFn) -> tuple[Floats, int]:
    batch, tokens = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 2, 5, 8, 13]))
    values = st.sampled_from(VALUES) if draw(st.booleans()) else st.floats(width=32)
    row = st.lists(values, min_size=tokens, max_size=tokens)
    scores = draw(st.lists(row, min_size=batch, max_size=batch))
    return np.array(scores, np.float32), draw(st.integers(1, tokens))


@given(cut=cuts(), hidden=st.sampled_from([1, 3, 8]), dtype=st.sampled_from(["fp16", "bf16", "fp32"]))
@example(cut=(np.zeros((2, 13), np.float32), 5), hidden=3, dtype="fp32")  # all equal
@example(cut=(np.full((1, 8), INF, np.float32), 3), hidden=3, dtype="fp16")
@example(cut=(np.full((1, 8), NAN, np.float32), 3), hidden=3, dtype="bf16")
@example(cut=(np.array([[NAN, -INF, NAN, -INF, 1]], np.float32), 3), hidden=3, dtype="fp32")
@example(cut=(np.array([[-NAN, -INF, -1, NAN, -3e38]], np.float32), 3), hidden=3, dtype="fp32")  # NaN of both signs
@example(cut=(np.array([[-0.0, 0.0, -0.0, 0.0]], np.float32), 2), hidden=3, dtype="fp32")  # equal, whatever their sign
@example(cut=(np.array([[0.0, -1e-45, -0.0, 1e-45]], np.float32), 2), hidden=3, dtype="fp32")  # subnormal, not zero
@settings(max_examples=12, deadline=None)
def test_keeps_what_the_numpy_oracle_keeps(
    interpreter: Interpreter, cut: tuple[Floats, int], hidden: int, dtype: Dtype
) -> None:
    check(interpreter, *cut, hidden, dtype)


def tied(batch: int, tokens: int, keep: int, always: int) -> Floats:
    """Scores in [0, 1) with one digit, so that the cut falls among equals; `always` of each row are infinite."""
    random = np.random.default_rng(keep)
    scores = random.random((batch, tokens), np.float32).round(1)
    for row in scores:
        row[random.permutation(tokens)[:always]] = INF
    ranked = np.sort(scores)[:, ::-1]
    assert keep in (1, tokens) or (ranked[:, keep - 1] == ranked[:, keep]).all()
    return scores


SLOW = pytest.mark.slow  # the interpreter takes half a minute for each


@pytest.mark.parametrize(
    ("keep", "dtype"),
    [(751, "fp16"), *(pytest.param(*case, marks=SLOW) for case in ((1, "fp16"), (376, "bf16"), (750, "fp32")))],
)
def test_a_stage_of_real_size(interpreter: Interpreter, keep: int, dtype: Dtype) -> None:
    """751 tokens, an odd number, of which 175 must stay; once two sequences, and rows of 1.5 blocks of columns."""
    batch, hidden = (2, 3072) if keep == 376 else (1, 5)
    check(interpreter, tied(batch, 751, keep, 175), keep, hidden, dtype)


@pytest.mark.parametrize(
    ("tokens", "keep"), [pytest.param(*case, marks=SLOW) for case in ((4097, 4000), (4096, 1000), (10000, 33))]
)
def test_long_prompts(interpreter: Interpreter, tokens: int, keep: int) -> None:
    check(interpreter, tied(1, tokens, keep, 7), keep)


@pytest.mark.parametrize("spread", [1e-3, 1e30])
def test_scores_without_ties(interpreter: Interpreter, spread: float) -> None:
    """The search ends early: at a threshold that is no token's key."""
    scores = np.random.default_rng(0).normal(0, spread, (1, 257)).astype(np.float32)
    check(interpreter, scores, 100, hidden=4)


def test_agrees_with_the_standard_operators(interpreter: Interpreter) -> None:
    batch, tokens, keep, hidden = 2, 61, 30, 7
    f = Frame("gather", "fp32")
    x, score = give(f, "x", (batch, tokens, hidden)), give(f, "score", (batch, tokens), ir.DataType.FLOAT)
    position, token_type = (give_integers(f, name, batch, tokens) for name in ("position", "token_type"))
    outputs = top_k_gather(f.op, x, score, position, token_type, keep)
    take(f, "y", outputs[0], (batch, keep, hidden))
    for name, value in (("kept", outputs[1]), ("kept_type", outputs[2])):
        take(f, name, value, (batch, keep), ir.DataType.INT64)
    session = onnxruntime.InferenceSession(ir.to_proto(f.finish().model).SerializeToString())

    scores = np.random.default_rng(0).choice(np.array(VALUES, np.float32), (batch, tokens))
    inputs, results = launch(interpreter, scores, keep, hidden, "fp32")
    feeds = {"x": inputs[0].view(np.float32), "score": scores, "position": inputs[1], "token_type": inputs[2]}
    y, kept, kept_type = session.run(None, feeds)
    for ours, theirs in zip(results, (y.view(np.uint32), kept, kept_type), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_the_statement_itself() -> None:
    """The rules, spelled out: what the other tests compare with."""
    cases = [([1, 3, 2, 3], [1, 3]), ([1, 1, 1], [0, 1]), ([NAN, -1e38, 0], [1, 2]), ([NAN, -INF, 0], [0, 2])]
    for scores, kept in [*cases, ([-0.0, 0.0, -0.0], [0, 1]), ([0.0, -0.0, 0.0], [0, 1])]:
        assert top_k(np.array([scores], np.float32), 2).tolist() == [kept]


def test_the_kernel_needs_no_torch() -> None:
    done = blocked_python("import himap_export.engines.plugin.kernel", ["torch"])
    assert done.returncode == 0, done.stderr
