"""Pictures of a sweep: hit rate by capacity, stall by bandwidth, and which experts stay resident."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from ef_jax.errors import InputError
from ef_jax.replay.recommendation import Recommendation
from ef_jax.replay.result import ReplayResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which people with any common colour blindness tell apart; markers and dashes differ as well.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D31")
_MARKERS = "os^DvPX*"
_DASHES = ("-", "--", "-.", ":")
_BAND = "#D9D9D9"
_LOG_RATIO = 4.0  # capacities that are further apart than this get a logarithmic axis


def require_matplotlib(path: str | os.PathLike[str]) -> None:
    """Check that a picture can be drawn and written, before a long sweep.

    Raises:
      InputError: matplotlib is not installed, knows no such kind of file, or the directory is not there.
    """
    path = Path(path)
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
    except ImportError:
        raise InputError('--plot needs matplotlib: pip install "ef_jax[plot]"') from None
    kinds = FigureCanvasAgg.get_supported_filetypes()
    if path.suffix[1:].lower() not in kinds:
        raise InputError(f"cannot draw {str(path)!r:.200}: end its name in one of {', '.join(sorted(kinds))}")
    if not path.parent.is_dir():
        raise InputError(f"cannot write {str(path)!r:.200}: there is no directory {str(path.parent)!r:.200}")


def worth_showing(results: Sequence[ReplayResult], recommended: Recommendation) -> ReplayResult:
    """The row to look at closely: the recommended one, or if it never misses, its policy's largest cache that does."""
    rows = [result for result in results if not result.bound and result.policy == recommended.policy]
    chosen = next(row for row in rows if row.capacity == recommended.capacity)
    missing = [row for row in rows if row.misses + row.late_hits]
    return chosen if chosen in missing or not missing else max(missing, key=lambda row: row.capacity.slots)


