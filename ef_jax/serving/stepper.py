"""What the batch engine asks of whatever runs the passes."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int32, UInt8

from ef_jax.sampling_options import SamplingOptions


@runtime_checkable
class Stepper(Protocol):
    """Runs passes over sequences that each hold a row of key/value caches; it decides nothing about their order.

    One thread at a time calls it. A method that raises `LinkError` has changed nothing that counts: the same call may
    be made again, and every row may still leave. After any other error only `recover` is called.

    Attributes:
      rows: sequences held at once, R.
      batch: sequences of one decode step at most, B <= R.
      repeats: a pass that has raised `LinkError` may be run again. Not where other processes run their part of it: they
        would not run theirs again.
    """

    @property
    def rows(self) -> int: ...

    @property
    def batch(self) -> int: ...

    @property
    def repeats(self) -> bool: ...

    def prepare(self, length: int, until: int) -> None:
        """Compile what a prompt of `length` tokens needs that is decoded until `until` positions are taken."""

    def cuts(self, length: int) -> list[tuple[int, int]]:
        """`(start, width)` of the chunks that a prompt of `length` tokens is cut into, in order."""

    def lanes(self, width: int) -> int:
        """Prompts that one pass over chunks of this width takes at most, 1 or more."""

    def join(self, row: int, prompt: Int32[np.ndarray, " T"], options: SamplingOptions, draw: int) -> None:
        """A sequence takes the free row `row`. It was prepared for.

        Args:
          row: below `rows`.
          prompt: int32 `[T]`, 1 token or more.
          options: how its tokens are chosen.
          draw: the sequence's number for its random draws.
        """

    def prompt_pass(self, width: int, parts: Sequence[tuple[int, int]]) -> dict[int, tuple[int, float]]:
        """Run one chunk of each of several prompts.

        Args:
          width: of all the chunks.
          parts: `(row, start)` of each chunk, at most `lanes(width)`; a row's chunks come in order.

        Returns:
          The first token and its log-probability, by row, of the rows whose prompt ends in this pass.
        """

    def step(self, rows: Sequence[int], then: Sequence[int] = ()) -> list[tuple[int, float]]:
        """One token more of each of at most `batch` rows, ascending, whose prompts are through.

        Args:
          rows: those that take a token.
          then: those of them or others that are to take the next step, as far as is known: a hint for prefetches.

        Returns:
          A token and its log-probability for each row, in the order of `rows`.
        """

    def leave(self, row: int) -> None:
        """The sequence of `row` is done, or given up: the row is free."""

    def rest(self) -> None:
        """No row is taken and no request waits for now."""

    def recover(self) -> None:
        """An error has lost what the rows held: every row is free from now on; be usable again."""

    def paths(self, rows: Sequence[int]) -> UInt8[np.ndarray, "n L E"] | None:
        """Predicted paths of the rows' next inputs as log-odds bins, in the order of `rows`; None: none are known."""
