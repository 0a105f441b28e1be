"""`LlavaOnevisionForConditionalGeneration`: a SigLIP tower over tiles and an overview, a Qwen2 decoder
(arXiv 2408.03326). Of several pictures it sees the overviews alone, of a film every frame at half the resolution."""

import re
from dataclasses import replace
from typing import TYPE_CHECKING

from himap_export.engines.film import Film
from himap_export.engines.image import ImagePreprocessing
from himap_export.engines.split import Split
from himap_export.exporter import config as schemas
from himap_export.exporter.checks import require
from himap_export.exporter.families.anyres import Anyres
from himap_export.exporter.families.llava import Arrangement
from himap_export.exporter.families.resize import interpolation, resampled
from himap_export.exporter.family import ImageOptions, PromptRules, VisionSpec, llama_decoder
from himap_export.graphs.spec import DecoderSpec

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

HALF = (0.5, 0.5, 0.5)
TEMPLATE = "<|im_start|>user\n{pictures}\n{prompt}<|im_end|><|im_start|>assistant\n"
TURN = "<|im_end|><|im_start|>user\n\n{prompt}<|im_end|><|im_start|>assistant\n"


class LlavaOnevision(Anyres):
    """LLaVA-OneVision."""

    architecture = "LlavaOnevisionForConditionalGeneration"
    schema = schemas.LlavaOnevision
    model_type = "llava_onevision"
    configuration = "LlavaOnevisionConfig"
    texts, tower_type = ("qwen2",), "siglip_vision_model"
    selection = "full"
    mean, std = HALF, HALF

    @property
    def tied(self) -> bool:
        """Either level of the configuration may say it: the smallest model's decoder ties what its model denies."""
        parts = self.fields, self.fields.get("text_config", {})
        return any(part.get("tie_word_embeddings") for part in parts)

    @property
    def most(self) -> int | None:
        found = re.fullmatch(r"anyres_max_([1-9][0-9]{0,5})", self.full.vision_aspect_ratio)
        require(found is not None, f"vision_aspect_ratio {self.full.vision_aspect_ratio!r} is not anyres_max_N")
        return int(found[1]) if found else None

    def decoder(self) -> DecoderSpec:
        return llama_decoder(self.full.text_config, qkv_bias=True)

    def vision(self, asked: ImageOptions) -> VisionSpec:
        """Returns a picture of any size; one of several, of which it sees the overview and a newline; or a film, of
        which it sees the frames, a quarter as many tokens each, and a newline."""
        if asked.frames is None and not asked.several:
            return super().vision(asked)
        self.check()
        asked.require_whole()
        pixels, frames = self.full.vision_config.image_size, asked.frames
        side = self.side if frames is None else -(-self.side // 2)
        tiles = frames or 1
        return VisionSpec(
            size=asked.size or (pixels, pixels),
            channels=self.full.vision_config.num_channels,
            tokens=tiles * side**2 + 1,
            grid=(side, side),
            tiles=tiles,
            cut_to=(pixels, pixels),
            film=None if frames is None else Film(frames, frames, "arange", 1.0),
            several=frames is None,
        )

    def prompt(self) -> PromptRules:
        return replace(
            super().prompt(),
            template=TEMPLATE,
            lead="<image>",
            turn=TURN,
            eos=(151645,),
            pad=151643,
            film_token=self.full.video_token_index,
            film_text="<video>",
            film_lead="<video>",
        )

    def image(self, spec: VisionSpec) -> ImagePreprocessing:
        """Returns one of several pictures in the middle of a square of its longer side, or a film's frame as it is:
        both are resized to the tower's view."""
        if spec.newline:
            return super().image(spec)
        longer = max(spec.size)
        canvas = (longer, longer) if spec.film is None else spec.size
        return self.letterboxed(canvas, Split((spec.view,), spec.view, spec.view))

    def arrangement(self, spec: VisionSpec) -> Arrangement:
        """Returns the tokens of `vision`'s three kinds; of a film's frames, each grid resized to half its sides."""
        import torch

        if spec.newline:
            return super().arrangement(spec)
        (rows, columns), side, film = spec.grid, self.side, spec.film is not None

        def place(module: "Module", features: "Tensor") -> "Tensor":
            if film:
                pooling = module.get_buffer("pooling")
                features = resampled(features.reshape(-1, side, side, features.shape[-1]), pooling, pooling)
            tokens = features.reshape(1, spec.tiles * rows * columns, -1)
            return torch.cat([tokens, module.get_parameter("image_newline").expand(1, 1, -1)], dim=1)

        return Arrangement(place, {"pooling": interpolation(side, rows, "bilinear")} if film else {})
