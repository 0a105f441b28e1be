"""`SmolVLMForConditionalGeneration`: SmolVLM2 in Hugging Face's layout (transformers/models/smolvlm).

A SigLIP tower that sees square tiles, a pixel shuffle that makes one token of s x s patches (`scale_factor`), one
linear layer, and a LLaMA decoder. A picture is enlarged to four tiles along its longer edge and cut into tiles, behind
which comes an overview; of films each frame is one tile.
"""

from functools import cached_property
from math import ceil
from typing import TYPE_CHECKING, Any

import numpy.typing as npt

from himap_export.engines.film import Film
from himap_export.engines.image import ImagePreprocessing, mean_color
from himap_export.engines.prompt import Expansion, Segment
from himap_export.engines.split import Split
from himap_export.exporter import config as schemas
from himap_export.exporter.checks import require, require_model_type, require_tower
from himap_export.exporter.families.constants import on_meta
from himap_export.exporter.families.number_words import number_words
from himap_export.exporter.family import Family, ImageOptions, PromptRules, VisionSpec, llama_decoder, make_config
from himap_export.graphs.errors import Exit, HimapError
from himap_export.graphs.spec import DecoderSpec

if TYPE_CHECKING:
    import torch
    from transformers import SmolVLMConfig

Size = tuple[int, int]
# Tiles along a picture's longer edge: every published processor's `size` is four times its `max_image_size`.
LONGEST = 4
MOST_SIDE = 4096  # pixels: the processor enlarges no further
HALF = (0.5, 0.5, 0.5)
AROUND, OVERVIEW = "<fake_token_around_image>", "<global-img>"
INTRO = "You are provided the following series of {frames} frames from a {{duration}} [H:MM:SS] video.\n"
REST = "{prompt}<end_of_utterance>\nAssistant:"
FRAME = "\nFrame from {clock}:"


