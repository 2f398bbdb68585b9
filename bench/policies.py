"""Which cache policy is best, how near to clairvoyance, and what does it cost?

    python -m bench.policies [TRACE] [--fit 300] [--only quality collapse cost engine] [--jobs 1] [--save]

TRACE is a file of `ef-jax trace`, or a plain npz; without it the bundled model's own routing is recorded on the spot,
while it continues its held-out texts (sampled at temperature 1, seeded). Sequences are replayed one after another,
every token, of prompts too, as a step of decoding.

quality: every policy and both of Belady's bounds by share of the experts that have a slot, demand fetches only. The
  first `--fit` sequences (default: five sixths) only teach, hits are counted on the others. "gap closed" is the share
  of the way in hit rate from `lru` to `belady`. Accesses a second are those of the whole replay, `fit` included:
  distinct experts by layer and step, over the time that trace, residency table and policy take together.
collapse: the counted sequences alone, on slots for half a token cycle: the same rows, and `lru` without floors, which
  evicts every expert just before it is needed again. "of belady" and "of bypass" are the hit rate over the bounds'.
cost: what policy and residency table take of the host's time for a layer of a step, in microseconds, on made-up skewed
  routing of 48 layers x 128 experts, top-8 (routes follow the token, the sequence and chance), 25 % of the experts
  cached: the median over repeats of the mean of 100 steps, after 100 steps of warming up.
engine: decoding with the bundled model, 25 % of its experts cached, one long continuation a repeat, policies in turn.
  What a policy has learned stays with it. Blocks are so small here that a miss costs less than many a policy.

Prints tables, then one line of JSON.
"""

import argparse
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from bench import _models, _report
from ef_jax.memory.policies import POLICIES
from ef_jax.memory.policies.lru import Lru
from ef_jax.replay.capacity import Capacity, parse_capacity
from ef_jax.replay.replays import BOUNDS, SweepSettings
from ef_jax.replay.simulator import Replay, simulate
from ef_jax.replay.sweep import sweep
from ef_jax.replay.trace import DECODE, RoutingTrace

TARGETS = {
    "gap_closed_by_next_use": 0.2,
    "lru_accesses_per_second": 1e6,
    "online_accesses_per_second": 2e5,
    "us_per_layer": 50.0,
    "of_belady_below_a_token_cycle": 0.5,
}
_PROMPT_TOKENS = 32
_COST_SHAPE = {"layers": 48, "experts": 128, "top_k": 8}
_COST_STEPS = 100
_ENGINE_TOKENS = 400


class GlobalLru(Lru):
    """`lru` without floors."""

    floor_share = 0.0


