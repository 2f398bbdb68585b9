"""How tokens are chosen and when a text ends; plain values, without JAX."""

import dataclasses
import math

from ef_jax.errors import InputError

_LARGEST = 2**31 - 1
_SEEDS = 2**32


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SamplingOptions:
    """How to choose tokens and when to stop; the same for every prompt of a call.

    max_new_tokens: tokens to generate at most.
    temperature: 0 is greedy, and then top_k, top_p and seed have no effect.
    top_k: keep the k most likely tokens, and those as likely as the k-th; 0 keeps all.
    top_p: keep the most likely tokens that together reach this probability, and those as likely as the last.
    repetition_penalty: above 1 makes tokens of the prompt and of the text so far less likely (also when greedy).
    seed: of the random draws. Sequence i of a call draws from (seed, i, step), whatever else is in its batch.
    stop: generation ends before any of these strings; they are not part of the text.
    ignore_eos: go on after an end-of-sequence token.

    Raises:
      InputError: a value is out of range.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        _require_integer("max_new_tokens", self.max_new_tokens, 1, _LARGEST)
        _require_integer("top_k", self.top_k, 0, _LARGEST)
        _require_integer("seed", self.seed, 0, _SEEDS - 1)
        if self.temperature != 0:
            _require_number("temperature", self.temperature, 1e-5, 1e4, "or 0 for greedy decoding")
        _require_number("top_p", self.top_p, 1e-6, 1.0, "where 1 keeps every token")
        _require_number("repetition_penalty", self.repetition_penalty, 1e-3, 1e3, "where 1 has no effect")
        if isinstance(self.stop, str):
            raise InputError(f"stop must be a tuple of strings, got the string {self.stop!r}: write ({self.stop!r},)")
        for text in self.stop:
            if not text:
                raise InputError("a stop string is empty: it would stop every text at once; leave it out")


def _require_integer(name: str, value: int, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InputError(f"{name} must be a whole number from {low} to {high}, got {value!r}")


def _require_number(name: str, value: float, low: float, high: float, hint: str) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not number or not low <= value <= high:
        raise InputError(f"{name} must be a number from {low:g} to {high:g}, {hint}; got {value!r}")
