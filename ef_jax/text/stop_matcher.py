"""Stop strings in streamed text, also where they straddle pieces."""

from collections.abc import Iterable


class StopMatcher:
    """Passes text on until a stop string is complete; what may be the start of one is held back until it is decided.

    The text ends before the stop string that is complete first; of several that are complete at the same
    character, before the longest. So the result does not depend on how the text was cut into pieces.
    """

    def __init__(self, stop: Iterable[str]) -> None:
        """`stop`: the strings, none of them empty; without any, text passes unchanged."""
        self._stop = tuple(stop)
        self._held = ""
        self.stopped = False

    def push(self, piece: str) -> str:
        """The text that is now certain to belong to the result; "" once `stopped`."""
        if self.stopped:
            return ""
        text = self._held + piece
        found = [(start + len(stop), start) for stop in self._stop if (start := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            self._held = ""
            return text[: min(found)[1]]
        keep = len(text) - max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[keep:]
        return text[:keep]

    def flush(self) -> str:
        """What was held back, when no more text comes; "" once `stopped`."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`, shorter than `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
