"""Serving on a virtual clock: what a batch engine asks for, with the tokens and routes of a recorded trace."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int32, UInt8

from ef_jax.errors import InputError
from ef_jax.predict.log_odds import union_bins
from ef_jax.replay.pregate_bins import PregateBins
from ef_jax.replay.roofline import Roofline
from ef_jax.replay.simulator import Replay
from ef_jax.replay.trace import Pass, RoutingTrace
from ef_jax.sampling_options import SamplingOptions


class Served:
    """A `serving.stepper.Stepper` whose requests are sequences of a trace: forced tokens, forced routes.

    A request says by its `draw` which sequence it is; its prompt are that sequence's first tokens, and what it
    generates are the following ones, whatever the trace says was prompt. Every pass goes through a `Replay`, so through
    the residency, policy, predictor and scheduler of an engine, and takes the time of the link and of a roofline.

    Args:
      trace: recorded routing.
      replay: of its shape, with a link.
      costs: compute times.
      rows: sequences held at once, R.
      batch: sequences of a decode step at most, B.
      chunk: tokens of a prompt that a pass takes at most; a fourth and a sixteenth of it serve what is left over.
      pass_tokens: tokens of all prompts of a pass at most, paddings included; None: `chunk`.
      paths: uint8 `[N, L, E]`, what each token was predicted to use when it became known; None: nothing was.
      pregate: what the pre-gate says at each row; None: nothing.
      staging: prompts stream through the staging ring. False: a chunk goes through the cache as a wide step would.

    Raises:
      InputError: sizes below 1, fewer rows than a step takes, or paths of another shape.
    """

    def __init__(
        self,
        trace: RoutingTrace,
        replay: Replay,
        costs: Roofline,
        *,
        rows: int,
        batch: int,
        chunk: int = 256,
        pass_tokens: int | None = None,
        paths: UInt8[np.ndarray, "N L E"] | None = None,
        pregate: PregateBins | None = None,
        staging: bool = True,
    ) -> None:
        for name, value in (("rows", rows), ("batch", batch), ("chunk", chunk)):
            if value < 1:
                raise InputError(f"{name} {value}: give at least 1")
        if rows < batch:
            raise InputError(f"{rows} rows for steps of {batch} sequences: give at least as many")
        shape = (trace.count, trace.layers, trace.num_experts)
        if paths is not None and paths.shape != shape:
            raise InputError(f"paths are of shape {paths.shape}, and the trace needs {shape}")
        self.rows, self.batch = rows, batch
        self.replay = replay
        self._trace, self._costs = trace, costs
        self._widths = sorted({max(1, width) for width in (chunk // 16, chunk // 4, chunk)})
        self._pass_tokens = chunk if pass_tokens is None else pass_tokens
        self._paths, self._pregate, self._staging = paths, pregate, staging
        self._first: dict[int, int] = {}  # row of the trace with which a sequence begins, by row of the caches
        self._prompts: dict[int, int] = {}  # tokens of its prompt
        self._taken: dict[int, int] = {}  # tokens that it has taken in
        self._first_keys = np.arange(trace.layers)[:, None] * trace.num_experts

    def prepare(self, length: int, until: int) -> None:
        """See `Stepper`."""

    def cuts(self, length: int) -> list[tuple[int, int]]:
        """See `Stepper`."""
        cuts, start = [], 0
        while start < length:
            width = next((width for width in self._widths if width >= length - start), self._widths[-1])
            cuts.append((start, width))
            start += width
        return cuts

    def lanes(self, width: int) -> int:
        """See `Stepper`."""
        return max(1, self._pass_tokens // width)

    def join(self, row: int, prompt: Int32[np.ndarray, " T"], options: SamplingOptions, draw: int) -> None:
        """See `Stepper`.

        Raises:
          InputError: the prompt is not how sequence `draw` of the trace begins, or more is to be generated than it has.
        """
        trace = self._trace
        if not 0 <= draw < trace.sequences:
            raise InputError(f"sequence {draw} of a trace of {trace.sequences}: choose one of them")
        first, end = trace.offsets[draw : draw + 2].tolist()
        if not np.array_equal(trace.tokens[first:end][: len(prompt)], prompt):
            raise InputError(f"the prompt is not how sequence {draw} of the trace begins: take its first tokens")
        if len(prompt) + options.max_new_tokens > end - first:
            raise InputError(
                f"sequence {draw} of the trace has {end - first} tokens, and the prompt of {len(prompt)} is to be "
                f"continued by {options.max_new_tokens}: ask for {end - first - len(prompt)} at most"
            )
        self._first[row], self._prompts[row], self._taken[row] = first, len(prompt), 0

    def prompt_pass(self, width: int, parts: Sequence[tuple[int, int]]) -> dict[int, tuple[int, float]]:
        """See `Stepper`; log-probabilities are all 0."""
        chunks, firsts = [], {}
        for row, start in parts:
            end = min(start + width, self._prompts[row])
            chunks.append(np.arange(start, end) + self._first[row])
            self._taken[row] = end
            if end == self._prompts[row]:
                firsts[row] = (self._next(row), 0.0)
        self._run(np.concatenate(chunks), [row for row, _ in parts], prompt=True)
        return firsts

    def step(self, rows: Sequence[int], then: Sequence[int] = ()) -> list[tuple[int, float]]:
        """See `Stepper`; log-probabilities are all 0."""
        index, following = self._inputs(rows), self._inputs(then)
        for row in rows:
            self._taken[row] += 1
        self._run(index, rows, prompt=False, following=following)
        return [(self._next(row), 0.0) for row in rows]

    def leave(self, row: int) -> None:
        """See `Stepper`."""
        del self._first[row], self._prompts[row], self._taken[row]

    def rest(self) -> None:
        """See `Stepper`."""
        self.replay.end_run()

    @property
    def repeats(self) -> bool:
        """Nothing fails here."""
        return True

    def recover(self) -> None:
        """See `Stepper`."""
        for row in list(self._first):
            self.leave(row)

    def paths(self, rows: Sequence[int]) -> UInt8[np.ndarray, "n L E"] | None:
        """See `Stepper`."""
        return None if self._paths is None else self._paths[self._inputs(rows)]

    def _inputs(self, rows: Sequence[int]) -> np.ndarray:
        """Rows of the trace that these rows take in next."""
        return np.array([self._first[row] + self._taken[row] for row in rows], np.int64)

    def _next(self, row: int) -> int:
        return int(self._trace.tokens[self._first[row] + self._taken[row]])

    def _run(
        self, index: np.ndarray, rows: Sequence[int], *, prompt: bool, following: np.ndarray | None = None
    ) -> None:
        """A pass over rows `index` of the trace, of the sequences `rows`, which have taken them in; the next will be
        over rows `following`, as far as is known."""
        trace = self._trace
        experts = trace.experts[index]
        keys = (experts + self._first_keys).ravel()
        counts = np.bincount(keys, minlength=self._first_keys.size * trace.num_experts)
        counts = counts.reshape(trace.layers, trace.num_experts)
        seconds = self._costs.layer_seconds(
            tokens=len(index),
            positions=sum(self._taken[row] for row in rows),
            experts=np.count_nonzero(counts, axis=1),
        ).tolist()
        tokens = trace.tokens[index].tolist()
        if prompt and self._staging:
            self.replay.run(Pass(True, index.tolist(), tokens, (), [], counts), seconds=seconds)
            return
        step = Pass(False, index.tolist(), tokens, (), experts.transpose(1, 0, 2).tolist(), None)
        ahead = paths = then = None
        if not prompt:
            ahead = None if self._pregate is None else self._pregate.of_step(step.rows)
            paths = None if self._paths is None else union_bins(self._paths[index])
            if self._paths is not None and following is not None and len(following):
                then = union_bins(self._paths[following])
        self.replay.run(step, ahead, paths, following=then, seconds=seconds)
