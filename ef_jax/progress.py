"""A one-line progress bar on a terminal; silent everywhere else."""

import io
import sys
import threading
import time
from types import TracebackType
from typing import TextIO

_SECONDS_BETWEEN_DRAWS = 0.1
_WIDTH = 24


class Progress:
    """Progress towards `total` of something, drawn on `stream`; use it as a context manager.

    Safe to call from several threads. The line is erased at the end.

    Args:
      total: how much there is to do, in units of `unit`. A unit of "B" is shown as MB or GB.
      unit: what is counted, such as "B" or "layers".
      label: what is being done, such as "loading".
      stream: where the bar is drawn.
      enabled: draw or not; None draws only if `stream` is a terminal.
    """

    def __init__(
        self,
        total: int,
        unit: str,
        label: str,
        stream: TextIO | io.TextIOBase | None = None,
        enabled: bool | None = None,
    ) -> None:
        self._total = total
        self._unit = unit
        self._label = label
        self._stream = sys.stderr if stream is None else stream
        self._enabled = self._stream.isatty() if enabled is None else enabled
        self._done = 0
        self._note = ""
        self._lock = threading.Lock()
        self._start = time.monotonic()
        self._next_draw = self._start

    def update(self, amount: int = 1, note: str = "") -> None:
        """Say that `amount` more is done, and how it goes."""
        with self._lock:
            self._done += amount
            self._note = note
            now = time.monotonic()
            if self._enabled and now >= self._next_draw:
                self._next_draw = now + _SECONDS_BETWEEN_DRAWS
                self._draw(now)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._enabled:
            self._stream.write("\r\x1b[K")
            self._stream.flush()

    def _draw(self, now: float) -> None:
        fraction = min(1.0, self._done / self._total) if self._total else 1.0
        bar = "█" * int(_WIDTH * fraction)
        rate = self._done / max(now - self._start, 1e-9)
        left = f" {(self._total - self._done) / rate:.0f} s left" if rate > 0 else ""
        amount = f"{self._amount(self._done)}/{self._amount(self._total)}"
        note = f", {self._note}" if self._note else ""
        self._stream.write(f"\r\x1b[K{self._label} {bar:<{_WIDTH}} {fraction:4.0%} {amount}{left}{note}")
        self._stream.flush()

    def _amount(self, count: int) -> str:
        if self._unit != "B":
            return f"{count} {self._unit}"
        return f"{count / 1e9:.2f} GB" if self._total >= 1e9 else f"{count / 1e6:.1f} MB"
