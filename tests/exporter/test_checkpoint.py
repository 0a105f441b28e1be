"""Checkpoint folders: which of their files count, and what their JSON may say."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from himap_export.engines.checkpoint_files import INDEX, SINGLE, stored_tensors, tensor_names, weight_files
from himap_export.engines.weight_file import StoredTensor, map_tensors
from himap_export.exporter.bind import fitting
from himap_export.exporter.checkpoint import open_checkpoint, read_config
from himap_export.graphs.errors import Exit, HimapError
from himap_export.graphs.ports import Rows


def save(folder: Path, file: str, **values: float) -> None:
    """Tensors of one number each."""
    folder.mkdir(exist_ok=True)
    save_file({name: np.array([value], np.float32) for name, value in values.items()}, folder / file)


def index(folder: Path, content: Any) -> Path:
    folder.mkdir(exist_ok=True)
    text = content if isinstance(content, str) else json.dumps({"weight_map": content})
    (folder / INDEX).write_text(text)
    return folder


def numbers(stored: dict[str, StoredTensor]) -> dict[str, float]:
    return {name: array.item() for name, array in map_tensors(stored.values()).items()}


def refused(code: Exit, words: str, *folders: Path) -> None:
    with pytest.raises(HimapError, match=words) as caught:
        stored_tensors(folders)
    assert caught.value.code == code and len(str(caught.value)) < 1000


# --- which files count ---


def test_without_an_index_one_file_counts_and_no_other(tmp_path: Path) -> None:
    save(tmp_path, SINGLE, a=1, b=2)
    save(tmp_path, "model-00001-of-00002.safetensors", a=7, c=8)
    save(tmp_path, "adapter.safetensors", b=9)
    assert list(weight_files(tmp_path, Exit.MISSING)) == [tmp_path / SINGLE]
    assert numbers(stored_tensors([tmp_path])) == {"a": 1, "b": 2}
    assert tensor_names(tmp_path) == {"a", "b"}


def test_the_index_says_where_each_tensor_lies(tmp_path: Path) -> None:
    """Not the order of the files' names, nor what else they hold."""
    save(tmp_path, "one.safetensors", a=1, b=2)
    save(tmp_path, "two.safetensors", a=7, b=8, c=9)
    save(tmp_path, SINGLE, a=5, d=6)
    index(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
    assert list(weight_files(tmp_path, Exit.MISSING)) == [tmp_path / "one.safetensors", tmp_path / "two.safetensors"]
    assert numbers(stored_tensors([tmp_path])) == {"a": 1, "b": 8}
    assert tensor_names(tmp_path) == {"a", "b"}


def test_of_several_folders_the_first_that_holds_a_tensor_gives_it(tmp_path: Path) -> None:
    save(tmp_path / "model", SINGLE, a=1, b=2)
    save(tmp_path / "tower", "shard.safetensors", b=7, c=8)
    index(tmp_path / "tower", {"b": "shard.safetensors", "c": "shard.safetensors"})
    folders = [tmp_path / "model", tmp_path / "tower"]
    assert numbers(stored_tensors(folders)) == {"a": 1, "b": 2, "c": 8}
    assert numbers(stored_tensors(folders[::-1])) == {"a": 1, "b": 7, "c": 8}


def test_a_tensor_that_is_not_where_the_index_says(tmp_path: Path) -> None:
    save(tmp_path, "one.safetensors", a=1)
    folder = index(tmp_path, {"a": "one.safetensors", "b": "one.safetensors"})
    refused(Exit.FAILURE, r"one\.safetensors is not the index's: .* says that it holds b", folder)


def test_nothing_there(tmp_path: Path) -> None:
    refused(Exit.MISSING, "holds no weights", tmp_path)
    refused(Exit.MISSING, "holds no weights", tmp_path / "none")
    (tmp_path / "pytorch_model.bin").touch()
    refused(Exit.MISSING, "only pickled weights: .*python -c", tmp_path)
    with pytest.raises(HimapError, match="only pickled weights") as caught:
        stored_tensors([tmp_path], Exit.USAGE)
    assert caught.value.code == Exit.USAGE and tensor_names(tmp_path) == frozenset()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "is not JSON"),
        ("[]", "Expected object, got array"),
        ("{}", "has no weight_map"),
        ({}, "has no weight_map"),
        ('{"weight_map": null}', "Expected object, got null"),
        ('{"weight_map": ["a"]}', "Expected object, got array"),
        ('{"weight_map": {"a": "x"}, "weight_map": {}}', "twice"),
        ('{"weight_map": {"a": "x", "a": "y"}}', "twice"),
        ('{"weight_map": {"a": "x"}, "metadata": {"total_size": NaN}}', "no JSON number"),
        ('{"weight_map": ' + "[" * 100_000, "nested too deeply"),
        ({"a": 7}, "Expected str, got int"),
        ({"a": ""}, "Expected str of length >= 1"),
        ({"a": "x" * 300}, "Expected str of length <= 255"),
    ],
)
def test_a_damaged_index(tmp_path: Path, content: Any, words: str) -> None:
    save(tmp_path, SINGLE, a=1)
    refused(Exit.FAILURE, words, index(tmp_path, content))


