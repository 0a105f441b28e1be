"""The plan as it is told: what a prompt shows the model, and what the KV caches take with and without the cuts."""

from typing import Any

import pytest

import himap_export as hx
from himap_export.exporter.report import plan_json, plan_table

TOLD: dict[str, tuple[str, dict[str, Any]]] = {
    "image 336x336: 576 tokens": ("llava-7b", {}),
    "2 images 336x336: 576 tokens each": ("llava-7b", {"images": 2}),
    "film of 16 frames 448x448: 128 tokens a frame, 256 tokens a second of film at 2 frames a second": (
        "qwen2.5-vl-7b", {"frames": 16},
    ),
}  # fmt: skip


@pytest.mark.parametrize("line", TOLD)
def test_the_table_says_what_a_prompt_shows(line: str) -> None:
    alias, asked = TOLD[line]
    planned = hx.plan(alias, backend="tensorrt-rtx", **asked)
    assert line in plan_table(planned).splitlines()
    image = plan_json(planned)["image"]
    assert image["images"] == asked.get("images", 1)
    film = image["film"]
    assert film is None or (film["frames"], film["steps"], film["fps"]) == (16, 8, 2)
    assert (film is None) == ("frames" not in asked)


@pytest.mark.parametrize(("images", "unpruned", "pruned"), [(1, 448, 232), (4, 1312, 448)])
def test_caches_before_and_after_pruning(images: int, unpruned: int, pruned: int) -> None:
    """LLaVA-7B in fp16: half a MiB a token in 32 layers; 192 text slots and 128 new tokens in all of them."""
    assert unpruned == 0.5 * (576 * images + 320)
    alive = (2 * 576 + 6 * 288 + 24 * 72) / 32 * images
    assert pruned == 0.5 * (alive + 320)
    planned = hx.plan("llava-7b", backend="tensorrt-rtx", images=images, r1=0.5, r2=0.75)
    assert plan_json(planned)["kv_cache"] == {"unpruned": unpruned * 2**20, "bytes": pruned * 2**20}
    whole = f"{unpruned / 1024:.2f} GiB" if unpruned > 1024 else f"{unpruned:.1f} MiB"
    assert f"   {whole} -> {pruned:.1f} MiB" in plan_table(planned)


def test_variants_say_how_many_images_they_are_for() -> None:
    planned = hx.plan("llava-7b", backend="tensorrt-rtx", images=(1, 2), policy=("himap", "none"))
    lines = plan_table(planned).splitlines()
    head, rows = lines[4], lines[6:]
    column = slice(head.index("images"), head.index("images") + len("images"))
    assert [row[column].strip() for row in rows] == ["1", "1", "2", "2"]
    assert [v["image"]["images"] for v in plan_json(planned)["variants"]] == [1, 1, 2, 2]
