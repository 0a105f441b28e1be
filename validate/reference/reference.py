"""The PyTorch reference of HiMAP (arXiv 2503.13108) and of its baselines: what every bundle is compared with.

Hugging Face's own modules compute everything that pruning leaves alone (tower, projector, embedding, decoder layers,
rotary embedding, norm, head). This file only decides which tokens enter which layers, as the authors' `himap.py` does:

1. Layers 0..K1-1 see all tokens, K1..K2-1 those alive after the cut at K1, K2..L-1 those alive after the cut at K2.
2. A cut at K ranks the image tokens by its criterion, see CRITERIA. HiMAP's: the attention of layer K-1 (fp32 softmax,
   mean over the heads), summed over the text rows after the last image token (first cut; no such row: all scores are
   0, the first tokens stay) or over the rows of the image tokens themselves (second cut).
3. floor(R * n) image tokens leave, those with the lowest scores; of equals, the last one leaves first. All text stays.
4. Who stays keeps its order and its original position id; the causal mask is rebuilt.

Unlike the authors, who rank again at every generated token because they run without a cache, tokens are ranked once, at
prefill, and every layer caches the keys and values of the tokens that it saw. The first generated token is the same.

Samples are computed one by one and without padding, so nothing here can depend on where padding lies. It shares no code
with the rooms that are compared with it, not even their errors: misuse is a ValueError.

Shape letters: B batch, S tokens of a stage (S0, S1, ..), V image tokens that are candidates at a cut (V0, V1, ..),
D hidden, H query heads, G kv heads, E head dim, L layers, W vocabulary, N generated tokens.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache

from himap_export.validate.reference.adapter import Media, VisionFeatures, load_adapter
from himap_export.validate.reference.attention import register, watched
from himap_export.validate.reference.criteria import CRITERIA, Cuts, LayerView, ReferenceCut, State

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]
Item = TypeVar("Item", bound=np.generic)
Row = tuple[list[State], list[Tensor]]  # of one sample: by stage, how it ends; by cut, the scores of its candidates
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Prefill:
    """What the prompts gave, with one entry per cut. Positions count a sample's real tokens from 0."""

    lengths: Ints  # [B] real tokens of each prompt, which is also the position of the first generated token
    kept: tuple[Ints, ...]  # [B,S_i] positions of the tokens alive after the cut, ascending; -1 pads, on the right
    scores: tuple[Floats, ...]  # [B,V_i] importance of its candidates, in the order of their positions; NaN pads
    hidden: tuple[tuple[Floats, ...], ...]  # per stage and sample [S,D], before the next gather or the final norm
    logits: Floats  # [B,W] at the last prompt token
    caches: tuple[DynamicCache, ...]  # per sample; layer i holds keys (rotated) and values [1,G,S of its stage,E].
    # Decoding appends to the caches: the one thing in here that is not a constant.
    shifts: tuple[int, ...]  # per sample; under M-RoPE what is added to a position behind the prompt


