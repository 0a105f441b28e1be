"""What a criterion may look at in the reference is what Hugging Face's layers compute, in every family."""

import numpy as np
import pytest
import torch
from commands import Workshop
from families import FAMILIES, KV_HEADS, family_inputs
from tiny import make_inputs
from transformers import LlavaForConditionalGeneration

from himap_export.validate.reference.criteria import ReferenceCut
from himap_export.validate.reference.reference import Reference

LAYER = 3


@pytest.mark.parametrize("name", FAMILIES)
def test_a_state_shows_what_its_last_layer_computed(work: Workshop, name: str) -> None:
    inputs, reference = family_inputs(name), Reference(work.family(name), media=FAMILIES[name].media())
    start = reference.start(inputs.input_ids[0][inputs.attention_mask[0] != 0], inputs.pixel_values)
    before, state = reference.advance(start, LAYER - 1), reference.advance(start, LAYER, attention=True)
    torch.testing.assert_close(state.previous, before.hidden, rtol=0, atol=0)
    attention = reference.decoder.layers[LAYER - 1].self_attn
    read = reference.decoder.layers[LAYER - 1].input_layernorm(before.hidden)[0]
    size, e = read.shape[0], attention.head_dim
    raw = {which: getattr(attention, f"{which}_proj")(read).view(size, -1, e).transpose(0, 1) for which in "qkv"}
    for which in "qk":
        raw[which] = getattr(attention, f"{which}_norm", lambda x: x)(raw[which])
    for shown, wanted in ((state.raw_query, raw["q"]), (state.raw_key, raw["k"]), (state.value, raw["v"])):
        torch.testing.assert_close(shown, wanted, rtol=0, atol=1e-5)
    assert state.key.shape == state.raw_key.shape == state.value.shape == (KV_HEADS, size, e)
    # A rotation turns each pair (i, i + E/2) and nothing at position 0.
    for raw_one, turned in ((state.raw_query, state.query), (state.raw_key, state.key)):
        pairs = [x.unflatten(2, (2, e // 2)).norm(dim=2) for x in (raw_one, turned)]
        torch.testing.assert_close(*pairs, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(raw_one[:, 0], turned[:, 0], rtol=0, atol=1e-6)
        assert (raw_one[:, 1:] - turned[:, 1:]).abs().amax() > 0.1
    with pytest.raises(ValueError, match="advanced without"):
        before.key  # noqa: B018


@pytest.mark.parametrize("layer", [1, 2, 5])
@torch.no_grad()
def test_keys_and_states_rank_as_their_authors_have_it(work: Workshop, layer: int) -> None:
    """`image_k_l2_norm` (ViTCoP, vitcop_modeling_llama.py), `l2_diff_candidate` (V2Drop, modeling_qwen2_vl_self.py),
    on the states and the cache that transformers' model itself gives."""
    inputs, keep = make_inputs(work.tiny("gqa2"), [9], [5], seed=4), 5
    model = LlavaForConditionalGeneration.from_pretrained(work.checkpoint("gqa2"), attn_implementation="eager").eval()
    ids = torch.from_numpy(inputs.input_ids)
    out = model(ids, torch.from_numpy(inputs.pixel_values), output_hidden_states=True, use_cache=True)
    image = torch.nonzero(ids[0] == model.config.image_token_id).flatten()
    keys = out.past_key_values.layers[layer - 1].keys
    short = keys.mean(dim=1).norm(p=2, dim=-1)[0][image].topk(keep, largest=False).indices
    before, after = (out.hidden_states[n][:, image] for n in (layer - 1, layer))
    moved = torch.norm(after - before, p=2, dim=-1)[0].topk(keep, largest=True).indices
    for criterion, chosen in (("key-norm", short), ("v2drop", moved)):
        cuts = (ReferenceCut(layer, criterion, keep=keep),)
        kept = work.reference("gqa2").prefill(inputs.input_ids, inputs.pixel_values, cuts=cuts).kept[0][0]
        np.testing.assert_array_equal(np.intersect1d(kept, image), image[chosen.sort().values])
