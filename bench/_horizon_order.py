"""Part "order" of `bench.horizon`: rows of resident experts first, or all together, over an emulated link."""

import statistics
from typing import Any

import numpy as np

import ef_jax
from bench._report import rounded, table
from ef_jax.memory.rates import format_bandwidth

BATCHES = (1, 8)
RATES = (0.5e9, 2e9)  # bytes a second; blocks are of 74 kB
FRACTION = 0.25
STEPS = 48
ORDERS = ("together", "resident_first", "auto")


def run(repeats: int) -> dict[str, Any]:
    """Median milliseconds a step and of stall by order, with experts fetched on demand; outputs must be equal."""
    cells = []
    for batch in BATCHES:
        for rate in RATES:
            models = {
                order: ef_jax.load(
                    expert_fraction=FRACTION,
                    batch=batch,
                    context=256,
                    chunk=64,
                    prefetch="off",
                    emulate_link=ef_jax.LinkModel(bandwidth=rate),
                    order=order,
                    progress=False,
                )
                for order in ORDERS
            }
            prompts = [np.arange(100 * i + 1, 100 * i + 33, dtype=np.int32) for i in range(batch)]
            seconds: dict[str, list[float]] = {order: [] for order in ORDERS}
            stalls: dict[str, list[float]] = {order: [] for order in ORDERS}
            outputs = set()
            for repeat in range(repeats + 1):
                for order, lm in models.items():
                    lm.stats.reset()
                    generated = lm.generate(prompts, max_new_tokens=STEPS, ignore_eos=True, temperature=1.0, seed=1)
                    outputs.add(tuple(tuple(one.tokens) for one in generated))
                    phase = lm.stats.decode
                    if repeat:  # the first fills the cache and compiles
                        seconds[order].append(phase.seconds / phase.steps)
                        stalls[order].append(phase.stall_seconds / phase.steps)
            cells.append(
                {
                    "batch": batch,
                    "bandwidth": rate,
                    "outputs_equal": len(outputs) == 1,
                    "step_ms": {order: rounded(1e3 * statistics.median(seconds[order])) for order in ORDERS},
                    "stall_ms": {order: rounded(1e3 * statistics.median(stalls[order])) for order in ORDERS},
                }
            )
    rows = [
        (
            f"batch {cell['batch']}, {format_bandwidth(cell['bandwidth'])}",
            *(cell["step_ms"][order] for order in ORDERS),
            *(cell["stall_ms"][order] for order in ORDERS),
        )
        for cell in cells
    ]
    print(table(("ms a step", *ORDERS, *(f"stall {order}" for order in ORDERS)), rows))
    return {"expert_fraction": FRACTION, "steps": STEPS, "repeats": repeats, "cells": cells}
