"""Recall by distance and by source as a picture."""

from pathlib import Path
from typing import Any

from ef_jax.errors import InputError


def draw(quality: dict[str, Any], path: Path) -> None:
    """Write a PNG of the part `quality` of `bench.recall`.

    Raises:
      InputError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError('drawing needs matplotlib: pip install "ef_jax[plot]"') from None
    figure = Figure(figsize=(10, 4), layout="constrained")
    means, sources = figure.subplots(1, 2, sharey=True)
    for name, values in quality["recall"].items():
        means.plot(range(1, len(values) + 1), values, marker="o", label=name)
    means.set(xlabel="layers ahead", ylabel="recall of the experts used, %", ylim=(0, 100))
    means.legend(fontsize="small")
    for name, style in (("pre-gate", "--"), ("corrected", "-")):
        for distance in (1, 3, 6):
            column = [row[distance - 1] for row in quality["by_source"][name]]
            points = [(source, value) for source, value in enumerate(column) if value is not None]
            sources.plot(*zip(*points, strict=True), style, color=f"C{distance}", label=f"{name}, {distance} ahead")
    sources.set(xlabel="source (0: embedding, l + 1: what router l reads)")
    sources.legend(fontsize="small")
    figure.savefig(path, dpi=120)
