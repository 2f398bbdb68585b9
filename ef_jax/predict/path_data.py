"""Recorded routing as examples for a routing-path predictor: stretches of sequences, some with what came before."""

import zlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int32, UInt8, UInt16

from ef_jax.errors import InputError
from ef_jax.replay.trace import RoutingTrace


class PathBatch(NamedTuple):
    """B stretches of at most T tokens.

    Attributes:
      prompts: the tokens before each stretch, at most P, from place 0 on.
      lengths: how many.
      tokens: of the stretch.
      experts: that they used.
      counted: which places hold tokens.
    """

    prompts: Int32[np.ndarray, "B P"]
    lengths: Int32[np.ndarray, " B"]
    tokens: Int32[np.ndarray, "B T"]
    experts: UInt8[np.ndarray, "B T L K"] | UInt16[np.ndarray, "B T L K"]
    counted: Bool[np.ndarray, "B T"]


class Stretch(NamedTuple):
    """Tokens `begin` to `end` of a trace; those from `before` on are its prompt."""

    trace: int
    before: int
    begin: int
    end: int


class PathExamples:
    """The sequences of several traces, numbered through.

    Args:
      traces: at least one, all of the same L, E and K.

    Raises:
      InputError: a trace differs from the first in a size.
    """

    def __init__(self, traces: Sequence[RoutingTrace]) -> None:
        for number, trace in enumerate(traces, 1):
            if _described(trace) != _described(traces[0]):
                own, first = _described(trace), _described(traces[0])
                raise InputError(f"trace {number} has {own}, and the first has {first}: give traces of one kind")
        self._traces = traces
        self._sequences = [
            (number, int(begin), int(end))
            for number, trace in enumerate(traces)
            for begin, end in zip(trace.offsets[:-1], trace.offsets[1:], strict=True)
        ]

    @property
    def count(self) -> int:
        """Tokens."""
        return sum(trace.count for trace in self._traces)

    def checksum(self) -> int:
        """Of all tokens and experts, to tell other traces from these."""
        value = 0
        for trace in self._traces:
            for array in (trace.offsets, trace.tokens, trace.experts):
                value = zlib.crc32(np.ascontiguousarray(array), value)
        return value

    def tokens(self, sequences: Sequence[int]) -> int:
        """Tokens of some sequences."""
        return sum(end - begin for _, begin, end in (self._sequences[number] for number in sequences))

    def split(self, share: float, seed: int) -> tuple[list[int], list[int]]:
        """Numbers of the sequences to learn from and of those held out, chosen by chance.

        Args:
          share: of the tokens that are held out, about; at least one sequence is.
          seed: of the choice.

        Raises:
          InputError: there is only one sequence.
        """
        if len(self._sequences) < 2:
            raise InputError("the traces have one sequence, and some must be held out: record several prompts")
        order = np.random.default_rng(seed).permutation(len(self._sequences)).tolist()
        held, left = order[:1], share * self.count - self.tokens(order[:1])
        learned = []
        for number in order[1:]:
            tokens = self.tokens([number])
            if tokens <= left:
                held.append(number)
                left -= tokens
            else:
                learned.append(number)
        return learned, held

    def stretches(
        self, sequences: Sequence[int], *, most: int, prompt: int, random: np.random.Generator | None = None
    ) -> list[Stretch]:
        """Sequences cut into stretches of at most `most` tokens.

        Args:
          sequences: which.
          most: T.
          prompt: P, tokens before a stretch that it may know.
          random: cut at places chosen by chance, give half of the stretches nothing of what was before, and shuffle
            them. None: cut at multiples of `most`, and give all of them all.
        """
        cut = []
        for trace, first, last in (self._sequences[number] for number in sequences):
            begin = first
            while begin < last:
                length = most if random is None or begin > first else int(random.integers(1, most + 1))
                told = prompt if random is None or random.random() < 0.5 else 0
                end = min(begin + length, last)
                cut.append(Stretch(trace, max(first, begin - told), begin, end))
                begin = end
        if random is not None:
            random.shuffle(cut)
        return cut

    def batches(self, stretches: Sequence[Stretch], *, rows: int, most: int, prompt: int) -> Iterator[PathBatch]:
        """Stretches in batches of `rows`, the last one padded with empty ones; T is `most`, P `prompt`."""
        like = self._traces[0]
        for first in range(0, len(stretches), rows):
            batch = PathBatch(
                np.zeros((rows, prompt), np.int32),
                np.zeros(rows, np.int32),
                np.zeros((rows, most), np.int32),
                np.zeros((rows, most, like.layers, like.top_k), like.experts.dtype),
                np.zeros((rows, most), bool),
            )
            for row, (number, before, begin, end) in enumerate(stretches[first : first + rows]):
                trace = self._traces[number]
                batch.prompts[row, : begin - before] = trace.tokens[before:begin]
                batch.lengths[row] = begin - before
                batch.tokens[row, : end - begin] = trace.tokens[begin:end]
                batch.experts[row, : end - begin] = trace.experts[begin:end]
                batch.counted[row, : end - begin] = True
            yield batch


def _described(trace: RoutingTrace) -> str:
    return f"{trace.layers} layers x {trace.num_experts} experts, top-{trace.top_k}"