@pytest.mark.parametrize(
    "shard", ["../other/x.safetensors", "/etc/passwd", "sub/x.safetensors", "..", ".", "x\n.safetensors", "x\0", "none"]
)
def test_a_shard_is_a_file_of_the_indexs_folder(tmp_path: Path, shard: str) -> None:
    save(tmp_path / "other", "x.safetensors", a=1)
    save(tmp_path / "model", SINGLE, a=1)
    (tmp_path / "model" / "sub").mkdir()
    save(tmp_path / "model" / "sub", "x.safetensors", a=1)
    refused(Exit.MISSING, r"lacks (.|\n)*index\.json lists it", index(tmp_path / "model", {"a": shard}))


@pytest.mark.parametrize("name", [INDEX, SINGLE, "shard.safetensors"])
@pytest.mark.parametrize("kind", ["folder", "pipe", "itself"])
def test_what_is_no_file_is_refused_and_never_waited_for(tmp_path: Path, name: str, kind: str) -> None:
    if name == "shard.safetensors":
        index(tmp_path, {"a": name})
    path = tmp_path / name
    {"folder": path.mkdir, "pipe": lambda: os.mkfifo(path), "itself": lambda: path.symlink_to(path)}[kind]()
    refused(Exit.FAILURE, f"cannot read .*{name}", tmp_path)


def test_links_to_files_are_followed(tmp_path: Path) -> None:
    """The hub's snapshots hold nothing else."""
    save(tmp_path / "blobs", "1234", a=1)
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / SINGLE).symlink_to("../blobs/1234")
    assert numbers(stored_tensors([tmp_path / "snapshot"])) == {"a": 1}


# --- the checkpoint as a whole ---


def model(folder: Path, **more: str) -> Path:
    """A checkpoint of two tensors; `more`: further files."""
    save(folder, SINGLE, **{"model.vision_tower.a": 1, "model.b": 2})
    for name, text in {"config": "{}", **more}.items():
        (folder / f"{name}.json").write_text(text)
    return folder


def test_a_tower_of_its_own_counts_only_if_the_model_has_none(tmp_path: Path) -> None:
    whole = model(tmp_path / "whole")
    save(tmp_path / "tower", SINGLE, c=7)
    assert open_checkpoint(whole, tower=tmp_path / "tower").names == {"model.vision_tower.a", "model.b"}
    save(tmp_path / "bare", SINGLE, b=2)
    (tmp_path / "bare" / "config.json").write_text("{}")
    found = open_checkpoint(tmp_path / "bare", tower=tmp_path / "tower")
    assert numbers(found.tensors) == {"b": 2, "c": 7} and found.names == {"b", "c"}
    assert len({t.file for t in found.tensors.values()}) == 2
    assert open_checkpoint(tmp_path / "bare", weights=False, tower=tmp_path / "tower").names == {"b", "c"}


