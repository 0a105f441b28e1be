"""Random checkpoints in the layouts of the original releases, of any size."""

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from tiny import Tiny, make_llava

FIXTURES = Path(__file__).parent / "fixtures"
Arrays = dict[str, NDArray[Any]]
# Hugging Face's names of LLaVA-1.5, and the release's.
LLAVA = {
    "language_model.model.": "model.", "language_model.lm_head.": "lm_head.",
    "multi_modal_projector.linear_1.": "model.mm_projector.0.",
    "multi_modal_projector.linear_2.": "model.mm_projector.2.",
}  # fmt: skip


def _random(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """As tiny.py scales them: peaked attention, norms and biases that matter."""
    noise = rng.standard_normal(shape)
    if len(shape) == 1:
        noise = 0.1 * noise + (1 if "norm" in name or ".ln_" in name or name.startswith("ln_") else 0)
        noise = noise if name.endswith("weight") or "ls" in name else noise - noise.mean()
    elif "wte" not in name and "embed" not in name:
        fan_in = int(np.prod(shape[1:]))
        noise *= (1.6 if "c_attn" in name else 0.64) / fan_in**0.5
    return noise.astype(np.float32)


def make_qwen_vl(
    folder: Path, seed: int = 0, layers: int = 5, heads: int = 2, side: int = 112, width: int = 48
) -> None:
    """A Qwen-VL release: hidden 128, vocabulary 480 with bytes 0 to 255 and its 217 special tokens behind them."""
    hidden, ffn, vocab, start, towers, patch, wide = 128, 96, 480, 256 + 214, 2, 14, 64
    inner = hidden // heads * heads
    shapes: dict[str, tuple[int, ...]] = {
        "transformer.wte.weight": (vocab, hidden), "lm_head.weight": (vocab, hidden),
        "transformer.ln_f.weight": (hidden,),
    }  # fmt: skip
    for i in range(layers):
        p = f"transformer.h.{i}."
        shapes |= {p + "ln_1.weight": (hidden,), p + "ln_2.weight": (hidden,)}
        shapes |= {p + "attn.c_attn.weight": (3 * inner, hidden), p + "attn.c_attn.bias": (3 * inner,)}
        shapes |= {p + "attn.c_proj.weight": (hidden, inner), p + "mlp.c_proj.weight": (hidden, ffn)}
        shapes |= {p + "mlp.w1.weight": (ffn, hidden), p + "mlp.w2.weight": (ffn, hidden)}
    v = "transformer.visual."
    shapes |= {v + "conv1.weight": (width, 3, patch, patch), v + "positional_embedding": (256, width)}
    shapes |= {
        v + "proj": (hidden, hidden),
        v + "attn_pool.query": (256, hidden),
        v + "attn_pool.pos_embed": (256, hidden),
    }
    shapes |= {
        v + "attn_pool.kv_proj.weight": (hidden, width),
        v + "attn_pool.attn.in_proj_weight": (3 * hidden, hidden),
    }
    shapes |= {v + "attn_pool.attn.in_proj_bias": (3 * hidden,), v + "attn_pool.attn.out_proj.weight": (hidden, hidden)}
    shapes |= {v + "attn_pool.attn.out_proj.bias": (hidden,)}
    for norm, size in (("ln_pre", width), ("ln_post", hidden), ("attn_pool.ln_q", hidden), ("attn_pool.ln_kv", hidden)):
        shapes |= {f"{v}{norm}.weight": (size,), f"{v}{norm}.bias": (size,)}
    for i in range(towers):
        p = f"{v}transformer.resblocks.{i}."
        linears = {"attn.in_proj": (3 * width, width), "attn.out_proj": (width, width)}
        linears |= {"mlp.c_fc": (wide, width), "mlp.c_proj": (width, wide)}
        for name, shape in linears.items():
            shapes |= {f"{p}{name}.weight": shape, f"{p}{name}.bias": shape[:1]}
        for norm in ("ln_1", "ln_2"):
            shapes |= {f"{p}{norm}.weight": (width,), f"{p}{norm}.bias": (width,)}
    config = json.loads((FIXTURES / "qwen-vl-tiny" / "config.json").read_text())
    config |= {"vocab_size": vocab, "num_hidden_layers": layers, "num_attention_heads": heads, "hidden_size": hidden}
    config |= {"kv_channels": hidden // heads, "intermediate_size": 2 * ffn}
    config["visual"] = {
        "heads": 4, "image_size": side, "image_start_id": start, "layers": towers, "mlp_ratio": wide / width,
        "output_dim": hidden, "patch_size": patch, "width": width,
    }  # fmt: skip
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: _random(rng, name, shape) for name, shape in shapes.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    ranks = "".join(f"{base64.b64encode(bytes([n])).decode()} {n}\n" for n in range(256))
    (folder / "qwen.tiktoken").write_text(ranks)


def make_internvl_v1(
    folder: Path, seed: int = 0, layers: int = 6, heads: int = 2, tower: int = 5, width: int = 32
) -> None:
    """An InternVL v1 release: the fixture's layout at other sizes, its tower in a folder beside it."""
    hidden, ffn, vocab, wide = 48, 80, 340, 96
    given, rng = FIXTURES / "internvl-v1-tiny", np.random.default_rng(seed)
    own, vit = (json.loads((p / "config.json").read_text()) for p in (given, given / "vision_tower_intern_vit_6b"))
    own |= {"hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers, "vocab_size": vocab}
    own |= {"num_attention_heads": heads, "num_key_value_heads": heads, "mm_hidden_size": width}
    own |= {"mm_vision_tower": "./tower_intern_vit_6b"}
    vit |= {"hidden_size": width, "num_attention_heads": 2, "num_hidden_layers": tower, "intermediate_size": wide}
    sizes = {64: hidden, 160: ffn, 300: vocab}
    language = {
        n: t.shape for n, t in load_file(given / "model.safetensors").items() if ".layers." not in n or ".0." in n
    }
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in language.items():
        made = tuple(sizes[n] for n in shape)
        if name == "model.mm_projector.0.weight":
            made = (hidden, width)
        for i in range(layers) if ".layers." in name else (0,):
            shapes[name.replace(".layers.0.", f".layers.{i}.")] = made
    folder.mkdir(parents=True, exist_ok=True)
    save_file({n: _random(rng, n, s) for n, s in shapes.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(own))
    sizes, seen = {64: width, 192: 3 * width, 128: wide, 3: 3, 14: 14, 1: 1, 257: 257}, {}
    stored = load_file(given / "vision_tower_intern_vit_6b" / "model.safetensors")
    for name, tensor in stored.items():
        if ".layers." not in name or ".layers.0." in name:
            for i in range(tower) if ".layers." in name else (0,):
                seen[name.replace(".layers.0.", f".layers.{i}.")] = tuple(sizes[n] for n in tensor.shape)
    (folder / "tower_intern_vit_6b").mkdir(exist_ok=True)
    save_file({n: _random(rng, n, s) for n, s in seen.items()}, folder / "tower_intern_vit_6b" / "model.safetensors")
    (folder / "tower_intern_vit_6b" / "config.json").write_text(json.dumps(vit))


def make_both_layouts(folder: Path, tiny: Tiny) -> tuple[Path, Path]:
    """One random LLaVA in Hugging Face's layout and in the release's, its tower in a folder of its own."""
    ours, theirs = folder / "hf", folder / "original"
    make_llava(ours, tiny)
    config = json.loads((ours / "config.json").read_text())
    text, tower = config["text_config"], theirs / "clip-vit-tiny"
    tower.mkdir(parents=True)
    language: Arrays = {}
    seen: Arrays = {}
    for name, tensor in load_file(ours / "model.safetensors").items():
        if name.startswith("vision_tower."):
            seen[name.removeprefix("vision_tower.")] = tensor
        else:
            old, new = next((old, new) for old, new in LLAVA.items() if name.startswith(old))
            language[new + name.removeprefix(old)] = tensor
    save_file(language, theirs / "model.safetensors")
    save_file(seen, tower / "model.safetensors")
    (tower / "config.json").write_text(json.dumps(config["vision_config"]))
    own = {**text, "architectures": ["LlavaLlamaForCausalLM"], "model_type": "llava", "torch_dtype": "float32"}
    own |= {"mm_vision_tower": "./clip-vit-tiny", "mm_projector_type": "mlp2x_gelu", "image_aspect_ratio": "pad"}
    own |= {"mm_vision_select_layer": config["vision_feature_layer"], "mm_vision_select_feature": "patch"}
    (theirs / "config.json").write_text(json.dumps(own))
    return ours, theirs
