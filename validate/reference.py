"""The PyTorch reference of HiMAP (arXiv 2503.13108): what every bundle is judged against.

Hugging Face's own modules compute everything that HiMAP leaves alone (tower, projector, embedding, decoder layers,
rotary embedding, norm, head). This file only decides which tokens enter which layers, as the authors' `himap.py` does:

1. Layers 0..K1-1 see all tokens, K1..K2-1 those alive after the cut at K1, K2..L-1 those alive after the cut at K2.
2. A cut at K ranks the image tokens by the attention of layer K-1: fp32 softmax, mean over the heads, then summed
   over the text rows after the last image token (K1; no such row: all scores are 0, the first tokens stay) or over
   the rows of the image tokens themselves (K2).
3. floor(R * n) image tokens leave, those with the lowest scores; of equals, the last one leaves first. All text stays.
4. Who stays keeps its order and its original position id; the causal mask is rebuilt.

Unlike the authors, who rank again at every generated token because they run without a cache, tokens are ranked once, at
prefill, and every layer caches the keys and values of the tokens that it saw. The first generated token is the same.

Samples are computed one by one and without padding, so nothing here can depend on where padding lies. It shares no code
with the rooms it judges, not even their errors: misuse is a ValueError.

Shape letters: B batch, S tokens of a stage (S0, S1, S2), V image tokens that are candidates at a cut (V0, V1),
D hidden, H query heads, G kv heads, E head dim, L layers, W vocabulary, N generated tokens.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, LlavaForConditionalGeneration
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]
Item = TypeVar("Item", bound=np.generic)


@dataclass(frozen=True)
class Cuts:
    """Where HiMAP cuts (0-based layers) and the fraction of image tokens it removes there; r2 is of what K1 left.

    `keep`: how many image tokens stay behind each cut, where a budget was rounded up; else what the fractions leave.
    """

    k1: int
    k2: int
    r1: float
    r2: float
    keep: tuple[int, int] | None = None


@dataclass(frozen=True)
class Prefill:
    """What the prompts gave. Positions count a sample's real tokens from 0; padding of the prompt has none."""

    lengths: Ints  # [B] real tokens of each prompt, which is also the position of the first generated token
    kept_k1: Ints  # [B,S1] positions of the tokens alive after the cut at K1, ascending; -1 pads, on the right
    kept_k2: Ints  # [B,S2]; without cuts, both hold every position
    score_k1: Floats  # [B,V0] importance of the candidates, in the order of their positions; NaN pads, on the right
    score_k2: Floats  # [B,V1]; without cuts, both are [B,0]
    hidden: tuple[
        tuple[Floats, ...], ...
    ]  # per stage and sample [S,D], after layers K1-1, K2-1, L-1, before gather or norm
    logits: Floats  # [B,W] at the last prompt token
    caches: tuple[DynamicCache, ...]  # per sample; layer i holds keys (rotated) and values [1,G,S of its stage,E].
    # Decoding appends to the caches: the one thing in here that is not a constant.


@dataclass(frozen=True)
class _Row:
    """One sample of a Prefill. `kept` and `scores` have one entry per cut, `hidden` one per stage."""

    kept: tuple[Tensor, ...]  # [S1], [S2] int64
    scores: tuple[Tensor, ...]  # [V0], [V1] fp32
    hidden: tuple[Tensor, ...]  # [S0,D], [S1,D], [S2,D]
    logits: Tensor  # [W] fp32
    cache: DynamicCache


