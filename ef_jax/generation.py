"""What callers get back."""

import dataclasses
import math
from typing import Any, Literal

FinishReason = Literal["eos", "stop", "length", "timeout", "cancelled"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Generation:
    """One prompt's continuation.

    text: decoded continuation, up to a stop string; None where the checkpoint has no tokenizer. tokens: generated
    ids, an end-of-sequence token included. logprobs: natural log-probability of each token under the unmodified
    logits. finish_reason: "eos", "stop" (a stop string), "length" (max_new_tokens, or the context is full), or, of a
    submission, "timeout" or "cancelled" (what had come by then).
    """

    text: str | None
    tokens: list[int]
    finish_reason: FinishReason
    logprobs: list[float]

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """How likely a text is: `logprob`, the summed natural log-probability of its `tokens` after the first."""

    logprob: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """`exp` of the mean negative log-probability; NaN for a text of one token."""
        return math.exp(-self.logprob / self.tokens) if self.tokens else math.nan
