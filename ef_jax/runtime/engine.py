"""The engine: one device, one batch at a time, experts served from slots as the routers ask for them."""

import time
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from ef_jax.memory.plan import MemoryPlan
from ef_jax.memory.residency import Residency
from ef_jax.nn import FULL_WINDOW
from ef_jax.runtime.batch import Batch
from ef_jax.runtime.dense import DenseWeights
from ef_jax.runtime.prefill import PromptExperts
from ef_jax.runtime.programs import LOGIT_ROWS, Programs
from ef_jax.runtime.sampling import SamplingArrays, SamplingOptions, sampling_arrays
from ef_jax.runtime.stats import PhaseStats, Stats
from ef_jax.schedule.link import DeviceLink
from ef_jax.spec import ModelSpec


class Engine:
    """Runs batches of sequences through the model. Python decides over ids; compiled programs hold the arrays."""

    def __init__(
        self,
        spec: ModelSpec,
        plan: MemoryPlan,
        programs: Programs,
        dense: DenseWeights,
        residency: Residency,
        link: DeviceLink,
        device: jax.Device,
    ) -> None:
        self.spec, self.plan, self.programs = spec, plan, programs
        self.residency, self.link, self.device = residency, link, device
        self.stats = Stats.empty(
            layers=len(spec.moe_layers),
            experts=spec.total_experts,
            slots=plan.slots,
            staging_slots=plan.staging_slots,
        )
        self._dense = dense
        self._batch = Batch(spec, batch=plan.batch, context=plan.context, device=device)
        self._kinds = [layer.ffn for layer in spec.layers]
        self._windows = [np.int32(layer.window or FULL_WINDOW) for layer in spec.layers]
        self._moe_index = {layer: index for index, layer in enumerate(spec.moe_layers)}
        self._prompt_experts = PromptExperts(residency, link)

    def prepare(self, lengths: Sequence[int], until: int) -> None:
        """Compile what prompts of `lengths` tokens need, decoded until `until` positions are taken, so that nothing
        compiles while they run."""
        self.programs.compile_for(lengths, until)

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
        for _ in self._prompt_chunks(prompts):
            pass
        tokens, logprobs = self._choose(batch.last)
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
        batch, programs, layers = self._batch, self.programs, self._dense.layers
        phase = self.stats.decode
        began = time.perf_counter()
        positions = np.where(batch.active, batch.length, -1).astype(np.int32)[:, None]
        deferred: list[tuple[int, jax.Array]] = []
        span = programs.span(int(positions.max()) + 1)
        run = programs.layers(1, span)
        carried, batch.k[0], batch.v[0] = run[0](
            self._dense.top, batch.tokens, layers[0], batch.k[0], batch.v[0], positions, self._windows[0]
        )
        for layer in range(1, len(layers)):
            if self._kinds[layer - 1] == "moe":
                carried = self._serve(layer - 1, carried, phase, deferred)
            carried, batch.k[layer], batch.v[layer] = run[layer](
                layers[layer - 1],
                carried,
                layers[layer],
                batch.k[layer],
                batch.v[layer],
                positions,
                self._windows[layer],
            )
        if self._kinds[-1] == "moe":
            carried = self._serve(len(layers) - 1, carried, phase, deferred)
        tokens, logprobs = self._choose(programs.end_step()(layers[-1], carried))
        for index, ids in deferred:
            phase.hits[index] += len(set(np.asarray(ids).ravel().tolist()) - {-1})
        batch.length[batch.active] += 1
        phase.seconds += time.perf_counter() - began
        phase.tokens += int(batch.active.sum())
        phase.steps += 1
        return tokens, logprobs

    def stop(self, sequence: int) -> None:
        """Sequence `sequence` of the batch is done: later steps leave it out."""
        self._batch.active[sequence] = False

    def finish(self) -> None:
        """The batch is done: note the peak of device memory."""
        self._batch.active[:] = False
        self._note_peak()

    def logits(self, tokens: np.ndarray) -> Iterator[np.ndarray]:
        """Logits after every token of one sequence.

        Args:
          tokens: int32 `[T]`, not longer than the context.

        Yields:
          f32 `[t, V]`, in order; the t sum to T.
        """
        run = self.programs.logits()
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
        batch = self._batch
        batch.tokens, logprobs, batch.seen = self.programs.head()(
            last, self._dense.top, batch.seen, batch.step.copy(), batch.sampling
        )
        batch.step += 1
        return np.asarray(batch.tokens)[:, 0], np.asarray(logprobs)

    def _prompt_chunks(self, prompts: Sequence[np.ndarray]) -> Iterator[jax.Array]:
        """Run prompts chunk by chunk; yields each chunk's residual stream `[B, T, D]` after the last layer."""
        batch = self._batch
        for start, width in self.programs.chunks(max(len(prompt) for prompt in prompts)):
            tokens = np.zeros((self.plan.batch, width), np.int32)
            positions = np.full((self.plan.batch, width), -1, np.int32)
            index = np.full(self.plan.batch, -1, np.int32)
            for sequence, prompt in enumerate(prompts):
                part = prompt[start : start + width]
                tokens[sequence, : len(part)] = part
                positions[sequence, : len(part)] = np.arange(start, start + len(part))
                if start < len(prompt) <= start + width:
                    index[sequence] = len(prompt) - start - 1
            carried = self._chunk(width, self.programs.span(start + width), tokens, positions)
            x, batch.last = self.programs.end_chunk(width)(self._dense.layers[-1], carried, batch.last, index)
            self.stats.prefill.steps += 1
            yield x

    def _chunk(self, width: int, span: int, tokens: np.ndarray, positions: np.ndarray):  # type: ignore[no-untyped-def]
        batch, programs, layers = self._batch, self.programs, self._dense.layers
        run = programs.layers(width, span)
        carried, batch.k[0], batch.v[0] = run[0](
            self._dense.top, tokens, layers[0], batch.k[0], batch.v[0], positions, self._windows[0]
        )
        for layer in range(1, len(layers)):
            if self._kinds[layer - 1] == "moe":
                carried = self._serve_prompt(layer - 1, width, carried)
            carried, batch.k[layer], batch.v[layer] = run[layer](
                layers[layer - 1],
                carried,
                layers[layer],
                batch.k[layer],
                batch.v[layer],
                positions,
                self._windows[layer],
            )
        return self._serve_prompt(len(layers) - 1, width, carried) if self._kinds[-1] == "moe" else carried

    def _serve(self, layer, routed, phase: PhaseStats, deferred):  # type: ignore[no-untyped-def]
        """Have every expert that the layer's router chose in a slot; a layer that cannot miss is not read back."""
        index = self._moe_index[layer]
        residency = self.residency
        if residency.all_resident:
            deferred.append((index, routed.ids))
            return routed, self.link.pool.array, residency.slot_of[index].copy()
        needed = [e for e in dict.fromkeys(np.asarray(routed.ids).ravel().tolist()) if e >= 0]
        admission = residency.admit(index, needed)
        phase.hits[index] += admission.hits
        if admission.missing:
            spent = self.link.seconds
            self.link.finish(self.link.start(index, admission.missing), admission.missing_slots)
            phase.misses[index] += len(admission.missing)
            phase.bytes_demand += len(admission.missing) * self.plan.block_bytes
            phase.stall_seconds += self.link.seconds - spent
        return routed, self.link.pool.array, admission.slot_row

    def _serve_prompt(self, layer, width: int, carried):  # type: ignore[no-untyped-def]
        routed, rows, outputs = carried
        outputs = self._prompt_experts.run(
            self._moe_index[layer], rows, outputs, self.programs.wave(width), self.stats.prefill
        )
        return routed, rows.order, outputs

    def _note_peak(self) -> None:
        live = sum(
            array.nbytes
            for array in jax.live_arrays()
            if array.sharding.memory_kind == "device" and self.device in array.sharding.device_set
        )
        self.stats.peak_device_bytes = max(self.stats.peak_device_bytes, live + self.programs.temp_bytes)