def test_engines_only_need_no_weights(tmp_path: Path) -> None:
    folder = index(tmp_path, {"a": "none.safetensors"})
    (folder / "config.json").write_text("{}")
    found = open_checkpoint(folder, weights=False)
    assert found.names == {"a"} and found.tensors == {}
    (folder / INDEX).unlink()
    assert open_checkpoint(folder, weights=False).names == frozenset()


DEEP = '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}"
NOT_USABLE = ["", "[]", "7", "{", '{"a": 1, "a": 2}', '{"a": NaN}', '{"a": -Infinity}', '{"a": "\\ud800"}', DEEP]


@pytest.mark.parametrize("text", NOT_USABLE)
@pytest.mark.parametrize("name", ["config", "generation_config"])
def test_a_configuration_is_a_json_object(tmp_path: Path, name: str, text: str) -> None:
    folder = model(tmp_path / "model", **{name: text})
    with pytest.raises(HimapError, match=f"/{name}.json is not") as caught:
        read_config(folder), open_checkpoint(folder)
    assert caught.value.code == Exit.USAGE and len(str(caught.value)) < 1000


@pytest.mark.parametrize("kind", ["folder", "pipe", "itself"])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_a_configuration_is_a_file(tmp_path: Path, name: str, kind: str) -> None:
    folder = model(tmp_path / "model")
    path = folder / name
    path.unlink(missing_ok=True)
    {"folder": path.mkdir, "pipe": lambda: os.mkfifo(path), "itself": lambda: path.symlink_to(path)}[kind]()
    with pytest.raises(HimapError, match=f"cannot read .*{name}") as caught:
        read_config(folder), open_checkpoint(folder)
    assert caught.value.code == Exit.USAGE


def test_no_configuration(tmp_path: Path) -> None:
    with pytest.raises(HimapError, match=r"holds no config\.json"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("text", "eos", "pad"),
    [
        ("{}", None, None),
        ('{"eos_token_id": 2, "pad_token_id": 0}', 2, 0),
        ('{"eos_token_id": [5, 6], "pad_token_id": -1, "temperature": 1e-6, "transformers_version": "5"}', [5, 6], -1),
        ('{"eos_token_id": null}', None, None),
    ],
)
def test_token_ids(tmp_path: Path, text: str, eos: Any, pad: Any) -> None:
    found = open_checkpoint(model(tmp_path / "model", generation_config=text)).generation
    assert found == {"eos_token_id": eos, "pad_token_id": pad}


@pytest.mark.parametrize("value", ["[]", '"2"', "2.5", "true", "[1, null]", "[[1]]", "{}", "4294967296", "[1e3]"])
def test_token_ids_are_whole_numbers(tmp_path: Path, value: str) -> None:
    folder = model(tmp_path / "model", generation_config=f'{{"eos_token_id": {value}}}')
    with pytest.raises(HimapError, match=r"generation_config\.json is not usable: Expected .*eos_token_id") as caught:
        open_checkpoint(folder)
    assert caught.value.code == Exit.USAGE


# --- what a weight may be ---


@pytest.mark.parametrize("kind", [np.float64, np.int64, np.int8, np.bool_, np.uint16])
def test_a_weight_is_of_a_float_type_that_graphs_have(tmp_path: Path, kind: type[np.generic]) -> None:
    save_file({"a": np.ones((2, 3), kind)}, tmp_path / SINGLE)
    with pytest.raises(HimapError, match=r"tensor a is no weight .*stored as .*expected fp16, bf16, fp32") as caught:
        fitting(stored_tensors([tmp_path]), "a", (2, 3))
    assert caught.value.code == Exit.USAGE


def test_rows_of_a_scalar_do_not_fit(tmp_path: Path) -> None:
    save_file({"a": np.array(1, np.float32)}, tmp_path / SINGLE)
    with pytest.raises(HimapError, match=r"does not fit: its shape is \[\]"):
        fitting(stored_tensors([tmp_path]), "part", (2, 3), Rows("a", 0, 2))
