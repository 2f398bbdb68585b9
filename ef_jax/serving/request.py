"""A request: one prompt, from its arrival to its end."""

import threading
import traceback
from collections.abc import Callable

import numpy as np
from jaxtyping import Int32

from ef_jax.generation import Generation
from ef_jax.sampling_options import SamplingOptions
from ef_jax.serving.output import Output


class Request:
    """A prompt that is to be continued, and what has come of it. The batch engine changes it, anybody may read it.

    Attributes:
      prompt: int32 `[T]`.
      options: how its tokens are chosen.
      draw: its number for its random draws.
      output: its tokens and text so far.
      deadline: when it ends whatever it has, on the engine's clock, in seconds; None: never.
      row: the row that it holds.
      cuts: `(start, width)` of the chunks of its prompt that are still to run.
      ended: nothing more will come.
      error: what ended it, where that is an error.
    """

    def __init__(
        self,
        prompt: Int32[np.ndarray, " T"],
        options: SamplingOptions,
        output: Output,
        *,
        draw: int = 0,
        deadline: float | None = None,
    ) -> None:
        self.prompt, self.options, self.output = prompt, options, output
        self.draw, self.deadline = draw, deadline
        self.row: int | None = None
        self.cuts: list[tuple[int, int]] = []
        self.error: Exception | None = None
        self.ended = False
        self._over = threading.Event()
        self._listeners: list[Callable[[], None]] = []

    @property
    def until(self) -> int:
        """Positions of the caches that it takes at most: its last token is not fed back."""
        return len(self.prompt) + self.output.limit - 1

    def result(self) -> Generation:
        """What came of it, once it has ended.

        Raises:
          Exception: what ended it, where that is an error.
        """
        if self.error is not None:
            raise self.error
        return self.output.generation()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for its end, `timeout` seconds at most; whether it has ended."""
        return self._over.wait(timeout)

    def end(self, error: Exception | None = None) -> None:
        """It is over: by an error, or as its output's finish reason says."""
        assert not self.ended, "a request ends once"
        _clear_frames(error)
        self.error, self.ended = error, True
        self._over.set()
        self.tell()

    def listen(self, listener: Callable[[], None]) -> None:
        """Call `listener`, on the thread that drives, after every token and at the end."""
        self._listeners.append(listener)

    def unlisten(self, listener: Callable[[], None]) -> None:
        """Undo `listen`."""
        self._listeners.remove(listener)

    def tell(self) -> None:
        """Call the listeners."""
        for listener in tuple(self._listeners):
            listener()


def _clear_frames(error: BaseException | None) -> None:
    """Empty the frames of an error that is kept: they would keep arrays of the pass it ended."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
