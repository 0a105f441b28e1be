"""A checkpoint names Hugging Face ids and folders inside its own; other folders only the user does."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from himap_export.exporter import registry
from himap_export.exporter.aliases import ALIASES
from himap_export.exporter.registry import resolve
from himap_export.graphs.errors import Exit, HimapError
from himap_export.validate.accuracy.prompter import prompter_of_checkpoint
from himap_export.validate.checkpoint import checkpoint_folder, load_reference
from himap_export.validate.reference.legacy.llava_original import load

RELEASE = Path(__file__).parents[1] / "fixtures/internvl-v1-tiny"
TOWER = "vision_tower_intern_vit_6b"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(RELEASE, tmp_path / "model", ignore=shutil.ignore_patterns("*.npz")))


def name_tower(model: Path, named: str) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"mm_vision_tower": named}))


def test_a_folder_inside_the_checkpoint_is_its_tower(model: Path) -> None:
    for named in (f"./{TOWER}", TOWER, f"nowhere/../{TOWER}", f"{TOWER}/."):
        name_tower(model, named)
        found = resolve(str(model))
        assert found.tower is not None and found.tower.samefile(model / TOWER)
        assert found.family.fields["vision_config"]["model_type"] == "intern_vit_6b"


@pytest.fixture
def elsewhere(model: Path, tmp_path: Path) -> Path:
    """The tower, moved out of the checkpoint to where a path would find it."""
    return Path(shutil.move(model / TOWER, tmp_path / "private" / "tower"))


PATHS = {
    "absolute": lambda tower, model: str(tower),
    "upwards": lambda tower, model: os.path.relpath(tower, model),
    "from here": lambda tower, model: os.path.relpath(tower, tower.parents[2]),
    "upwards from inside": lambda tower, model: f"x/../../{tower.parent.name}/{tower.name}",
    "a link that leads out": lambda tower, model: link(model / "linked", tower),
    "itself": lambda tower, model: ".",
    "a name of 300 letters": lambda tower, model: "t" * 300,
    "a null byte": lambda tower, model: "a\x00b",
    "a loop": lambda tower, model: link(model / "loop", Path("loop")),
}


def link(place: Path, to: Path) -> str:
    place.symlink_to(to)
    return f"./{place.name}"


@pytest.mark.parametrize("case", PATHS)
def test_no_checkpoint_names_a_folder_elsewhere(
    case: str, model: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(elsewhere.parents[2])  # from where a path of three names leads to it
    named = PATHS[case](elsewhere, model)
    name_tower(model, named)
    with pytest.raises(HimapError) as caught:
        resolve(str(model))
    said = str(caught.value)
    assert caught.value.code == Exit.MISSING and "\n" not in said
    assert "`vision_tower` DIR" in said and named[:100] in said
    with pytest.raises((OSError, ValueError)):  # the reference's own rule
        load(model, torch.float32, "eager", "eager")


def test_a_name_with_one_slash_is_the_hubs_even_if_such_a_folder_is_here(
    model: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(elsewhere.parent.parent)
    name_tower(model, "private/tower")
    asked: list[str] = []
    monkeypatch.setattr(registry, "_download", lambda source, *_: asked.append(source) or elsewhere)
    assert resolve(str(model)).tower == elsewhere and asked == ["private/tower"]
    with pytest.raises(OSError, match="private/tower is neither a folder"):
        load(model, torch.float32, "eager", "eager")


def test_the_user_says_where_the_tower_is(model: Path, elsewhere: Path) -> None:
    name_tower(model, "/authors/machine/tower")
    found = resolve(str(model), vision_tower=elsewhere)
    assert found.tower == elsewhere and found.family.fields["vision_config"]["hidden_size"] == 64
    assert checkpoint_folder(str(model), elsewhere) == model
    reference = load_reference(model, "fp32", 1, vision_tower=elsewhere)
    assert reference.layers == 8
    with pytest.raises(HimapError, match="neither a folder"):
        load_reference(model, "fp32", 1)
    with pytest.raises(HimapError, match="holds no tokenizer"):  # and not: no tower
        prompter_of_checkpoint(model, elsewhere)
    with pytest.raises(HimapError, match=r"gone is no folder \(give the folder") as caught:
        resolve(str(model), vision_tower=elsewhere / "gone")
    assert caught.value.code == Exit.MISSING


def test_a_model_that_has_its_tower_takes_no_other(tmp_path: Path) -> None:
    with pytest.raises(HimapError, match="has its vision tower") as caught:
        resolve("shapes", vision_tower=tmp_path)
    assert caught.value.code == Exit.USAGE


def test_an_alias_names_its_tower_whatever_the_checkpoint_says(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name_tower(model, str(model / TOWER))
    asked: list[str] = []
    monkeypatch.setattr(registry, "_download", lambda source, *_: asked.append(source) or model / TOWER)
    found = resolve("internvl-v1-7b", checkpoint=model)
    assert asked == [ALIASES["internvl-v1-7b"].config["mm_vision_tower"]] and found.folder == model


@pytest.mark.parametrize("name", ["a" * 5000, "a\x00b", "/", "../x", "a/b/c", "", "a b/c", "-/x"])
def test_names_that_no_model_has(name: str) -> None:
    with pytest.raises(HimapError) as caught:
        resolve(name)
    assert caught.value.code == Exit.USAGE and len(str(caught.value)) < 1000


def test_an_adapter_is_no_model_to_judge_by(model: Path) -> None:
    """transformers would load the model that it names instead, wherever that is."""
    shapes = ALIASES["shapes"].source
    copy = Path(shutil.copytree(shapes, model.parent / "shapes"))
    (copy / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(model)}))
    with pytest.raises(HimapError, match="holds an adapter"):
        load_reference(copy, "fp32", 1)
