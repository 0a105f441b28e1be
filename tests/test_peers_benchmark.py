"""The peers' benchmark without its peers: who is chosen, what workers and llama-bench answer, bars and the floor."""

import json
import sys
from pathlib import Path

import peer_bars
import peer_systems
import peers
import pytest
from commands import Workshop

from himap_export.engines.bundle import Bundle
from himap_export.graphs.errors import HimapError
from himap_export.graphs.quantization import linear_shapes
from himap_export.validate.speed.benchmark import Times

MODERN = "avx512f, amx_bf16"
WORKER = """
import sys
sys.path.insert(0, {workers!r})
from serving import clock, serve

def opened(task):
    print("libraries print")
    if task.pruned:
        raise ValueError("cannot\\nprune")
    return {{"prefill": lambda: clock(lambda: sum(range(task.prompt))), "decode": lambda: 0.25 / task.steps}}

serve(opened)
"""


def times(key: str, prefill: float, decode: float, opened: float = 1.0) -> Times:
    return Times(key, {"prefill": (prefill, prefill * 2), "decode": (decode, decode)}, 2**20, opened)


def results(*found: Times, features: str = MODERN, byte: float = 2e-11) -> peer_bars.Results:
    rounds = len(found[0].seconds["decode"]) if found else 0
    times = {t.name: t for t in found}
    return peer_bars.Results(times, {"llama-bf16": "not built"}, 2.0, 10**9, [byte] * rounds, features)


def found(told: peer_bars.Results) -> dict[str, peer_bars.Verdict]:
    return {verdict.what: verdict for verdict in peer_bars.verdicts(told)}


def test_systems_are_chosen_by_pattern() -> None:
    assert peers.chosen([]) == list(peer_systems.SYSTEMS)
    assert [s.key for s in peers.chosen(["torch-*", "ours-ov-bf16"])] == ["ours-ov-bf16", "torch-fp32", "torch-bf16"]
    with pytest.raises(HimapError, match="no system is called triton") as raised:
        peers.chosen(["torch-*", "triton"])
    assert "llama-bf16" in raised.value.details


def test_every_bar_names_systems_that_there_are_and_every_peer_is_in_one() -> None:
    keys = {system.key for system in peer_systems.SYSTEMS}
    named = {key for bar in peer_bars.BARS for key in (bar.fast, bar.slow)} | set(peer_bars.LOADED)
    assert named <= keys and len(keys) == len(peer_systems.SYSTEMS)
    decoded = {bar.slow for bar in peer_bars.BARS if bar.phase == "decode"}
    assert {s.key for s in peer_systems.SYSTEMS if s.kind != "ours"} - decoded == {"qwen-bf16"}  # CDPruner's baseline


def test_bars_are_met_or_not_by_ratios_within_a_round() -> None:
    told = found(results(times("ours-ov-bf16", 0.1, 0.03, 3.5), times("torch-bf16", 0.35, 0.02)))
    torch = told["prefill, ours-ov-bf16 over torch-bf16"]
    assert torch.met and torch.line() == (
        "met             prefill, ours-ov-bf16 over torch-bf16: 3.50x (3.50 to 3.50), the bar is 3"
    )
    assert told["decode, ours-ov-bf16 over torch-bf16"].met is False
    assert told["decode, ours-ov-bf16"].met is False and "1.50x the memory floor (1.50 to 1.50)" in (
        told["decode, ours-ov-bf16"].found
    )
    assert told["second opening, ours-ov-bf16"].met is False
    assert told["prefill, ours-ov-bf16 over llama-bf16"].found == "llama-bf16: not built"
    assert told["prefill, ours-ov-fp32 over torch-fp32"].found == "ours-ov-fp32: not chosen"


def test_small_weights_have_bars_in_each_backend() -> None:
    """The head of both sides is quantised where peers are beside us."""
    ran = [times("ours-ort-fp32", 1.0, 0.05), times("llama-q4_0", 2.0, 0.02), times("ours-ort-int4", 1.05, 0.02)]
    ran += [times("ours-ort-int4-head", 1.2, 0.019), times("ours-ort-int4-head-unpruned", 2.3, 0.02)]
    told = found(results(*ran))
    assert (
        told["decode, ours-ort-int4 over ours-ort-fp32"].met and told["decode, ours-ort-int4-head over llama-q4_0"].met
    )
    assert told["prefill, ours-ort-int4 over ours-ort-fp32"].met
    slow = told["prefill, ours-ort-int4-head over ours-ort-fp32"]
    assert slow.met is False and slow.found == "0.83x (0.83 to 0.83), the bar is 0.909"
    assert told["prefill, ours-ort-int4-head over ours-ort-int4-head-unpruned"].met
    assert told["decode, ours-ov-int4-head over genai-int4"].met is None


