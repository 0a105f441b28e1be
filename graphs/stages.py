"""The language graphs of a bundle: the stages of prefill (prefix, k1, k2, ..) and decode.

    image features, ids -> [prefix] -> hidden, score -> [gather | k1] -> hidden, score -> [gather | k2] -> logits

Each cut's top-k gather opens the stage behind it, so the score that decides it crosses a stage boundary where it can be
seen, compared and forced. Prefill writes the caches of its own layers, [B,G,C_i,E], real keys first; decode appends one
token to each and overwrites padding. Both update the caches in place: past and present are one tensor to the runtime,
and TensorRT makes of it a KV-cache update. For prompts that come and go there is decode once more, over many rows
(slots), one of which a prefill fills. Only weights' names come from outside.
"""

from dataclasses import dataclass, replace

import onnx_ir as ir
from msgspec.structs import replace as with_fields

from himap_export.graphs.build import Frame, StageGraph
from himap_export.graphs.decoder import Attended, Attention, Decoder, Names, Rotary, rotary
from himap_export.graphs.gather import top_k_gather
from himap_export.graphs.importance import importance
from himap_export.graphs.plan import PruningPlan, TokenBudget
from himap_export.graphs.ports import Place
from himap_export.graphs.quota import per_image
from himap_export.graphs.scoring import ScoringContext
from himap_export.graphs.spec import IMAGE, PADDING, DecoderSpec, Dtype, stage_layers

INT64 = ir.DataType.INT64
Pair = tuple[ir.Value, ir.Value]  # of keys and values


