"""Paths that are followed on the device are those of the whole sequences, and nothing compiles on the way."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ef_jax.nn.routing_path import RoutingPath, empty_state
from ef_jax.predict.log_odds import NOMINAL
from ef_jax.runtime.routing_paths import RoutingPaths, routing_path_bytes
from tests.nn.test_routing_path import SPEC, all_at_once, random_path

ROWS, BATCH = 3, 2


@pytest.fixture(scope="module")
def path() -> RoutingPath:
    return random_path()


@pytest.fixture
def paths(path: RoutingPath) -> RoutingPaths:
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return RoutingPaths(path, rows=ROWS, batch=BATCH, context=32, sharding=sharding)


def expected(path: RoutingPath, prompt: np.ndarray, tokens: list[int]) -> np.ndarray:
    """Probabilities of the last token."""
    told = prompt[-SPEC.most_prompt :]
    prompts = np.zeros((1, SPEC.most_prompt), np.int32)
    prompts[0, : len(told)] = told
    odds = all_at_once(path, jnp.asarray(prompts), jnp.array([len(told)]), jnp.array([tokens], jnp.int32))
    return np.asarray(jax.nn.sigmoid(odds[0, -1]))


def test_rows_join_leave_and_take_turns(path: RoutingPath, paths: RoutingPaths) -> None:
    random = np.random.default_rng(0)
    prompts: dict[int, np.ndarray] = {}
    taken: dict[int, list[int]] = {}
    compiled: list[str] = []

    def join(row: int, length: int) -> None:
        prompts[row], taken[row] = random.integers(0, 16, length, np.int32), []
        paths.join(row, prompts[row])
        assert not paths.bins([row]).any()

    def heard(event: str, *_: Any, **__: Any) -> None:
        compiled.append(event)

    join(0, 5)
    jax.monitoring.register_event_duration_secs_listener(heard)
    try:
        for step in range(16):
            if step in (1, 2, 9):
                join({1: 1, 2: 2, 9: 0}[step], {1: 0, 2: 30, 9: 2}[step])
            rows = [row for row in ([0, 1], [2], [1, 0], [2, 0])[step % 4] if row in taken]
            tokens = random.integers(0, 16, (BATCH, 1), np.int32)
            padded = np.array([*rows, ROWS, ROWS][:BATCH], np.int32)
            for place, row in enumerate(rows):
                taken[row].append(int(tokens[place, 0]))
            paths.follow(padded, jax.device_put(tokens) if step % 2 else tokens)
    finally:
        jax.monitoring.unregister_event_duration_listener(heard)
    assert not [event for event in compiled if "compile" in event or "trace" in event]
    bins = paths.bins([2, 0, 1])
    assert bins.dtype == np.uint8
    for place, row in enumerate((2, 0, 1)):
        near = NOMINAL[bins[place]] - expected(path, prompts[row], taken[row])
        assert np.abs(near).max() < 0.017  # half a bin at its widest


def test_after_a_reset_nothing_is_known(paths: RoutingPaths) -> None:
    paths.join(1, np.array([3], np.int32))
    paths.follow(np.array([1, ROWS], np.int32), np.array([[4], [0]], np.int32))
    assert paths.bins([1]).any()
    paths.reset()
    assert not paths.bins([1]).any()


def test_bytes_are_those_of_the_arrays(path: RoutingPath) -> None:
    state = empty_state(SPEC, rows=ROWS, context=32)
    paths = RoutingPaths(path, rows=ROWS, batch=ROWS, context=32, sharding=state.positions.sharding)
    paths.follow(np.arange(ROWS, dtype=np.int32), np.zeros((ROWS, 1), np.int32))
    held = sum(array.nbytes for array in jax.tree.leaves((paths._leaves, paths._state, paths._latest[0][0])))
    assert routing_path_bytes(SPEC, rows=ROWS, context=32) == held
