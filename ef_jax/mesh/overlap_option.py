"""Whether passes of prompts run side by side, and why."""

import dataclasses
from typing import Any, Literal

from ef_jax.choices import chosen
from ef_jax.mesh.overlap import LayerCosts, Split

OverlapOption = Literal["auto", "on", "off"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Overlap:
    """What was decided.

    Attributes:
      passes: of prompts that run side by side, 1 or 2.
      reason: in a few words.
      costs: of a layer of one pass, where they were measured.
      split: what they make of two passes, one after another and side by side.
    """

    passes: int
    reason: str
    costs: LayerCosts | None = None
    split: Split | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON types; seconds of a layer's parts, and those predicted of two passes by how many run together."""
        report: dict[str, Any] = {"passes": self.passes, "reason": self.reason}
        if self.costs is not None and self.split is not None:
            rows = self.split.rows // 2
            parts = [field.name for field in dataclasses.fields(self.costs)]
            report["layer_seconds"] = {part: getattr(self.costs, part).seconds(rows) for part in parts}
            report["predicted_seconds"] = {str(count): seconds for count, seconds in self.split.seconds.items()}
        return report


ALONE = Overlap(passes=1, reason="every pass of prompts takes all that there are")


def check_overlap(option: str) -> OverlapOption:
    """The option, if it is one.

    Raises:
      InputError: it is not.
    """
    checked: OverlapOption = chosen("overlap", option, OverlapOption)
    return checked
