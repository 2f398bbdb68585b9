"""Token ids to text, token by token."""

from collections.abc import Callable, Collection, Sequence

_REPLACEMENT = "\ufffd"
_UNFINISHED_BYTES = 3
_WINDOW = 64


class StreamDecoder:
    """Incremental detokenisation: pieces hold only whole characters and, joined, equal the decoding of all ids.

    A token may carry part of a UTF-8 character. Its text waits until the character is whole, or until it is certain
    that it never will be; then it reads U+FFFD, as in the full decoding. Only a short window of ids is decoded each
    time; it starts with ids whose text is out already, since decoders of the SentencePiece kind drop the space in
    front of the first token. With byte-fallback tokenizers an invalid byte turns the valid byte tokens before it
    into U+FFFD, which a stream cannot take back; valid text is always exact.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], skip: Collection[int] = ()) -> None:
        """`decode`: ids to text. `skip`: ids that have no text (special tokens)."""
        self._decode = decode
        self._skip = frozenset(skip)
        self._window: list[int] = []
        self._fresh = 0  # index in the window of the first id whose text is not all out
        self._emitted = 0  # characters of the window's text that are out

    def push(self, token: int) -> str:
        """The text that `token` settles, possibly ""."""
        if token in self._skip:
            return ""
        self._window.append(token)
        text = self._decode(self._window)
        whole = len(text.rstrip(_REPLACEMENT))
        # Each U+FFFD stands for at least one byte, so that all but the last three are there to stay.
        settled = max(whole, len(text) - _UNFINISHED_BYTES, self._emitted)
        piece = text[self._emitted : settled]
        self._emitted = settled
        if piece and whole == len(text):
            self._window = self._window[self._fresh :]
            self._fresh = len(self._window)
            self._emitted = len(self._decode(self._window))
        elif len(self._window) > _WINDOW:
            self._shorten(text)
        return piece

    def flush(self) -> str:
        """The text still waiting, when no more tokens come."""
        piece = self._decode(self._window)[self._emitted :]
        self._window, self._fresh, self._emitted = [], 0, 0
        return piece

    def _shorten(self, text: str) -> None:
        """Forget ids at the front of a long window of broken characters, where that leaves its text as it is."""
        for split in range(len(self._window) - _UNFINISHED_BYTES - 1, self._fresh, -1):
            head, tail = self._window[:split], self._window[split:]
            dropped = self._decode(head)
            if len(dropped) <= self._emitted and dropped + self._decode(tail) == text:
                self._window, self._fresh, self._emitted = tail, 0, self._emitted - len(dropped)
                return
