"""Engines at real size: one alias is really built, without weights and over quantised ones; the table of all goes
between its marks, and nothing else is touched."""

import json
import re
from pathlib import Path

import engines_only
import ml_dtypes
import numpy as np
import pytest
import quantised_engines
from commands import call

from himap_export.exporter.aliases import ALIASES
from himap_export.exporter.cli import main as export_main
from himap_export.exporter.planning import Request, plan_export
from himap_export.exporter.registry import resolve
from himap_export.graphs.ports import ElementType, WeightSpec

PUBLISHED = [name for name, alias in ALIASES.items() if alias.config]


def test_the_table_goes_between_the_marks(tmp_path: Path) -> None:
    docs = tmp_path / "models.md"
    docs.write_text(f"above\n{engines_only.MARKS[0]}\nold\n{engines_only.MARKS[1]}\nbelow\n")
    built = engines_only.Built("a", "b/c", "fp16", "4x4", 16, (16, 8, 2), 0.5, 12.34, 1 << 30, 5_000_000)
    engines_only.insert(docs, engines_only.table([built]))
    lines = docs.read_text().splitlines()
    assert lines[0] == "above" and lines[-1] == "below" and "old" not in lines
    assert "| `a` | b/c | fp16 | 4x4 | 16 | 16 → 8 → 2 | 50.0% | 12.3 | 1.00 GiB | 5 MB |" in lines
    docs.write_text("no marks")
    with pytest.raises(SystemExit):
        engines_only.insert(docs, "table")
    assert docs.read_text() == "no marks"


def test_the_docs_table_lists_every_alias() -> None:
    docs = (Path(__file__).parents[1] / "docs" / "models.md").read_text()
    assert [f"| `{name}` |" in docs for name in PUBLISHED] == [True] * len(PUBLISHED)


@pytest.mark.parametrize(
    ("alias", "more", "row"),
    [
        ("llava-7b", (("--images", "4"),), ("4 images 336x336", 576)),
        ("qwen2.5-vl-7b", (("--frames", "16"),), ("film of 16 frames 448x448", 128)),
        ("smolvlm2-500m", (("--frames", "16", "--text-budget", "384"),), ("film of 16 frames 2048x2048", 64)),
        ("internvl3-2b", (), None),
    ],
)
def test_what_else_is_built_of_an_alias(
    alias: str, more: tuple[tuple[str, ...], ...], row: object, capsys: pytest.CaptureFixture[str]
) -> None:
    """And how its row tells what the command says of it."""
    assert tuple(engines_only.options(alias)) == ((), *more)
    for asked in more:
        assert call(export_main, alias, "--backend", "tensorrt-rtx", *asked, "--dry-run", "--json") == 0
        assert engines_only.seen(json.loads(capsys.readouterr().out)["image"]) == row


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_alias_plans_without_network_or_weights(name: str) -> None:
    """Budgets, FLOPs and dtype of the published sizes; parameters add up to what the model's name says."""
    planned = plan_export(resolve(name, weights=False), Request())
    s, v = planned.decoder, planned.variants[0]
    assert v.budget.visual[0] == v.vision.tokens and 0.1 < planned.ratios(v)[0] < 0.6
    attention = s.hidden * s.head_dim * 2 * (s.heads + s.kv_heads)
    head = s.vocab * s.hidden * (1 if planned.model.family.tied else 2)
    parameters = s.layers * (attention + 3 * s.hidden * s.ffn) + head
    size = re.search(r"-([\d.]+)([bm])", name)
    billions = float(size[1]) / {"b": 1, "m": 1000}[size[2]] if size else 7.7  # Qwen-VL-Chat's language model
    # A name counts the tower in and rounds: 1B is 0.63 and a tower of 0.3, 3B is 3.09, 4B is 4.02.
    assert 0.6 * billions < parameters / 1e9 < 1.15 * billions, parameters / 1e9
    json.dumps(planned.model.family.fields)


@pytest.mark.slow
def test_one_alias_is_built(tmp_path: Path) -> None:
    built = engines_only.build("internvl3-1b", tmp_path / "bundle")
    assert built.tokens == (256, 128, 32) and built.seconds > 1 and built.peak > 1 << 28 and built.size < 200e6


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32", "int8", "int4", "fp8", "fp4"])
def test_drawn_weights_fill_their_bytes_and_are_numbers(dtype: ElementType) -> None:
    """In pieces, as they are drawn; E4M3 has two codes that are none."""
    spec = WeightSpec(dtype, (6, 10))
    raw = b"".join(piece.tobytes() for piece in quantised_engines.drawn(spec, np.random.default_rng(0)))
    assert len(raw) == {"fp16": 120, "bf16": 120, "fp32": 240, "int4": 30, "fp4": 30}.get(dtype, 60)
    kinds = {"fp16": np.float16, "bf16": ml_dtypes.bfloat16, "fp32": np.float32, "fp8": ml_dtypes.float8_e4m3fn}
    numbers = np.frombuffer(raw, kinds.get(dtype, np.int8)).astype(np.float32)
    assert np.isfinite(numbers).all() and len(set(numbers)) > 10
    assert dtype not in ("fp16", "bf16", "fp32") or (numbers.min() >= 1 and numbers.max() < 2)


@pytest.mark.slow
def test_a_decode_graph_of_quantised_weights_is_built(tmp_path: Path) -> None:
    built = quantised_engines.build("internvl3-1b", "int4", 128, 9, tmp_path)
    assert built.linears == 63 and built.block == 128 and built.engine > 0.98 * built.weights
    assert (
        sum(int(kernel.partition("x ")[0]) for kernel in built.products) == 36
    )  # q, k, v are joined; gate, up as well
    assert "63 linear layers in 36x" in quantised_engines.told(built)
