"""What a step goes to by group size, and how many tokens a second whole machines make, as a picture."""

from pathlib import Path
from typing import Any

from ef_jax.errors import InputError

_PARTS = {"compute": "C0", "exchange": "C2", "stall": "C3"}


def draw(rows: list[dict[str, Any]], machines: list[dict[str, Any]], path: Path) -> None:
    """Write a PNG of the rows and the machines of `bench.scale`.

    Raises:
      InputError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError('drawing needs matplotlib: pip install "ef_jax[plot]"') from None
    slots = list(dict.fromkeys(row["slots"] for row in rows))
    figure = Figure(figsize=(4 * len(slots) + 4, 4), layout="constrained")
    *bars, lines = figure.subplots(1, len(slots) + 1)
    for axes, count in zip(bars, slots, strict=True):
        _draw_shares(axes, [row for row in rows if row["slots"] == count])
        axes.set_title(f"{count} slots a device")
    figure.legend(*bars[0].get_legend_handles_labels(), fontsize="small", loc="outside lower left", ncols=len(_PARTS))
    for count in slots:
        of_count = [machine for machine in machines if machine["slots"] == count]
        devices = [machine["devices"] for machine in of_count]
        rates = [machine["tokens_per_second"] for machine in of_count]
        lines.plot(devices, rates, marker="o", label=f"{count} slots a device")
    lines.set_xscale("log", base=2)
    lines.set_yscale("log")
    lines.set_xticks(devices, [str(count) for count in devices])
    lines.set(xlabel="devices, in the fastest groups", ylabel="tokens/s of all", title="machines")
    lines.legend(fontsize="small")
    figure.suptitle("Simulated from recorded routing and stated figures; nothing here was measured", fontsize="medium")
    figure.savefig(path, dpi=120)


def _draw_shares(axes: Any, rows: list[dict[str, Any]]) -> None:
    """A bar for each group, of each part's share of a step; placements side by side in a group."""
    placements = list(dict.fromkeys(row["placement"] for row in rows))
    groups = list(dict.fromkeys(row["group"] for row in rows))
    width = 0.8 / len(placements)
    for place, name in enumerate(placements):
        of_name = [row for row in rows if row["placement"] == name]
        at = [group + width * (place - (len(placements) - 1) / 2) for group in range(len(groups))]
        below = [0.0] * len(groups)
        for part, color in _PARTS.items():
            heights = [100 * row[f"{part}_ms"] / row["step_ms"] for row in of_name]
            axes.bar(at, heights, 0.9 * width, bottom=below, color=color, label=part if place == 0 else None)
            below = [low + height for low, height in zip(below, heights, strict=True)]
        for x in at:
            axes.text(x, 101, name[:3], ha="center", va="bottom", fontsize=6)
    best = [min(row["step_ms"] for row in rows if row["group"] == group) for group in groups]
    ticks = [f"{group}\n{step:.3g} ms" for group, step in zip(groups, best, strict=True)]
    axes.set_xticks(range(len(groups)), ticks)
    axes.set(xlabel="devices that share the experts, step", ylabel="% of a step", ylim=(0, 108))