class SmolVlm(Family[schemas.SmolVlm]):
    """SmolVLM2."""

    architecture = "SmolVLMForConditionalGeneration"
    schema = schemas.SmolVlm
    model_type = "smolvlm"
    decoder_prefixes = ("model.text_model.", "text_model.")
    vision_prefixes = ("model.", "")

    @cached_property
    def full(self) -> "SmolVLMConfig":
        """transformers' configuration."""
        from transformers import SmolVLMConfig

        require_model_type("text model", self.fields.get("text_config", {}), "llama")
        require_model_type("vision tower", self.fields.get("vision_config", {}), "smolvlm_vision")
        return make_config(SmolVLMConfig, self.fields)

    @property
    def tied(self) -> bool:
        """transformers 5 ties by the outer field, false if absent, whatever text_config says."""
        return bool(self.fields.get("tie_word_embeddings", False))

    def decoder(self) -> DecoderSpec:
        return llama_decoder(self.full.text_config)

    def vision(self, asked: ImageOptions) -> VisionSpec:
        """Returns a picture of `asked.size` cut into tiles, seen whole if `asked.tiles` is 1, or a film's frames."""
        tower, scale = self.full.vision_config, self.full.scale_factor
        require_tower(tower.hidden_size, tower.num_attention_heads, tower.hidden_act)
        tile, patches = tower.image_size, tower.image_size // tower.patch_size
        require(
            tile * LONGEST <= MOST_SIDE, f"tiles of {tile} pixels: {LONGEST} along an edge are more than {MOST_SIDE}"
        )
        side, rest = divmod(patches, scale)
        whole_blocks = side > 0 and not rest
        require(whole_blocks, f"{patches}x{patches} patches of a tile do not fall into blocks of {scale}x{scale}")
        size = asked.size or (LONGEST * tile, LONGEST * tile)
        film = None if asked.frames is None else Film(asked.frames, asked.frames, "linspace", fps=1.0)
        tiles = film.frames if film else self._tiles(size, asked.tiles)
        if film and asked.tiles not in (None, 1):
            raise HimapError(f"{asked.tiles} tiles do not fit a film", "each frame is one tile", code=Exit.USAGE)
        positions = self.full.text_config.max_position_embeddings
        most = (positions - 1) // side**2
        if not 1 <= tiles <= most:
            details = f"each is {side**2} of the model's {positions} positions: 1 to {most}"
            raise HimapError(f"{tiles} {'frames' if film else 'tiles'} do not fit", details, code=Exit.USAGE)
        return VisionSpec(
            size=size, cut_to=(tile, tile), tiles=tiles, channels=tower.num_channels, tokens=tiles * side**2,
            grid=(side, side), film=film,
        )  # fmt: skip

    def _tiles(self, size: Size, asked: int | None) -> int:
        """Returns how many tiles a picture of `size` is, its overview counted: 1, if that alone is `asked` for."""
        cut = self._split(size)
        if asked in (None, 1, cut.tiles):
            return asked or cut.tiles
        (rows, columns), summary = cut.grid, f"{asked} tiles do not fit"
        details = f"{size[1]}x{size[0]} pixels are {rows}x{columns} tiles and an overview"
        raise HimapError(summary, details, f"ask for {cut.tiles}, or for 1, the overview alone", Exit.USAGE)

    def prompt(self) -> PromptRules:
        return PromptRules(
            image_token=self.fields.get("image_token_id", 49190),
            image_text="<image>",
            template=f"<|im_start|>User:{{pictures}}{REST}",
            interleaved=f"<|im_start|>User: {REST}",
            lead="<image>",
            turn=f"<end_of_utterance>\nUser: {REST}",
            film_text="<video>",
            film_lead=" <video>",
            positions=self.full.text_config.max_position_embeddings,
            eos=(49279,),
            pad=2,
        )

    def expansion(self, spec: VisionSpec) -> Expansion:
        """Returns `get_image_prompt_string` and `replace_video_token` of processing_smolvlm.py."""
        each, whole = spec.tokens // spec.tiles, AROUND + OVERVIEW
        if spec.film is not None:
            intro = INTRO.format(frames=number_words(spec.tiles))
            texts = [intro + FRAME + whole, *[AROUND + FRAME + whole] * (spec.tiles - 1)]
            return Expansion(tuple(Segment(text, each) for text in texts), AROUND + "\n\n")
        if spec.tiles == 1:
            return Expansion((Segment(whole, each),), AROUND)
        rows, columns = self._split(spec.size).grid
        places = [(row, column) for row in range(1, rows + 1) for column in range(1, columns + 1)]
        texts = ["\n" * (r > 1 and c == 1) + f"{AROUND}<row_{r}_col_{c}>" for r, c in places]
        return Expansion(tuple(Segment(text, each) for text in [*texts, "\n\n" + whole]), AROUND)

    def image(self, spec: VisionSpec) -> ImagePreprocessing:
        """Returns the picture within `spec.size`, the rest grey, enlarged and cut; or, seen whole, made one tile."""
        split = self._split(spec.size)
        if spec.tiles == 1 or spec.film is not None:
            split = Split((split.resizes[0], spec.view), spec.view, spec.view)
        return ImagePreprocessing(
            resize=spec.size, crop=None, resample="lanczos", mean=HALF, std=HALF, pad_color=mean_color(HALF),
            letterbox=True, split=split,
        )  # fmt: skip

    def _split(self, size: Size) -> Split:
        """Returns how a picture of `size` (height, width) is cut: `resize`, then `resize_for_vision_encoder`."""
        tile: int = self.full.vision_config.image_size
        first = tuple(max(1, side + side % 2) for side in _enlarged(size, LONGEST * tile))
        sheet = tuple(ceil(side / tile) * tile for side in _enlarged((first[0], first[1]), LONGEST * tile))
        return Split(((first[0], first[1]), (sheet[0], sheet[1])), (sheet[0], sheet[1]), (tile, tile), "last")

    def module(self, spec: VisionSpec, dtype: "torch.dtype") -> "torch.nn.Module":
        """Returns Hugging Face's own tower and connector, joined as in SmolVLMModel.get_image_features."""
        import torch
        from transformers.models.smolvlm.modeling_smolvlm import SmolVLMConnector, SmolVLMVisionTransformer

        full, (rows, columns) = self.full, spec.grid
        scale = full.scale_factor

        class Vision(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.vision_model = SmolVLMVisionTransformer._from_config(
                    full.vision_config, attn_implementation="sdpa"
                )
                self.connector = SmolVLMConnector(full)

            def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
                tower = self.vision_model
                patches = tower.embeddings.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
                x = patches + tower.embeddings.position_embedding(self.places)
                x = tower.post_layernorm(tower.encoder(inputs_embeds=x).last_hidden_state)  # [tiles,N,d]
                # The pixel shuffle in one transpose, over blocks of s x s patches.
                blocks = x.reshape(-1, rows, scale, columns, scale, x.shape[-1]).transpose(2, 3)
                features: torch.Tensor = self.connector.modality_projection(blocks.reshape(1, spec.tokens, -1))
                return features

        return on_meta(Vision, dtype, {"places": _places(rows * scale)})


def _enlarged(size: Size, longer: int) -> Size:
    """Returns (height, width) in the proportions of `size`, the longer edge `longer`, the other rounded down."""
    aspect = size[1] / size[0]
    return (int(longer / aspect), longer) if aspect >= 1 else (longer, int(longer * aspect))


def _places(side: int) -> npt.NDArray[Any]:
    """Returns which learned position each patch of a tile has, [side*side].

    As SmolVLMVisionEmbeddings computes it from fractions of the side, in fp32: at sides of 19, 25, 29 and others some
    patches fall into their neighbour's place.
    """
    import torch

    with torch.device("cpu"):
        fractions = torch.clamp(torch.arange(side, dtype=torch.float32) * (1.0 / torch.tensor(side)), max=1.0 - 1e-6)
        bounds = torch.arange(1 / side, 1.0, 1 / side)
        buckets = torch.bucketize(fractions, bounds, right=True)
    places: npt.NDArray[Any] = (buckets[:, None] * side + buckets[None]).reshape(-1).numpy()
    return places
