"""Configurations are typed and bounded before transformers' classes see them, and they see nothing else of them."""

import copy
import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import inspect

from himap_export.exporter import config as schemas
from himap_export.exporter.aliases import ALIASES
from himap_export.exporter.planning import Request, plan_export
from himap_export.exporter.registry import find_family, resolve
from himap_export.graphs.errors import Exit, HimapError

FIXTURES = Path(__file__).parents[1] / "fixtures"
Json = dict[str, Any]
# One published configuration of each family, small enough to be planned in no time.
NAMED = {
    name: ALIASES[name].config for name in ("llava-7b", "qwen2.5-vl-7b", "qwen3-vl-2b", "internvl3-1b", "qwen-vl-chat")
}
NAMED["internvl-v1"] = json.loads((FIXTURES / "internvl-v1-tiny/config.json").read_text())
TOWER = "vision_tower_intern_vit_6b"


def folder_of(folder: Path, config: Json, tower: Json | None = None) -> Path:
    """A checkpoint without weights."""
    (folder / TOWER).mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    own = json.loads((FIXTURES / "internvl-v1-tiny" / TOWER / "config.json").read_text())
    (folder / TOWER / "config.json").write_text(json.dumps(own if tower is None else tower))
    return folder


def changed(config: Json, path: str, value: object) -> Json:
    """A copy in which `value` stands at `path`, such as "text_config.vocab_size"."""
    made = copy.deepcopy(config)
    *outer, last = path.split(".")
    part = made
    for name in outer:
        part = part[name]
    part[last] = value
    return made


def plan(folder: Path) -> Any:
    return plan_export(resolve(str(folder)), Request(policies=("none",), text_budgets=(8,), max_new_tokens=8))


SIZES = (0, -1, 1.5, 64.0, "64", True, None, [64], {}, 10**9, 10**40)
BAD: list[tuple[str, str, object]] = [
    *(("llava-7b", "text_config.num_hidden_layers", value) for value in SIZES),
    *(("llava-7b", "text_config.hidden_size", value) for value in SIZES),
    *(("qwen2.5-vl-7b", "num_attention_heads", value) for value in SIZES),
    *(("qwen3-vl-2b", "vision_config.depth", value) for value in SIZES),
    *(("qwen-vl-chat", "visual.layers", value) for value in SIZES),
    *(("internvl-v1", "num_hidden_layers", value) for value in SIZES),
    *((name, part, value) for name, part in (("llava-7b", "text_config"), ("llava-7b", "vision_config"),
                                             ("qwen-vl-chat", "visual"), ("qwen2.5-vl-7b", "vision_config"))
      for value in (None, [], 7, "x")),
    *(("llava-7b", "text_config.rms_norm_eps", value) for value in (0, -1e-5, 1e-50, 2, math.inf, "1e-5", None)),
    *(("qwen3-vl-2b", "text_config.rope_theta", value) for value in (0, -1.0, math.inf, 1e30, "1e6", None, [1e4])),
    ("qwen-vl-chat", "rotary_emb_base", math.inf),
    ("qwen-vl-chat", "layer_norm_epsilon", 0.0),
    ("qwen-vl-chat", "intermediate_size", 3),
    ("qwen-vl-chat", "visual.mlp_ratio", 1e300),
    ("llava-7b", "vision_config.layer_norm_eps", 0),
    ("qwen2.5-vl-7b", "rope_scaling.mrope_section", [16, 24]),
    ("qwen2.5-vl-7b", "rope_scaling.mrope_section", [16, 24, 10**12]),
    ("qwen2.5-vl-7b", "rope_scaling.mrope_section", "16"),
    ("qwen2.5-vl-7b", "rope_scaling", {"full_attention": {"rope_theta": 3.0}}),
    ("qwen2.5-vl-7b", "rope_scaling", [1]),
    ("qwen2.5-vl-7b", "vision_config.fullatt_block_indexes", [10**9]),
    ("qwen2.5-vl-7b", "vision_config.fullatt_block_indexes", 7),
    ("qwen3-vl-2b", "vision_config.deepstack_visual_indexes", [0] * 5000),
    ("llava-7b", "image_token_index", -200),
    ("llava-7b", "image_token_index", "32000"),
    ("llava-7b", "vision_config.image_size", [336, 336]),
    ("llava-7b", "vision_config.image_size", 10**6),
    ("internvl3-1b", "vision_config.image_size", [448, 448, 448]),
    ("internvl3-1b", "vision_config.patch_size", [0, 14]),
    ("llava-7b", "vision_feature_layer", []),
    ("llava-7b", "vision_feature_layer", "-2"),
    ("llava-7b", "architectures", "LlavaForConditionalGeneration"),
    ("llava-7b", "architectures", ["LlavaForConditionalGeneration"] * 100),
    ("llava-7b", "text_config.eos_token_id", []),
    ("llava-7b", "text_config.pad_token_id", "0"),
    ("llava-7b", "text_config.model_type", ["llama"]),
    ("llava-7b", "tie_word_embeddings", "no"),
    ("llava-7b", "dtype", {"": "float16"}),
    ("llava-7b", "num_labels", 10**9),  # transformers names each one
    ("llava-7b", "text_config.num_labels", 10**9),
    ("internvl-v1", "mm_vision_tower", ["x"]),
    ("internvl-v1", "mm_projector_type", "x" * 5000),
]  # fmt: skip


