"""`LlavaNextForConditionalGeneration`: LLaVA-1.6, CLIP over tiles and an overview, a LLaMA or Mistral decoder."""

from dataclasses import replace

from himap_export.engines.image import CLIP_MEAN, CLIP_STD
from himap_export.exporter import config as schemas
from himap_export.exporter.checks import require_supported
from himap_export.exporter.families.anyres import Anyres
from himap_export.exporter.family import PromptRules
from himap_export.graphs.spec import DecoderSpec

VICUNA = (
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the human's questions. "
)


class LlavaNext(Anyres):
    """LLaVA-NeXT."""

    architecture = "LlavaNextForConditionalGeneration"
    schema = schemas.LlavaNext
    model_type = "llava_next"
    configuration = "LlavaNextConfig"
    texts = ("llama", "mistral")
    selection = "default"
    mean, std = CLIP_MEAN, CLIP_STD

    def decoder(self) -> DecoderSpec:
        require_supported("sliding window", getattr(self.full.text_config, "sliding_window", None), None)
        return super().decoder()

    def prompt(self) -> PromptRules:
        rules = super().prompt()
        if self.full.text_config.model_type == "mistral":
            return replace(rules, template="[INST] {pictures}{prompt} [/INST]", turn="</s> [INST] {prompt} [/INST]")
        return replace(rules, template=VICUNA + rules.template)
