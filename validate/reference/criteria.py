"""What the reference ranks image tokens by: a restatement of every selector on what Hugging Face's modules compute.

It shares no code with the graphs that are compared with it. Letters as in reference.py.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache


@dataclass(frozen=True)
class ReferenceCut:
    """Layers `layer` and later (0-based) see only the image tokens that rank highest by `criterion`, a key of CRITERIA.

    `remove` is the fraction that leaves, of those still alive; or `keep` is how many stay. `images`: each of as many
    pictures keeps as many, by its own ranking.
    """

    layer: int
    criterion: str
    remove: float = 0.0
    keep: int | None = None
    coefficients: tuple[float, ...] = ()
    images: int = 1


Cuts = Sequence[ReferenceCut]


def reference_himap(k1: int, k2: int, r1: float, r2: float) -> tuple[ReferenceCut, ReferenceCut]:
    """Returns the two cuts of HiMAP; `r2` is of what the first one left."""
    return ReferenceCut(k1, "instruction", r1), ReferenceCut(k2, "image", r2)


@dataclass(frozen=True)
class LayerView:
    """What one layer computed for one prompt: `query` and `key` are rotated, `raw_query` and `raw_key` not yet."""

    attention: Tensor  # [S,S] fp32 probabilities, averaged over heads
    query: Tensor  # [H,S,E]
    key: Tensor  # [G,S,E]
    value: Tensor  # [G,S,E]
    raw_query: Tensor  # [H,S,E], behind its norm, where the model has one
    raw_key: Tensor  # [G,S,E]
    previous: Tensor  # [1,S,D] hidden states that the layer was given
    normed: Tensor  # [1,S,D] those that it passed on, behind the model's final norm


@dataclass(frozen=True)
class State:
    """One prompt on its way through the decoder, between layers `layer` - 1 and `layer`.

    What layer `layer` - 1 computed is there to rank by, under the names of LayerView, once `advance` was asked for it.
    """

    layer: int
    hidden: Tensor  # [1,S,D]
    alive: Tensor  # [S] int64 original positions, ascending
    image: Tensor  # [V0] int64 positions of the image tokens
    seen: LayerView | None = None  # of layer `layer` - 1, if asked for
    cache: DynamicCache | None = None  # a state without one can be advanced any number of times
    rope_positions: Tensor | None = None  # [3,S0] of all tokens, under M-RoPE; None: their original positions
    deepstack: tuple[Tensor, ...] = ()  # [V0,D] each, added to the image tokens behind layers 0, 1, ..
    coefficients: tuple[float, ...] = ()  # of the cut that ranks

    @property
    def attention(self) -> Tensor:
        return self._view.attention

    @property
    def query(self) -> Tensor:
        return self._view.query

    @property
    def key(self) -> Tensor:
        return self._view.key

    @property
    def value(self) -> Tensor:
        return self._view.value

    @property
    def raw_query(self) -> Tensor:
        return self._view.raw_query

    @property
    def raw_key(self) -> Tensor:
        return self._view.raw_key

    @property
    def previous(self) -> Tensor:
        return self._view.previous

    @property
    def normed(self) -> Tensor:
        return self._view.normed

    @property
    def _view(self) -> LayerView:
        if self.seen is None:
            raise ValueError("this state was advanced without what criteria look at")
        return self.seen

    @property
    def is_image(self) -> Tensor:
        """Returns which of the tokens alive are of the image, bool [S]."""
        return torch.isin(self.alive, self.image)

    @property
    def is_instruction(self) -> Tensor:
        """Returns which are text after the last image token, bool [S]."""
        return self.alive > (self.image.max() if len(self.image) else -1)

    def deepened(self, layer: int, hidden: Tensor) -> Tensor:
        """Returns `hidden` [B,S,D] behind `layer`, with the vision features that belong there (Qwen3-VL's
        deepstack)."""
        if layer >= len(self.deepstack):
            return hidden
        own = torch.isin(self.image, self.alive)
        added = torch.zeros_like(hidden)
        added[:, self.is_image] = self.deepstack[layer][..., own, :].to(hidden.dtype)
        return hidden + added

    def received(self, rows: Tensor) -> Tensor:
        """Returns the attention [V] that image tokens get from `rows`, bool [S]."""
        return self.attention[rows][:, self.is_image].sum(0)


def _boundary(s: State) -> Tensor:
    """[S] bool: the first text token after the image, if there is one."""
    return s.is_instruction & (s.is_instruction.cumsum(0) == 1)


def _random(s: State, keep: int, seed: int) -> Tensor:
    """Three rounds of x <- x^3 + y + a modulo 2039, y <- y^3 + x + b modulo 2027: of the seed, where a and b are the
    layer, then of each position, where they are what the seed became; then 2048 x + y."""

    def mixed(z: int, a: int, b: int) -> tuple[int, int]:
        x, y = (z + a) % 2039, (z + b) % 2027
        for _ in range(3):
            x = (x**3 + y + a) % 2039
            y = (y**3 + x + b) % 2027
        return x, y

    keys = mixed(seed, s.layer, s.layer)
    drawn = [mixed(position, *keys) for position in s.alive[s.is_image].tolist()]
    return torch.tensor([float(2048 * x + y) for x, y in drawn], device=s.hidden.device)


def _uniform(s: State, keep: int, seed: int) -> Tensor:
    """1 for `keep` of V tokens in even steps."""
    count = int(s.is_image.sum())
    steps = [(n + 1) * keep // count > n * keep // count for n in range(count)]
    return torch.tensor(steps, dtype=torch.float32, device=s.hidden.device)


def _key_norm(s: State, keep: int, seed: int) -> Tensor:
    """Minus the L2 norm of the mean of the heads' keys, as ViTCoP's `image_k_l2_norm` (arXiv 2601.17818)."""
    norms: Tensor = torch.linalg.vector_norm(s.key.float().mean(0), dim=1)
    return -norms[s.is_image]


def _v2drop(s: State, keep: int, seed: int) -> Tensor:
    """The L2 norm of what the layer added, as V2Drop's `l2_diff_candidate` (arXiv 2509.01552)."""
    moved: Tensor = torch.linalg.vector_norm(s.hidden[0].float() - s.previous[0].float(), dim=1)
    return moved[s.is_image]


