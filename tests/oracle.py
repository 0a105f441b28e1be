"""The pruned decoder in NumPy, without stages, gathers or caches: what the graphs are compared with.

Nothing is ever removed: all tokens, the answer's included, go through all layers at once in fp64, and a cut only
narrows what later layers may look at.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from oracle_criteria import RANKINGS, Floats, Ints, Layer

from himap_export.graphs.plan import PruningPlan
from himap_export.graphs.spec import DecoderSpec

IMAGE_TOKEN = 0


@dataclass(frozen=True)
class Decoded:
    """`kept`: positions alive after each cut. `logits` [1+N,W]: after the prompt and after each answer token."""

    kept: tuple[Ints, ...]
    logits: Floats
    margin: float


def decode(
    spec: DecoderSpec,
    plan: PruningPlan,
    w: Mapping[str, Floats],
    grid: tuple[int, int] | None,
    prompt: Ints,
    image: Floats,
    deep: Floats,
    answer: Ints,
    seed: int,
) -> Decoded:
    """One prompt [S] with image features [V,D], lying as `grid` says, and features `deep` [n,V,D] for the image tokens
    behind the first n layers, followed by `answer` [N]; random cuts draw by `seed`."""
    size, length = len(prompt) + len(answer), len(prompt)
    position = np.arange(size)
    is_image = np.append(prompt == IMAGE_TOKEN, np.zeros(len(answer), bool))
    x: Floats = w["embed_tokens.weight"][np.append(prompt, answer)].astype(np.float64)
    x[is_image] = image
    turns = places(is_image, grid)
    instruction = np.flatnonzero((position > np.flatnonzero(is_image)[-1]) & (position < length))
    alive, kept, margin, cuts = np.ones(size, bool), [np.arange(length)], np.inf, list(plan.cuts)
    for i in range(spec.layers):
        previous, (x, seen) = x, layer(spec, w, f"layers.{i}.", x, alive, turns)
        if i < len(deep):
            x[is_image] += deep[i]
        if cuts and i + 1 == cuts[0].layer:
            cut, candidates = cuts.pop(0), np.flatnonzero(is_image & alive)
            keep = len(candidates) - int((cut.remove or 0) * len(candidates)) if cut.keep is None else cut.keep
            s = Layer(
                **seen, hidden=x, previous=previous, normed=norm(spec, x, w["norm.weight"]), candidates=candidates,
                instruction=instruction,
                last=int(np.flatnonzero(alive[:length])[-1]), position=position, cut=cut.layer, keep=keep, seed=seed,
                coefficients=cut.coefficients,
            )  # fmt: skip
            score = RANKINGS[cut.criterion](s)
            order = np.argsort(-score, kind="stable")
            if 0 < keep < len(order) and score.any() and cut.criterion not in ("random", "uniform"):
                margin = min(margin, score[order[keep - 1]] - score[order[keep]])
            alive = alive.copy()
            alive[candidates[order[keep:]]] = False
            kept.append(np.flatnonzero(alive[:length]))
    # Logits follow the last prompt token that is alive (an image token at the end may be gone), then each answer token.
    followed = [kept[-1][-1], *range(length, size)]
    n = norm(spec, x[followed], w["norm.weight"])
    return Decoded(tuple(kept[1:]), n @ w["lm_head.weight"].T, float(margin))


def places(is_image: NDArray[np.bool_], grid: tuple[int, int] | None) -> Ints:
    """Time, row, column [S,3]: told token by token, as a reader of the paper (arXiv 2409.12191) would."""
    found, now, seen = [], 0, 0
    for image in is_image:
        if grid is not None and image:
            found.append((now, now + seen // grid[1], now + seen % grid[1]))
            seen += 1
            if seen == grid[0] * grid[1]:
                now += max(grid)
        else:
            found.append((now,) * 3)
            now += 1
    return np.array(found)


def layer(
    spec: DecoderSpec, w: Mapping[str, Floats], p: str, x: Floats, alive: NDArray[np.bool_], turns: Ints
) -> tuple[Floats, dict[str, Floats]]:
    """x [S,D] after one layer in which tokens see only those `alive`, and itself; and what it attended with, by the
    names of a criterion's Layer."""
    size = len(x)

    def linear(of: Floats, name: str) -> Floats:
        return of @ w[f"{p}{name}.weight"].T + w.get(f"{p}{name}.bias", np.zeros(1))

    n = norm(spec, x, w[p + "input_layernorm.weight"])
    q = linear(n, "self_attn.q_proj").reshape(size, spec.heads, -1)
    k = linear(n, "self_attn.k_proj").reshape(size, spec.kv_heads, -1)
    if spec.qk_norm:
        q, k = (norm(spec, a, w[f"{p}self_attn.{which}_norm.weight"]) for a, which in ((q, "q"), (k, "k")))
    raw_q, raw_k, q, k = q, k, rotate(spec, q, turns), rotate(spec, k, turns)
    v = linear(n, "self_attn.v_proj").reshape(size, spec.kv_heads, -1)
    visible = (np.tri(size, dtype=bool) & alive) | np.eye(size, dtype=bool)
    outs, attention = [], np.zeros((size, size))
    for head in range(spec.heads):
        shared = head * spec.kv_heads // spec.heads
        logits = np.where(visible, q[:, head] @ k[:, shared].T / np.sqrt(spec.head_dim), -np.inf)
        probability = np.exp(logits - logits.max(1, keepdims=True))
        probability /= probability.sum(1, keepdims=True)
        attention += probability / spec.heads
        outs.append(probability @ v[:, shared])
    x = x + linear(np.concatenate(outs, 1), "self_attn.o_proj")
    by_head = {"query": q, "key": k, "value": v, "raw_query": raw_q, "raw_key": raw_k}
    seen = {"attention": attention} | {name: a.swapaxes(0, 1) for name, a in by_head.items()}
    n = norm(spec, x, w[p + "post_attention_layernorm.weight"])
    gate = linear(n, "mlp.gate_proj")
    return x + linear(gate / (1 + np.exp(-gate)) * linear(n, "mlp.up_proj"), "mlp.down_proj"), seen


def norm(spec: DecoderSpec, x: Floats, weight: Floats) -> Floats:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + spec.norm_eps) * weight


def rotate(spec: DecoderSpec, x: Floats, turns: Ints) -> Floats:
    """[S,heads,E]: pairs (i, i + E/2) as complex numbers, turned by position * base**(-2i/E)."""
    half = spec.head_dim // 2
    position = np.array([[turn[axis] for axis in spec.rope_axes or [0] * half] for turn in turns])
    turn = np.exp(1j * position * spec.rope_base ** (-np.arange(half) / half))
    turned = (x[..., :half] + 1j * x[..., half:]) * turn[:, None]
    return np.concatenate([turned.real, turned.imag], -1)
