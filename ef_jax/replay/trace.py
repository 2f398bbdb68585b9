"""`RoutingTrace`: which experts the routers chose, token by token, and the forward passes in which they ran."""

import dataclasses
import heapq
import itertools
import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int64

from ef_jax.errors import InputError
from ef_jax.replay.trace_checks import check_arrays

PROMPT, DECODE = 0, 1

# Ids that `steps` turns into Python lists at a time. Larger blocks of lists outlive the garbage collector's young
# generation and cost three times as much.
_BLOCK_IDS = 1 << 10


@dataclasses.dataclass(slots=True)
class Pass:
    """One forward pass: a step of decoding, or a chunk of prompts.

    Attributes:
      prompt: a chunk of prompts.
      rows: rows of the trace that ran, in batch order; of a chunk, sequence by sequence.
      tokens: the token of each row.
      starts: places in `rows` at which a sequence begins.
      routes: of a step, the experts by layer, sequence and rank, `[L][B][K]`; of a chunk, empty.
      counts: of a chunk, int64 `[L, E]`, rows that each expert serves; of a step, None.
    """

    prompt: bool
    rows: list[int]
    tokens: list[int]
    starts: Sequence[int]
    routes: list[list[list[int]]]
    counts: np.ndarray | None


class PassOrder(NamedTuple):
    """The rows of a trace in the order in which they run: pass p is `rows[bounds[p] : bounds[p + 1]]`."""

    rows: Int64[np.ndarray, "N"]
    bounds: Int64[np.ndarray, "P+1"]
    prompt: Bool[np.ndarray, "P"]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class RoutingTrace:
    """Recorded routing of Q sequences, N tokens in all, through L layers of E experts of which each token uses K.

    Attributes:
      experts: uint8 or uint16 `[N, L, K]`, expert ids in the router's order, distinct within a row.
      tokens: int32 `[N]`, the token that each row processed.
      offsets: int64 `[Q+1]`, sequence q is rows `offsets[q]` to `offsets[q+1]`.
      num_experts: E.
      phases: uint8 `[N]`, `PROMPT` or `DECODE`.
      passes: int64 `[N]`, the number of the forward pass that processed the token, counted over prompts and steps
        alike: tokens of one number ran together, sequences in batch order. None: not recorded.
      model: name of the model, empty if unknown.
      fingerprint: `ef_jax.predict.fingerprint.model_fingerprint` of the model, empty if unknown.
      block_bytes: bytes of one expert's block, if known.
      lossy: what changed the results of the run that was recorded, in words; empty: nothing.
      weights: float16 `[N, L, K]`, the router's weights, if recorded.
      pregate: float16 `[N, L, H, E]`, if recorded: `pregate[n, s, d - 1]` are the choice scores (what a router takes
        its top-k of) that layer s - 1 + d gives the token's residual stream at source s. Source 0 is its embedding,
        source l + 1 what the router of layer l read. Zeros for layers past the last.

    Raises:
      InputError: arrays that contradict one another or the above; the line names the first offence.
    """

    experts: np.ndarray
    tokens: np.ndarray
    offsets: np.ndarray
    num_experts: int
    phases: np.ndarray
    passes: np.ndarray | None = None
    model: str = ""
    fingerprint: str = ""
    block_bytes: int | None = None
    lossy: str = ""
    weights: np.ndarray | None = None
    pregate: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.block_bytes is not None and self.block_bytes < 1:
            raise InputError(f"block_bytes is {self.block_bytes}: give the bytes of an expert's block, or leave it out")
        check_arrays(
            experts=self.experts,
            tokens=self.tokens,
            offsets=self.offsets,
            num_experts=self.num_experts,
            phases=self.phases,
            passes=self.passes,
            weights=self.weights,
            pregate=self.pregate,
        )

    def __repr__(self) -> str:
        how = f", lossy: {self.lossy}" if self.lossy else ""
        return (
            f"RoutingTrace({self.model or 'unknown model'}: {self.sequences} sequences, {self.count} tokens, "
            f"{self.layers} layers x {self.num_experts} experts, top-{self.top_k}{how})"
        )

    @property
    def count(self) -> int:
        """N, tokens."""
        return len(self.tokens)

    @property
    def sequences(self) -> int:
        """Q."""
        return len(self.offsets) - 1

    @property
    def layers(self) -> int:
        """L, MoE layers."""
        return int(self.experts.shape[1])

    @property
    def top_k(self) -> int:
        """K, experts that a token uses in a layer."""
        return int(self.experts.shape[2])

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write the trace to a file, whole or not at all; see `trace_file`.

        Raises:
          InputError: the file exists and `overwrite` is not given, or it cannot be written.
        """
        from ef_jax.replay.trace_file import save_trace

        save_trace(self, path, overwrite=overwrite)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "RoutingTrace":
        """Read a trace from a file; see `trace_file`.

        Raises:
          InputError: the file cannot be read or is no trace.
        """
        from ef_jax.replay.trace_file import load_trace

        return load_trace(path)

    def select(self, first: int, last: int | None = None) -> "RoutingTrace":
        """Sequences `first` to `last` (the end, where None), as a trace of their own; arrays are shared.

        A pass keeps those of its rows that are selected.

        Raises:
          InputError: these sequences are not there, or there are none between the two.
        """
        last = self.sequences if last is None else last
        if not 0 <= first < last <= self.sequences:
            raise InputError(f"sequences {first} to {last} of a trace of {self.sequences}: choose at least one of them")
        part = slice(int(self.offsets[first]), int(self.offsets[last]))
        return dataclasses.replace(
            self,
            experts=self.experts[part],
            tokens=self.tokens[part],
            offsets=self.offsets[first : last + 1] - self.offsets[first],
            phases=self.phases[part],
            passes=None if self.passes is None else self.passes[part],
            weights=None if self.weights is None else self.weights[part],
            pregate=None if self.pregate is None else self.pregate[part],
        )

    def order(self, batch: int | None = None) -> PassOrder:
        """Which rows run together, and when.

        Args:
          batch: None runs the trace as it was recorded. Without recorded passes that is one sequence after another,
            each prompt as one chunk. A number B runs the sequences as B streams and every token, prompts included, as
            a step of decoding: a sequence that ends makes place for the next one at the following step.

        Raises:
          InputError: `batch` is below 1.
        """
        if batch is not None:
            return self._interleaved(batch)
        if self.passes is None:
            joins = np.zeros(self.count, bool)
            joins[1:] = (self.phases[1:] == PROMPT) & (self.phases[:-1] == PROMPT)
            joins[self.offsets[:-1]] = False
            rows, begins = np.arange(self.count), np.flatnonzero(~joins)
        else:
            rows = np.argsort(self.passes, kind="stable")
            begins = np.flatnonzero(np.diff(self.passes[rows], prepend=-1))
        return PassOrder(rows, np.append(begins, self.count), self.phases[rows[begins]] == PROMPT)

    def steps(self, batch: int | None = None) -> Iterator[Pass]:
        """The passes of `order(batch)`, one by one.

        Raises:
          InputError: `batch` is below 1.
        """
        rows, bounds, prompt = self.order(batch)
        starts = self._starts(rows, bounds)
        sizes = np.diff(bounds)
        same = (sizes[1:] == sizes[:-1]) & (prompt[1:] == prompt[:-1])
        runs = [0, *(np.flatnonzero(~same) + 1).tolist(), len(sizes)]
        for first, last in itertools.pairwise(runs):
            if prompt[first]:
                for number in range(first, last):
                    yield self._prompt_pass(rows[bounds[number] : bounds[number + 1]], starts.get(number, ()))
                continue
            width = int(sizes[first])
            most = max(1, _BLOCK_IDS // (width * self.layers * self.top_k))
            for begin in range(first, last, most):
                end = min(begin + most, last)
                index = rows[bounds[begin] : bounds[end]].reshape(end - begin, width)
                routes = self.experts[index].transpose(0, 2, 1, 3).tolist()
                steps = zip(index.tolist(), self.tokens[index].tolist(), routes, strict=True)
                for number, (step_rows, tokens, route) in enumerate(steps, begin):
                    yield Pass(False, step_rows, tokens, starts.get(number, ()), route, None)

    def _interleaved(self, batch: int) -> PassOrder:
        if batch < 1:
            raise InputError(f"batch {batch}: give at least 1")
        lengths = np.diff(self.offsets)
        begins, places = np.zeros((2, self.sequences), np.int64)
        free = [(0, place) for place in range(batch)]
        for sequence, length in enumerate(lengths.tolist()):
            begins[sequence], places[sequence] = time, place = free[0]
            heapq.heapreplace(free, (time + length, place))
        step = np.arange(self.count) + np.repeat(begins - self.offsets[:-1], lengths)
        rows = np.lexsort((np.repeat(places, lengths), step))
        bounds = np.concatenate([[0], np.cumsum(np.bincount(step))])
        return PassOrder(rows, bounds, np.zeros(len(bounds) - 1, bool))

    def _starts(self, rows: np.ndarray, bounds: np.ndarray) -> dict[int, list[int]]:
        """The places at which sequences begin, by pass."""
        begins = np.zeros(self.count, bool)
        begins[self.offsets[:-1]] = True
        at = np.flatnonzero(begins[rows])
        number = np.searchsorted(bounds, at, side="right") - 1
        starts: dict[int, list[int]] = {}
        for step, place in zip(number.tolist(), (at - bounds[number]).tolist(), strict=True):
            starts.setdefault(step, []).append(place)
        return starts

    def _prompt_pass(self, rows: np.ndarray, starts: Sequence[int]) -> Pass:
        first_key = np.arange(self.layers)[:, None] * self.num_experts
        keys = self.experts[rows] + first_key
        counts = np.bincount(keys.ravel(), minlength=self.layers * self.num_experts)
        counts = counts.reshape(self.layers, self.num_experts)
        return Pass(True, rows.tolist(), self.tokens[rows].tolist(), starts, [], counts)
