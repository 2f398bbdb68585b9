"""The engine: one device, one batch at a time, experts served from slots as the routers ask for them."""

import functools
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ef_jax.errors import InputError, LinkError
from ef_jax.memory.plan import MemoryPlan
from ef_jax.memory.residency import Residency
from ef_jax.memory.slot_pool import MAX_INSERT
from ef_jax.nn import FULL_WINDOW
from ef_jax.predict import Predictor
from ef_jax.prefetching import NO_PREFETCHING, Prefetching
from ef_jax.runtime.batch import Batch
from ef_jax.runtime.dense import DenseWeights
from ef_jax.runtime.look_ahead import Look, LookAhead, Report, read_report, read_token_report
from ef_jax.runtime.programs import LOGIT_ROWS, Programs
from ef_jax.runtime.recorder import Listener
from ef_jax.runtime.sampling import SamplingArrays, SamplingOptions, sampling_arrays
from ef_jax.runtime.steps import Routed
from ef_jax.schedule.device_link import DeviceLink
from ef_jax.schedule.emulated_link import EmulatedLink
from ef_jax.schedule.scheduler import Scheduler
from ef_jax.schedule.token_order import Order, run_there_first
from ef_jax.spec import ModelSpec
from ef_jax.stats import Stats
from ef_jax.timeline import COMPUTE, STEPS, Timeline


