"""The models one can name: aliases with what their configuration says, and the architectures that can be exported."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from himap_export.exporter import llava
from himap_export.exporter.checkpoint import read_config
from himap_export.graphs.errors import Exit, HimapError


@dataclass(frozen=True)
class Alias:
    """A published model: where it lies, and its config.json as far as a plan needs it (no network for `--dry-run`)."""

    source: str
    config: dict[str, Any]


def _llava(hidden: int, ffn: int, layers: int, heads: int) -> dict[str, Any]:
    text = {"model_type": "llama", "hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers}
    text |= {"num_attention_heads": heads, "num_key_value_heads": heads, "vocab_size": 32064, "rms_norm_eps": 1e-5}
    text |= {"max_position_embeddings": 4096, "pad_token_id": 32001}
    vision = {"model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "image_size": 336}
    vision |= {"num_attention_heads": 16, "num_hidden_layers": 24, "patch_size": 14, "projection_dim": 768}
    config = {"architectures": [llava.ARCHITECTURE], "model_type": "llava", "image_token_index": 32000}
    return config | {"text_config": text, "vision_config": vision}


ALIASES = {
    "llava-7b": Alias("llava-hf/llava-1.5-7b-hf", _llava(4096, 11008, 32, 32)),
    "llava-13b": Alias("llava-hf/llava-1.5-13b-hf", _llava(5120, 13824, 40, 40)),
    "shapes": Alias(str(Path(__file__).parent / "shapes"), {}),
}
ARCHITECTURES = (llava.ARCHITECTURE,)
# What an export reads of a repository on the hub: never code, never pickles.
_PATTERNS = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model")


@dataclass(frozen=True)
class Model:
    """A model as named by the user: its configuration, and its folder once the weights are there."""

    name: str
    source: str
    config: dict[str, Any]
    folder: Path | None


def resolve(name: str, revision: str | None = None, weights: bool = True) -> Model:
    """Alias, local folder or Hugging Face id to a model; without `weights` an alias needs no network.

    HimapError: usage for what is no model or of an unsupported architecture, missing for what cannot be fetched.
    """
    alias = ALIASES.get(name)
    source = alias.source if alias else name
    if Path(source).is_dir():
        return _checked(Model(name, source, read_config(Path(source)), Path(source)))
    if alias and not weights:
        return _checked(Model(name, source, alias.config, None))
    if alias is None and (source.count("/") != 1 or source.startswith((".", "/"))):
        known = f"aliases: {', '.join(ALIASES)}; or a Hugging Face id, or a folder"
        raise HimapError(f"unknown model {name}", known, code=Exit.USAGE)
    folder = _download(source, revision, weights)
    return _checked(Model(name, source, read_config(folder), folder))


def _checked(model: Model) -> Model:
    found = (model.config.get("architectures") or ["(none named)"])[0]
    if found not in ARCHITECTURES:
        supported = f"supported: {', '.join(ARCHITECTURES)}"
        raise HimapError(f"{model.name}: unsupported architecture {found}", supported, code=Exit.USAGE)
    return model


def _download(source: str, revision: str | None, weights: bool) -> Path:
    from huggingface_hub import snapshot_download

    patterns = [p for p in _PATTERNS if weights or not p.endswith("safetensors")]
    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=patterns))
    except Exception as problem:  # the hub's client raises its own, its transport's and the OS's errors
        details = (str(problem).splitlines() or [type(problem).__name__])[0]
        hint = "check the id and the network, or give a local checkpoint folder"
        raise HimapError(f"cannot fetch {source} from the Hugging Face hub", details, hint, Exit.MISSING) from None
