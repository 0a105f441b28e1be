"""The part of config.json that we and transformers' configuration classes act on: typed, bounded, and all they see.

A field that is absent stays absent: what it then is, transformers says; of a release that it does not know, we do.
Unknown fields are left out, for transformers acts on many: a number of labels becomes a table, a named kernel is run.
"""

from typing import Annotated, TypeAlias, TypeVar

from msgspec import UNSET, Meta, Struct, UnsetType

from himap_export.engines.documents import Id
from himap_export.engines.split import MAX_SIDE
from himap_export.graphs.spec import Heads, Layers, Width

T = TypeVar("T")
Given: TypeAlias = T | UnsetType

Name = Annotated[str, Meta(min_length=1, max_length=1000)]  # of a class, a kind or a checkpoint: none has 200 letters
Token = Annotated[int, Meta(ge=0, lt=2**31)]
Ids = Annotated[list[Id], Meta(min_length=1, max_length=1024)]
Vocabulary = Annotated[int, Meta(ge=1, le=2**24)]  # 64 times the largest published
Positions = Annotated[int, Meta(ge=1, le=2**24)]  # the longest published context has 10 million
Side = Annotated[int, Meta(ge=1, le=MAX_SIDE)]  # pixels
Patch = Annotated[int, Meta(ge=1, le=1024)]  # pixels; merged patches; frames
Index = Annotated[int, Meta(ge=-1025, le=1024)]  # of a layer, or from the end
Indexes = Annotated[list[Annotated[int, Meta(ge=0, le=1024)]], Meta(max_length=1024)]
Sections = Annotated[list[Annotated[int, Meta(ge=0, le=2**11)]], Meta(min_length=3, max_length=3)]  # of half a head
Epsilon = Annotated[float, Meta(ge=1e-30, le=1)]  # in fp32 a smaller one is zero
Theta = Annotated[float, Meta(ge=1, le=1e18)]  # published: 1e4 to 1e9
Factor = Annotated[float, Meta(gt=0, le=1e6)]


class Head(Struct, frozen=True):
    """What says which family a configuration is of."""

    architectures: Annotated[list[Name], Meta(max_length=64)] | None = None


class Common(Struct, frozen=True, kw_only=True):
    """What any level of a configuration may say."""

    model_type: Given[Name] = UNSET
    architectures: Given[Annotated[list[Name], Meta(max_length=64)] | None] = UNSET
    tie_word_embeddings: Given[bool] = UNSET
    dtype: Given[Name | None] = UNSET
    torch_dtype: Given[Name | None] = UNSET
    bos_token_id: Given[Id | None] = UNSET
    eos_token_id: Given[Id | Ids | None] = UNSET
    pad_token_id: Given[Id | None] = UNSET
    num_labels: Given[Annotated[int, Meta(ge=0, le=10**6)] | None] = UNSET  # each gets a name from transformers


