"""Recorded routing as examples for a correction: one a token, of sequences to learn from or sequences held out."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int

from ef_jax.errors import InputError
from ef_jax.nn.correction import CorrectionSpec
from ef_jax.nn.correction_parallel import TokenInputs
from ef_jax.replay.trace import RoutingTrace

_SEQUENCES_AT_ONCE = 64


class Examples:
    """The tokens of several traces, numbered through.

    Args:
      traces: at least one, each with pre-gate scores, all of the same L, E, K and H.

    Raises:
      InputError: a trace has no pre-gate scores, or differs from the first in a size.
    """

    def __init__(self, traces: Sequence[RoutingTrace]) -> None:
        for number, trace in enumerate(traces, 1):
            if trace.pregate is None:
                raise InputError(
                    f"trace {number} of {len(traces)} has no pre-gate scores: record it with ef-jax trace --pregate 6"
                )
            if sizes_of(trace) != sizes_of(traces[0]):
                own, first = (_described(sizes_of(each)) for each in (trace, traces[0]))
                raise InputError(f"trace {number} has {own}, and the first has {first}: give traces of one kind")
        self._traces = traces
        self._ends = np.cumsum([trace.count for trace in traces])
        self._counts: list[np.ndarray] = []
        self._decays: tuple[float, ...] | None = None
        self.offsets = np.concatenate([[0], *(trace.offsets[1:] + end for trace, end in self._with_begins())])
        """int64, where each sequence begins, and the end."""

    @property
    def count(self) -> int:
        """Tokens."""
        return int(self._ends[-1])

    def split(self, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Numbers of the tokens to learn from and of those held out, int64; whole sequences, chosen by chance.

        Args:
          share: of the tokens that are held out, about; at least one sequence is.
          seed: of the choice.

        Raises:
          InputError: there is only one sequence.
        """
        lengths = np.diff(self.offsets)
        if len(lengths) < 2:
            raise InputError("the traces have one sequence, and some must be held out: record several prompts")
        order = np.random.default_rng(seed).permutation(len(lengths))
        held = np.zeros(len(lengths), bool)
        left = share * self.count
        for sequence in order.tolist():
            if lengths[sequence] <= 1.5 * left:
                held[sequence] = True
                left -= lengths[sequence]
        held[np.argmin(lengths)] |= not held.any()
        of_token = np.repeat(held, lengths)
        return np.flatnonzero(~of_token), np.flatnonzero(of_token)

    def inputs(self, rows: Int[np.ndarray, "M"], spec: CorrectionSpec) -> TokenInputs:
        """What is known of the tokens `rows`, given in rising order, as numpy arrays."""
        self._count_uses(spec.decays)
        parts = []
        for number, (trace, begin) in enumerate(self._with_begins()):
            own = rows[(rows >= begin) & (rows < begin + trace.count)] - begin
            first = np.isin(own, trace.offsets[:-1])
            experts = trace.experts[own].astype(np.int32)
            before = np.where(first[:, None, None], -1, trace.experts[np.maximum(own - 1, 0)].astype(np.int32))
            assert trace.pregate is not None
            parts.append((trace.tokens[own], experts, before, self._counts[number][own], trace.pregate[own]))
        joined = [np.concatenate(arrays) for arrays in zip(*parts, strict=True)]
        return TokenInputs(*joined)  # type: ignore[arg-type]  # numpy arrays, which jax takes

    def _with_begins(self) -> list[tuple[RoutingTrace, int]]:
        """Each trace and the number of its first token."""
        return [(trace, int(end) - trace.count) for trace, end in zip(self._traces, self._ends, strict=True)]

    def _count_uses(self, decays: tuple[float, ...]) -> None:
        if self._decays != decays:
            self._counts = [counts_before(trace, decays) for trace in self._traces]
            self._decays = decays


def counts_before(trace: RoutingTrace, decays: tuple[float, ...]) -> np.ndarray:
    """float16 `[N, n, L, E]`: the decayed counts of uses before each token (see `CorrectionSpec.decays`)."""
    kept = np.array(decays, np.float32)[:, None, None]
    counts = np.zeros((trace.count, len(decays), trace.layers, trace.num_experts), np.float16)
    lengths = np.diff(trace.offsets)
    by_length = np.argsort(-lengths, kind="stable")
    for first in range(0, trace.sequences, _SEQUENCES_AT_ONCE):
        part = by_length[first : first + _SEQUENCES_AT_ONCE]
        now = np.zeros((len(part), *counts.shape[1:]), np.float32)
        used = np.zeros((len(part), *counts.shape[2:]), np.float32)
        for step in range(int(lengths[part[0]])):
            running = int((lengths[part] > step).sum())
            rows = trace.offsets[part[:running]] + step
            counts[rows] = now[:running]
            used[:running] = 0
            np.put_along_axis(used[:running], trace.experts[rows].astype(np.intp), 1, axis=2)
            now[:running] = kept * now[:running] + (1 - kept) * used[:running, None]
    return counts


def sizes_of(trace: RoutingTrace) -> tuple[int, int, int, int]:
    """L, E, K and H of a trace with pre-gate scores."""
    return trace.layers, trace.num_experts, trace.top_k, 0 if trace.pregate is None else trace.pregate.shape[2]


def aimed(layers: int, distances: int) -> Bool[np.ndarray, "L H"]:
    """Whether source s has a layer at distance d = 1 to H."""
    return np.add.outer(np.arange(layers), np.arange(distances)) < layers


def _described(sizes: tuple[int, int, int, int]) -> str:
    layers, experts, top_k, distances = sizes
    return f"{layers} layers x {experts} experts, top-{top_k}, {distances} distances"
