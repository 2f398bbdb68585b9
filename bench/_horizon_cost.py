"""Part "cost" of `bench.horizon`: host time of prediction and planning, in microseconds a layer of a step.

A scheduler at the shape of a real model, 48 layers x 128 experts, top-8, a quarter of them in slots of `lru`, pre-gate
bins for 6 layers; routes follow the layer and chance, bins the routes to come. The link does nothing and takes no time:
what a real one takes for a copy comes on top, whether it is asked for early or late. `window` is the number of blocks
that the link claims to have time for in a layer. "admit" is the same scheduler without a predictor, "added" the
difference to it. The median and the least over steps: on a machine that does other things, the least is nearer to what
the work takes.
"""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from bench._report import spread, table
from ef_jax.memory.policies import Key, make_policy
from ef_jax.memory.residency import Residency
from ef_jax.predict import Pregate
from ef_jax.schedule.pace import LinkPace
from ef_jax.schedule.scheduler import Prefetch, Scheduler
from ef_jax.stats import Stats

LAYERS, EXPERTS, TOP_K, DISTANCES = 48, 128, 8, 6
TARGET_MICROSECONDS = 60.0
WINDOWS = (2, 8)
HORIZONS: tuple[Prefetch, ...] = (1, 6, "auto")
_SHARE = 0.25
_WARM, _STEPS = 48, 24


class _NoLink:
    """A link over which everything has come by the time the next layer asks."""

    prefetches_failed = 0
    bytes_moved = 0
    seconds = 0.0
    timeline = None

    def __init__(self, window: int) -> None:
        self.prefetches_begun = 0
        self.pace = LinkPace(1e-3 / window, 1e-3, 0.9)
        self._window = window
        self._keys: list[Key] = []

    def start(self, layer: int, experts: Sequence[int]) -> None: ...

    def finish(self, blocks: None, slots: Sequence[int]) -> None: ...

    def settle(self) -> None: ...

    def abandon(self) -> None: ...

    def withdraw(self) -> list[Key]:
        return []

    def failed(self) -> list[Key]:
        return []

    def arrived(self) -> list[Key]:
        keys, self._keys = self._keys, []
        return keys

    def window(self) -> int:
        return self._window

    def prefetch(self, keys: list[Key], slots: Sequence[int]) -> None:
        self._keys = keys
        self.prefetches_begun += len(keys)

    def wait(self, keys: Sequence[Key]) -> None: ...


class _Steps:
    """Routes `[L][K]` and bins uint8 `[L+1, H+1, E]` of steps."""

    def __init__(self) -> None:
        random = np.random.default_rng(0)
        usual = 1.2 * random.standard_normal((LAYERS, EXPERTS))
        self.all = [self._step(random, usual) for _ in range(_WARM + _STEPS)]

    def _step(self, random: np.random.Generator, usual: np.ndarray) -> tuple[list[list[int]], np.ndarray]:
        scores = usual + random.standard_normal((LAYERS, EXPERTS))
        order = np.argsort(-scores, axis=1)
        middle = np.take_along_axis(scores, order[:, TOP_K - 1 : TOP_K + 1], 1).mean(axis=1, keepdims=True)
        margin, error = 4 * (scores - middle) / scores.std(), random.standard_normal((LAYERS, EXPERTS))
        bins = np.zeros((LAYERS + 1, DISTANCES + 1, EXPERTS), np.uint8)
        for source in range(LAYERS + 1):
            for distance in range(DISTANCES + 1):
                target = source - 1 + distance
                if 0 <= target < LAYERS:
                    log_odds = margin[target] + 0.45 * distance * error[target]
                    bins[source, distance] = np.clip(np.rint(16 * log_odds + 128), 0, 255)
        return order[:, :TOP_K].tolist(), bins


def run(repeats: int) -> dict[str, Any]:
    """Microseconds a layer, by horizon and window."""
    steps = _Steps()
    kinds: list[tuple[Prefetch, int]] = [("off", 1), *((kind, window) for window in WINDOWS for kind in HORIZONS)]
    samples: dict[tuple[Prefetch, int], list[float]] = {kind: [] for kind in kinds}
    blocks = {}
    for _ in range(repeats):
        for kind in kinds:
            taken, blocks[kind] = _measure(steps, *kind)
            samples[kind] += taken
    admit = spread(samples["off", 1])
    rows = []
    for kind in kinds[1:]:
        taken = spread(samples[kind])
        rows.append(
            {
                "prefetch": kind[0],
                "window": kind[1],
                "blocks_a_layer": blocks[kind],
                "microseconds": taken,
                "added": {name: taken[name] - admit[name] for name in ("median", "min")},
            }
        )
    print(f"host time a layer of {LAYERS} x {EXPERTS} experts, top-{TOP_K}, microseconds")
    shown = [("off", None, None, f"{admit['median']:.1f}", f"{admit['min']:.1f}", None, None)]
    shown += [
        (
            str(row["prefetch"]),
            row["window"],
            f"{row['blocks_a_layer']:.2f}",
            *(f"{row[name][figure]:.1f}" for name in ("microseconds", "added") for figure in ("median", "min")),
        )
        for row in rows
    ]
    print(table(["prefetch", "window", "blocks", "median", "least", "added, median", "added, least"], shown))
    print(f"to be added: {TARGET_MICROSECONDS:g} at most\n")
    return {"target": TARGET_MICROSECONDS, "admit": admit, "rows": rows}


def _measure(steps: _Steps, prefetch: Prefetch, window: int) -> tuple[list[float], float]:
    """Microseconds a layer by step, and blocks fetched a layer."""
    slots = round(_SHARE * LAYERS * EXPERTS)
    link = _NoLink(window)
    residency = Residency(
        layers=LAYERS,
        experts=EXPERTS,
        cache_slots=slots,
        staging_slots=TOP_K,
        policy=make_policy("lru", layers=LAYERS, experts=EXPERTS, cache_slots=slots),
    )
    predictor = Pregate(layers=LAYERS, experts=EXPERTS, top_k=TOP_K, distances=DISTANCES)
    stats = Stats.empty(layers=LAYERS, experts=LAYERS * EXPERTS, slots=slots, staging_slots=TOP_K)
    scheduler: Scheduler = Scheduler(
        residency,
        link,
        stats,
        block_bytes=1,
        wave_size=TOP_K,
        predictor=None if prefetch == "off" else predictor,
        prefetch=prefetch,
        trial=False,
    )
    taken = []
    begun = 0
    for number, (routes, bins) in enumerate(steps.all):
        if number == _WARM:
            begun = link.prefetches_begun
        began = time.perf_counter()
        scheduler.begin_step([0], bins[0])
        for layer, row in enumerate(routes):
            scheduler.complete(scheduler.ask(layer, [row], bins[layer + 1]))
        if number >= _WARM:
            taken.append(1e6 * (time.perf_counter() - began) / LAYERS)
    return taken, (link.prefetches_begun - begun) / (_STEPS * LAYERS)