@pytest.mark.parametrize(("name", "path", "value"), BAD, ids=lambda value: str(value)[:40])
def test_a_field_that_is_not_as_it_must_be_is_named(name: str, path: str, value: object, tmp_path: Path) -> None:
    config = changed(NAMED[name], path, value)
    with pytest.raises(HimapError) as caught:
        resolve(str(folder_of(tmp_path, config)))
    said = str(caught.value)
    assert caught.value.code == Exit.USAGE and len(said) < 600
    if value != math.inf:  # no JSON
        assert f"$.{path}" in said and ("xpected" in said or "unknown field" in said)


@pytest.mark.parametrize(("field", "value"), [("hidden_size", 0), ("num_hidden_layers", 10**9), ("patch_size", "14")])
def test_the_tower_of_a_release_is_checked_too(field: str, value: object, tmp_path: Path) -> None:
    own = json.loads((FIXTURES / "internvl-v1-tiny" / TOWER / "config.json").read_text())
    with pytest.raises(HimapError, match=rf"{TOWER}: config.json is not usable: .* at \$\.{field}"):
        resolve(str(folder_of(tmp_path, NAMED["internvl-v1"], own | {field: value})))


@pytest.mark.parametrize(
    ("name", "path", "value", "words"),
    [
        ("llava-7b", "image_token_index", 32064, "it is 32064, the vocabulary has 32064"),
        ("internvl3-1b", "image_token_id", 200000, "the vocabulary has 151674"),
        ("qwen-vl-chat", "visual.image_start_id", 151934, "it is 151936, the vocabulary has 151936"),
        ("llava-7b", "text_config.num_key_value_heads", 5, "32 attention heads are not shared evenly by 5"),
        ("llava-7b", "text_config.num_key_value_heads", 64, "32 attention heads are not shared evenly by 64"),
        ("llava-7b", "text_config.head_dim", 3, "heads of 3 cannot be rotated by halves"),
        ("llava-7b", "vision_config.num_attention_heads", 7, "not a multiple of the number of attention heads"),
        ("llava-7b", "vision_config.patch_size", 500, "0 tokens"),
        ("llava-7b", "vision_config.num_channels", 4, "where pictures have 3"),
        ("llava-7b", "vision_config.hidden_act", "none", "unsupported activation of the vision tower none"),
        ("llava-7b", "projector_hidden_act", "none", "unsupported activation of the projector none"),
        ("llava-7b", "vision_feature_layer", [-2, 25], "vision_feature_layer 25 of a vision tower of 24 layers"),
        ("llava-7b", "text_config.model_type", "bert", "unsupported text model bert"),
        ("llava-7b", "vision_config.model_type", "swin", "unsupported vision tower swin"),
        (
            "llava-7b",
            "text_config.layer_types",
            ["linear_attention"] * 32,
            "unsupported kind of layer linear_attention",
        ),
        ("internvl3-1b", "vision_config.norm_type", "none", "unsupported norm of the vision tower none"),
        ("internvl3-1b", "vision_config.num_attention_heads", 3, "no 3 equal heads"),
        ("internvl3-1b", "vision_config.patch_size", [1000, 1000], "unsupported vision tower"),
        ("qwen2.5-vl-7b", "vision_config.window_size", 27, "windows of 27 pixels hold no merged patch of 28"),
        ("qwen2.5-vl-7b", "vision_config.num_heads", 1280, "equal heads of a multiple of 4"),
        ("qwen2.5-vl-7b", "rope_scaling.mrope_section", [16, 24, 23], "unsupported sum of mrope_section 63"),
        ("qwen3-vl-2b", "vision_config.deepstack_visual_indexes", [5, 5, 11], "deepstack_visual_indexes [5, 5, 11]"),
        ("qwen3-vl-2b", "vision_config.deepstack_visual_indexes", [5, 24], "of a vision tower of 24 layers"),
        ("qwen-vl-chat", "visual.heads", 15, "no 15 equal heads"),
        ("qwen-vl-chat", "kv_channels", 127, "heads of 127 cannot be rotated"),
        (
            "internvl-v1",
            "mm_projector_type",
            "mlp1000000000x_gelu",
            "unsupported mm_projector_type mlp1000000000x_gelu",
        ),
        ("internvl-v1", "mm_vision_select_layer", 7, "mm_vision_select_layer 7 of a vision tower of 6 layers"),
    ],
)
def test_what_cannot_be_built_is_refused_by_the_plan(
    name: str, path: str, value: object, words: str, tmp_path: Path
) -> None:
    folder = folder_of(tmp_path, changed(NAMED[name], path, value))
    with pytest.raises(HimapError) as caught:
        plan(folder)
    assert words in str(caught.value) and caught.value.code == Exit.USAGE and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (Request(image_sizes=((98000, 98000),)), "no model sees such pictures"),
        (Request(image_sizes=((28, 16408),)), "at most 16384 pixels a side"),
        (Request(image_sizes=((14000, 14000),)), "134217728 in all"),
        (Request(image_sizes=tuple((28 * n, 28) for n in range(1, 300))), "299 variants are too many"),
        (Request(text_budgets=tuple(range(10, 400))), "390 variants are too many"),
        (Request(text_budgets=(10**9,)), "the budgets are too long"),
        (Request(align=10**12), "`align`"),
        (Request(batch=10**9), "the budget is not usable: Expected int <= 4096"),
    ],
)
def test_what_is_asked_for_is_bounded_before_it_is_made(asked: Request, words: str) -> None:
    with pytest.raises(HimapError) as caught:
        plan_export(resolve("qwen2.5-vl-7b", weights=False), asked)
    assert words in str(caught.value) and caught.value.code == Exit.USAGE


