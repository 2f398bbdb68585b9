"""The options that trade exactness for speed: what a run was allowed to change. Each is off unless asked for."""

import dataclasses
import math
from typing import Any

from ef_jax.errors import InputError, UnsupportedError
from ef_jax.spec import ModelSpec

LOW_GROUP = 32
"""Weights that share a scale in 4 bits, unless said otherwise."""

_FORMATS = ("int8", "int4")
_MOST_BIAS = 64.0  # whose power is far from the largest float32
GROUPS = (32, 64, 96, 128)
"""Weights that may share a scale in int4."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LossyOptions:
    """What may change a run's results; None leaves each as the model has it. `load` takes them with `lossy_` before.

    Attributes:
      adaptive_experts: a token keeps its experts of largest router weight up to this share of the weight of all that it
        chose, above 0 to 1; those beyond are dropped. 1 drops none.
      cache_bias: when decoding, an expert that has a slot is chosen before one that has not, if its router logit is
        lower by less than this, 0 to 64; 0 changes nothing.
      skip: a missing expert whose router weight is below this is left out of a decode step, 0 to 1. Weights are
        those before a model's scaling factor; of several tokens' the largest counts. 1 leaves out all that is missing.
      low_precision_miss: likewise, what is fetched and computed in 4 bits.
      quantize: blocks are stored and computed in fewer bits: "int8", "int4" (a scale for 32 weights), or "int4:64".

    Raises:
      InputError: a value out of its range.
    """

    adaptive_experts: float | None = None
    cache_bias: float | None = None
    skip: float | None = None
    low_precision_miss: float | None = None
    quantize: str | None = None

    def __post_init__(self) -> None:
        _check_number("adaptive_experts", self.adaptive_experts, most=1.0, above_zero=True)
        _check_number("cache_bias", self.cache_bias, most=_MOST_BIAS)
        _check_number("skip", self.skip, most=1.0)
        _check_number("low_precision_miss", self.low_precision_miss, most=1.0)
        if self.quantize is not None:
            quantization(self.quantize)
        skip, low = self.skip, self.low_precision_miss
        if skip is not None and low is not None and skip >= low:
            raise InputError(
                f"lossy_skip {skip:g} leaves nothing for lossy_low_precision_miss {low:g}: give it a larger one"
            )

    @property
    def any(self) -> bool:
        """Whether anything may change."""
        return any(value is not None for value in dataclasses.asdict(self).values())

    @property
    def weighs_misses(self) -> bool:
        """Whether the router's weight of a missing expert says what becomes of it."""
        return self.skip is not None or self.low_precision_miss is not None

    def check(self, spec: ModelSpec) -> None:
        """Refuses what a model has no use for.

        Raises:
          UnsupportedError: its tokens have one expert each, and experts are to be dropped; or its experts cannot be
            rounded to 4 bits, and missing ones are to be.
        """
        if self.adaptive_experts is not None and spec.experts.top_k == 1:
            raise UnsupportedError(
                "lossy_adaptive_experts drops experts of a token, and this model's tokens have one each: leave it out"
            )
        experts = spec.experts
        if self.low_precision_miss is not None:
            why = None
            if experts.quantization is not None:
                why = f"are {spec.block_dtype} already"
            elif not experts.gated:
                why = "have no gate"
            elif experts.width % LOW_GROUP or spec.hidden % (2 * LOW_GROUP):
                why = f"have sizes, {experts.width} and half of {spec.hidden}, that {LOW_GROUP} does not divide"
            if why is not None:
                raise UnsupportedError(
                    f"lossy_low_precision_miss rounds missing experts to 4 bits, and this model's {why}: leave it out"
                )

    def as_dict(self) -> dict[str, Any] | None:
        """Those that are on, by the names that `load` has for them; None: none, the run is lossless."""
        on = {f"lossy_{name}": value for name, value in dataclasses.asdict(self).items() if value is not None}
        return on or None


def quantization(text: str) -> tuple[str, int | None]:
    """Format and group of `lossy_quantize`: "int8" has no group, "int4" one of 32 unless it says so, as in "int4:64".

    Raises:
      InputError: another format, or another group than 32, 64, 96 and 128.
    """
    name, colon, group = text.partition(":") if isinstance(text, str) else ("", "", "")
    if name in _FORMATS and not colon:
        return name, None if name == "int8" else LOW_GROUP
    if name == "int4" and group in map(str, GROUPS):
        return name, int(group)
    raise InputError(
        f"lossy_quantize {text!r:.60} is not a format: give int8, int4 (a scale for 32 weights), or int4:64"
    )


def _check_number(name: str, value: float | None, *, most: float, above_zero: bool = False) -> None:
    if value is None:
        return
    fits = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not fits or value < 0 or (above_zero and value == 0) or value > most:
        least = "above 0" if above_zero else "0"
        raise InputError(f"lossy_{name} must be a number, {least} to {most:g}; got {value!r:.60}")


LOSSLESS = LossyOptions()