@dataclass(frozen=True)
class StagedModel:
    """Everything that fixes the graphs."""

    spec: DecoderSpec
    plan: PruningPlan
    budget: TokenBudget
    dtype: Dtype
    names: Names

    def graphs(self) -> tuple[StageGraph, ...]:
        """Returns the stages of prefill, decode and, if the budget has slots, decode over as many rows."""
        slots, wide = self.budget.slots, with_fields(self.budget, batch=self.budget.slots or 1, slots=0)
        many = [replace(self, budget=wide).decode("slots")] if slots else []
        return *(self.stage(i) for i in range(len(self.plan.stages))), self.decode(), *many

    def removes(self, cut: int) -> bool:
        """Tells whether cut 1, 2, .. removes anything; one that does not has no score and no gather."""
        return self.budget.visual[cut] < self.budget.visual[cut - 1]

    def stage(self, i: int) -> StageGraph:
        """Returns stage i of prefill: opened by the prompt or a gather, closed by the next cut's score or by logits."""
        f = Frame(self.plan.stages[i], self.dtype)
        x, position, token_type = self._prompt(f) if i == 0 else self._cut(f, i)
        x, previous, a = self._prefill(f, i, x=x, position=position, token_type=token_type)
        by_token = (self.budget.batch, self.budget.total[i], self.spec.hidden)
        hidden = f.op.Reshape(x, list(by_token))
        if i == len(self.plan.cuts):
            self._last_logits(f, hidden, token_type)
            f.output(Place("last_hidden"), hidden, by_token)
            return f.finish()
        f.output(Place("hidden", cut=i + 1), hidden, by_token)
        if self.removes(i + 1):
            self._score(
                f, i + 1, a=a, hidden=hidden, layer_input=previous, token_type=token_type, position=position
            )  # fmt: skip
        return f.finish()

    def _prompt(self, f: Frame) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Returns embedded ids [B*S0,D] with the image features in their places, position and token_type [B,S0]."""
        b, s0, hidden = self.budget.batch, self.budget.total[0], self.spec.hidden
        places = Place("input_ids"), Place("position_ids"), Place("token_type")
        ids, position, token_type = (f.integers(place, b, s0) for place in places)
        features = f.input(Place("image_features"), (b, self.budget.visual[0], hidden))
        x = f.op.Reshape(self._merge(f, self._embed(f, ids), features, token_type), [b * s0, hidden])
        return x, position, token_type

    def _cut(self, f: Frame, i: int) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Gathers by cut i, from S_{i-1} to S_i tokens; outputs the positions and types of those it keeps."""
        b, hidden, before, after = self.budget.batch, self.spec.hidden, *self.budget.total[i - 1 : i + 1]
        x = f.input(Place("hidden", cut=i), (b, before, hidden))
        places = Place("kept_positions", cut=i - 1), Place("kept_types", cut=i - 1)
        if i == 1:
            places = Place("position_ids"), Place("token_type")
        position, token_type = (f.integers(place, b, before) for place in places)
        if self.removes(i):
            score = f.input(Place("score", cut=i), (b, before), "fp32")
            if self.plan.quota == "per-image" and self.budget.images > 1:
                visual, keep = self.budget.visual[i - 1 : i + 1]
                score = per_image(f.op, score, token_type, images=self.budget.images, visual=visual, keep=keep)
            x, position, token_type = top_k_gather(f.op, x, score, position=position, token_type=token_type, keep=after)
        f.output(Place("kept_positions", cut=i), position, (b, after), "int64")
        f.output(Place("kept_types", cut=i), token_type, (b, after), "int64")
        return f.op.Reshape(x, [b * after, hidden]), position, token_type

    def _score(
        self,
        f: Frame,
        i: int,
        a: Attended,
        hidden: ir.Value,
        layer_input: ir.Value,
        token_type: ir.Value,
        position: ir.Value,
    ) -> None:
        """Outputs the score by which cut i ranks; a random one reads the requests' seeds."""
        cut, (before, after) = self.plan.cuts[i - 1], self.budget.visual[i - 1 : i + 1]
        seed = f.integers(Place("seed"), self.budget.batch, 1) if cut.criterion == "random" else None
        decoder = Decoder(f, self.spec, names=self.names, batch=self.budget.batch, tokens=self.budget.total[i - 1])
        context = ScoringContext(
            f.op, self.spec, query=a.query, key=a.key, value=a.value, raw_query=a.raw_query, raw_key=a.raw_key,
            hidden=hidden, layer_input=layer_input, token_type=token_type, position=position, seed=seed,
            layer=cut.layer, visual=before, keep=after, text=self.budget.text, coefficients=cut.coefficients,
            final_norm=lambda x: decoder.norm(x, "norm"),
        )  # fmt: skip
        shape = self.budget.batch, self.budget.total[i - 1]
        f.output(Place("score", cut=i), importance(cut.criterion, context), shape, "fp32")

    def _last_logits(self, f: Frame, hidden: ir.Value, token_type: ir.Value) -> None:
        """Outputs the logits of each sample's last prompt token; padding lies behind it."""
        real = f.op.Cast(f.op.Not(f.op.Equal(token_type, PADDING)), to=INT64)
        last = f.op.Sub(f.op.ReduceSum(real, [1], keepdims=1), 1)
        self._logits(f, f.op.GatherND(hidden, last, batch_dims=1))

    def decode(self, name: str = "decode") -> StageGraph:
        """Returns the graph that takes one token per sample through all layers, over the caches of all stages."""
        b, spec = self.budget.batch, self.spec
        f = Frame(name, self.dtype)
        ids, position = f.integers(Place("next_id"), b, 1), f.integers(Place("next_position"), b, 1)
        rope = rotary(f, spec, f.integers(Place("next_rope_position"), b, 1, 3) if spec.rope_axes else position)
        x = f.op.Reshape(self._embed(f, ids), [b, spec.hidden])
        decoder = Decoder(f, spec, names=self.names, batch=b, tokens=1)
        for stage, layers in enumerate(stage_layers(self.plan, spec.layers)):
            capacity = self.budget.capacity[stage]
            # A token removed by a cut left its slot to those behind it: slot = position - tokens removed so far.
            slot = f.op.Reshape(f.op.Sub(position, self.budget.visual[0] - self.budget.visual[stage]), [b])
            seen = f.op.LessOrEqual(list(range(capacity)), f.op.Reshape(slot, [b, 1, 1, 1]))
            mask = f.op.Cast(f.op.Where(seen, 0.0, -65504.0), to=f.dtype)
            for i in layers:
                x, _ = decoder.layer(i, x, rope, self._cached_attention(f, i, capacity=capacity, slot=slot, mask=mask))
        self._logits(f, x)
        return f.finish()

    def _cached_attention(self, f: Frame, i: int, capacity: int, slot: ir.Value, mask: ir.Value) -> Attention:
        """Returns attention of one new token, which takes its `slot` in layer i's caches, over what `mask` shows it."""

        def attend(q: ir.Value, k: ir.Value, v: ir.Value) -> ir.Value:
            k, v = self._cache(f, i, capacity=capacity, new=(k, v), at=slot)
            return f.op.Attention(q, k, v, mask)

        return attend

    def _cache(self, f: Frame, i: int, capacity: int, new: Pair, at: ir.Value) -> Pair:
        """Writes `new` keys and values [B,G,n,E] into layer i's caches [B,G,C,E] from slot `at` [B] on: inputs, and
        outputs that share their memory."""
        shape = (self.budget.batch, self.spec.kv_heads, capacity, self.spec.head_dim)
        places = Place("key", i), Place("value", i)
        old = f.input(places[0], shape), f.input(places[1], shape)
        k, v = (f.op.TensorScatter(cache, value, at, axis=2) for cache, value in zip(old, new, strict=True))
        for place, value, cache in zip(places, (k, v), old, strict=True):
            f.output(place, value, shape, updates=cache)
        return k, v

    def _prefill(
        self, f: Frame, stage: int, x: ir.Value, position: ir.Value, token_type: ir.Value
    ) -> tuple[ir.Value, ir.Value, Attended]:
        """Runs the stage's layers: each attends over its own keys and values and leaves them at its caches' head.

        Returns what the last of them made, what it was given, both [B*S,D], and what it attended with.
        """
        b, tokens, capacity = self.budget.batch, self.budget.total[stage], self.budget.capacity[stage]
        rope, first = self._rotary(f, position), f.op.Constant(value_ints=[0] * b)
        decoder = Decoder(f, self.spec, names=self.names, batch=b, tokens=tokens)
        for i in stage_layers(self.plan, self.spec.layers)[stage]:
            x, a = decoder.layer(i, previous := x, rope, decoder.prefill_attention)
            self._cache(f, i, capacity=capacity, new=(a.key, a.value), at=first)
            if i < self.spec.deepstack:
                x = self._add_deepstack(f, i, x=x, position=position, token_type=token_type)
        return x, previous, a

    def _rotary(self, f: Frame, position: ir.Value) -> Rotary:
        """Rotates by the tokens' places in the prompt; under M-RoPE by what the whole prompt's ids have there.

        So a cut need not carry the ids: they are looked up by the original positions that it keeps.
        """
        if not self.spec.rope_axes:
            return rotary(f, self.spec, position)
        whole = f.integers(Place("rope_position_ids"), self.budget.batch, self.budget.total[0], 3)
        return rotary(f, self.spec, f.op.GatherND(whole, f.op.Unsqueeze(position, [2]), batch_dims=1))

    def _add_deepstack(self, f: Frame, i: int, x: ir.Value, position: ir.Value, token_type: ir.Value) -> ir.Value:
        """Returns x + the vision features that belong behind layer i, at the image tokens still alive: [B*S,D].

        Features are of all V0 tokens: which one is a token's own is counted in the whole prompt's types.
        """
        b, visual, hidden = self.budget.batch, self.budget.visual[0], self.spec.hidden
        features = f.input(Place("deepstack", i), (b, visual, hidden))
        whole = f.integers(Place("token_type"), b, self.budget.total[0])
        nth = f.op.GatherElements(self._nth_image(f, whole), position, axis=1)
        added = f.op.GatherND(features, f.op.Unsqueeze(nth, [2]), batch_dims=1)
        here = f.op.Where(f.op.Unsqueeze(f.op.Equal(token_type, IMAGE), [2]), added, f.op.CastLike(0.0, added))
        return f.op.Add(x, f.op.Reshape(here, [-1, hidden]))

    def _embed(self, f: Frame, ids: ir.Value) -> ir.Value:
        return f.op.Gather(f.weight(self.names("embed_tokens.weight"), self.spec.vocab, self.spec.hidden), ids)

    def _merge(self, f: Frame, text: ir.Value, features: ir.Value, token_type: ir.Value) -> ir.Value:
        """Returns [B,S,D] in which the n-th image token of a sample is the n-th image feature."""
        image = f.op.GatherND(features, f.op.Unsqueeze(self._nth_image(f, token_type), [2]), batch_dims=1)
        return f.op.Where(f.op.Unsqueeze(f.op.Equal(token_type, IMAGE), [2]), image, text)

    def _nth_image(self, f: Frame, token_type: ir.Value) -> ir.Value:
        """Counts the image tokens before each image token: [B,S]; anything from 0 on at other tokens."""
        return f.op.Max(f.op.Sub(f.op.CumSum(f.op.Cast(f.op.Equal(token_type, IMAGE), to=INT64), 1), 1), 0)

    def _logits(self, f: Frame, x: ir.Value) -> None:
        """Outputs final norm and head over [B,D] as logits [B,W] fp32."""
        decoder = Decoder(f, self.spec, names=self.names, batch=self.budget.batch, tokens=1)
        logits = decoder.linear(decoder.norm(x, "norm"), "lm_head", self.spec.vocab, bias=False)
        f.output(Place("logits"), f.op.Cast(logits, to=ir.DataType.FLOAT), (self.budget.batch, self.spec.vocab), "fp32")