class Rope(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Rotary positions. An unknown field, or one a layer type, would be another rotation."""

    rope_type: Given[Name] = UNSET
    type: Given[Name] = UNSET
    rope_theta: Given[Theta] = UNSET
    partial_rotary_factor: Given[Factor] = UNSET
    mrope_section: Given[Sections] = UNSET
    mrope_interleaved: Given[bool] = UNSET
    factor: Given[Factor] = UNSET
    # Of types that no family takes: known so that the type is what is refused.
    original_max_position_embeddings: Given[Positions] = UNSET
    attention_factor: Given[Factor | None] = UNSET
    beta_fast: Given[Factor | None] = UNSET
    beta_slow: Given[Factor | None] = UNSET
    mscale: Given[Factor | None] = UNSET
    mscale_all_dim: Given[Factor | None] = UNSET
    low_freq_factor: Given[Factor] = UNSET
    high_freq_factor: Given[Factor] = UNSET


class Text(Common, frozen=True, kw_only=True):
    """A decoder of the LLaMA and Qwen families."""

    hidden_size: Given[Width] = UNSET
    intermediate_size: Given[Width] = UNSET
    num_hidden_layers: Given[Layers] = UNSET
    num_attention_heads: Given[Heads] = UNSET
    num_key_value_heads: Given[Heads | None] = UNSET
    head_dim: Given[Heads | None] = UNSET
    vocab_size: Given[Vocabulary] = UNSET
    hidden_act: Given[Name] = UNSET
    max_position_embeddings: Given[Positions] = UNSET
    rms_norm_eps: Given[Epsilon] = UNSET
    rope_theta: Given[Theta] = UNSET
    rope_parameters: Given[Rope | None] = UNSET
    rope_scaling: Given[Rope | None] = UNSET
    partial_rotary_factor: Given[Factor] = UNSET
    attention_bias: Given[bool] = UNSET
    mlp_bias: Given[bool] = UNSET
    use_sliding_window: Given[bool | None] = UNSET
    sliding_window: Given[Annotated[int, Meta(ge=0, le=2**24)] | None] = UNSET
    max_window_layers: Given[Annotated[int, Meta(ge=0, le=1024)] | None] = UNSET
    layer_types: Given[Annotated[list[Name], Meta(max_length=1024)] | None] = UNSET


class Tower(Common, frozen=True, kw_only=True):
    """What all vision towers are told in the same words."""

    hidden_size: Given[Width] = UNSET
    intermediate_size: Given[Width] = UNSET
    hidden_act: Given[Name] = UNSET
    patch_size: Given[Patch] = UNSET
    num_hidden_layers: Given[Layers] = UNSET  # of Qwen's towers: transformers takes it for `depth`,
    num_attention_heads: Given[Heads] = UNSET  # and this for `num_heads`


class Clip(Tower, frozen=True, kw_only=True):
    """CLIP's tower."""

    num_channels: Given[Patch] = UNSET
    image_size: Given[Side] = UNSET
    projection_dim: Given[Width] = UNSET
    layer_norm_eps: Given[Epsilon] = UNSET


class Siglip(Tower, frozen=True, kw_only=True):
    """SigLIP's tower."""

    num_channels: Given[Patch] = UNSET
    image_size: Given[Side] = UNSET
    layer_norm_eps: Given[Epsilon] = UNSET
    vision_use_head: Given[bool] = UNSET


class ReleasedTower(Clip, frozen=True, kw_only=True):
    """The tower of a release: CLIP, alone or under `vision_config` beside its text encoder, or InternViT-6B."""

    vision_config: Given[Clip] = UNSET
    norm_type: Given[Name] = UNSET
    qkv_bias: Given[bool] = UNSET
    qk_normalization: Given[bool] = UNSET


class InternVit(Tower, frozen=True, kw_only=True):
    """InternVL3's tower."""

    patch_size: Given[Patch | Annotated[list[Patch], Meta(min_length=2, max_length=2)]] = UNSET  # type: ignore[assignment]
    image_size: Given[Side | Annotated[list[Side], Meta(min_length=2, max_length=2)]] = UNSET
    num_channels: Given[Patch] = UNSET
    layer_norm_eps: Given[Epsilon] = UNSET
    norm_type: Given[Name] = UNSET
    attention_bias: Given[bool] = UNSET
    use_qk_norm: Given[bool] = UNSET
    use_absolute_position_embeddings: Given[bool] = UNSET
    use_mask_token: Given[bool] = UNSET
    use_mean_pooling: Given[bool] = UNSET


class SmolTower(Tower, frozen=True, kw_only=True):
    """SmolVLM2's tower: SigLIP, as Idefics3 has it."""

    num_channels: Given[Patch] = UNSET
    image_size: Given[Side] = UNSET
    layer_norm_eps: Given[Epsilon] = UNSET


class QwenTower(Tower, frozen=True, kw_only=True):
    """What the towers of Qwen2.5-VL and Qwen3-VL are told."""

    depth: Given[Layers] = UNSET
    num_heads: Given[Heads] = UNSET
    in_channels: Given[Patch] = UNSET
    spatial_merge_size: Given[Patch] = UNSET
    temporal_patch_size: Given[Patch] = UNSET
    out_hidden_size: Given[Width] = UNSET
    rope_parameters: Given[Rope | None] = UNSET


class Qwen25Tower(QwenTower, frozen=True, kw_only=True):
    """Windows of `window_size` pixels in all blocks but some."""

    window_size: Given[Side] = UNSET
    fullatt_block_indexes: Given[Indexes] = UNSET
    tokens_per_second: Given[Annotated[int, Meta(ge=1, le=1000)]] = UNSET  # of M-RoPE's time


class Qwen3Tower(QwenTower, frozen=True, kw_only=True):
    """Learned positions, and the blocks that feed the decoder's first layers."""

    num_position_embeddings: Given[Width] = UNSET
    deepstack_visual_indexes: Given[Indexes] = UNSET


FeatureLayer = Index | Annotated[list[Index], Meta(min_length=1, max_length=64)]  # one, or several side by side


class Llava(Common, frozen=True, kw_only=True):
    """`LlavaForConditionalGeneration`."""

    text_config: Given[Text] = UNSET
    vision_config: Given[Clip] = UNSET
    image_token_index: Given[Token] = UNSET
    image_token_id: Given[Token] = UNSET
    projector_hidden_act: Given[Name] = UNSET
    multimodal_projector_bias: Given[bool] = UNSET
    vision_feature_layer: Given[FeatureLayer] = UNSET
    vision_feature_select_strategy: Given[Name] = UNSET


Pinpoints = Annotated[
    list[Annotated[list[Side], Meta(min_length=2, max_length=2)]], Meta(min_length=1, max_length=1024)
]  # (height, width) of the sheets that a picture may be laid on


class LlavaNext(Llava, frozen=True, kw_only=True):
    """`LlavaNextForConditionalGeneration`."""

    image_grid_pinpoints: Given[Pinpoints] = UNSET


class LlavaOnevision(LlavaNext, frozen=True, kw_only=True):
    """`LlavaOnevisionForConditionalGeneration`."""

    vision_config: Given[Siglip] = UNSET  # type: ignore[assignment]
    video_token_index: Given[Token] = UNSET
    video_token_id: Given[Token] = UNSET
    vision_aspect_ratio: Given[Name] = UNSET


class InternVl(Common, frozen=True, kw_only=True):
    """`InternVLForConditionalGeneration`."""

    text_config: Given[Text] = UNSET
    vision_config: Given[InternVit] = UNSET
    image_token_id: Given[Token] = UNSET
    downsample_ratio: Given[Factor] = UNSET
    projector_hidden_act: Given[Name] = UNSET
    vision_feature_layer: Given[FeatureLayer] = UNSET
    vision_feature_select_strategy: Given[Name] = UNSET


class SmolVlm(Common, frozen=True, kw_only=True):
    """`SmolVLMForConditionalGeneration`."""

    text_config: Given[Text] = UNSET
    vision_config: Given[SmolTower] = UNSET
    image_token_id: Given[Token] = UNSET
    scale_factor: Given[Patch] = UNSET


class Qwen25Vl(Text, frozen=True, kw_only=True):
    """`Qwen2_5_VLForConditionalGeneration`; the decoder's fields at the top, as published, or under `text_config`."""

    text_config: Given[Text] = UNSET
    vision_config: Given[Qwen25Tower] = UNSET
    image_token_id: Given[Token] = UNSET
    video_token_id: Given[Token] = UNSET


class Qwen3Vl(Common, frozen=True, kw_only=True):
    """`Qwen3VLForConditionalGeneration`."""

    text_config: Given[Text] = UNSET
    vision_config: Given[Qwen3Tower] = UNSET
    image_token_id: Given[Token] = UNSET
    video_token_id: Given[Token] = UNSET


class LlavaOriginal(Text, frozen=True, kw_only=True):
    """`LlavaLlamaForCausalLM`, with its code's defaults. `vision_config`: the tower's own config.json, put in by the
    registry."""

    hidden_size: Width
    vision_config: Given[ReleasedTower] = UNSET
    mm_vision_tower: Given[Name] = UNSET
    vision_tower: Given[Name] = UNSET
    mm_vision_select_layer: Index = -2
    mm_vision_select_feature: Name = "patch"
    mm_projector_type: Name = "linear"
    mm_hidden_size: Given[Width] = UNSET
    mm_patch_merge_type: Name = "flat"
    mm_use_im_start_end: bool = False
    image_aspect_ratio: Name | None = None


class InternVit6B(Tower, frozen=True, kw_only=True):
    """A `ReleasedTower` that is an InternViT-6B, with its code's defaults."""

    hidden_size: Width
    intermediate_size: Width
    hidden_act: Name = "gelu"
    patch_size: Patch
    num_hidden_layers: Layers
    num_attention_heads: Heads
    num_channels: Patch = 3
    image_size: Side
    layer_norm_eps: Epsilon = 1e-6
    norm_type: Name = "rms_norm"
    qkv_bias: bool = False
    qk_normalization: bool = True


class Visual(Struct, frozen=True, kw_only=True):
    """The tower of Qwen-VL and its resampler."""

    heads: Heads
    image_size: Side
    image_start_id: Token
    layers: Layers
    mlp_ratio: Annotated[float, Meta(gt=0, le=64)]
    output_dim: Width
    patch_size: Patch
    width: Width
    n_queries: Width = 256


class QwenVl(Common, frozen=True, kw_only=True):
    """`QWenLMHeadModel`, of 2023, with its code's defaults."""

    hidden_size: Width
    intermediate_size: Annotated[int, Meta(ge=2, le=2**21, multiple_of=2)]  # of gate and up together
    num_hidden_layers: Layers
    num_attention_heads: Heads
    kv_channels: Heads
    vocab_size: Vocabulary
    seq_length: Positions
    max_position_embeddings: Positions
    layer_norm_epsilon: Epsilon
    rotary_emb_base: Theta = 10000.0
    rotary_pct: Factor = 1.0
    no_bias: bool = True
    use_dynamic_ntk: bool = True
    use_logn_attn: bool = True
    bf16: Given[bool | None] = UNSET
    fp16: Given[bool | None] = UNSET
    fp32: Given[bool | None] = UNSET
    visual: Visual