@pytest.mark.parametrize(("unpruned", "met"), [(0.195, True), (0.19, False)])
def test_the_ceiling_is_what_flops_promise(unpruned: float, met: bool) -> None:
    told = found(results(times("ours-ov-bf16", 0.1, 0.03), times("ours-ov-bf16-unpruned", unpruned, 0.03)))
    verdict = told["prefill, ours-ov-bf16 over ours-ov-bf16-unpruned"]
    assert verdict.met is met and "of the 2.00x that FLOPs promise" in verdict.found


def test_bars_of_bf16_do_not_apply_to_a_cpu_without_it() -> None:
    ran = [times(f"ours-ov-{dtype}", 0.1, 0.03) for dtype in ("bf16", "fp32")]
    ran += [times(f"torch-{dtype}", 0.3, 0.05) for dtype in ("bf16", "fp32")]
    told = found(results(*ran, features="avx2, avx512f"))
    assert all(verdict.met is None for what, verdict in told.items() if "bf16" in what)
    assert told["decode, ours-ov-bf16"].line() == (
        "does not apply  decode, ours-ov-bf16: this CPU has neither amx_bf16 nor avx512_bf16"
    )
    assert told["prefill, ours-ov-fp32 over torch-fp32"].met


def test_a_decode_step_reads_matrices_and_kept_keys_and_values(work: Workshop) -> None:
    run = Bundle.open(work.bundle("gqa2", "--k1", 1, "--k2", 3, "--r1", 0.5, "--r2", 0.5)).select()
    spec, budget = run.manifest.decoder, run.budget
    stored = run.graph("decode").weights.values()
    matrices = [t.shape for t in stored if len(t.shape) == 2]
    numbers = sum(a * b for a, b in matrices) - spec.vocab * spec.hidden  # the embedding: one row is read
    layers = (len(range(*edge)) for edge in _edges([cut.layer for cut in run.plan.cuts], spec.layers))
    cached = sum(n * 2 * spec.kv_heads * spec.head_dim * s for n, s in zip(layers, budget.total, strict=True))
    assert run.manifest.dtype == "fp32" and peer_bars.decode_bytes(run) == 4 * (numbers + budget.batch * cached)


@pytest.mark.parametrize(("flags", "bits"), [(("int4", "--block", 32), 4 + 32 / 32), (("int8",), 8)])
def test_a_decode_step_reads_quantised_matrices_as_they_are_stored(
    work: Workshop, flags: tuple[str | int, ...], bits: float
) -> None:
    """Scales are fp32, of 32 inputs or of all; the head and the caches stay what they are."""
    plan = ("--k1", 1, "--k2", 3, "--r1", 0.5, "--r2", 0.5)
    plain, small = (Bundle.open(work.bundle("mha", *plan, *more)).select() for more in ((), ("--quantize", *flags)))
    sizes = linear_shapes(small.manifest.decoder).items()
    layers = [shape for name, shape in sizes if name != "lm_head.weight"]
    outs, numbers = sum(out for out, _ in layers), sum(out * wide for out, wide in layers)
    scales = 0 if flags[0] == "int4" else 4 * outs
    saved = peer_bars.decode_bytes(plain) - peer_bars.decode_bytes(small)
    assert saved == 4 * numbers - numbers * bits / 8 - scales


def _edges(cuts: list[int], last: int) -> list[tuple[int, int]]:
    return list(zip([0, *cuts], [*cuts, last], strict=True))


def test_memory_is_read_at_more_than_a_gigabyte_a_second() -> None:
    assert 1e9 < 1 / peer_bars.reading(1, size=2**24)("decode") < 1e13