def _debiased(s: State, keep: int, seed: int) -> Tensor:
    """Attention from the instruction over a trend that grows exp(slope) times a position (arXiv 2508.17807)."""
    (slope,), place = s.coefficients, s.alive[s.is_image]
    return s.received(s.is_instruction) / torch.exp(slope * (place - place[:1]))


def _hawk(s: State, keep: int, seed: int) -> Tensor:
    """Per head the mean of q k^T / sqrt(E) over the instruction's queries, as a unit vector over image tokens; their
    weighted sum (arXiv 2604.07812)."""
    query, key = s.raw_query.float()[:, s.is_instruction], s.raw_key.float()[:, s.is_image]
    met = query @ key.repeat_interleave(len(query) // len(key), dim=0).transpose(1, 2) / query.shape[-1] ** 0.5
    mean = met.mean(1) if met.shape[1] else met.new_zeros(len(query), key.shape[1])
    weights = torch.tensor(s.coefficients or [1 / len(query)] * len(query), device=mean.device)
    return weights @ torch.nn.functional.normalize(mean, dim=-1)


def _dart(s: State, keep: int, seed: int) -> Tensor:
    """Which tokens greedy pivots take (arXiv 2502.11494), told by margins: how much farther from the pivot that came
    nearest to taking it a token lies than the last one that pivot took. Pivots themselves score 2."""
    length, states = s.key.float().abs().sum((0, 2)), s.normed[0].float()

    def longest(of: Tensor, count: int) -> list[int]:
        order = length[of].sort(descending=True, stable=True).indices[:count]
        places: list[int] = torch.nonzero(of).flatten()[order].sort().values.tolist()
        return places

    own = longest(s.is_image, min(4, max(keep, 1)))
    scores = {place: 2.0 if place in own else -4.0 for place in torch.nonzero(s.is_image).flatten().tolist()}
    free = [place for place in scores if place not in own]
    pivots: list[int | None] = [*own, *longest(s.is_instruction, 4), *[None] * 8]
    shares = [(keep - 4) // 8 + (n < (keep - 4) % 8) if keep > 4 else 0 for n in range(8)]
    for pivot, share in zip(pivots[:8], shares, strict=True):
        if not share:
            break
        if pivot is None:
            far = {place: -int(s.alive[place]) / 2**20 for place in free}
        else:
            cosines = torch.nn.functional.cosine_similarity(states[pivot], states[free], dim=-1).tolist()
            far = {place: -cosine for place, cosine in zip(free, cosines, strict=True)}
        taken = sorted(free, key=lambda place: -far[place])[:share]
        for place in free:
            scores[place] = max(scores[place], far[place] - far[taken[-1]])
        free = [place for place in free if place not in taken]
    return torch.tensor(list(scores.values()), device=s.hidden.device)


# Scores [V] of the image tokens alive, in the order of their positions, from a state, how many will stay, and the
# request's seed; the highest stay. One's own are added by `validate/registration.py`. himap: instruction,
# then image. fastv (arXiv 2403.06764): last. truncation (arXiv 2406.06579, eqs. 7-11; position Nsys + Nimg): boundary.
Score = Callable[[State, int, int], Tensor]
CRITERIA: dict[str, Score] = {
    "instruction": lambda s, keep, seed: s.received(s.is_instruction),
    "image": lambda s, keep, seed: s.received(s.is_image),
    "last": lambda s, keep, seed: s.received(s.alive == s.alive[-1]),
    "boundary": lambda s, keep, seed: s.received(_boundary(s)),
    "random": _random,
    "uniform": _uniform,
    "key-norm": _key_norm,
    "v2drop": _v2drop,
    "instruction-debiased": _debiased,
    "hawk": _hawk,
    "dart": _dart,
}
