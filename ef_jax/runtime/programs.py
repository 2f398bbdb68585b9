"""The engine's compiled programs: one a kind of layer boundary, compiled ahead of time for fixed shapes.

Ahead-of-time executables are called directly. A call with another shape raises instead of recompiling, which is how
"no recompilation" is enforced, and each executable's own memory analysis gives the plan its workspace.

The engine holds R sequences, each with a row of the key/value caches. A chunk of prompts is `begin`, then for each
layer its `wave`s and `between`, then `end_chunk`; after a prompt's last chunk, `head`. A decode step of B of the
sequences is `begin`, a `between` a layer, `end_step`, `head`; a layer whose experts are not all there yet may run those
that are by `there`. Arguments are in the order that each docstring gives them. "rows" are the rows of a pass's
sequences, R for places that are empty; None in a decode step of an engine with R = B, where place and row are one.
"cache" is what the layer's mixer remembers, keys and values mostly (`cache_shapes`), "reach" how far the layer's tokens
see (`reach_of`), "finish" the leaves of `finish_paths`, none for a dense layer. "carried" is what a layer hands to the
next program: for a dense layer the residual stream, for an MoE layer `(Routed, pool, slot_row, outputs)` when decoding,
with the outputs of the experts that have run, and `(Routed, order, outputs)` in a prompt. "look" and "state" are the
arguments of a look ahead and "ahead" its report and the new state (see `look_ahead`); None in prompts and where nobody
looks ahead, but that `weighed` programs of a decode step leave a report all the same. "held", bool `[E]`, says which
experts of the layer that a decode step's program ends in have a slot or are on their way; only programs that lift them
(`LossyOptions.cache_bias`) take it.

With an encoder a prompt is one pass through the encoder's layers, which ends by `end_encoder` and, for each layer of
the decoder, `remember`. Decode steps run the decoder's layers.
"""

import copy
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ef_jax.lossy import LOSSLESS, LossyOptions
from ef_jax.memory.program_memory import program_memory
from ef_jax.memory.slot_pool import pool_shapes
from ef_jax.nn import QUERY_BLOCK, combine, layer_definition, merge_layer, merge_top, top_definition
from ef_jax.runtime import pass_shapes, steps
from ef_jax.runtime.executables import Compiled, ask_in_parallel, executable
from ef_jax.runtime.expert_kernels import ExpertKernels
from ef_jax.runtime.look_ahead import LookAheadSpec, absorb_chunk, look_from_layer, look_from_token, report_routes
from ef_jax.runtime.low_precision import LowPrecision
from ef_jax.runtime.program_arguments import ProgramArguments
from ef_jax.runtime.rows import put, take
from ef_jax.runtime.sampling import mark_seen, sample, sampling_arrays
from ef_jax.sampling_options import SamplingOptions
from ef_jax.spec import LayerSpec, ModelSpec

LOGIT_ROWS = 16