def test_a_worker_answers_in_lines_of_json(tmp_path: Path) -> None:
    program = tmp_path / "worker.py"
    program.write_text(WORKER.format(workers=str(peer_systems.WORKERS)))
    task = {"folder": str(tmp_path), "precision": "fp32", "threads": 1, "prompt": 9, "steps": 5}
    words = [sys.executable, str(program), json.dumps(task)]
    with peer_systems.worker("a peer", words, tmp_path / "log") as one:
        assert 0 < one.ask("prefill") < 1 and one.ask("decode") == 0.05
        assert 1e6 < one.ask(peer_systems.MEMORY) < 1e9 and 0 <= one.ask(peer_systems.OPENED) < 10
    assert "libraries print" in (tmp_path / "log").read_text()
    words[-1] = json.dumps(task | {"pruned": 62})
    with (
        pytest.raises(HimapError, match="a peer failed: ValueError: cannot prune"),
        peer_systems.worker("a peer", words, tmp_path / "log"),
    ):
        pass


def test_a_worker_that_dies_or_is_not_installed_is_an_error(tmp_path: Path) -> None:
    words = [sys.executable, "-c", "import os; os._exit(7)"]
    with (
        pytest.raises(HimapError, match="a peer died: exit code 7"),
        peer_systems.worker("a peer", words, tmp_path / "l"),
    ):
        pass
    with (
        pytest.raises(HimapError, match="make peers-env"),
        peer_systems.worker("a peer", [str(tmp_path / "python")], tmp_path / "l"),
    ):
        pass


def test_llama_bench_is_run_for_each_answer(tmp_path: Path) -> None:
    program = tmp_path / "llama-bench"
    body = (
        f"#!{sys.executable}\nimport json, sys, time\ntime.sleep(0.3)\ntokens = 746 if '-d' not in sys.argv else 16\n"
    )
    program.write_text(body + "print(json.dumps([{'argv': sys.argv, 'samples_ns': [tokens * 1_000_000]}]))\n")
    program.chmod(0o755)
    one = peer_systems.LlamaBench([str(program)], tmp_path / "log")
    assert one.ask("prefill") == 0.746 and one.ask("decode") == 0.001
    assert one.ask(peer_systems.OPENED) > 0 and one.ask(peer_systems.MEMORY) > 1e6
    program.write_text("#!/bin/sh\necho no such model >&2\nexit 3\n")
    with pytest.raises(HimapError, match="llama-bench failed: exit code 3"):
        one.ask("prefill")
    assert (tmp_path / "log").read_text() == "no such model\n"


def test_rounds_leave_out_warm_up_and_the_table_shows_the_spread() -> None:
    class Open:
        def __init__(self) -> None:
            self.asked: list[str] = []
            self.pid: int | None = None

        def ask(self, request: str) -> float:
            self.asked.append(request)
            return 3 * 2**20 if request == "memory" else len(self.asked) / 1000

    a, b = Open(), Open()
    systems, reader = {"a": peers.Opened("A", a, 1.5), "b": peers.Opened("B", b, 2.5)}, Open()
    told, read = peers.rounds(systems, reader, count=2, warm_up=1)
    assert reader.asked == ["decode"] * 3 and read == [0.002, 0.003]
    assert a.asked == b.asked == ["prefill"] * 3 + ["decode"] * 3 + ["memory"]
    assert told["a"].seconds == {"prefill": (0.002, 0.003), "decode": (0.005, 0.006)}
    _, line, _ = peers.table(told)
    assert line.split() == ["A", "2.5", "(2.0", "to", "3.0)", "5.5", "(5.0", "to", "6.0)", "3", "MiB", "1.50", "s"]


def test_nothing_more_is_opened_when_memory_is_short() -> None:
    peers.check_memory(4 * 2**30)
    assert peers.available_bytes() > 2**20
    with pytest.raises(HimapError, match=r"2\.0 GiB of memory are left beside the systems that are open: expected 3"):
        peers.check_memory(2 * 2**30)


def test_the_plot_is_a_picture_and_all_is_in_the_json(tmp_path: Path) -> None:
    told = results(times("ours-ov-bf16", 0.1, 0.03), times("torch-bf16", 0.35, 0.05))
    peers.plot(told.times, "a CPU", tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    json_ = json.loads(json.dumps(peers.results_json(told, "a CPU", 2)))
    assert json_["systems"]["torch-bf16"]["prefill"] == [0.35, 0.7] and json_["left_out"] == {"llama-bf16": "not built"}
    assert {bar["met"] for bar in json_["bars"]} == {True, False, None}
