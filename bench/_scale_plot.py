"""Time of a step by group size as a picture."""

from pathlib import Path
from typing import Any

from ef_jax.errors import InputError

_PARTS = ("compute", "exchange", "stall")


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Write a PNG of the rows of `bench.scale`.

    Raises:
      InputError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError('drawing needs matplotlib: pip install "ef_jax[plot]"') from None
    slots = list(dict.fromkeys(row["slots"] for row in rows))
    placements = list(dict.fromkeys(row["placement"] for row in rows))
    groups = list(dict.fromkeys(row["group"] for row in rows))
    figure = Figure(figsize=(5 * len(slots), 4), layout="constrained")
    width = 0.8 / len(placements)
    for axes, count in zip(figure.subplots(1, len(slots), squeeze=False)[0], slots, strict=True):
        for place, name in enumerate(placements):
            of_name = {row["group"]: row for row in rows if row["slots"] == count and row["placement"] == name}
            at = [group + width * (place - (len(placements) - 1) / 2) for group in range(len(groups))]
            below = [0.0] * len(groups)
            for part, color in zip(_PARTS, ("C0", "C2", "C3"), strict=True):
                heights = [of_name[group][f"{part}_ms"] for group in groups]
                label = part if place == 0 else None
                axes.bar(at, heights, 0.9 * width, bottom=below, color=color, label=label)
                below = [low + height for low, height in zip(below, heights, strict=True)]
            for x, top in zip(at, below, strict=True):
                axes.text(x, top, name[:3], ha="center", va="bottom", fontsize=7)
        axes.set_xticks(range(len(groups)), [str(group) for group in groups])
        axes.set(xlabel="devices that share the experts", ylabel="ms a step", title=f"{count} slots a device")
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
