"""The checkpoint a bundle is judged against, and the PyTorch reference of it."""

from pathlib import Path
from typing import TYPE_CHECKING

from himap_export.graphs.errors import HimapError
from himap_export.graphs.spec import Dtype

if TYPE_CHECKING:
    from himap_export.validate.reference.reference import Reference


def checkpoint_folder(model: str, vision_tower: Path | None = None) -> Path:
    """The folder of an alias, a Hugging Face id or a folder, with weights; `vision_tower` as for `resolve`. HimapError
    as `resolve`."""
    from himap_export.exporter.checkpoint import open_checkpoint
    from himap_export.exporter.registry import resolve

    found = resolve(model, vision_tower=vision_tower)
    assert found.folder is not None  # `resolve` fetches weights unless told not to
    open_checkpoint(found.folder, tower=found.tower)
    return found.folder


def load_reference(
    checkpoint: Path, dtype: Dtype, threads: int, attention: str = "eager", vision_tower: Path | None = None
) -> "Reference":
    """PyTorch's model, `threads` CPU threads; its vision tower in `vision_tower` or where it says. HimapError if
    transformers cannot load it."""
    import torch
    from transformers.utils import logging

    from himap_export.validate.reference.reference import Reference

    torch.set_num_threads(threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    kinds = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    try:
        return Reference(checkpoint, kinds[dtype], attention, vision_tower=vision_tower)
    except (MemoryError, ImportError):
        raise
    except Exception as problem:  # transformers checks configurations and weights with errors of many kinds
        details = " ".join(str(problem).split())[:500] or type(problem).__name__
        raise HimapError(f"PyTorch cannot load {checkpoint}", details) from None
