"""A sweep as a table to read."""

from collections.abc import Sequence

from ef_jax.memory.rates import format_bandwidth
from ef_jax.replay.result import ReplayResult, Timing

_NONE = "-"


def replay_table(results: Sequence[ReplayResult]) -> str:
    """One row a result, a blank line between capacities and between links; columns of a link only if there was one."""
    timed = any(result.timing is not None for result in results)
    head = ["policy", "slots", "share %", "hit %", "gap %", "misses/token", "MB/token"]
    head += ["stall ms/token", "ms/step", "tokens/s", "link %", "wasted MB"] if timed else []
    cells = [head, *(_row(result, timed) for result in results)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    lines = []
    group: tuple[int, float | None] | None = None
    for number, row in enumerate(cells):
        if number:
            result = results[number - 1]
            timing = result.timing
            own = (result.capacity.slots, None if timing is None else timing.bandwidth)
            if own != group:
                lines.append("" if timing is None else f"\n{_link(result, timing)}")
            group = own
        numbers = [text.rjust(width) for text, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *numbers]).rstrip())
    return "\n".join(lines)


def _row(result: ReplayResult, timed: bool) -> list[str]:
    tokens = max(result.tokens, 1)
    row = [
        result.policy,
        str(result.capacity.slots),
        f"{100 * result.capacity.share:.4g}",
        f"{100 * result.hit_rate:.2f}",
        _NONE if result.gap_closed is None else f"{100 * result.gap_closed:.1f}",
        f"{result.misses / tokens:.2f}",
        _NONE if result.bytes is None else f"{result.bytes / tokens / 1e6:.2f}",
    ]
    if not timed:
        return row
    timing = result.timing
    if timing is None or timing.stall_seconds is None or timing.step_seconds is None:
        return [*row, *[_NONE] * 5]
    return [
        *row,
        f"{1e3 * timing.stall_seconds / tokens:.3f}",
        f"{1e3 * timing.step_seconds:.3f}",
        _NONE if timing.tokens_per_second is None else f"{timing.tokens_per_second:.1f}",
        _NONE if timing.link_utilisation is None else f"{100 * timing.link_utilisation:.1f}",
        f"{(timing.bytes_wasted or 0) / 1e6:.1f}",
    ]


def _link(result: ReplayResult, timing: Timing) -> str:
    scale = 1e3 / max(result.tokens, 1)
    return (
        f"{format_bandwidth(timing.bandwidth)}: no scheduler stalls less than "
        f"{scale * timing.stall_lower_seconds:.3f} ms/token, and a clairvoyant one stalls "
        f"{scale * timing.stall_clairvoyant_seconds:.3f}"
    )