def plot_sweep(
    path: str | os.PathLike[str],
    results: Sequence[ReplayResult],
    *,
    title: str,
    recommended: Recommendation | None = None,
    shown: ReplayResult | None = None,
    residency: Float[np.ndarray, "L E"] | None = None,
) -> None:
    """Draw a sweep into a file; its kind follows from the name.

    Args:
      path: file to write; one that exists is replaced.
      results: rows of the sweep.
      title: heading.
      recommended: marked in the curves.
      shown: the panel of bandwidths is drawn at its capacity; None: at that of the first row.
      residency: share of the steps in which each key was resident under the policy and capacity of `shown`.

    Raises:
      InputError: matplotlib is not installed, or the file cannot be written.
    """
    require_matplotlib(path)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    bandwidths = {result.timing.bandwidth for result in results if result.timing is not None}
    panels = 1 + (len(bandwidths) > 1) + (residency is not None)
    figure = Figure(figsize=(6.0 * panels, 5.4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    styles = _styles(results)
    axes = iter(figure.subplots(1, panels, squeeze=False)[0])
    _hit_rates(next(axes), results, styles, recommended)
    if len(bandwidths) > 1:
        _stalls(next(axes), results, styles, results[0] if shown is None else shown)
    if residency is not None:
        _residency(figure, next(axes), residency, shown)
    try:
        figure.savefig(path)
    except OSError as error:
        raise InputError(f"cannot write {str(path)!r:.200}: {error.strerror or error}") from None


def _styles(results: Sequence[ReplayResult]) -> dict[str, dict[str, Any]]:
    """How each policy is drawn, in every panel."""
    policies = dict.fromkeys(result.policy for result in results if not result.bound)
    return {
        policy: {
            "color": _COLOURS[number % len(_COLOURS)],
            "marker": _MARKERS[number % len(_MARKERS)],
            "linestyle": _DASHES[number % len(_DASHES)],
            "markersize": 5,
            "linewidth": 1.5,
        }
        for number, policy in enumerate(policies)
    }


def _hit_rates(
    axes: "Axes",
    results: Sequence[ReplayResult],
    styles: dict[str, dict[str, Any]],
    recommended: Recommendation | None,
) -> None:
    curves: dict[str, dict[float, float]] = {}
    for result in results:
        curves.setdefault(result.policy, {}).setdefault(result.capacity.share, result.hit_rate)
    shares = sorted({share for curve in curves.values() for share in curve})
    if "lru" in curves and "belady" in curves:
        low, high = (np.array([100 * curves[name][share] for share in shares]) for name in ("lru", "belady"))
        percents = [100 * share for share in shares]
        where = (high >= low).tolist()
        axes.fill_between(
            percents, low, high, where=where, interpolate=True, color=_BAND, label="lru to belady", zorder=0
        )
    for name, curve in curves.items():
        points = sorted(curve.items())
        style = styles.get(name, {"color": "#666666", "linestyle": ":" if "bypass" in name else "-", "linewidth": 1.2})
        axes.plot([100 * share for share, _ in points], [100 * rate for _, rate in points], label=name, **style)
    percents = [100 * share for share in shares]
    axes.plot(percents, percents, color="#999999", linewidth=0.8, linestyle=(0, (1, 3)), label="uniform routing")
    if recommended is not None:
        spot = (100 * recommended.capacity.share, 100 * recommended.hit_rate)
        axes.plot(*spot, marker="o", markersize=12, fillstyle="none", color="black", linestyle="", label="recommended")
    if shares[-1] / shares[0] >= _LOG_RATIO:
        axes.set_xscale("log")
        axes.minorticks_off()
    axes.set_xticks(percents, [f"{percent:.3g}" for percent in percents])
    axes.set_ylim(0, 104)
    axes.set_xlabel("experts that have a slot, % of all")
    axes.set_ylabel("hit rate of decode steps, %")
    axes.set_title("Hit rate")
    _finish(axes)


def _stalls(
    axes: "Axes", results: Sequence[ReplayResult], styles: dict[str, dict[str, Any]], shown: ReplayResult
) -> None:
    """Stall a token by bandwidth at the capacity of one row."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    timed = [(result, result.timing) for result in results if result.timing is not None]
    capacity = shown.capacity
    curves: dict[str, dict[float, float]] = {}
    lower: dict[float, float] = {}
    clairvoyant: dict[float, float] = {}
    for result, timing in timed:
        if result.capacity.slots != capacity.slots or not result.tokens:
            continue
        scale = 1e3 / result.tokens
        lower[timing.bandwidth / 1e9] = scale * timing.stall_lower_seconds
        clairvoyant[timing.bandwidth / 1e9] = scale * timing.stall_clairvoyant_seconds
        if timing.stall_seconds is not None:
            curves.setdefault(result.policy, {})[timing.bandwidth / 1e9] = scale * timing.stall_seconds
    rates = sorted(lower)
    low, high = [lower[rate] for rate in rates], [clairvoyant[rate] for rate in rates]
    axes.fill_between(rates, low, high, color=_BAND, zorder=0)
    axes.plot(rates, low, color="#666666", linewidth=1.2, label="no scheduler stalls less")
    axes.plot(rates, high, color="#666666", linewidth=1.2, linestyle=":", label="clairvoyant schedule")
    for name, curve in curves.items():
        points = sorted(curve.items())
        axes.plot(*zip(*points, strict=True), label=name, **styles[name])
    drawn = [value for curve in (lower, clairvoyant, *curves.values()) for value in curve.values()]
    axes.set_xscale("log")
    if all(drawn):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    else:
        axes.set_ylim(bottom=0)
    axes.minorticks_off()
    axes.set_xticks(rates, [f"{rate:.3g}" for rate in rates])
    axes.set_xlabel("bandwidth of the link, GB/s")
    axes.set_ylabel("stall, ms a token")
    axes.set_title(f"Stall with {capacity.slots} slots ({100 * capacity.share:.3g} %)")
    _finish(axes)


def _residency(figure: "Figure", axes: "Axes", residency: Float[np.ndarray, "L E"], shown: ReplayResult | None) -> None:
    from matplotlib.ticker import MaxNLocator

    image = axes.imshow(100 * residency, aspect="auto", cmap="cividis", vmin=0, vmax=100, interpolation="nearest")
    figure.colorbar(image, ax=axes, label="steps in which it was resident, %")
    axes.set_xlabel("expert")
    axes.set_ylabel("MoE layer")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title(
        "Residency" if shown is None else f"Residency under {shown.policy} with {shown.capacity.slots} slots"
    )


def _finish(axes: "Axes") -> None:
    axes.grid(color="#EEEEEE", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=4, fontsize="small", frameon=False)