class Programs(ProgramArguments):
    """Executables of one engine: `rows` sequences of up to `context` tokens, of which a decode step runs `batch`, over
    a pool of `pool_slots` slots.

    A pass over `width` tokens a sequence (1 when decoding, else one of `chunk_widths`) reads the first `span`
    positions of the key/value caches, one of `spans`; there are few of both, and how many sequences it takes depends on
    the width alone (`lanes`). So a sequence's results do not depend on its company. `compile_for` compiles what a
    sequence needs.

    `low_precision` is the second pool of a run whose misses of little weight are computed in 4 bits, by `low`. Of
    `lossy` what changes the routers' choices is in the programs of layers; where it asks for the weights of misses, the
    programs are `weighed`: the router's weights are in their reports.
    """

    def __init__(
        self,
        spec: ModelSpec,
        *,
        batch: int,
        context: int,
        chunk: int,
        pool_slots: int,
        sharding: jax.sharding.Sharding,
        kernels: ExpertKernels,
        rows: int | None = None,
        look_ahead: LookAheadSpec | None = None,
        low_precision: LowPrecision | None = None,
        lossy: LossyOptions = LOSSLESS,
    ) -> None:
        super().__init__(spec, batch, batch if rows is None else rows, context, pool_slots, look_ahead, sharding)
        self.kernels = kernels
        self.weighed, self.low_precision, self.lossy = lossy.weighs_misses, low_precision, lossy
        of_chunk = pass_shapes.chunk_widths(min(chunk, context))
        self.chunk_widths = pass_shapes.prompt_widths(context) if spec.encodes else of_chunk
        self.spans = pass_shapes.spans(context)
        self._compiled: dict[tuple[Any, ...], jax.stages.Compiled] = {}
        self._memory: dict[tuple[Any, ...], Any] = {}
        self._passes: dict[tuple[int, int], list[Compiled]] = {}

    def with_pool_slots(self, pool_slots: int) -> "Programs":
        """The same programs over a pool of another size; those that do not read the pool stay compiled."""
        other = copy.copy(self)
        other.pool_slots, other._memory, other._passes = pool_slots, {}, {}
        other._compiled = {key: program for key, program in self._compiled.items() if not other._reads_pool(key)}
        return other

    def without_look_ahead(self) -> "Programs":
        """The same programs without a look ahead; those that have none stay compiled."""
        other = copy.copy(self)
        other.look_ahead, other._memory, other._passes = None, {}, {}
        other._compiled = {key: program for key, program in self._compiled.items() if not self._looks_ahead(key)}
        return other

    def compile_all(self) -> None:
        """Compile every program for every width and span."""
        widths = (1, *self.chunk_widths)
        passes = [program for width in widths for span in self.spans for program in self._pass(width, span)]
        ask_in_parallel([*passes, *self._of_misses(), self.end_step, self.head, self.join, self.logits])

    def compile_largest(self) -> None:
        """Compile the programs with the largest workspace: over the whole context, the chunks of most tokens and those
        of most queries at once, and the heads."""
        span = self.spans[-1]
        by_tokens = max(self.chunk_widths, key=lambda width: (self.lanes(width) * width, width))
        by_queries = max(self.chunk_widths, key=lambda width: (self.lanes(width) * min(width, QUERY_BLOCK), width))
        passes = [program for width in {by_tokens, by_queries} for program in self._pass(width, span)]
        ask_in_parallel([*passes, *self._in_low(), self.end_step, self.head, self.join, self.logits])

    def compile_for(self, length: int, until: int) -> None:
        """Compile what a prompt of `length` tokens needs, decoded until `until` positions are taken."""
        wanted: list[Callable[[], Compiled]] = []
        for start, width in self.chunks(length):
            wanted += self._pass(width, self.span(start + width))
        before = 0 if self.spec.encodes else length  # a decoder with an encoder has positions of its own
        for span in self.spans if until > length else ():
            if self.span(before + 1) <= span <= self.span(before + until - length):
                wanted += self._pass(1, span)
        if until > length and self.pool_slots < self.spec.total_experts:
            wanted += self._of_misses()
        ask_in_parallel(wanted)

    def chunks(self, length: int) -> Iterator[tuple[int, int]]:
        """`(start, width)` of the chunks that a prompt of `length` tokens is cut into."""
        return pass_shapes.chunks(length, self.chunk_widths)

    def span(self, positions: int) -> int:
        """The least span that holds `positions` positions; the whole cache for more."""
        return next((span for span in self.spans if span >= positions), self.spans[-1])

    @property
    def workspace_bytes(self) -> int:
        """Temporaries and fresh outputs of the largest program so far, and the outputs it was fed."""
        analyses = self._analyses()
        fresh = [analysis.output_size_in_bytes - analysis.alias_size_in_bytes for analysis in analyses]
        largest = max(analysis.temp_size_in_bytes + out for analysis, out in zip(analyses, fresh, strict=True))
        return int(largest + max(fresh))

    @property
    def temp_bytes(self) -> int:
        """Temporaries of the largest program, which no list of live arrays shows."""
        return max(int(analysis.temp_size_in_bytes) for analysis in self._analyses())

    @property
    def count(self) -> int:
        """Programs compiled so far; it must not grow while decoding."""
        return len(self._compiled)

    def layers(self, width: int, span: int) -> list[Compiled]:
        """What runs each layer of a pass: `begin`, then a `between` a layer."""
        passes = self._passes.get((width, span))
        if passes is None:
            pairs = itertools.pairwise(self.pass_kinds(width))
            passes = [self.begin(width, span), *(self.between(width, span, *pair) for pair in pairs)]
            self._passes[width, span] = passes
        return passes

    def begin(self, width: int, span: int) -> Compiled:
        """`(top, tokens, leaves, cache, reach, (positions, rows), look, state[, held]) -> carried, cache, ahead,
        (positions, rows)`: embedding and first layer. `cache` and `state` are donated.

        Positions and rows come back as device arrays, which the other layers take without another copy.
        """
        kind = self.pass_kinds(width)[0]

        def begin(top, tokens, leaves, cache, reach, places, look, state, held=None):  # type: ignore[no-untyped-def]
            x = self._top(top).embed_tokens(tokens)
            return *self._enter(width, span, kind, leaves, x, cache, reach, places, look, state, held), places

        def inputs() -> tuple[Any, ...]:
            lanes = self.lanes(width)
            tokens = self._device_int(lanes, 1) if width == 1 else self._int(lanes, width)
            places = (self._int(lanes, width), self._int(lanes) if self._finds_rows(width) else None)
            layer = (self._leaves(kind), *self._layer_inputs(kind), places, *self._look(width, kind))
            return (self._top_leaves(), tokens, *layer, *self._held(width, kind))

        return self._program(("begin", width, span), begin, inputs, donate=(3, 7))

    def between(self, width: int, span: int, before: LayerSpec, after: LayerSpec) -> Compiled:
        """`(finish, carried, next leaves, cache, reach, (positions, rows), look, state[, held]) -> carried, cache,
        ahead`: from one layer into the next. `cache` and `state` are donated."""

        def between(finish, carried, leaves, cache, reach, places, look, state, held=None):  # type: ignore[no-untyped-def]
            x = self._leave(width, before, finish, carried)
            return self._enter(width, span, after, leaves, x, cache, reach, places, look, state, held)

        def inputs() -> tuple[Any, ...]:
            carried, lanes = self._carried(width, before), self.lanes(width)
            rows = self._device_int(lanes) if self._finds_rows(width) else None
            places = (self._device_int(lanes, width), rows)
            layer = (self._leaves(after), *self._layer_inputs(after), places, *self._look(width, after))
            return (self._finish(before), carried, *layer, *self._held(width, after))

        return self._program(("between", width, span, before, after), between, inputs, donate=(3, 7))

    def there(self) -> Compiled:
        """`(Routed, pool, slot_row, outputs) -> outputs`: in a decode step, the experts that have their slots while
        others are still on their way."""

        def there(routed, pool, slot_row, outputs):  # type: ignore[no-untyped-def]
            return steps.run_experts(self.spec, self.kernels, routed, pool, slot_row, outputs)

        return self._program(("there",), there, lambda: self._carried(1, self._moe_kind))

    def low(self) -> Compiled:
        """`(Routed, small pool, slot_row, outputs) -> outputs`: in a decode step, the experts that `slot_row` gives a
        slot of the pool of low precision."""
        small = self.low_precision
        if small is None:
            raise ValueError("these programs compute nothing in low precision")

        def low(routed, pool, slot_row, outputs):  # type: ignore[no-untyped-def]
            return steps.run_experts(small.spec, small.kernels, routed, pool, slot_row, outputs)

        def inputs() -> tuple[Any, ...]:
            routed, _, slot_row, outputs = self._carried(1, self._moe_kind)
            return routed, pool_shapes(small.spec.block_format, small.slots, self._sharding), slot_row, outputs

        return self._program(("low", small), low, inputs)

    def wave(self, width: int) -> Compiled:
        """`(sorted rows, outputs, pool, slot_row) -> outputs` (donated): the experts of one wave."""

        def wave(rows, outputs, pool, slot_row):  # type: ignore[no-untyped-def]
            return steps.run_wave(self.spec, self.kernels, rows, outputs, pool, slot_row)

        def inputs() -> tuple[Any, ...]:
            return (*self._sorted(width), self._pool(), self._int(self.spec.experts.count))

        return self._program(("wave", width), wave, inputs, donate=(1,))

    def absorb(self, width: int) -> Compiled:
        """`(look, state, ids [B, T, K], rows) -> state` (donated): what a chunk leaves for a correction to know."""

        def absorb(look, state, ids, rows):  # type: ignore[no-untyped-def]
            return put(state, rows, absorb_chunk(self.look_ahead, look, take(state, rows), ids))

        def inputs() -> tuple[Any, ...]:
            lanes = self.lanes(width)
            return (*self._look(1), self._device_int(lanes, width, self.spec.experts.top_k), self._int(lanes))

        return self._program(("absorb", width), absorb, inputs, donate=(1,))

    def end_step(self) -> Compiled:
        """`(finish, carried) -> last [B, D]`: the last layer's experts in a decode step."""
        kind = self.pass_kinds(1)[-1]

        def end_step(finish, carried):  # type: ignore[no-untyped-def]
            return self._leave(1, kind, finish, carried)[:, 0]

        return self._program(("end_step",), end_step, lambda: (self._finish(kind), self._carried(1, kind)))

    def end_chunk(self, width: int) -> Compiled:
        """`(finish, carried, last, ends) -> x, last`: the residual stream after the last layer of a chunk.

        `last` `[B, D]` (donated) takes at `ends[b, 1]` the row `ends[b, 0]` of each sequence b whose prompt ends in the
        chunk; B and beyond: none.
        """
        kind = self.pass_kinds(width)[-1]

        def end_chunk(finish, carried, last, ends):  # type: ignore[no-untyped-def]
            x = self._leave(width, kind, finish, carried)
            rows = jnp.take_along_axis(x, ends[:, :1, None], axis=1)[:, 0]
            return x, put(last, ends[:, 1], rows)

        def inputs() -> tuple[Any, ...]:
            last = self._float(self.batch, self.spec.hidden)
            return (self._finish(kind), self._carried(width, kind), last, self._int(self.lanes(width), 2))

        return self._program(("end_chunk", width), end_chunk, inputs, donate=(2,))

    def end_encoder(self, width: int) -> Compiled:
        """`(finish, carried, top) -> memory [lanes, T, D]`: what the encoder makes of prompts."""
        kind = self.pass_kinds(width)[-1]

        def end_encoder(finish, carried, top):  # type: ignore[no-untyped-def]
            return self._top(top).encoder_norm(self._leave(width, kind, finish, carried))

        def inputs() -> tuple[Any, ...]:
            return (self._finish(kind), self._carried(width, kind), self._top_leaves())

        return self._program(("end_encoder", width), end_encoder, inputs)

    def remember(self, width: int, kind: LayerSpec) -> Compiled:
        """`(memory, leaves, cache, (positions, rows)) -> cache` (donated): what a layer of the decoder will read of the
        prompts."""

        def remember(memory, leaves, cache, places):  # type: ignore[no-untyped-def]
            return merge_layer(layer_definition(self.spec, kind)[0], leaves).remember(memory, cache, *places)

        def inputs() -> tuple[Any, ...]:
            lanes = self.lanes(width)
            places = (self._int(lanes, width), self._int(lanes))
            memory = self._float(lanes, width, self.spec.hidden)
            return (memory, self._leaves(kind), self._layer_inputs(kind)[0], places)

        return self._program(("remember", width, kind), remember, inputs, donate=(2,))

    def join(self) -> Compiled:
        """`(seen, state, row, mask [V]) -> seen, state` (donated): a new sequence has a row, and `mask` its tokens."""

        def join(seen, state, row, mask):  # type: ignore[no-untyped-def]
            return seen.at[row].set(mask), None if state is None else state.at[row].set(0)

        def inputs() -> tuple[Any, ...]:
            mask = jax.ShapeDtypeStruct((self.spec.vocab,), np.bool_)
            return (self._seen(), self._look(1)[1], self._int(), mask)

        return self._program(("join",), join, inputs, donate=(0, 1))

    def head(self) -> Compiled:
        """`(last [B, D], top, seen [R, V], step [B], sampling [B], active [B], rows, look, state) -> tokens [B, 1],
        logprobs [B], seen, ahead`: the next token. `seen` and `state` are donated."""

        def head(last, top, seen, step, sampling, active, rows, look, state):  # type: ignore[no-untyped-def]
            ends = self._top(top)
            logits = ends.logits(last)
            with jax.named_scope("sample"):
                tokens, logprobs = sample(logits, take(seen, rows), step, sampling)
            ahead = None
            if self.look_ahead is not None:
                embedded, known = ends.embed_tokens(tokens), take(state, rows)
                args = (look, embedded, tokens, active, known)
                report, known = look_from_token(self.spec, self.look_ahead, *args, together=self._together)
                ahead = report, put(state, rows, known)
            chosen = tokens[:, None]
            return chosen, self._told(tokens, logprobs), mark_seen(seen, chosen, active[:, None], rows), ahead

        def inputs() -> tuple[Any, ...]:
            active = jax.ShapeDtypeStruct((self.batch,), np.bool_)
            last = self._float(self.batch, self.spec.hidden)
            sampling = jax.tree.map(
                lambda o: self._array(o.shape, o.dtype), sampling_arrays([(SamplingOptions(), 0)] * self.batch)
            )
            rows = self._int(self.batch) if self._finds_rows(1) else None
            step = self._int(self.batch)
            return (last, self._top_leaves(), self._seen(), step, sampling, active, rows, *self._look(1))

        return self._program(("head",), head, inputs, donate=(2, 8))

    def logits(self) -> Compiled:
        """`(rows [LOGIT_ROWS, D], top) -> f32 [LOGIT_ROWS, V]`."""

        def logits(rows, top):  # type: ignore[no-untyped-def]
            return self._top(top).logits(rows)

        def inputs() -> tuple[Any, ...]:
            return (self._float(LOGIT_ROWS, self.spec.hidden), self._top_leaves())

        return self._program(("logits",), logits, inputs)

    def logits_of(self, rows: np.ndarray, top: Sequence[jax.Array]) -> Iterator[np.ndarray]:
        """f32 `[t, V]` logits of residual rows `[T, D]`, in order; the t sum to T."""
        run = self.logits()
        for first in range(0, len(rows), LOGIT_ROWS):
            part = rows[first : first + LOGIT_ROWS]
            padded = np.zeros((LOGIT_ROWS, rows.shape[1]), rows.dtype)
            padded[: len(part)] = part
            yield np.asarray(run(padded, top))[: len(part)]

    def _analyses(self) -> list[Any]:
        """The memory analyses of all programs so far; each takes XLA milliseconds, once."""
        for key in self._compiled.keys() - self._memory.keys():
            self._memory[key] = program_memory(self._compiled[key])
        return list(self._memory.values())

    # What the programs are made of.

    def _pass(self, width: int, span: int) -> list[Callable[[], Compiled]]:
        """The programs of a pass over `width` tokens a sequence, still to be asked for."""
        programs: list[Callable[[], Compiled]] = [functools.partial(self.begin, width, span)]
        boundaries = dict.fromkeys(itertools.pairwise(self.pass_kinds(width)))
        programs += [functools.partial(self.between, width, span, *kinds) for kinds in boundaries]
        if width > 1:
            programs.append(functools.partial(self.wave, width))
            if self.spec.encodes:
                kinds_after = dict.fromkeys(self.pass_kinds(1))
                programs.append(functools.partial(self.end_encoder, width))
                programs += [functools.partial(self.remember, width, kind) for kind in kinds_after]
            else:
                programs.append(functools.partial(self.end_chunk, width))
            if self.look_ahead is not None and self.look_ahead.correction is not None:
                programs.append(functools.partial(self.absorb, width))
        return programs

    def _of_misses(self) -> list[Callable[[], Compiled]]:
        """What a decode step runs only where an expert is missing."""
        return [self.there, *self._in_low()]

    def _in_low(self) -> list[Callable[[], Compiled]]:
        return [] if self.low_precision is None else [self.low]

    def _reads_pool(self, key: tuple[Any, ...]) -> bool:
        name = key[0]
        if name == "between":
            return bool(key[1] == 1 and key[3].ffn == "moe")
        return name in ("wave", "there") or (name == "end_step" and self.pass_kinds(1)[-1].ffn == "moe")

    def _looks_ahead(self, key: tuple[Any, ...]) -> bool:
        if self.look_ahead is None:
            return False
        if key[0] in ("begin", "between"):
            return bool(key[1] == 1 and (self.pass_kinds(1)[0] if key[0] == "begin" else key[4]).ffn == "moe")
        return bool(key[0] in ("head", "absorb") or (key[0] == "join" and self.look_ahead.correction is not None))

    def _finds_rows(self, width: int) -> bool:
        """Sequences of a pass have rows of other numbers than their places."""
        return width > 1 or self.rows != self.batch

    def _held(self, width: int, kind: LayerSpec) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Argument "held" of a program that ends in a layer of this kind, where it takes one."""
        if self.lossy.cache_bias is None or width > 1 or kind.ffn == "dense":
            return ()
        return (jax.ShapeDtypeStruct((self.spec.experts.count,), np.bool_),)

    def _enter(self, width, span, kind, leaves, x, cache, reach, places, look, state, held):  # type: ignore[no-untyped-def]
        positions, rows = places
        lift = None if held is None else jnp.where(held, jnp.float32(self.lossy.cache_bias), 0)
        share = self.lossy.adaptive_experts
        entered, cache = steps.enter_layer(
            self.spec, kind, leaves, x, cache, positions, reach, span, rows, share=share, lift=lift
        )
        if not isinstance(entered, steps.Routed):
            return entered, cache, None
        if width == 1:
            if self.look_ahead is None:
                return entered, cache, (report_routes(entered), None) if self.weighed else None
            known = take(state, rows)
            report, known = look_from_layer(
                self.spec, self.look_ahead, look, entered, known, weighed=self.weighed, together=self._together
            )
            return entered, cache, (report, put(state, rows, known))
        rows = steps.sort_rows(self.spec, entered)
        return (entered, rows, jnp.zeros_like(rows.rows)), cache, None

    def _leave(self, width, kind, finish, carried):  # type: ignore[no-untyped-def]
        if kind.ffn == "dense":
            return carried
        if width == 1:
            routed, *slots_and_outputs = carried
            outputs = steps.run_experts(self.spec, self.kernels, routed, *slots_and_outputs)
            output = steps.combine_step(self.spec, routed, outputs)
        else:
            routed, order, outputs = carried
            output = combine(outputs, order, steps.output_weights(self.spec, routed))
        return steps.finish_experts(self.spec, finish, routed, output)

    def _told(self, tokens: jax.Array, logprobs: jax.Array) -> Any:
        """What the head tells the host besides the tokens, which it reads too."""
        return logprobs

    def _together(self, of_sequences: jax.Array) -> jax.Array:
        """What reports are made of, of all sequences of a step, from that of this device's, while tracing."""
        return of_sequences

    def _top(self, leaves):  # type: ignore[no-untyped-def]
        return merge_top(top_definition(self.spec)[0], leaves)

    def _program(
        self,
        key: tuple[Any, ...],
        function: Callable[..., Any],
        inputs: Callable[[], tuple[Any, ...]],
        donate: tuple[int, ...] = (),
    ) -> Compiled:
        if key not in self._compiled:
            pool_slots = self.pool_slots if self._reads_pool(key) else None
            look_ahead = self.look_ahead if self._looks_ahead(key) else None
            sizes = (self.batch, self.rows, self.context, pool_slots)
            choice = (self.lossy.adaptive_experts, self.lossy.cache_bias) if key[0] in ("begin", "between") else None
            weighed = self.weighed and key[:2] in (("begin", 1), ("between", 1))
            place = (self.spec, self.kernels, *sizes, look_ahead, weighed, choice, self._place, key)
            self._compiled[key] = executable(place, lambda: self._compile(key, function, inputs(), donate))
        return self._compiled[key]

    @property
    def _place(self) -> Any:
        """What else executables are known by: where they run."""
        return self._sharding

    def _compile(
        self, key: tuple[Any, ...], function: Callable[..., Any], inputs: tuple[Any, ...], donate: tuple[int, ...]
    ) -> jax.stages.Compiled:
        return jax.jit(function, donate_argnums=donate).lower(*inputs).compile()
