"""The tables of `scale.md`, from what `bench.scale` saved: `python -m bench._scale_page` prints them."""

import json
from collections.abc import Iterable, Sequence
from typing import Any

from bench import _report


def tables(found: dict[str, Any]) -> dict[str, str]:
    """Markdown tables by name."""
    slots = found["settings"]["slots"]
    return {
        "groups": _groups(found["rows"]),
        **{f"machines, {count} slots": _machines(found["machines"], count) for count in slots},
        "placements": _placements(found["rows"]),
        "division": _division(found["rows"]),
        "prompts": _prompts(found["prompts"]),
    }


def _machines(machines: list[dict[str, Any]], slots: int) -> str:
    head = ("devices", "data x expert", "step ms", "stall ms", "imbalance", "exchange %", "hit %", "tokens/s a device",
            "tokens/s in all", "binds")  # fmt: skip
    return _table(
        head,
        (
            [
                row["devices"], f"{row['data']} x {row['group']}", _three(row["step_ms"]), _three(row["stall_ms"]),
                f"{row['experts_imbalance']:.2f}", _three(100 * row["exchange_share"]), _three(100 * row["hit_rate"]),
                f"{row['tokens_per_second_per_device']:,.0f}", f"{row['tokens_per_second']:,.0f}", row["bound"],
            ]
            for row in machines
            if row["slots"] == slots
        ),
    )  # fmt: skip


def _groups(rows: list[dict[str, Any]]) -> str:
    head = ("slots a device", "devices a group", "of its experts in slots", "stall ms", "exchange ms", "compute ms",
            "step ms", "binds")  # fmt: skip
    return _table(
        head,
        (
            [
                row["slots"], row["group"], f"{100 * row['share']:.0f} %", *_times(row, "stall", "exchange", "compute"),
                _three(row["step_ms"]), row["bound"],
            ]
            for row in rows
            if row["placement"] == "balanced"
        ),
    )  # fmt: skip


def _placements(rows: list[dict[str, Any]]) -> str:
    names = list(dict.fromkeys(row["placement"] for row in rows))
    cells = []
    for slots, group in dict.fromkeys((row["slots"], row["group"]) for row in rows):
        of_group = {row["placement"]: row for row in rows if (row["slots"], row["group"]) == (slots, group)}
        sent, even, step = (
            [style(of_group[name][key]) for name in names]
            for key, style in (("sent", _hundredths), ("experts_imbalance", _hundredths), ("step_ms", _four))
        )
        cells.append([slots, group, *(" / ".join(words) for words in (sent, even, step))])
    return _table(("slots", "group", "rows sent a token", "imbalance", "step ms"), cells)


def _division(rows: list[dict[str, Any]]) -> str:
    head = ("slots", "data x expert", "step ms, each on its own", "of the slowest", "all together", "tokens/s together")
    cells = []
    for row in rows:
        if row["placement"] == "balanced":
            tokens = row["tokens_per_second_per_device"] * row["copies"] * row["group"] * row["step_ms"]
            cells.append(
                [
                    row["slots"], f"{row['copies']} x {row['group']}", _three(row["step_ms"]),
                    _three(row["slowest_copy_ms"]), _three(row["together_ms"]), f"{tokens / row['together_ms']:,.0f}",
                ]
            )  # fmt: skip
    return _table(head, cells)


def _prompts(prompts: list[dict[str, Any]]) -> str:
    """Those that more slots leave as they are, once."""
    head = ("slots", "group", "tokens a device", "uncut ms", "in two ms", "best number", "gain")
    slots: dict[tuple[Any, ...], int] = {}
    for row in prompts:
        times = (_three(row["whole_ms"]), _three(row["two_ms"]))
        cells = (row["group"], f"{row['tokens']:,}", *times, row["micro_batches"], f"{row['gain']:.2f}")
        slots.setdefault(cells, row["slots"])
    return _table(head, ([count, *cells] for cells, count in slots.items()))


def _times(row: dict[str, Any], *parts: str) -> list[str]:
    return [_three(row[f"{part}_ms"]) for part in parts]


def _three(value: float) -> str:
    return f"{value:#.3g}".rstrip(".") if value else "0"


def _four(value: float) -> str:
    return f"{value:#.4g}".rstrip(".")


def _hundredths(value: float) -> str:
    return f"{value:.2f}"


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def main() -> None:
    """Print them."""
    for name, table in tables(json.loads(_report.result_path("scale").read_text())).items():
        print(f"\n{name}\n\n{table}")


if __name__ == "__main__":
    main()
