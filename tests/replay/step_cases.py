"""Small random layer-steps, and all that a cache of a few slots can do with them."""

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
from hypothesis import strategies as st

from ef_jax.replay.layer_steps import PROMPT, LayerSteps

LAYERS, EXPERTS = 2, 3

State = tuple[int, int | None, frozenset[int], int | None, int]


def steps_of(needs: list[tuple[int, list[int]]], *, layers: int = LAYERS, experts: int = EXPERTS) -> LayerSteps:
    """Layer-steps from `(layer, flat keys)` pairs."""
    return LayerSteps(
        keys=np.array([key for _, keys in needs for key in keys], np.int32),
        starts=np.concatenate([[0], np.cumsum([len(keys) for _, keys in needs])]).astype(np.int64),
        layers=np.array([layer for layer, _ in needs], np.int32),
        num_layers=layers,
        num_experts=experts,
    )


def needs(most_steps: int, *, prompts: bool = True) -> st.SearchStrategy[list[tuple[int, list[int]]]]:
    """Lists of `(layer, flat keys)`; layers in any order, so that nothing rests on the token cycle."""

    def keys_of(layer: int) -> st.SearchStrategy[tuple[int, list[int]]]:
        first, count = (0, LAYERS * EXPERTS) if layer == PROMPT else (layer * EXPERTS, EXPERTS)
        keys = st.lists(st.integers(first, first + count - 1), min_size=1, max_size=3, unique=True).map(sorted)
        return st.tuples(st.just(layer), keys)

    layers = st.sampled_from([0, 0, 1, 1, PROMPT] if prompts else [0, 1])
    return st.lists(layers.flatmap(keys_of), min_size=1, max_size=most_steps)


def subsets(items: frozenset[int], most: int) -> Iterator[frozenset[int]]:
    for size in range(min(len(items), most) + 1):
        yield from map(frozenset, itertools.combinations(sorted(items), size))


def most_hits(steps: LayerSteps, slots: int, *, bypass: bool) -> int:
    """The most hits of any demand-only cache: every choice of what to keep after every layer-step is tried."""
    best = {frozenset[int](): 0}
    for step, layer in enumerate(steps.layers.tolist()):
        needed = frozenset(steps.keys[steps.starts[step] : steps.starts[step + 1]].tolist())
        after: dict[frozenset[int], int] = {}
        for cache, hits in best.items():
            found = cache & needed if layer != PROMPT else frozenset()
            takes = slots if bypass or layer == PROMPT else min(slots, len(needed))
            for kept in subsets(cache | needed, slots):
                legal = found <= kept and (bypass or layer == PROMPT or len(kept & needed) == takes)
                if legal:
                    after[kept] = max(after.get(kept, -1), hits + len(found))
        best = after
    return max(best.values())


def least_time(steps: LayerSteps, slots: int, *, block_seconds: int, layer_seconds: Sequence[int]) -> int:
    """The least time in which all steps can end, whole seconds: every schedule over the link is tried.

    Times are whole, so no schedule gains by starting a copy in between. A state is (layer-steps ended, seconds that the
    running one still needs or None, resident keys, key on the link or None, seconds until it arrives).
    """
    needs = [frozenset(steps.keys[a:b].tolist()) for a, b in itertools.pairwise(steps.starts)]
    layers, everything = steps.layers.tolist(), frozenset(range(steps.num_keys))

    def choices(state: State) -> Iterator[State]:
        done, left, resident, copied, wait = state
        if left == 0:
            yield done + 1, None, resident, copied, wait
        if copied is not None and wait == 0:
            yield done, left, resident | {copied}, None, 0
        if done == len(needs):
            return
        room = slots - (copied is not None)
        if left is None and layers[done] == PROMPT:
            for kept in subsets(resident | needs[done] - {copied}, room):
                yield done + 1, None, kept, copied, wait
        elif left is None and needs[done] <= resident:
            yield done, layer_seconds[layers[done]], resident, copied, wait
        if copied is None:
            leaves = resident - needs[done] if left is not None else resident
            lost = [frozenset([key]) for key in leaves] if len(resident) == slots else [frozenset[int]()]
            for key, leaving in itertools.product(everything - resident, lost):
                yield done, left, resident - leaving, key, block_seconds

    states: set[State] = {(0, None, frozenset(), None, 0)}
    for time in itertools.count():
        fresh = states
        while fresh:
            fresh = {after for state in fresh for after in choices(state)} - states
            states |= fresh
        if any(done == len(needs) for done, *_ in states):
            return time
        states = {
            (done, None if left is None else left - 1, resident, copied, max(wait - 1, 0))
            for done, left, resident, copied, wait in states
            if left != 0 and (copied is None or wait)
        }
    raise AssertionError
