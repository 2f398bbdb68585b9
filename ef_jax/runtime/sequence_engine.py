"""What engines do with sequences: prompts, steps, choosing tokens, logits; on one device or on a mesh."""

import functools
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import UInt8

from ef_jax.predict.log_odds import union_bins
from ef_jax.runtime.dense import DenseWeights
from ef_jax.runtime.layer_passes import LayerPasses, routed_rows, through
from ef_jax.runtime.rows import Chunk
from ef_jax.sampling_options import SamplingOptions
from ef_jax.timeline import COMPUTE, STEPS, Timeline


class SequenceEngine(LayerPasses):
    """Runs sequences through the model.

    It holds up to `rows` sequences, each in a row of the key/value caches. One takes a row with `join`, runs its prompt
    in the passes of `cuts` with `prompt_pass`, then a token at a time with `step`, and goes with `leave`. What a
    sequence gets does not depend on its row or its company, bit for bit. It is a `Stepper` for a `BatchEngine`.
    """

    @property
    def dense(self) -> DenseWeights:
        """The weights that stay on the device."""
        return self._dense

    @property
    def programs(self) -> Any:
        """The `Programs` that the engine was made with, or what a bench has put in their place; those that
        `lookout.running` names may be others."""
        return self.lookout.programs

    def show(self, timeline: Timeline | None) -> None:
        """Note in `timeline` what runs from now on; None: nowhere.

        Compute is noted from when a layer's experts are there until the host has read what the next layer needs, so on
        a device that runs by itself it is what the host sees of it.
        """
        self.timeline = timeline
        self._scheduler.show(timeline)

    @property
    def rows(self) -> int:
        """Sequences that can be held at once."""
        return self._rows.count

    @property
    def batch(self) -> int:
        """Sequences that one step can run."""
        return self._rows.batch

    @property
    def repeats(self) -> bool:
        """Whether a pass that has raised `LinkError` can be run again."""
        return True

    def cuts(self, length: int) -> list[tuple[int, int]]:
        """`(start, width)` of the chunks that a prompt of `length` tokens is cut into."""
        return list(self.programs.chunks(length))

    def lanes(self, width: int) -> int:
        """Prompts that one `prompt_pass` over `width` tokens of each can take."""
        return self._pass_lanes(width)

    def prepare(self, length: int, until: int) -> None:
        """Compile what a prompt of `length` tokens needs, decoded until `until` positions are taken, so that nothing
        compiles while it runs. Sequences look ahead only if somebody will listen."""
        if self._resting:
            self.lookout.look(self._scheduler.listens())
        self.lookout.compile_for(length, until, may_stop=self._scheduler.on_trial)

    def join(self, row: int, prompt: np.ndarray, options: SamplingOptions, draw: int) -> None:
        """A sequence takes a row; its prompt is still to be run.

        Args:
          row: 0 to `rows - 1`, one that nobody has.
          prompt: int32 `[T]`, not empty, not longer than the context.
          options: how its tokens are chosen.
          draw: the number that its random draws go by.
        """
        self._resting = False
        rows, lookout = self._rows, self.lookout
        rows.join(row, prompt, options, draw)
        mask = np.zeros(self.spec.vocab, bool)
        mask[self._first_token if self.spec.encodes else prompt] = True
        rows.seen, lookout.state = lookout.running.join()(rows.seen, lookout.state, np.int32(row), mask)
        if self.routing_paths is not None:
            self.routing_paths.join(row, prompt)

    def leave(self, row: int) -> None:
        """The sequence of a row is done; the row is free."""
        self._rows.prompts[row] = self._rows.prompts[row][:0]

    def prompt_pass(self, width: int, parts: Sequence[tuple[int, int]]) -> dict[int, tuple[int, float]]:
        """One chunk of each of some prompts.

        Args:
          width: of the chunks, as `cuts` has them.
          parts: row and start of each chunk, at most `lanes(width)`.

        Returns:
          For each row whose prompt ends in the pass, its first token and that token's log-probability. With an encoder
          these come of a first step of the decoder, which follows the pass.

        Raises:
          LinkError: blocks could not be copied; the pass can be run again.
        """
        began = time.perf_counter()
        ended = [row for row, start in parts if len(self._rows.prompts[row]) <= start + width]
        ended = sorted(ended) if self.rows == self.batch else ended
        self._run_chunk(width, parts, dict(zip(ended, self._rows.places(ended), strict=True)))
        phase = self.stats.prefill
        for row, start in parts:
            self._rows.length[row] = min(len(self._rows.prompts[row]), start + width)
            phase.tokens += int(self._rows.length[row]) - start
        firsts = []
        if ended and not self.spec.encodes:
            firsts = self._choose(self._last, ended)
            self._note(COMPUTE, "head", self._served_at)
        self._note(STEPS, "prompts", began)
        phase.seconds += time.perf_counter() - began
        self._note_peak()
        if ended and self.spec.encodes:
            self._begin_texts(ended)
            firsts = self.step(ended)
        return dict(zip(ended, firsts, strict=True))

    def step(self, rows: Sequence[int], then: Sequence[int] = ()) -> list[tuple[int, float]]:
        """One token for the sequences of some rows.

        Args:
          rows: at most `batch`, whose prompts have run.
          then: other rows that are to take the next step, as far as is known.

        Returns:
          A token and its log-probability for each, in the order of `rows`.

        Raises:
          LinkError: blocks could not be copied; the step can be run again.
        """
        began = time.perf_counter()
        order, last, deferred = self._advance(rows, then)
        chosen = self._choose(last, order)
        self._note(COMPUTE, "head", self._served_at)
        self._end_step(order, deferred, began)
        if order == list(rows):
            return chosen
        of_row = dict(zip(order, chosen, strict=True))
        return [of_row[row] for row in rows]

    def _advance(
        self, rows: Sequence[int], then: Sequence[int]
    ) -> tuple[list[int], jax.Array, list[tuple[int, jax.Array]]]:
        """The layers of a decode step.

        Returns:
          The rows in the order of their places, residual rows `[B, D]`, and routes that nobody has waited for yet.
        """
        state = self._rows
        by_age = sorted(rows, key=lambda row: int(state.number[row]))  # as replays have them
        order = sorted(rows) if state.count == state.batch else by_age
        places = state.places(order)
        self._age_order = None if order == by_age else [order.index(row) for row in by_age]
        positions = np.full((state.batch, 1), -1, np.int32)
        positions[places, 0] = state.length[order]
        index = state.index(order) if state.count != state.batch else None
        span = self.lookout.running.span(int(positions.max()) + 1)
        deferred: list[tuple[int, jax.Array]] = []
        if self.lookout.may_stop and not self._scheduler.listens():
            self.lookout.look(False)
        ahead = self.lookout.token_report(order)
        self._scheduler.begin_step(
            state.tokens[by_age].tolist(),
            None if ahead is None else ahead.bins,
            diversity=None if ahead is None else ahead.diversity,
            paths=self._union_of_paths(order),
            following=self._union_of_paths(list(then)),
        )
        serve = functools.partial(self._serve, deferred)
        carried = through(self._layers(1, span, self._tokens(order), positions, index, serve))
        last = self.lookout.running.end_step()(self._dense.finish[self._step_layers[-1]], carried)
        return order, last, deferred

    def _end_step(self, order: list[int], deferred: list[tuple[int, jax.Array]], began: float) -> None:
        """A step that began then has run: it is counted, and what was not waited for is told."""
        for layer, ids in deferred:
            self._note_routes(layer, ids)
        self._rows.length[order] += 1
        phase = self.stats.decode
        phase.seconds += time.perf_counter() - began
        phase.tokens += len(order)
        phase.steps += 1
        self._note(STEPS, "step", began)

    def rest(self) -> None:
        """Nobody has a row: nothing is fetched for now; note the peak of device memory."""
        self._resting = True
        self._scheduler.end_run()
        if self.stats.horizon is None and self._off_because is not None:
            self.stats.horizon = {"off_because": self._off_because}
        self._note_peak()

    def recover(self) -> None:
        """After an error that was no `LinkError`: arrays that were lost with a program are made anew, empty."""
        self._fed = None
        self.lookout.reset()
        if self._rows.lost:
            self._rows.clear()
        if self._recover_slots():
            self._scheduler.forget()
        if self._last.is_deleted():
            self._last = self._no_last()
        if self.routing_paths is not None:
            self.routing_paths.reset()

    def paths(self, rows: Sequence[int]) -> UInt8[np.ndarray, "n L E"] | None:
        """What the next tokens of some rows are predicted to use, as bins of log-odds; None: nobody knows."""
        return None if self.routing_paths is None else self.routing_paths.bins(rows)

    def logits(self, tokens: np.ndarray, row: int = 0) -> Iterator[np.ndarray]:
        """Logits after every token of one sequence.

        Args:
          tokens: int32 `[T]`, not longer than the context.
          row: one that nobody has.

        Yields:
          f32 `[t, V]`, in order; the t sum to T.
        """
        left = len(tokens)
        began = time.perf_counter()
        self.join(row, tokens, SamplingOptions(), 0)
        try:
            for start, width in self.cuts(left):
                rows = self._run_alone(width, row, start)[: left - start]
                yield from self.lookout.running.logits_of(rows, self._dense.top)
        finally:
            self.leave(row)
        self.stats.prefill.seconds += time.perf_counter() - began
        self.stats.prefill.tokens += len(tokens)
        self._note_peak()

    def logits_by_steps(self, tokens: np.ndarray, row: int = 0) -> Iterator[np.ndarray]:
        """As `logits`, by a prompt of the first token and a decode step for each of the others."""
        self.join(row, tokens[:1], SamplingOptions(), 0)
        try:
            began = time.perf_counter()
            first = self._run_alone(self.cuts(1)[0][1], row, 0)
            self._rows.length[row] = 1
            rows = [first[0]]
            self.stats.prefill.seconds += time.perf_counter() - began
            self.stats.prefill.tokens += 1
            rows += self._follow(row, tokens[1:].tolist())
            yield from self.lookout.running.logits_of(np.stack(rows), self._dense.top)
        finally:
            self.leave(row)
        self._note_peak()

    def logits_after(self, prompt: np.ndarray, tokens: np.ndarray, row: int = 0) -> Iterator[np.ndarray]:
        """Logits of a decoder with an encoder: after its first token, and after each of those given.

        Args:
          prompt: int32 `[P]`, what the encoder reads.
          tokens: int32 `[T]`, what the decoder is given; with the prompt not longer than the context.
          row: one that nobody has.

        Yields:
          f32 `[t, V]`, in order; the t sum to 1 + T.
        """
        self.join(row, prompt, SamplingOptions(), 0)
        try:
            for start, width in self.cuts(len(prompt)):
                self._run_chunk(width, [(row, start)], {})
            self._begin_texts([row])
            rows = self._follow(row, [self._first_token, *tokens.tolist()])
            yield from self.lookout.running.logits_of(np.stack(rows), self._dense.top)
        finally:
            self.leave(row)
        self._note_peak()

    def _follow(self, row: int, tokens: Sequence[int]) -> list[np.ndarray]:
        """What the layers make of tokens that a sequence is given, a decode step each: residual rows `[D]`."""
        self._fed = None
        self.lookout.hear_tokens([row], None)
        place, rows = self._rows.places([row])[0], []
        for token in tokens:
            began = time.perf_counter()
            self._rows.tokens[row] = token
            order, last, deferred = self._advance([row], ())
            rows.append(self._whole(last)[place])
            self._end_step(order, deferred, began)
        return rows

    def _union_of_paths(self, rows: list[int]) -> UInt8[np.ndarray, "L E"] | None:
        """What a step of some rows is predicted to use, if there is somebody to hear it."""
        if self.routing_paths is None or not rows or not self._scheduler.hears:
            return None
        return union_bins(self.routing_paths.bins(rows))

    def _tokens(self, rows):  # type: ignore[no-untyped-def]
        """What the sequences of a step take in, `[B, 1]` on the device."""
        if self._fed is not None:
            fed, tokens = self._fed
            if fed == rows or (self.rows == self.batch and set(rows) <= set(fed)):
                return tokens
        state = self._rows
        given = np.zeros((state.batch, 1), np.int32)
        given[state.places(rows), 0] = state.tokens[rows]
        return state.put(given)

    def _choose(self, last: jax.Array, rows: list[int]) -> list[tuple[int, float]]:
        """The next token of the sequences of some rows, and its log-probability, from residual rows `[B, D]`."""
        state = self._rows
        places = state.places(rows)
        active, step = np.zeros(state.batch, bool), np.zeros(state.batch, np.int32)
        active[places], step[places] = True, state.step[rows]
        tokens, told, state.seen, ahead = self.lookout.running.head()(
            last,
            self._dense.top,
            state.seen,
            step,
            state.sampling(rows),
            active,
            state.index(rows) if state.count != state.batch else None,
            *self.lookout.from_token(),
        )
        if self.routing_paths is not None:
            self.routing_paths.follow(state.index(rows), tokens)
        state.step[rows] += 1
        self._fed = rows, tokens
        self.lookout.hear_tokens(rows, ahead)
        ids, logprobs = self._read_choice(tokens, told)
        state.tokens[rows] = chosen = ids[places]
        return list(zip(chosen.tolist(), logprobs[places].tolist(), strict=True))

    def _read_choice(self, tokens: Any, told: Any) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and log-probabilities `[B]` of what the head gave; waits for them."""
        return np.asarray(tokens)[:, 0], np.asarray(told)

    def _whole(self, array: jax.Array) -> np.ndarray:
        """An array of a step's sequences, read by the host."""
        return np.asarray(array)

    def gather(self, arrays: list[jax.Array]) -> list[jax.Array]:
        """Arrays of a pass's sequences, of one shape, as ones that this process can read whole; nothing is waited for.
        Where there are other processes they have to ask for the same."""
        return arrays

    def _run_alone(self, width: int, row: int, start: int) -> np.ndarray:
        """A chunk of one prompt: the residual stream `[T, D]` after the last layer."""
        return self._whole(self._run_chunk(width, [(row, start)], {}))[0]

    def _note_routes(self, layer: int, ids: Any) -> None:
        """A layer that could not miss chose these experts, as `_serve` has deferred them."""
        self._scheduler.note(layer, self._by_age(routed_rows(ids, dropping=self._drops)))

    def _recover_slots(self) -> bool:
        """Make slots anew that an insert which failed has taken; whether there were any."""
        raise NotImplementedError

    def _note_peak(self) -> None:
        """Bring the peak of device memory in `stats` up to date."""
        raise NotImplementedError

    def _run_chunk(self, width: int, parts: Sequence[tuple[int, int]], ends: dict[int, int]) -> jax.Array:
        """Run chunks of prompts: `(row, start)` each; `_last` takes the last row of those in `ends`, at that place.

        Returns:
          The residual stream `[lanes, T, D]` after the last layer.
        """
        return through(self._chunk(width, parts, ends))

    def _pass_lanes(self, width: int) -> int:
        """Chunks that go through the layers together."""
        lanes: int = self.programs.lanes(width)
        return lanes

    def _chunk(self, width, parts, ends):  # type: ignore[no-untyped-def]
        """`_run_chunk`, of at most `_pass_lanes`, layer by layer; see `_layers` for what it yields."""
        chunk = self._rows.chunk(width, self._pass_lanes(width), parts, ends)
        span = self.lookout.running.span(max(start for _, start in parts) + width)
        absorb = self.lookout.absorber(width, chunk.rows)
        serve = functools.partial(self._serve_prompt, width, absorb)
        carried = yield from self._layers(width, span, chunk.tokens, chunk.positions, chunk.rows, serve)
        self.stats.prefill.steps += 1
        finish = self._dense.finish[self._prompt_layers[-1]]
        if self.spec.encodes:
            return self._remember(width, finish, carried, chunk)
        x, self._last = self.lookout.running.end_chunk(width)(finish, carried, self._last, chunk.ends)
        return x

    def _remember(self, width: int, finish: Sequence[jax.Array], carried: Any, chunk: Chunk) -> jax.Array:
        """Have the decoder's layers remember what the encoder makes of prompts `[lanes, T, D]`, which is returned."""
        programs, caches = self.lookout.running, self._rows.caches
        memory: jax.Array = programs.end_encoder(width)(finish, carried, self._dense.top)
        for layer in self._step_layers:
            remember = programs.remember(width, self.spec.layers[layer].kind)
            caches[layer] = remember(memory, self._dense.layers[layer], caches[layer], (chunk.positions, chunk.rows))
        return memory

    def _begin_texts(self, rows: list[int]) -> None:
        """The decoder begins anew in some rows, whose prompts the encoder has read."""
        self._rows.length[rows], self._rows.tokens[rows] = 0, self._first_token
        self._fed = None
        self.lookout.hear_tokens(rows, None)
