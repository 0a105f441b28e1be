"""Hugging Face's attention, handing out what it computes with: what the reference ranks tokens by.

Letters as in reference.py.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

Sink = dict[str, Tensor]


def register(base: str) -> str:
    """Tells transformers of an attention like `base` ("eager", "sdpa") that also hands out probabilities; its name."""
    function = eager_attention_forward if base == "eager" else ALL_ATTENTION_FUNCTIONS.get(base)
    if function is None:
        raise ValueError(f"unknown attn_implementation {base!r}")
    name = f"himap_reference_{base}"
    AttentionInterface.register(name, functools.partial(_attend, function))
    # So that calling the loaded model itself is also right: an unknown name would get no causal mask at all.
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[base])
    return name


def _attend(
    base: Callable[..., tuple[Tensor, Tensor | None]],
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    himap_sink: Sink | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention `base`; also puts `query` [1,H,S,E], `key`, `value` [1,G,S,E], without the axis of one, and the
    causal softmax of the first two, "attention", into `himap_sink`.

    The probabilities are [S,S] fp32, averaged over heads, from fp32 logits, whatever the model's dtype.
    Eager attention returns its probabilities rounded to the model's dtype, which in fp16 is enough to flip keep sets.
    """
    if himap_sink is not None:
        keys = key[0].float().repeat_interleave(query.shape[1] // key.shape[1], dim=0)
        logits = query[0].float() @ keys.transpose(1, 2) * options["scaling"]
        future = torch.ones(logits.shape[1:], dtype=torch.bool, device=logits.device).triu(1)
        probabilities = logits.masked_fill(future, -torch.inf).softmax(-1).mean(0)
        himap_sink |= {"attention": probabilities, "query": query[0], "key": key[0], "value": value[0]}
    return base(module, query, key, value, attention_mask, **options)


@contextmanager
def watched(attention: Any) -> Iterator[Sink]:
    """Yields an empty sink. Calls of Hugging Face's module `attention` in the block put `raw_query` [H,S,E] and
    `raw_key` [G,S,E] into it, which are what it will rotate; the rest comes by `himap_sink`."""
    sink: Sink = {}

    def keep(name: str) -> Callable[[torch.nn.Module, Any, Tensor], None]:
        def hook(module: torch.nn.Module, inputs: Any, output: Tensor) -> None:
            sink[name] = output.reshape(output.shape[1], -1, attention.head_dim).transpose(0, 1)

        return hook

    with ExitStack() as hooks:
        for which, name in (("q", "raw_query"), ("k", "raw_key")):
            last = getattr(attention, f"{which}_norm", None) or getattr(attention, f"{which}_proj")
            hooks.callback(last.register_forward_hook(keep(name)).remove)
        yield sink
