"""What the lossy options cost against what they buy, as a picture."""

from pathlib import Path
from typing import Any

from ef_jax.errors import InputError


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Write a PNG of the rows of `bench.lossy`: added nats by tokens a second, a line for each option.

    Raises:
      InputError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError('drawing needs matplotlib: pip install "ef_jax[plot]"') from None
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    lossless = rows[0]["tokens_per_second"]["median"]
    for name in dict.fromkeys(row["option"] for row in rows[1:]):
        own = [row for row in rows if row["option"] == name]
        points = [(row["tokens_per_second"]["median"], row["cost_nats"], row["strength"]) for row in own]
        if own[0]["strength"] is None:
            axes.axvline(points[0][0], color="gray", linestyle=":", label=name)
            continue
        axes.plot([lossless, *(x for x, _, _ in points)], [0, *(y for _, y, _ in points)], marker="o", label=name)
        for x, y, strength in points:
            axes.annotate(f"{strength}", (x, y), xytext=(3, 3), textcoords="offset points", fontsize="x-small")
    axes.set(xlabel="tokens a second", ylabel="added nats a token")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