def main() -> int:
    """Run the bench; the exit code."""
    parts: dict[str, Callable[[argparse.Namespace], Any]] = {
        "quality": quality,
        "collapse": collapse,
        "cost": cost,
        "engine": engine,
    }
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trace", metavar="TRACE", nargs="?", help="routing trace (default: the bundled model's own)")
    parser.add_argument("--only", nargs="+", choices=tuple(parts), default=list(parts), metavar="PART")
    parser.add_argument("--capacity", default="0.125,0.25,0.5", metavar="LIST", help="as ef-jax replay takes them")
    parser.add_argument("--fit", type=_report.positive, metavar="N", help="sequences that teach (default: five sixths)")
    parser.add_argument("--jobs", type=_report.positive, default=1, help="processes; more than one disturb the speeds")
    parser.add_argument("--sequences", type=_report.positive, default=48, help="to record from the bundled model")
    parser.add_argument("--tokens", type=_report.positive, default=256, help="to sample for each of these")
    parser.add_argument("--repeats", type=_report.positive, default=5, help="of parts cost and engine")
    _report.add_save_option(parser, "policies")
    options = parser.parse_args()
    trace = RoutingTrace.load(options.trace) if options.trace else _record(options.sequences, options.tokens)
    options.fit = trace.sequences * 5 // 6 if options.fit is None else options.fit
    options.routing = trace
    print(f"{trace!r}, the first {options.fit} of them to learn from\n")
    result: dict[str, Any] = {
        "trace": {
            "model": trace.model,
            "sequences": trace.sequences,
            "tokens": trace.count,
            "layers": trace.layers,
            "experts_per_layer": trace.num_experts,
            "experts_per_token": trace.top_k,
            "fit": options.fit,
        },
        "jobs": options.jobs,
        "targets": TARGETS,
    }
    for part in options.only:
        result[part] = parts[part](options)
    _report.finish("policies", result, options.save)
    return 0


def quality(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Hit rates, gaps closed and speeds of every policy and bound."""
    trace = options.routing
    experts = trace.layers * trace.num_experts
    capacities = [parse_capacity(word, experts=experts) for word in options.capacity.split(",")]
    settings = SweepSettings(batch=1, fit=options.fit)
    results = sweep(trace, capacities, [*POLICIES, *BOUNDS], settings, jobs=options.jobs, progress=None)
    accesses = trace.count * trace.layers * trace.top_k
    rows = [
        {
            "policy": result.policy,
            "capacity": result.capacity.share,
            "slots": result.capacity.slots,
            "hit_rate": _report.rounded(result.hit_rate),
            "gap_closed": None if result.gap_closed is None else _report.rounded(result.gap_closed),
            "misses_per_token": _report.rounded(result.misses / result.tokens),
            "accesses": result.accesses,
            "accesses_per_second": _report.rounded(accesses / result.replay_seconds),
        }
        for result in results
    ]
    print("hit rates, fetching on demand")
    shown = [
        (
            row["policy"],
            row["slots"],
            f"{100 * row['hit_rate']:.2f}",
            None if row["gap_closed"] is None else f"{100 * row['gap_closed']:.1f}",
            f"{row['misses_per_token']:.2f}",
            f"{row['accesses_per_second'] / 1e3:.0f}",
        )
        for row in rows
    ]
    head = ["policy", "slots", "hit %", "gap closed %", "misses/token", "1000 accesses/s"]
    print(_report.table(head, shown), end="\n\n")
    return rows


def collapse(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Hit rates on slots for half a token cycle."""
    trace = options.routing.select(options.fit)
    slots = trace.layers * trace.top_k // 2
    capacity = Capacity(slots / (trace.layers * trace.num_experts), slots)
    settings = SweepSettings(batch=1)
    results = sweep(trace, [capacity], [*POLICIES, *BOUNDS], settings, jobs=options.jobs, progress=None)
    rates = {result.policy: result.hit_rate for result in results}
    policy = GlobalLru(layers=trace.layers, experts=trace.num_experts, cache_slots=slots)
    phase = simulate(trace, policy=policy, slots=slots, batch=1).decode
    rates = {"lru without floors": sum(phase.hits) / (sum(phase.hits) + sum(phase.misses)), **rates}
    rows = [
        {
            "policy": name,
            "slots": slots,
            "hit_rate": _report.rounded(rate),
            "of_belady": _report.rounded(rate / rates["belady"]),
            "of_belady_bypass": _report.rounded(rate / rates["belady_bypass"]),
        }
        for name, rate in rates.items()
    ]
    print(f"hit rates on {slots} slots, half a token cycle")
    shown = [
        (row["policy"], *(f"{100 * row[figure]:.1f}" for figure in ("hit_rate", "of_belady", "of_belady_bypass")))
        for row in rows
    ]
    print(_report.table(["policy", "hit %", "of belady %", "of bypass %"], shown), end="\n\n")
    return rows


def cost(options: argparse.Namespace) -> dict[str, Any]:
    """Host time of policy and residency table, in microseconds a layer of a step."""
    layers, experts, top_k = _COST_SHAPE.values()
    steps = list(_skewed((options.repeats + 1) * _COST_STEPS, **_COST_SHAPE).steps(1))
    times: dict[str, list[float]] = {}
    for name in POLICIES:
        replay = Replay(layers=layers, experts=experts, slots=layers * experts // 4, staging_slots=top_k, policy=name)
        for first in range(0, len(steps), _COST_STEPS):
            began = time.perf_counter()
            for step in steps[first : first + _COST_STEPS]:
                replay.run(step)
            seconds = time.perf_counter() - began
            if first:  # before, it warms up
                times.setdefault(name, []).append(1e6 * seconds / (_COST_STEPS * layers))
    rows = {name: _report.spread(samples) for name, samples in times.items()}
    print(f"policy and residency table, us a layer ({layers} layers x {experts} experts, top-{top_k}, 25 % cached)")
    shown = [(name, *(f"{row[figure]:.1f}" for figure in ("median", "min", "max"))) for name, row in rows.items()]
    print(_report.table(["policy", "median", "min", "max"], shown), end="\n\n")
    return {"shape": _COST_SHAPE, "us_per_layer": rows}


def engine(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Tokens a second and hit rates of decoding, policy by policy."""
    import ef_jax

    base = ef_jax.load(expert_fraction=0.0, context=512, progress=False)
    models = {name: _models.with_cache(base, 0.25, name) for name in POLICIES}
    (prompt,) = _models.prompts(base, 1, _PROMPT_TOKENS)
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in POLICIES}
    for repeat in range(options.repeats + 1):
        for name, lm in models.items():
            lm.stats.reset()
            lm.generate(prompt, max_new_tokens=_ENGINE_TOKENS, temperature=1.0, seed=repeat, ignore_eos=True)
            phase = lm.stats.decode
            if repeat:  # before, it warms up
                hits, misses = sum(phase.hits), sum(phase.misses)
                samples[name].append((lm.stats.tokens_per_second, hits / (hits + misses)))
    rows = [
        {
            "policy": name,
            "tokens_per_second": _report.spread([speed for speed, _ in taken]),
            "hit_rate": _report.spread([rate for _, rate in taken]),
        }
        for name, taken in samples.items()
    ]
    print("decoding with the bundled model, 25 % of the experts cached")
    shown = [
        (row["policy"], f"{row['tokens_per_second']['median']:.0f}", f"{100 * row['hit_rate']['median']:.1f}")
        for row in rows
    ]
    print(_report.table(["policy", "tokens/s", "hit %"], shown), end="\n\n")
    return rows


def _record(sequences: int, tokens: int) -> RoutingTrace:
    """The bundled model's routing while it continues its held-out texts."""
    import ef_jax

    lm = ef_jax.load(expert_fraction=1.0, batch=8, context=_PROMPT_TOKENS + tokens, progress=False)
    prompts = _models.prompts(lm, sequences, _PROMPT_TOKENS)
    with lm.trace() as recording:
        lm.generate(prompts, max_new_tokens=tokens, temperature=1.0, seed=0, ignore_eos=True)
    return recording.trace()


def _skewed(tokens: int, *, layers: int, experts: int, top_k: int) -> RoutingTrace:
    """One sequence whose routes follow the token in hand, the sequence and chance, in equal parts."""
    random = np.random.default_rng(0)
    vocabulary = 200
    by_token = random.standard_normal((vocabulary, layers, experts), np.float32)
    by_sequence = random.standard_normal((layers, experts), np.float32)
    ids = np.minimum(random.zipf(1.3, tokens), vocabulary) - 1
    routes = np.empty((tokens, layers, top_k), np.uint8)
    for row, token in zip(routes, ids, strict=True):
        scores = by_token[token] + by_sequence + random.standard_normal((layers, experts), np.float32)
        row[:] = np.argsort(-scores, axis=-1)[:, :top_k]
    return RoutingTrace(
        experts=routes,
        tokens=ids.astype(np.int32),
        offsets=np.array([0, tokens]),
        num_experts=experts,
        phases=np.full(tokens, DECODE, np.uint8),
    )


if __name__ == "__main__":
    sys.exit(_report.run("policies", main))
