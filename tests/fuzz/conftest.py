"""The good checkpoint, bundle and files that the attacker spoils copies of: made once, never written to."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from commands import OPENVINO, ORT, Workshop
from families import FAMILIES, family_inputs
from PIL import Image
from ready_checkpoints import write_compressed, write_gptq

FIXTURES = Path(__file__).parent.parent / "fixtures"


@pytest.fixture(scope="session")
def originals(work: Workshop) -> Mapping[str, Path]:
    """By the name they have in a room: model, bundle, in.npz, image.png, data.jsonl, and a folder for each config."""
    model, bundle = work.family("llava"), work.family_bundle("llava", "--k1", 1, "--k2", 3)
    small = work.family_bundle("llava", "--k1", 1, "--k2", 3, "--quantize", "int4", *ORT, *OPENVINO)
    with work._once("fuzz") as (folder, missing):
        if missing:
            folder.mkdir()
            _make(folder)
            write_gptq(model, folder / "quantised gptq", version=2, symmetric=False)
            write_compressed(model, folder / "quantised compressed-tensors")
    return {"model": model, "bundle": bundle, "bundle of int4": small} | {
        path.name: path for path in sorted(folder.iterdir())
    }


def _make(folder: Path) -> None:
    inputs = family_inputs("llava")
    np.savez(
        folder / "in.npz",
        input_ids=inputs.input_ids,
        attention_mask=inputs.attention_mask,
        pixel_values=inputs.pixel_values,
    )
    Image.effect_noise((60, 50), 60).convert("RGB").save(folder / "image.png")
    line = {"image": "image.png", "question": "Which?", "answer": "a dog"}
    (folder / "data.jsonl").write_text("\n".join([json.dumps(line)] * 2))
    for name, row in FAMILIES.items():
        if name != "internvl-tiles":
            config = row.config()
            config.architectures = [type(config).__name__.replace("Config", "ForConditionalGeneration")]
            config.save_pretrained(folder / f"config of {name}")
            (folder / f"config of {name}" / "flags.json").write_text(json.dumps(list(map(str, row.flags))))
    for name in ("internvl-v1-tiny", "qwen-vl-tiny"):
        own = folder / f"config of {name}"
        own.mkdir()
        (own / "config.json").write_bytes((FIXTURES / name / "config.json").read_bytes())
        tower = "vision_tower_intern_vit_6b"
        if (FIXTURES / name / tower).is_dir():
            (own / tower).mkdir()
            (own / tower / "config.json").write_bytes((FIXTURES / name / tower / "config.json").read_bytes())