def test_bf16_weights_are_not_cut_to_fp16_unasked() -> None:
    model = resolve("qwen3-vl-2b", weights=False)
    for backends, dtype in ((("onnxruntime",), "fp32"), (("tensorrt-rtx",), "bf16")):
        assert plan_export(model, Request(backends=backends)).dtype == dtype
    both = ("onnxruntime", "tensorrt-rtx")
    with pytest.raises(HimapError, match="fp16 may overflow") as caught:
        plan_export(model, Request(backends=both))
    assert caught.value.code == Exit.USAGE
    assert plan_export(model, Request(backends=both, dtype="fp16")).dtype == "fp16"


def test_tiles_are_bounded() -> None:
    for tiles in (0, -3, 10**12):
        with pytest.raises(HimapError, match=f"{tiles} tiles do not fit"):
            plan_export(resolve("internvl3-1b", weights=False), Request(tiles=tiles))


def test_transformers_sees_only_the_fields_that_are_known(tmp_path: Path) -> None:
    """Not the kernel to fetch, not the layers that differ, not the outputs that would change shape."""
    config, kernel = NAMED["qwen2.5-vl-7b"], "somebody/kernel"
    more = {"_attn_implementation": kernel, "return_dict": False, "per_layer_config": {"0": {"hidden_size": 1}}}
    more |= {"id2label": {"x": "y"}, "output_hidden_states": True, "chunk_size_feed_forward": 7, "auto_map": {"a": "b"}}
    spoiled = {**config, **more, "vision_config": {**config["vision_config"], **more}}
    model = resolve(str(folder_of(tmp_path, spoiled)))
    assert model.family.fields == type(model.family).parse(config).fields
    assert (
        plan(folder_of(tmp_path, spoiled)).decoder
        == plan_export(resolve("qwen2.5-vl-7b", weights=False), Request()).decoder
    )


UNUSED = {"in_chans", "vision_start_token_id", "vision_end_token_id", "image_seq_length"}


@pytest.mark.parametrize("name", [name for name, alias in ALIASES.items() if alias.config])
def test_aliases_are_known_whole(name: str) -> None:
    config = ALIASES[name].config
    found = find_family(config, name).parse(config, name).fields
    for ours, all_ in (
        (found, config),
        *((found[key], part) for key, part in config.items() if isinstance(part, dict)),
    ):
        assert {key: value for key, value in all_.items() if key not in UNUSED and not isinstance(value, dict)} == {
            key: value for key, value in ours.items() if key in all_ and not isinstance(value, dict)
        }


