"""A forecast beside what was measured: rows of `bench.forecast`, and what they come to."""

import statistics
from collections.abc import Sequence
from typing import Any

from bench._report import rounded, table
from ef_jax.forecast import Speed

AIM = (0.75, 1.25)


def row(name: str, measured: float, prior: Speed, trace: Speed | None = None, **more: Any) -> dict[str, Any]:
    """One run: measured tokens a second, and what was forecast."""
    found = {
        "run": name,
        "batch": prior.batch,
        "measured": rounded(measured),
        "forecast": rounded(prior.tokens_per_second),
        "low": rounded(prior.low),
        "high": rounded(prior.high),
        "ratio": rounded(prior.tokens_per_second / measured),
        "in_band": prior.low <= measured <= prior.high,
        "bound": prior.time.bound,
    }
    if trace is not None:
        found |= {
            "forecast_by_trace": rounded(trace.tokens_per_second),
            "ratio_by_trace": rounded(trace.tokens_per_second / measured),
        }
    return found | more


def summary(rows: Sequence[dict[str, Any]], ratio: str = "ratio") -> dict[str, Any]:
    """How many rows are within the aim and the band, and how far ratios lie apart."""
    ratios = [found[ratio] for found in rows]
    return {
        "rows": len(rows),
        "within_aim": sum(AIM[0] <= value <= AIM[1] for value in ratios),
        "in_band": sum(found["in_band"] for found in rows),
        "median": rounded(statistics.median(ratios)),
        "least": rounded(min(ratios)),
        "most": rounded(max(ratios)),
    }


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Print the rows."""
    by_trace = any("ratio_by_trace" in found for found in rows)
    head = ["run", "batch", "measured", "forecast", "low", "high", "forecast / measured", "bound"]
    cells = [
        (found["run"], found["batch"], *(found[key] for key in ("measured", "forecast", "low", "high")),
         f"{found['ratio']:.2f}", found["bound"],
         *((f"{found['ratio_by_trace']:.2f}",) if by_trace else ()))
        for found in rows
    ]  # fmt: skip
    print(table([*head, *(["by trace"] if by_trace else [])], cells))


def say(name: str, found: dict[str, Any]) -> None:
    """Print a summary."""
    print(
        f"{name}: {found['within_aim']} of {found['rows']} within {AIM[0]} to {AIM[1]}, {found['in_band']} within the "
        f"band; median {found['median']:.2f}, {found['least']:.2f} to {found['most']:.2f}"
    )
