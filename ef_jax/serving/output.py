"""One sequence's output as it grows: tokens, settled pieces of text, and why it ended."""

from collections.abc import Sequence

from ef_jax.generation import FinishReason, Generation
from ef_jax.sampling_options import SamplingOptions
from ef_jax.text import StopMatcher, StreamDecoder, Tokenizer


class Output:
    """What has come of one request so far.

    Attributes:
      pieces: the settled text in the order it came, without empty pieces; joined, the text.
      tokens: generated ids.
      finish_reason: None while it goes on.
    """

    def __init__(
        self, tokenizer: Tokenizer | None, options: SamplingOptions, *, eos: Sequence[int], limit: int
    ) -> None:
        """`tokenizer`: None: no text. `eos`: ids that end the text. `limit`: most tokens, 1 or more."""
        self._decoder: StreamDecoder | None = tokenizer.stream() if tokenizer is not None else None
        self._stop = StopMatcher(options.stop)
        self._eos = () if options.ignore_eos else tuple(eos)
        self._logprobs: list[float] = []
        self.limit = limit
        self.pieces: list[str] = []
        self.tokens: list[int] = []
        self.finish_reason: FinishReason | None = None

    @property
    def has_text(self) -> bool:
        """Whether there is a tokenizer to make text."""
        return self._decoder is not None

    def push(self, token: int, logprob: float) -> None:
        """Take a token and what text it settles."""
        self.tokens.append(token)
        self._logprobs.append(logprob)
        piece = ""
        reason: FinishReason | None = None
        if token in self._eos:
            reason = "eos"
        elif self._decoder is not None:
            piece = self._stop.push(self._decoder.push(token))
        if reason is None and len(self.tokens) >= self.limit:
            reason = "length"
        self._settle(piece, reason)

    def close(self, reason: FinishReason) -> None:
        """End before its time; text that was held back comes out."""
        self._settle("", reason)

    def _settle(self, piece: str, reason: FinishReason | None) -> None:
        if reason is not None and self._decoder is not None:
            piece += self._stop.push(self._decoder.flush())
            piece += self._stop.flush()
        if piece:
            self.pieces.append(piece)
        self.finish_reason = "stop" if self._stop.stopped else reason

    def generation(self) -> Generation:
        """The finished output."""
        assert self.finish_reason is not None
        return Generation(
            text="".join(self.pieces) if self._decoder is not None else None,
            tokens=self.tokens,
            finish_reason=self.finish_reason,
            logprobs=self._logprobs,
        )