# What transformers' classes take and no graph of ours depends on: how weights were drawn, what is dropped in training,
# what transformers itself caches, tokens of other inputs than pictures.
NOT_OURS = {
    "initializer_range", "initializer_factor", "layer_scale_init_value", "attention_dropout", "hidden_dropout_prob",
    "projection_dropout", "use_cache", "pretraining_tp", "tokens_per_second", "image_seq_length", "video_token_id",
    "vision_start_token_id", "vision_end_token_id",
}  # fmt: skip
CLASSES = [
    ("LlavaConfig", schemas.Llava), ("InternVLConfig", schemas.InternVl), ("Qwen2_5_VLConfig", schemas.Qwen25Vl),
    ("Qwen3VLConfig", schemas.Qwen3Vl), ("LlamaConfig", schemas.Text), ("LlamaConfig", schemas.LlavaOriginal),
    ("Qwen2Config", schemas.Text), ("Qwen3Config", schemas.Text), ("CLIPVisionConfig", schemas.Clip),
    ("CLIPVisionConfig", schemas.ReleasedTower), ("InternVLVisionConfig", schemas.InternVit),
]  # fmt: skip


@pytest.mark.parametrize(("name", "schema"), CLASSES, ids=lambda value: getattr(value, "__name__", value))
def test_every_field_of_transformers_that_makes_a_model_is_known(name: str, schema: type[msgspec.Struct]) -> None:
    """A field that a new release of transformers acts on would else be left out in silence."""
    kind = getattr(transformers, name)
    inherited = {field.name for field in dataclasses.fields(transformers.PretrainedConfig)}
    own = {field.name for field in dataclasses.fields(kind)} - inherited
    assert own - set(schema.__struct_fields__) <= NOT_OURS


def unions(kind: inspect.Type, seen: set[type]) -> Iterator[inspect.UnionType]:
    """Every union within a type."""
    if isinstance(kind, inspect.StructType):
        if kind.cls not in seen:
            seen.add(kind.cls)
            for field in kind.fields:
                yield from unions(field.type, seen)
        return
    if isinstance(kind, inspect.UnionType):
        yield kind
    for name in ("types", "item_types", "item_type", "value_type", "key_type"):
        inner = getattr(kind, name, ())
        for one in inner if isinstance(inner, tuple) else (inner,):
            yield from unions(one, seen)


def test_no_schema_has_the_union_that_breaks_msgspec() -> None:
    """msgspec 0.22 reads beyond its memory for a union of a bounded number or text and a tuple of fixed length."""
    from himap_export.engines import image, manifest, prompt, questions  # noqa: F401  # defines schemas
    from himap_export.exporter import checkpoint, plans, processor  # noqa: F401
    from himap_export.exporter.quantize import declared  # noqa: F401
    from himap_export.validate.accuracy import answers  # noqa: F401

    kinds = [kind for kind in all_structs(msgspec.Struct) if kind.__module__.startswith("himap_export.")]
    assert len(kinds) > 30
    for kind in kinds:
        for union in unions(inspect.type_info(kind), set()):
            fixed = any(isinstance(one, inspect.TupleType) for one in union.types)
            assert not (fixed and any(bounded(one) for one in union.types)), kind


def all_structs(kind: type) -> Iterator[type]:
    for one in kind.__subclasses__():
        yield one
        yield from all_structs(one)


def bounded(kind: inspect.Type) -> bool:
    limits = ("ge", "gt", "le", "lt", "multiple_of", "min_length", "max_length", "pattern")
    scalar = isinstance(kind, inspect.IntType | inspect.FloatType | inspect.StrType)
    return scalar and any(getattr(kind, name, None) is not None for name in limits)


def places(config: Json, prefix: str = "") -> Iterator[str]:
    for key, value in config.items():
        yield prefix + key
        if isinstance(value, dict):
            yield from places(value, f"{prefix}{key}.")


ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-3, 3000)
    | st.floats(allow_nan=False)
    | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=150)
@given(data=st.data())
def test_any_value_anywhere_is_planned_or_refused_in_a_line(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    name = data.draw(st.sampled_from(sorted(NAMED)))
    path = data.draw(st.sampled_from(sorted(places(NAMED[name]))))
    folder = folder_of(tmp_path_factory.getbasetemp() / "any", changed(NAMED[name], path, data.draw(ANYTHING)))
    try:
        plan(folder)
    except HimapError as problem:
        assert problem.code in (Exit.USAGE, Exit.MISSING) and "\n" not in str(problem) and len(str(problem)) < 1500