class Reference:
    """A Hugging Face LLaVA checkpoint, unpruned or cut by HiMAP. Deterministic; every method runs without gradients."""

    def __init__(
        self,
        folder: Path,
        dtype: torch.dtype = torch.float32,
        attn_implementation: str = "eager",
        device: str = "cpu",
    ) -> None:
        """Load `folder` in `dtype`. `attn_implementation="sdpa"` is the fast one, a fair opponent in benchmarks."""
        loaded: tuple[Any, dict[str, Any]] = LlavaForConditionalGeneration.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation={
                "": attn_implementation,
                "vision_config": attn_implementation,
                "text_config": _register(attn_implementation),
            },
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
        self.model, report = loaded
        # Hugging Face only warns and goes on with random weights. Unexpected ones (old rotary tables) do no harm.
        if problems := {name: found for name, found in report.items() if found and name != "unexpected_keys"}:
            raise ValueError(f"{folder} does not hold the model's weights: {problems}")
        self.model.eval().to(device)
        self.decoder: Any = self.model.model.language_model
        self.layers = len(self.decoder.layers)
        self.image_token: int = self.model.config.image_token_id
        self.device, self._eager = device, attn_implementation == "eager"
        stop = self.model.generation_config.eos_token_id
        self.stop_tokens: tuple[int, ...] = () if stop is None else (stop,) if isinstance(stop, int) else tuple(stop)
        pad = self.model.generation_config.pad_token_id
        self.pad_token: int = pad if pad is not None else next(iter(self.stop_tokens), 0)

    @torch.no_grad()
    def prefill(
        self,
        input_ids: Ints,
        pixel_values: Floats | None,
        attention_mask: Ints | None = None,
        cuts: Cuts | None = None,
        forced: tuple[Ints, Ints] | None = None,
    ) -> Prefill:
        """Run the prompts.

        `input_ids` [B,S] int64 with one image placeholder per image token, anywhere; `pixel_values` [images,3,H,W],
        in the order of the placeholders; `attention_mask` [B,S], 0 where a token is padding, on either side.
        `cuts=None` is the unpruned model. `forced` keeps the given positions ([B,S1], [B,S2], text included, -1 pads)
        instead of the ranked ones; the scores are reported all the same.
        """
        if forced is not None and cuts is None:
            raise ValueError("forced positions need cuts: they say at which layers to keep them")
        rows = []
        for sample, (embeds, image) in enumerate(self._embed(input_ids, pixel_values, attention_mask)):
            given = None if forced is None else tuple(_real(kept[sample]).to(self.device) for kept in forced)
            rows.append(self._unpruned(embeds) if cuts is None else self._pruned(embeds, image, cuts, given))
        return _stack(rows)

    @torch.no_grad()
    def generate(
        self,
        input_ids: Ints,
        pixel_values: Floats | None,
        attention_mask: Ints | None = None,
        *,
        max_new_tokens: int,
        cuts: Cuts | None = None,
        forced: tuple[Ints, Ints] | None = None,
    ) -> Ints:
        """Greedy answers [B,N], N <= max_new_tokens, laid out as Hugging Face's `generate` does.

        A row ends with its stop token and is padded behind it; N is where the last row ended.
        """
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
        start = self.prefill(input_ids, pixel_values, attention_mask, cuts, forced)
        rows = []
        for logits, cache, length in zip(start.logits, start.caches, start.lengths.tolist(), strict=True):
            tokens = [int(logits.argmax())]
            while len(tokens) < max_new_tokens and tokens[-1] not in self.stop_tokens:
                position = length + len(tokens) - 1
                tokens.append(int(self.step(torch.tensor([tokens[-1]]), position, cache)[0].argmax()))
            rows.append(np.array(tokens, np.int64))
        return _pad(rows, self.pad_token)

    @torch.no_grad()
    def replay(self, start: Prefill, tokens: Ints) -> Floats:
        """Logits [B,N,W] that follow each prefix of `tokens` [B,N]: entry 0 is the prefill's, n has seen n tokens.

        One flipped token does not end a comparison this way. Appends to the caches of `start`: replay a prefill once.
        """
        rows = []
        for sample, row in enumerate(tokens):
            first, length = start.logits[sample], int(start.lengths[sample])
            rest = [
                self.step(torch.tensor([token]), length + step, start.caches[sample])[0].cpu().numpy()
                for step, token in enumerate(row[:-1].tolist())
            ]
            rows.append(np.stack([first, *rest]))
        return np.stack(rows)

    @torch.no_grad()
    def step(self, tokens: Tensor, position: int, cache: DynamicCache) -> Tensor:
        """One decode step: `tokens` [B] at `position`, appended to `cache`; logits [B,W] fp32."""
        hidden = self.decoder.embed_tokens(tokens.to(self.device)[:, None])
        # No mask: a single row may see all that is cached, and each layer has cached only what was alive in its stage.
        hidden, _ = self._run(range(self.layers), hidden, torch.tensor([position], device=self.device), cache)
        return self._logits(hidden)

    def embed(
        self, input_ids: Ints, pixel_values: Floats | None, attention_mask: Ints | None = None
    ) -> tuple[Tensor, ...]:
        """Decoder inputs [S0,D] of each sample, without padding, image features in their places."""
        with torch.no_grad():
            return tuple(embeds[0] for embeds, _ in self._embed(input_ids, pixel_values, attention_mask))

    @torch.no_grad()
    def forward(self, embeds: Tensor) -> tuple[Tensor, DynamicCache]:
        """The unpruned decoder on `embeds` [B,S,D], no padding: logits [B,W] fp32 at the last token, and the cache."""
        cache = DynamicCache(config=self.model.config.text_config)
        hidden, _ = self._run(range(self.layers), embeds, torch.arange(embeds.shape[1], device=self.device), cache)
        return self._logits(hidden), cache

    @torch.no_grad()
    def image_features(self, pixel_values: Floats) -> Tensor:
        """Projected features [images,V,D] of `pixel_values` [images,3,H,W]."""
        pixels = torch.as_tensor(pixel_values).to(self.device, self.model.dtype)
        return torch.stack(list(self.model.model.get_image_features(pixel_values=pixels).pooler_output))

    def _embed(
        self, input_ids: Ints, pixel_values: Floats | None, attention_mask: Ints | None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Each sample's embeddings [1,S0,D] and the positions [V0] of its image tokens."""
        if input_ids.ndim != 2 or (attention_mask is not None and attention_mask.shape != input_ids.shape):
            raise ValueError("input_ids must be [batch, tokens] and attention_mask the same shape")
        real = np.ones_like(input_ids) if attention_mask is None else attention_mask
        samples = [torch.as_tensor(ids[keep != 0]).to(self.device) for ids, keep in zip(input_ids, real, strict=True)]
        if any(not len(ids) for ids in samples):
            raise ValueError("a prompt has no tokens")
        counts = [int((ids == self.image_token).sum()) for ids in samples]
        features: Tensor | None = None
        if pixel_values is not None and len(pixel_values):
            features = self.image_features(pixel_values).flatten(0, 1)
        available = 0 if features is None else len(features)
        if available != sum(counts):
            raise ValueError(f"the prompts have {sum(counts)} image tokens, the images give {available} features")
        used = 0
        for ids, count in zip(samples, counts, strict=True):
            image = torch.nonzero(ids == self.image_token).flatten()
            embeds: Tensor = self.decoder.embed_tokens(ids)
            if features is not None:
                embeds = embeds.index_copy(0, image, features[used : used + count].to(embeds.dtype))
            used += count
            yield embeds[None], image

    def _unpruned(self, embeds: Tensor) -> _Row:
        """All layers see all tokens [1,S0,D]."""
        cache = DynamicCache(config=self.model.config.text_config)
        positions = torch.arange(embeds.shape[1], device=self.device)
        hidden, _ = self._run(range(self.layers), embeds, positions, cache)
        empty = torch.empty(0)
        return _Row((positions, positions), (empty, empty), (hidden[0],), self._logits(hidden)[0], cache)

    def _pruned(self, embeds: Tensor, image: Tensor, cuts: Cuts, forced: tuple[Tensor, ...] | None) -> _Row:
        """Three stages with a cut after the first and the second. `embeds` [1,S0,D], `image` [V0] positions."""
        if not 0 < cuts.k1 < cuts.k2 < self.layers or not (0 <= cuts.r1 <= 1 and 0 <= cuts.r2 <= 1):
            raise ValueError(f"{cuts} is out of range: 0 < k1 < k2 < {self.layers} layers, and fractions from 0 to 1")
        cache = DynamicCache(config=self.model.config.text_config)
        hidden, alive = embeds, torch.arange(embeds.shape[1], device=self.device)
        after_image = alive > (image.max() if len(image) else -1)
        all_kept, all_scores, outputs = [], [], []
        for cut, (first, last, removed) in enumerate(((0, cuts.k1, cuts.r1), (cuts.k1, cuts.k2, cuts.r2))):
            hidden, attention = self._run(range(first, last), hidden, alive, cache, score=True)
            is_image = torch.isin(alive, image)
            scores = attention[after_image if cut == 0 else is_image][:, is_image].sum(0)
            outputs.append(hidden[0])
            if forced is None:
                keep = _left(len(scores), removed) if cuts.keep is None else cuts.keep[cut]
                kept = torch.cat((alive[~is_image], alive[is_image][_winners(scores, keep)])).sort().values
            else:
                kept = _checked(forced[cut], alive)
            hidden, alive = hidden[:, torch.isin(alive, kept)], kept
            all_kept.append(kept)
            all_scores.append(scores)
        hidden, _ = self._run(range(cuts.k2, self.layers), hidden, alive, cache)
        logits = self._logits(hidden)[0]
        return _Row(tuple(all_kept), tuple(all_scores), (*outputs, hidden[0]), logits, cache)

    def _run(
        self, layers: range, hidden: Tensor, positions: Tensor, cache: DynamicCache, score: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Hugging Face's decoder `layers` on `hidden` [B,S,D] at `positions` [S], appended to `cache`.

        Also the attention probabilities [S,S] fp32 of the last of the layers, averaged over the heads, if `score`.
        """
        rotary = self.decoder.rotary_emb(hidden, position_ids=positions[None])
        mask = None
        if self._eager and hidden.shape[1] > 1:  # sdpa is causal by itself where there is no mask and more than one row
            size = hidden.shape[1]
            mask = torch.full((1, 1, size, size), -torch.inf, dtype=hidden.dtype, device=hidden.device).triu(1)
        sink: list[Tensor] = []
        for index in layers:
            hidden = self.decoder.layers[index](
                hidden,
                attention_mask=mask,
                position_ids=positions[None],
                past_key_values=cache,
                use_cache=True,
                position_embeddings=rotary,
                himap_sink=sink if score and index == layers[-1] else None,
            )
        return hidden, sink[0].mean(0) if sink else torch.empty(0)

    def _logits(self, hidden: Tensor) -> Tensor:
        """Logits [B,W] fp32 of the last row of `hidden` [B,S,D]."""
        logits: Tensor = self.model.lm_head(self.decoder.norm(hidden[:, -1]))
        return logits.float()


def _register(base: str) -> str:
    """Tell transformers of an attention like `base` ("eager", "sdpa") that also hands out probabilities; its name."""
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
    himap_sink: list[Tensor] | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention `base`; also appends the causal softmax of `query` [1,H,S,E], `key` [1,G,S,E] to `himap_sink`.

    The probabilities are [H,S,S] fp32, from fp32 logits, whatever the model's dtype.
    Eager attention returns its probabilities rounded to the model's dtype, which in fp16 is enough to flip keep sets.
    """
    if himap_sink is not None:
        keys = key[0].float().repeat_interleave(query.shape[1] // key.shape[1], dim=0)
        logits = query[0].float() @ keys.transpose(1, 2) * options["scaling"]
        future = torch.ones(logits.shape[1:], dtype=torch.bool, device=logits.device).triu(1)
        himap_sink.append(logits.masked_fill(future, -torch.inf).softmax(-1))
    return base(module, query, key, value, attention_mask, **options)


def _left(tokens: int, removed: float) -> int:
    return tokens - math.floor(removed * tokens)


def _winners(scores: Tensor, keep: int) -> Tensor:
    """Indices, ascending, of the `keep` largest of `scores` [V]; of equals the first stay."""
    return scores.sort(descending=True, stable=True).indices[:keep].sort().values


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


def _stack(rows: Sequence[_Row]) -> Prefill:
    """One Prefill of the samples."""
    kept = [_pad([row.kept[cut].cpu().numpy() for row in rows], -1) for cut in (0, 1)]
    score = [_pad([row.scores[cut].float().cpu().numpy() for row in rows], np.nan) for cut in (0, 1)]
    stages = zip(*(row.hidden for row in rows), strict=True)
    return Prefill(
        lengths=np.array([row.cache.get_seq_length(0) for row in rows], np.int64),
        kept_k1=kept[0],
        kept_k2=kept[1],
        score_k1=score[0],
        score_k2=score[1],
        hidden=tuple(tuple(hidden.float().cpu().numpy() for hidden in stage) for stage in stages),
        logits=np.stack([row.logits.cpu().numpy() for row in rows]),
        caches=tuple(row.cache for row in rows),
    )
