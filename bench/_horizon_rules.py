"""Part "rules" of `bench.horizon`: the rules for candidates against one another, in replays like those of part "stall".

Stall in % of on demand by rule, all with automatic horizons, and what was fetched in blocks a layer: by value; the
experts that are used more often than not; as many as the probabilities add up to; those that together have 90 % of the
probability, the N_e of ExpertFlow-S. The best rule of a cell is the one of the shortest step.
"""

from typing import Any

from bench._graded import Graded
from bench._report import rounded, table
from ef_jax.replay.simulator import simulate
from ef_jax.replay.trace import RoutingTrace
from ef_jax.schedule.link_model import LinkModel
from ef_jax.schedule.prefetch import CANDIDATES

RATIOS = (0.5, 2.0, 8.0)
RESIDENCIES = (0.125, 0.5)
_LAYER_SECONDS = 1e-3
_BLOCK_BYTES = 1000


def run(trace: RoutingTrace, *, policy: str = "lru") -> dict[str, Any]:
    """Replays of `trace`; the first sequence only teaches."""
    rows = [_cell(trace, policy, residency, ratio) for residency in RESIDENCIES for ratio in RATIOS]
    print("stall in % of on demand, and blocks fetched a layer, by rule for candidates")
    shown = [
        (
            f"{100 * row['residency']:g}",
            f"{row['ratio']:g}",
            *(f"{100 * row['stall'][rule]:.3f} ({row['blocks_a_layer'][rule]:.1f})" for rule in CANDIDATES),
            row["best"],
        )
        for row in rows
    ]
    print(table(["resident %", "x balance", *CANDIDATES, "best"], shown), end="\n\n")
    return {"policy": policy, "rows": rows}


def _cell(trace: RoutingTrace, policy: str, residency: float, ratio: float) -> dict[str, Any]:
    block = _LAYER_SECONDS / (trace.top_k * ratio)
    stalls, seconds, blocks = {}, {}, {}
    for rule in CANDIDATES:
        steps = (step.routes for step in trace.steps(1))
        graded = Graded(steps, layers=trace.layers, experts=trace.num_experts) if trace.pregate is None else "pregate"
        phase = simulate(
            trace,
            slots=round(residency * trace.layers * trace.num_experts),
            policy=policy,
            batch=1,
            fit=1,
            block_bytes=_BLOCK_BYTES,
            link=LinkModel(bandwidth=_BLOCK_BYTES / block),
            compute_seconds=_LAYER_SECONDS,
            predictor=graded,
            prefetch="auto",
            candidates=rule,
        ).decode
        layers = phase.steps * trace.layers
        stalls[rule] = rounded(phase.stall_seconds / (layers * trace.top_k * block))
        seconds[rule] = phase.seconds
        blocks[rule] = rounded((phase.bytes_demand + phase.bytes_prefetch) / _BLOCK_BYTES / layers)
    best = min(seconds, key=seconds.__getitem__)
    return {"residency": residency, "ratio": ratio, "stall": stalls, "blocks_a_layer": blocks, "best": best}