class Reference:
    """A checkpoint in Hugging Face's modules, unpruned or cut. Deterministic; every method runs without gradients."""

    def __init__(
        self,
        folder: Path,
        dtype: torch.dtype = torch.float32,
        attn_implementation: str = "eager",
        device: str = "cpu",
        vision_tower: Path | None = None,
        media: Media | None = None,
    ) -> None:
        """Load `folder` in `dtype`. `attn_implementation="sdpa"` is the fast one, a fair opponent in benchmarks.

        `vision_tower`: the folder of its tower, for a release that has it apart. `media`: what pixels are of; None:
        pictures of their own size."""
        decoder_attention = register(attn_implementation)
        self.adapter = load_adapter(
            folder, dtype, decoder_attention=decoder_attention, vision_attention=attn_implementation,
            vision_tower=vision_tower, media=media or Media(),
        )  # fmt: skip
        self.adapter.whole.to(device)
        self.decoder: Any = self.adapter.decoder
        self.layers = len(self.decoder.layers)
        self.dtype, self.device, self._eager = dtype, device, attn_implementation == "eager"
        self.stop_tokens, self.pad_token = self.adapter.stop_tokens, self.adapter.pad_token

    @torch.no_grad()
    def prefill(
        self,
        input_ids: Ints,
        pixel_values: Floats | None,
        attention_mask: Ints | None = None,
        cuts: Cuts = (),
        forced: Sequence[Ints] | None = None,
        seeds: Sequence[int] | None = None,
        seconds: Sequence[float] = (),
    ) -> Prefill:
        """Runs the prompts.

        `input_ids` [B,S] int64 with one image placeholder per image token, anywhere; `pixel_values` [images,3,H,W],
        tiles counted as images, in the order of the placeholders; `attention_mask` [B,S], 0 where a token is padding,
        on either side.
        No `cuts` is the unpruned model. `forced` keeps the given positions (per cut [B,S_i], text included, -1 pads)
        instead of the ranked ones; the scores are reported all the same. `seeds` [B] (0) are what random cuts draw by,
        `seconds` [B] (1) what lies between two steps of a prompt's film.
        """
        if forced is not None and len(forced) != len(cuts):
            raise ValueError(f"forced positions of {len(forced)} cuts for {len(cuts)} cuts")
        self._check(cuts)
        rows = []
        for sample, state in enumerate(self._embed(input_ids, pixel_values, attention_mask, seconds)):
            given = None if forced is None else [_real(kept[sample]).to(self.device) for kept in forced]
            rows.append(self._row(state, cuts, given, 0 if seeds is None else int(seeds[sample])))
        return self._stacked(rows)

    @torch.no_grad()
    def start(self, input_ids: Ints, pixel_values: Floats | None) -> State:
        """Returns one prompt [S] embedded, before layer 0: what `advance`, `cut` and `logits` take from stage to
        stage."""
        return next(self._embed(input_ids[None], pixel_values, None))

    @torch.no_grad()
    def advance(self, state: State, layer: int, attention: bool = False) -> State:
        """Returns `state` after the layers before `layer`, with what criteria see of the last one if `attention`."""
        layers = range(state.layer, layer)
        positions = self.rope_positions(state)
        hidden, seen = self.run(layers, state.hidden, positions, state.cache, score=attention, state=state)
        return replace(state, layer=layer, hidden=hidden, seen=seen)

    @torch.no_grad()
    def cut(self, state: State, cut: ReferenceCut, seed: int = 0) -> tuple[State, Tensor]:
        """Returns `state` with the image tokens that `cut` keeps, and the scores [V] it ranked them by."""
        is_image = state.is_image
        count = int(is_image.sum())
        each = count // cut.images
        keep = cut.images * (each - math.floor(cut.remove * each)) if cut.keep is None else cut.keep
        scores = CRITERIA[cut.criterion](replace(state, coefficients=cut.coefficients), keep, seed)
        if scores.shape != (count,):
            raise ValueError(f"{cut.criterion} gives scores {list(scores.shape)} to {count} image tokens")
        winners = _winners(scores.reshape(cut.images, -1), keep // cut.images)
        kept = torch.cat((state.alive[~is_image], state.alive[is_image][winners])).sort().values
        return self._keep(state, kept), scores

    @torch.no_grad()
    def logits(self, state: State) -> Tensor:
        """Returns the logits [W] fp32 at the last token of a `state` that has been through all layers."""
        return self._logits(state.hidden)[0]

    @torch.no_grad()
    def answer(self, start: Prefill, max_new_tokens: int, given: Ints | None = None) -> tuple[Ints, Floats]:
        """Returns the answers [B,N] to a prefill, greedy or the `given` ones, and logits [B,N,W]: entry n follows the
        first n tokens. N <= max_new_tokens is where the last row ended, with its stop token; others are padded behind.

        One flipped token does not end a comparison of logits behind given tokens. Appends to the caches of `start`:
        answer a prefill once.
        """
        tokens, logits, ended = list[Ints](), [start.logits], np.zeros(len(start.logits), bool)
        for n in range(max_new_tokens):
            tokens.append(np.where(ended, self.pad_token, logits[n].argmax(1)) if given is None else given[:, n])
            ended |= given is None and np.isin(tokens[n], self.stop_tokens)
            if ended.all() or n + 1 == max_new_tokens:
                break
            samples = zip(tokens[n].tolist(), (start.lengths + n).tolist(), start.caches, start.shifts, strict=True)
            rows = [self.step(torch.tensor([token]), *more)[0].cpu().numpy() for token, *more in samples]
            logits.append(np.stack(rows))
        return np.stack(tokens, axis=1), np.stack(logits, axis=1)

    @torch.no_grad()
    def step(self, tokens: Tensor, position: int, cache: DynamicCache, shift: int = 0) -> Tensor:
        """Returns logits [B,W] fp32 of one decode step: `tokens` [B] at `position`, appended to `cache`."""
        hidden = self.decoder.embed_tokens(tokens.to(self.device)[:, None])
        at = torch.tensor([position + shift], device=self.device)
        # No mask: a single row may see all that is cached, and each layer has cached only what was alive in its stage.
        hidden, _ = self.run(range(self.layers), hidden, at.expand(3, 1) if self.adapter.rope_positions else at, cache)
        return self._logits(hidden)

    @torch.no_grad()
    def embed(self, input_ids: Ints, pixel_values: Floats | None, attention_mask: Ints | None = None) -> State:
        """Prompts of one length, image features in their places, as one state of [B,S0,D] for `forward`.

        Positions, and what M-RoPE makes of them, are the first prompt's: it serves to measure time."""
        states = list(self._embed(input_ids, pixel_values, attention_mask))
        deepstack = (torch.stack(parts) for parts in zip(*(s.deepstack for s in states), strict=True))
        hidden = torch.cat([state.hidden for state in states])
        return replace(states[0], hidden=hidden, deepstack=tuple(deepstack))

    @torch.no_grad()
    def forward(self, state: State) -> tuple[Tensor, DynamicCache]:
        """Returns the unpruned decoder's logits [B,W] fp32 at the last token of what `embed` gives, and its cache."""
        cache = DynamicCache(config=self.decoder.config)
        hidden, _ = self.run(range(self.layers), state.hidden, self.rope_positions(state), cache, state=state)
        return self._logits(hidden), cache

    def see(self, pixel_values: Floats) -> VisionFeatures:
        """Returns what the tower makes of `pixel_values` [images,3,H,W]."""
        return self.adapter.see(torch.as_tensor(pixel_values).to(self.device, self.dtype))

    @torch.no_grad()
    def image_features(self, pixel_values: Floats, prompts: int | None = None) -> tuple[Tensor, ...]:
        """Returns what the tower makes of `pixel_values` [images,3,H,W], [prompts,V,D] each: the projected features,
        then those of deepstack. One image a prompt if None."""
        seen = self.see(pixel_values)
        return tuple(f.reshape(prompts or len(pixel_values), -1, f.shape[-1]) for f in (seen.features, *seen.deepstack))

    def rope_positions(self, state: State) -> Tensor:
        """Returns the positions that the rotary embedding reads for the tokens of `state`: [S], under M-RoPE [3,S]."""
        return state.alive if state.rope_positions is None else state.rope_positions[:, state.alive]

    def _embed(
        self, input_ids: Ints, pixel_values: Floats | None, attention_mask: Ints | None, seconds: Sequence[float] = ()
    ) -> Iterator[State]:
        """Each sample, embedded, before layer 0."""
        if input_ids.ndim != 2 or (attention_mask is not None and attention_mask.shape != input_ids.shape):
            raise ValueError("input_ids must be [batch, tokens] and attention_mask the same shape")
        real = np.ones_like(input_ids) if attention_mask is None else attention_mask
        samples = [torch.as_tensor(ids[keep != 0]).to(self.device) for ids, keep in zip(input_ids, real, strict=True)]
        if any(not len(ids) for ids in samples):
            raise ValueError("a prompt has no tokens")
        images = [torch.nonzero(self.adapter.is_image(ids)).flatten() for ids in samples]
        seen = self.see(pixel_values) if pixel_values is not None and len(pixel_values) else None
        available, wanted = 0 if seen is None else len(seen.features), sum(map(len, images))
        if available != wanted:
            raise ValueError(f"the prompts have {wanted} image tokens, the images give {available} features")
        used = 0
        for row, (ids, image) in enumerate(zip(samples, images, strict=True)):
            own = slice(used, used := used + len(image))
            embeds: Tensor = self.decoder.embed_tokens(ids.index_fill(0, image, 0))
            rope, deepstack = None, tuple[Tensor, ...]()
            if seen is not None and pixel_values is not None:
                embeds = embeds.index_copy(0, image, seen.features[own].to(embeds.dtype))
                deepstack = tuple(features[own] for features in seen.deepstack)
            if self.adapter.rope_positions is not None:
                size = (0, 0) if pixel_values is None else (pixel_values.shape[2], pixel_values.shape[3])
                rope = self.adapter.rope_positions(ids, size, seconds[row] if len(seconds) else 1.0)
            alive = torch.arange(len(ids), device=self.device)
            yield State(0, embeds[None], alive, image, rope_positions=rope, deepstack=deepstack)

    def _check(self, cuts: Cuts) -> None:
        layers = [0, *(cut.layer for cut in cuts), self.layers]
        shares = [cut.remove for cut in cuts]
        if unknown := [cut.criterion for cut in cuts if cut.criterion not in CRITERIA]:
            raise ValueError(f"the reference does not rank by {unknown[0]}")
        if any(a >= b for a, b in pairwise(layers)) or any(not 0 <= share <= 1 for share in shares):
            raise ValueError(f"{cuts} is out of range: layers rise from 1 to {self.layers - 1}, fractions from 0 to 1")

    def _row(self, state: State, cuts: Cuts, forced: list[Tensor] | None, seed: int) -> Row:
        """The state at the end of each stage, one more than there are cuts, and the scores [V] of each cut."""
        state, ended, scores = replace(state, cache=DynamicCache(config=self.decoder.config)), list[State](), []
        for n, cut in enumerate(cuts):
            state = self.advance(state, cut.layer, attention=True)
            ended.append(replace(state, seen=None))
            ranked, score = self.cut(state, cut, seed)
            state = ranked if forced is None else self._keep(state, _checked(forced[n], state.alive))
            scores.append(score)
        return [*ended, self.advance(state, self.layers)], scores

    def _stacked(self, rows: Sequence[Row]) -> Prefill:
        """One Prefill of the samples."""
        stages, last = list(zip(*(ended for ended, _ in rows), strict=True)), [ended[-1] for ended, _ in rows]
        ranked = zip(*(scores for _, scores in rows), strict=True)
        caches = tuple(state.cache for state in last if state.cache is not None)
        lengths = [cache.get_seq_length(0) for cache in caches]
        turned = zip((state.rope_positions for state in last), lengths, strict=True)
        return Prefill(
            lengths=np.array(lengths, np.int64),
            kept=tuple(_pad([state.alive.cpu().numpy() for state in stage], -1) for stage in stages[1:]),
            scores=tuple(_pad([score.float().cpu().numpy() for score in cut], np.nan) for cut in ranked),
            hidden=tuple(tuple(state.hidden[0].float().cpu().numpy() for state in stage) for stage in stages),
            logits=np.stack([self.logits(state).cpu().numpy() for state in last]),
            caches=caches,
            shifts=tuple(0 if rope is None else int(rope.max()) + 1 - length for rope, length in turned),
        )

    def _keep(self, state: State, kept: Tensor) -> State:
        hidden = state.hidden[:, torch.isin(state.alive, kept)]
        return replace(state, hidden=hidden, alive=kept, seen=None)

    def run(
        self,
        layers: range,
        hidden: Tensor,
        positions: Tensor,
        cache: DynamicCache | None = None,
        score: bool = False,
        state: State | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, LayerView | None]:
        """Runs Hugging Face's decoder `layers` on `hidden` [B,S,D], at `positions` [S] or [3,S], appended to `cache` if
        there is one, under `mask` [1,1,S,S] or causal; what `state` adds to image tokens is added. With gradients.

        Also returns what criteria see of the last of the layers, if `score`.
        """
        ids = positions.reshape(-1, 1, positions.shape[-1])  # Hugging Face's [3,1,S] under M-RoPE, else [1,S]
        rotary = self.decoder.rotary_emb(hidden, position_ids=ids if len(ids) > 1 else ids[0])
        size = hidden.shape[1]
        if mask is None and self._eager and size > 1:  # sdpa is causal where there is no mask and more than one row
            mask = torch.full((1, 1, size, size), -torch.inf, dtype=hidden.dtype, device=hidden.device).triu(1)
        seen = None
        for index in layers:
            layer, previous = self.decoder.layers[index], hidden
            with watched(layer.self_attn) if score and index == layers[-1] else nullcontext() as sink:
                hidden = layer(
                    hidden, attention_mask=mask, position_ids=ids[0], position_embeddings=rotary,
                    past_key_values=cache, use_cache=cache is not None, himap_sink=sink,
                )  # fmt: skip
            hidden = hidden if state is None else state.deepened(index, hidden)
            if sink is not None:
                seen = LayerView(**sink, previous=previous, normed=self.decoder.norm(hidden))
        return hidden, seen

    def _logits(self, hidden: Tensor) -> Tensor:
        """Logits [B,W] fp32 of the last row of `hidden` [B,S,D]."""
        return self.adapter.head(self.decoder.norm(hidden[:, -1])).float()


def _winners(scores: Tensor, keep: int) -> Tensor:
    """Indices, ascending, of the `keep` largest in each row of `scores` [images,V], counted through; of equals the
    first stay."""
    best = scores.sort(descending=True, stable=True).indices[:, :keep]
    return (best + torch.arange(len(scores), device=scores.device)[:, None] * scores.shape[1]).flatten().sort().values


def _real(positions: Ints) -> Tensor:
    """The positions without their padding."""
    return torch.as_tensor(positions[positions >= 0], dtype=torch.int64)


def _checked(kept: Tensor, alive: Tensor) -> Tensor:
    """`kept` [S1] if it can follow `alive` [S0]: ascending, a subset, and with the token whose logits are wanted."""
    if not bool((kept.diff() > 0).all()) or not bool(torch.isin(kept, alive).all()):
        raise ValueError(f"forced positions {kept.tolist()} are not an ascending subset of {alive.tolist()}")
    if not len(kept) or kept[-1] != alive[-1]:
        raise ValueError(f"forced positions {kept.tolist()} leave out the last prompt token, {int(alive[-1])}")
    return kept


def _pad(rows: Sequence[NDArray[Item]], fill: float) -> NDArray[Item]:
    """Rows [n] of different lengths as one array [B,max n], `fill` on the right."""
    padded = np.full((len(rows), max(map(len, rows))), fill, rows[0].dtype)
    for target, row in zip(padded, rows, strict=True):
        target[: len(row)] = row
    return padded