class Engine:
    """Runs batches of sequences through the model. Python decides over ids; compiled programs hold the arrays."""

    def __init__(
        self,
        spec: ModelSpec,
        plan: MemoryPlan,
        programs: Programs,
        dense: DenseWeights,
        residency: Residency,
        link: DeviceLink | EmulatedLink,
        device: jax.Device,
        *,
        look_ahead: LookAhead | None = None,
        predictor: Predictor | None = None,
        prefetching: Prefetching = NO_PREFETCHING,
        candidates: str = "value",
        order: Order = "auto",
    ) -> None:
        self.spec, self.plan, self.programs = spec, plan, programs
        self.link, self.device = link, device
        self.look_ahead, self.order = look_ahead, order
        self._looking = look_ahead  # what the steps of this run look ahead by
        self._blind: Programs | None = None
        self._off_because = prefetching.off_because
        self.stats = Stats.empty(
            layers=len(spec.moe_layers),
            experts=spec.total_experts,
            slots=plan.slots,
            staging_slots=plan.staging_slots,
        )
        self.recorder: Listener | None = None
        self.timeline: Timeline | None = None
        self._served_at = 0.0
        self._dense = dense
        self._batch = Batch(spec, batch=plan.batch, context=plan.context, device=device)
        windows = [np.int32(layer.window or FULL_WINDOW) for layer in spec.layers]
        self._windows: list[jax.Array] = jax.device_put(windows, self._batch.sharding)
        self._moe_index = {layer: index for index, layer in enumerate(spec.moe_layers)}
        self._arrange_looks()
        self._report: jax.Array | None = None
        self._token_report: Report | None = None
        chosen = plan.batch * spec.experts.top_k
        self._no_outputs = jnp.zeros((chosen, spec.hidden), jnp.dtype(spec.dtype), device=self._batch.sharding)
        self.scheduler: Scheduler[Any] = Scheduler(
            residency,
            link,
            self.stats,
            block_bytes=plan.block_bytes,
            wave_size=MAX_INSERT,
            predictor=predictor,
            prefetch=prefetching.prefetch,
            candidates=candidates,
        )

    @property
    def residency(self) -> Residency:
        """Which block is in which slot."""
        return self.scheduler.residency

    @property
    def dense(self) -> DenseWeights:
        """The weights that stay on the device."""
        return self._dense

    @property
    def _running(self) -> Any:
        """The programs of this run: `Programs`, or what a bench has put in their place."""
        return self.programs if self._blind is None or self._looking is self.look_ahead else self._blind

    def show(self, timeline: Timeline | None) -> None:
        """Note in `timeline` what runs from now on; None: nowhere.

        Compute is noted from when a layer's experts are there until the host has read what the next layer needs, so on
        a device that runs by itself it is what the host sees of it.
        """
        self.timeline = timeline
        self.scheduler.show(timeline)

    def shift_pregate(self, shifts: np.ndarray) -> None:
        """Add `shifts`, f32 `[L + 1, H, E]`, to pre-gate logits from now on; see `residual_means`.

        Raises:
          InputError: nothing looks ahead, or a trained predictor does.
        """
        if self.look_ahead is None:
            raise InputError('nothing looks ahead here: load the model with prefetch="auto" and a link that overlaps')
        self.look_ahead.shift(shifts)
        self._arrange_looks()

    def prepare(self, lengths: Sequence[int], until: int) -> None:
        """Compile what prompts of `lengths` tokens need, decoded until `until` positions are taken, so that nothing
        compiles while they run. They look ahead only if somebody will listen."""
        self._look(self.look_ahead if self.scheduler.listens() else None)
        self._running.compile_for(lengths, until)
        if self._looking is not None and self.scheduler.on_trial:
            self._blind = self._blind or self.programs.without_look_ahead()
            self._blind.compile_for(lengths, until)

    def start(self, prompts: Sequence[np.ndarray], sampling: SamplingArrays) -> tuple[np.ndarray, np.ndarray]:
        """Begin a batch: run the prompts and choose each sequence's first token.

        Args:
          prompts: at most `plan.batch` int32 arrays of token ids, none empty, none longer than the context.
          sampling: options of `plan.batch` sequences.

        Returns:
          tokens int32 and log-probabilities f32, one a prompt.
        """
        batch = self._batch
        began = time.perf_counter()
        batch.begin(prompts, sampling)
        if self._looking is not None:
            self._looking.reset()
        for _ in self._prompt_chunks(prompts):
            pass
        tokens, logprobs = self._choose(batch.last)
        self._note(COMPUTE, "head", self._served_at)
        self._note(STEPS, "prompts", began)
        phase = self.stats.prefill
        phase.seconds += time.perf_counter() - began
        phase.tokens += sum(len(prompt) for prompt in prompts)
        self._note_peak()
        return tokens[: len(prompts)], logprobs[: len(prompts)]

    def step(self) -> tuple[np.ndarray, np.ndarray]:
        """One token for every active sequence.

        Returns:
          tokens int32 `[B]` and log-probabilities f32 `[B]`; those of inactive sequences mean nothing.
        """
        batch, phase = self._batch, self.stats.decode
        began = time.perf_counter()
        positions = np.where(batch.active, batch.length, -1).astype(np.int32)[:, None]
        span = self._running.span(int(positions.max()) + 1)
        deferred: list[tuple[int, jax.Array]] = []
        if self._looking is not None and self._blind is not None and not self.scheduler.listens():
            self._look(None)
        ahead = self._token_report
        self.scheduler.begin_step(
            batch.inputs[batch.active].tolist(),
            None if ahead is None else ahead.bins,
            diversity=None if ahead is None else ahead.diversity,
        )
        carried = self._layers(1, span, batch.tokens, positions, functools.partial(self._serve, deferred))
        tokens, logprobs = self._choose(self._running.end_step()(self._dense.finish[-1], carried))
        self._note(COMPUTE, "head", self._served_at)
        for index, ids in deferred:
            self.scheduler.note(index, _rows(ids))
        batch.length[batch.active] += 1
        phase.seconds += time.perf_counter() - began
        phase.tokens += int(batch.active.sum())
        phase.steps += 1
        self._note(STEPS, "step", began)
        return tokens, logprobs

    def stop(self, sequence: int) -> None:
        """Sequence `sequence` of the batch is done: later steps leave it out."""
        self._batch.active[sequence] = False

    def finish(self) -> None:
        """The batch is done: nothing is fetched for it any more; note the peak of device memory."""
        self._batch.active[:] = False
        self.scheduler.end_run()
        if self.stats.horizon is None and self._off_because is not None:
            self.stats.horizon = {"off_because": self._off_because}
        self._note_peak()

    def logits(self, tokens: np.ndarray) -> Iterator[np.ndarray]:
        """Logits after every token of one sequence.

        Args:
          tokens: int32 `[T]`, not longer than the context.

        Yields:
          f32 `[t, V]`, in order; the t sum to T.
        """
        run = self._running.logits()
        left = len(tokens)
        began = time.perf_counter()
        self._batch.begin([tokens], sampling_arrays(SamplingOptions(), self.plan.batch))
        for x in self._prompt_chunks([tokens]):
            rows = np.asarray(x)[0, :left]
            left -= len(rows)
            for first in range(0, len(rows), LOGIT_ROWS):
                part = rows[first : first + LOGIT_ROWS]
                padded = np.zeros((LOGIT_ROWS, rows.shape[1]), rows.dtype)
                padded[: len(part)] = part
                yield np.asarray(run(padded, self._dense.top))[: len(part)]
        self.stats.prefill.seconds += time.perf_counter() - began
        self.stats.prefill.tokens += len(tokens)
        self._note_peak()

    def _choose(self, last: jax.Array) -> tuple[np.ndarray, np.ndarray]:
        """The next token of every sequence, `[B]`, and its log-probability, from its last residual row `[B, D]`."""
        batch, looking = self._batch, self._looking
        state = None if looking is None else looking.state
        batch.tokens, logprobs, batch.seen, ahead = self._running.head()(
            last,
            self._dense.top,
            batch.seen,
            batch.step.copy(),
            batch.sampling,
            batch.active.copy(),
            self._first_look,
            state,
        )
        batch.step += 1
        self._token_report = None
        if looking is not None:
            report, looking.state = ahead
            self._token_report = read_token_report(self.spec, report)
        batch.inputs = np.asarray(batch.tokens)[:, 0]
        return batch.inputs, np.asarray(logprobs)

    def _prompt_chunks(self, prompts: Sequence[np.ndarray]) -> Iterator[jax.Array]:
        """Run prompts chunk by chunk; yields each chunk's residual stream `[B, T, D]` after the last layer."""
        batch, looking = self._batch, self._looking
        for start, width in self._running.chunks(max(len(prompt) for prompt in prompts)):
            tokens = np.zeros((self.plan.batch, width), np.int32)
            positions = np.full((self.plan.batch, width), -1, np.int32)
            index = np.full(self.plan.batch, -1, np.int32)
            for sequence, prompt in enumerate(prompts):
                part = prompt[start : start + width]
                tokens[sequence, : len(part)] = part
                positions[sequence, : len(part)] = np.arange(start, start + len(part))
                if start < len(prompt) <= start + width:
                    index[sequence] = len(prompt) - start - 1
            span = self._running.span(start + width)
            absorb = self._running.absorb(width) if looking is not None and looking.state is not None else None
            serve = functools.partial(self._serve_prompt, self._running.wave(width), absorb)
            carried = self._layers(width, span, tokens, positions, serve)
            x, batch.last = self._running.end_chunk(width)(self._dense.finish[-1], carried, batch.last, index)
            self.stats.prefill.steps += 1
            yield x

    def _layers(self, width, span, tokens, positions, serve):  # type: ignore[no-untyped-def]
        """Every layer of a pass; `serve(index, carried)` sees to the experts of each MoE layer. Returns the last's."""
        batch, windows, layers, finish = self._batch, self._windows, self._dense.layers, self._dense.finish
        run = self._running.layers(width, span)
        if self.recorder is not None:
            serve = self.recorder.listen(serve, tokens, positions)
        self._served_at = time.perf_counter()
        looks = self._looks if width == 1 else [None] * len(layers)
        carried, batch.k[0], batch.v[0], ahead, positions = run[0](
            self._dense.top,
            tokens,
            layers[0],
            batch.k[0],
            batch.v[0],
            windows[0],
            positions,
            looks[0],
            self._look_state(looks[0]),
        )
        self._hear(ahead)
        for layer in range(1, len(layers)):
            before = layer - 1
            if before in self._moe_index:
                carried = serve(self._moe_index[before], carried)
                self._served_at = time.perf_counter()
            carried, batch.k[layer], batch.v[layer], ahead = run[layer](
                finish[before],
                carried,
                layers[layer],
                batch.k[layer],
                batch.v[layer],
                windows[layer],
                positions,
                looks[layer],
                self._look_state(looks[layer]),
            )
            self._hear(ahead)
        last = len(layers) - 1
        if last in self._moe_index:
            carried = serve(self._moe_index[last], carried)
            self._served_at = time.perf_counter()
        return carried

    def _look(self, looking: LookAhead | None) -> None:
        """From the next program on look ahead by `looking`, or not at all."""
        if looking is not self._looking:
            self._looking, self._token_report = looking, None
            self._blind = self._blind or self.programs.without_look_ahead()
            self._arrange_looks()

    def _arrange_looks(self) -> None:
        """The look ahead of each decoder layer's program, and that of the head's; None where there is none."""
        looks = [None] * (1 + len(self._moe_index)) if self._looking is None else self._looking.looks
        self._first_look: Look | None = looks[0]
        self._looks: list[Look | None] = [None] * len(self.spec.layers)
        for layer, index in self._moe_index.items():
            self._looks[layer] = looks[1 + index]

    def _look_state(self, look: Look | None) -> jax.Array | None:
        return None if look is None or self._looking is None else self._looking.state

    def _hear(self, ahead: tuple[jax.Array, jax.Array | None] | None) -> None:
        """Keep what a program said of coming layers."""
        if ahead is None or self._looking is None:
            self._report = None
        else:
            self._report, self._looking.state = ahead

    def _serve(self, deferred, index: int, routed: Routed):  # type: ignore[no-untyped-def]
        """Have every expert that MoE layer `index` chose in a slot; a layer that cannot miss is not read back."""
        scheduler, residency, link = self.scheduler, self.residency, self.link
        outputs = self._no_outputs
        if scheduler.cannot_miss(index):
            deferred.append((index, routed.ids))
            return routed, link.pool.array, residency.slot_of[index].copy(), outputs
        try:
            report = None if self._report is None else read_report(self.spec, self._report, self.plan.batch)
            rows, bins = (_rows(routed.ids), None) if report is None else (report.ids, report.bins)
        except (
            RuntimeError
        ) as error:  # JAX's: a copy that nobody waited for may have failed, and what reads it fails too
            raise LinkError(f"what led to layer {index} has failed: {str(error).splitlines()[0]:.200}") from error
        self._note(COMPUTE, f"layer {index}", self._served_at)
        admission = scheduler.ask(index, rows, bins)
        if not (admission.missing or admission.late):
            return routed, link.pool.array, residency.slot_row(index, admission), outputs
        if not run_there_first(self.order, admission, link):
            scheduler.complete(admission)
            return routed, link.pool.array, residency.slot_row(index, admission), outputs
        coming = [*admission.missing, *admission.late]
        there = residency.slot_row(index, admission)
        there[coming] = -1
        began = time.perf_counter()
        outputs = self._running.there()(routed, link.pool.array, there, outputs)
        self._note(COMPUTE, f"layer {index}, resident rows", began)
        scheduler.complete(admission)
        rest = np.full_like(there, -1)
        rest[coming] = residency.slot_row(index, admission)[coming]
        return routed, link.pool.array, rest, outputs

    def _serve_prompt(self, wave, absorb, index: int, carried):  # type: ignore[no-untyped-def]
        """Outputs of every routed row of MoE layer `index`, wave by wave; a trained predictor hears of its routes."""
        routed, rows, outputs = carried
        if absorb is not None and self._looking is not None:
            looking = self._looking
            looking.state = absorb(looking.looks[1 + index], looking.state, routed.ids)
        counts = np.asarray(rows.sizes)
        self._note(COMPUTE, f"prompt, layer {index}", self._served_at)
        for part in self.scheduler.serve_prompt(index, counts):
            began = time.perf_counter()
            outputs = wave(rows, outputs, self.link.pool.array, part.slot_row)
            self._note(COMPUTE, f"prompt, wave of layer {index}", began)
        return routed, rows.order, outputs

    def _note(self, track: str, name: str, began: float) -> None:
        if self.timeline is not None:
            self.timeline.span(track, name, began, time.perf_counter())

    def _note_peak(self) -> None:
        live = sum(
            array.nbytes
            for array in jax.live_arrays()
            if array.sharding.memory_kind == "device" and self.device in array.sharding.device_set
        )
        self.stats.peak_device_bytes = max(self.stats.peak_device_bytes, live + self.programs.temp_bytes)


def _rows(ids: Any) -> list[list[int]]:
    """The experts of each active sequence of a step, `[B, 1, K]`; waits for them."""
    return [row for row in np.asarray(ids)[:, 0].tolist() if row[0] >= 0]
