"""How fast would released models be on machines that people have?

    python -m bench.forecast_table [--save]

Ten models of tests/fixtures/configs on four machines of `ef_jax.forecast.MACHINES`, by arithmetic alone: nothing is
loaded or compiled, and nobody has run it. A cell: tokens/s of decoding one sequence and a batch, and of a prompt; the
band of the first; its expected hit rate and what bounds it; the share of the experts that stay on disk, where host
memory does not hold all and is given as `host_memory`. The budget is 90 % of what JAX offers, as `load` takes it.
Prints Markdown, then one line of JSON.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from bench import _report
from bench._report import rounded
from ef_jax.errors import BudgetError
from ef_jax.families import spec_from_config
from ef_jax.forecast import MACHINES, Forecast, Machine, arithmetic_plan, forecast
from ef_jax.memory.parameters import count_parameters
from ef_jax.memory.plan import MemoryRequest
from ef_jax.memory.sizes import format_bytes
from ef_jax.spec import ModelSpec

MODELS = (
    "olmoe-1b-7b", "deepseek-v2-lite", "gpt-oss-20b", "qwen3-30b-a3b", "mixtral-8x7b", "qwen3-next-80b-a3b",
    "glm-4.5-air", "gpt-oss-120b", "qwen3-235b-a22b", "deepseek-v3",
)  # fmt: skip
MACHINE_NAMES = ("h100-sxm-pcie5", "a100-pcie4", "rtx4090-pcie4", "rtx3090-pcie3")
BATCH, CONTEXT = 4, 4096
_CONFIGS = Path(__file__).parent.parent / "tests" / "fixtures" / "configs"
_SHARE = 0.9  # of what JAX offers, as `load` takes


def main() -> int:
    """Run the bench; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    _report.add_save_option(parser, "forecast_table")
    options = parser.parse_args()
    _report.finish("forecast_table", run(), options.save)
    return 0


def run() -> dict[str, Any]:
    """Print the table, and return its rows."""
    rows = [_row(name, MACHINES[machine]) for name in MODELS for machine in MACHINE_NAMES]
    print(f"tokens/s at batch 1, at batch {BATCH}, of prompts; with the band at batch 1; context {CONTEXT}\n")
    print(markdown(rows))
    machines = [MACHINES[name].as_dict() for name in MACHINE_NAMES]
    return {"batch": BATCH, "context": CONTEXT, "rows": rows, "machines": machines}


def markdown(rows: list[dict[str, Any]]) -> str:
    """The rows as a table: a line a model, a column a machine."""
    lines = ["| model | experts | " + " | ".join(MACHINE_NAMES) + " |", "| --- " * (2 + len(MACHINE_NAMES)) + "|"]
    for model in dict.fromkeys(row["model"] for row in rows):
        of_model = [row for row in rows if row["model"] == model]
        experts = format_bytes(of_model[0]["expert_bytes"])
        lines.append(f"| {model} | {experts} | " + " | ".join(_cell(row) for row in of_model) + " |")
    return "\n".join(lines)


def _cell(row: dict[str, Any]) -> str:
    if row["error"]:
        return row["error"]
    one, many, prompt = row["single"], row["batched"], row["prompt"]
    rates = " / ".join(_three_digits(speed["tokens_per_second"]) for speed in (one, many, prompt))
    absent = 1 - row["host_blocks"] / row["experts"]
    short = f"; {100 * absent:.0f} % on disk" if absent else ""
    hits = f"{100 * row['hit_rate']:.0f} % hits"
    band = f"{_three_digits(one['low'])} to {_three_digits(one['high'])}"
    return f"{rates} ({band}); {hits}, {one['bound']}{short}"


def _three_digits(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{float(f'{value:.3g}'):,.0f}"


def _row(name: str, machine: Machine) -> dict[str, Any]:
    spec = spec_from_config(json.loads((_CONFIGS / f"{name}.json").read_text()))
    row = {"model": name, "machine": machine.name, "expert_bytes": count_parameters(spec).expert_bytes, "error": None}
    try:
        found = _forecast(spec, machine)
    except BudgetError:
        return {**row, "error": "device too small"}
    hits = found.single.hit_rate
    return {
        **row,
        "slots": found.slots,
        "experts": found.experts,
        "host_blocks": found.host_blocks,
        "host_short": found.host_short,
        "fits": found.fits,
        "hit_rate": None if hits is None else rounded(hits.expected),
        "load_seconds": rounded(found.load_seconds),
        **{
            part: {
                "tokens_per_second": rounded(speed.tokens_per_second),
                "low": rounded(speed.low),
                "high": rounded(speed.high),
                "bound": speed.time.bound,
                "link_bytes_per_token": rounded(speed.link_bytes_per_token),
                "disk_bytes_per_token": rounded(speed.disk_bytes_per_token),
            }
            for part, speed in (("single", found.single), ("batched", found.batched), ("prompt", found.prompt))
        },
    }


def _forecast(spec: ModelSpec, machine: Machine) -> Forecast:
    budget = int(_SHARE * machine.device_memory)
    context = min(CONTEXT, spec.max_position)
    request = MemoryRequest(device_memory=budget, batch=BATCH, context=context)
    found = forecast(spec, arithmetic_plan(spec, request, machine.platform), machine)
    if not found.host_short:
        return found
    room = machine.host_memory - (found.host_bytes - spec.total_experts * spec.block_bytes)
    request = dataclasses.replace(request, host_memory=room)
    return forecast(spec, arithmetic_plan(spec, request, machine.platform), machine)


if __name__ == "__main__":
    sys.exit(_report.run("forecast_table", main))
