import dataclasses

import numpy as np
import pytest

from ef_jax.errors import InputError
from ef_jax.memory.policies import POLICIES
from ef_jax.replay.capacity import Capacity, parse_capacity
from ef_jax.replay.recommendation import recommend
from ef_jax.replay.replays import BOUNDS, Replays, SweepSettings
from ef_jax.replay.result import ReplayResult
from ef_jax.replay.simulator import simulate
from ef_jax.replay.sweep import choose_policies, sweep
from ef_jax.schedule.link_model import LinkModel
from tests.replay.traces import made_up

ALL = (*POLICIES, *BOUNDS)
LINKS = (LinkModel(bandwidth=1e9), LinkModel(bandwidth=4e9))
EXPERTS = 3 * 16


def cache(text: str, experts: int = EXPERTS) -> Capacity:
    return parse_capacity(text, experts=experts)


def untimed(results: list[ReplayResult]) -> list[ReplayResult]:
    return [dataclasses.replace(result, replay_seconds=0.0) for result in results]


def test_rows_come_link_by_link_and_count_every_access() -> None:
    trace = made_up(block_bytes=1_000_000)
    settings = SweepSettings(links=LINKS, layer_seconds=1e-4, fit=1)
    names = ["belady", "lru", "static"]
    results = sweep(trace, [cache("0.25"), cache("0.5")], names, settings)
    assert [(r.timing.bandwidth, r.capacity.slots, r.policy) for r in results if r.timing is not None] == [
        (link.bandwidth, slots, policy) for link in LINKS for slots in (12, 24) for policy in names
    ]
    for result in results:
        row = result.as_dict()
        assert row["hits"] + row["late_hits"] + row["misses"] == row["accesses"] == 5 * 40 * 3 * 2
        assert (row["steps"], row["tokens"], row["batch"]) == (200, 200, 1)
        assert row["bytes"] == row["misses"] * 1_000_000
        assert row["misses_per_token"] == row["misses"] / 200
        assert row["bound"] is (row["policy"] in BOUNDS)
        assert 0 <= row["stall_lower_seconds"] <= row["stall_clairvoyant_seconds"]
        if row["bound"]:
            assert row["stall_seconds"] is None
            continue
        assert row["stall_seconds"] >= row["stall_lower_seconds"]
        assert row["step_seconds"] == pytest.approx((row["stall_seconds"] + 200 * 3e-4) / 200)
        assert row["tokens_per_second"] == pytest.approx(1 / row["step_seconds"])
        assert 0 < row["link_utilisation"] <= 1


def test_bounds_are_above_the_policies_and_the_gap_runs_from_lru_to_belady() -> None:
    results = {r.policy: r for r in sweep(made_up(), [cache("0.5")], ALL, SweepSettings())}
    best = results["belady_bypass"]
    assert all(result.hits <= best.hits for result in results.values())
    assert (results["lru"].gap_closed, results["belady"].gap_closed) == (0.0, 1.0)
    low, high = results["lru"].hit_rate, results["belady"].hit_rate
    for result in results.values():
        assert result.gap_closed == pytest.approx((result.hit_rate - low) / (high - low))
        assert result.bytes is None
    assert [r.gap_closed for r in sweep(made_up(), [cache("0.5")], ["lru"], SweepSettings())] == [None]


def test_a_cache_for_everything_never_misses() -> None:
    trace = made_up(block_bytes=1000)
    for result in sweep(trace, [cache("1")], ["lru", *BOUNDS], SweepSettings(links=LINKS[:1], layer_seconds=1e-4)):
        assert (result.misses, result.hit_rate, result.gap_closed) == (0, 1.0, None)
        assert result.timing is not None
        assert result.timing.stall_clairvoyant_seconds == 0
        assert result.timing.stall_seconds in (None, 0)


def test_processes_change_nothing() -> None:
    trace = made_up(block_bytes=1_000_000, sequences=3, length=20)
    settings = SweepSettings(links=LINKS, layer_seconds=1e-4, batch=2, fit=1)
    words = ([cache("6"), cache("0.5")], ["static", "belady", "lru"], settings)
    assert untimed(sweep(trace, *words, jobs=2)) == untimed(sweep(trace, *words))


def test_the_replay_is_the_simulators() -> None:
    trace = made_up()
    result = sweep(trace, [cache("0.25")], ["lru"], SweepSettings(batch=3, fit=2))[0]
    stats = simulate(trace, slots=12, policy="lru", batch=3, fit=2)
    assert (result.hits, result.misses) == (sum(stats.decode.hits), sum(stats.decode.misses))
    assert result.batch == 3
    assert result.token_cycle > 3 * 2


def test_residency_adds_up_to_the_slots() -> None:
    trace = made_up(skew=3.0)
    share = Replays(trace, SweepSettings(fit=1)).residency("lru", 12)
    assert share.shape == (3, 16)
    assert share.sum() == pytest.approx(12)
    used = np.bincount(trace.experts[40:, 0].ravel(), minlength=16)
    assert share[0, used.argmax()] > share[0, used.argmin()]


@pytest.mark.parametrize("batch", [None, 3])
def test_under_uniform_routing_no_policy_wins(batch: int | None) -> None:
    """From one token cycle of slots up, every hit rate is the capacity, give or take chance; and that is said."""
    trace = made_up(sequences=8, length=80, skew=0.0)
    results = sweep(trace, [cache("0.25"), cache("0.5")], list(POLICIES), SweepSettings(batch=batch, fit=3))
    for result in results:
        share = result.capacity.share
        chance = 4 * np.sqrt(share * (1 - share) / result.accesses)
        assert result.hit_rate < share + chance
        if result.capacity.slots >= result.token_cycle:
            assert result.hit_rate > share - chance
    recommended = recommend(results)
    assert recommended is not None
    assert recommended.warning.startswith("routing looks uniform: no policy helps")
    assert "no policy helps" in recommended.reason
    assert recommended.capacity.share == 0.5


def test_policies_by_name() -> None:
    assert choose_policies(["all"]) == list(ALL)
    assert choose_policies(["belady", "lru", "belady"]) == ["belady", "lru"]
    with pytest.raises(InputError, match=r"policy 'fifo' is not one of lru, .*belady_bypass, all"):
        choose_policies(["lru", "fifo"])
    with pytest.raises(InputError, match="no policy: choose among"):
        choose_policies([])


def test_settings_that_do_not_fit_the_trace() -> None:
    with pytest.raises(InputError, match="fit 6: leave at least one of the 6 sequences"):
        Replays(made_up(), SweepSettings(fit=6))
    with pytest.raises(InputError, match="does not say how large an expert's block is"):
        Replays(made_up(), SweepSettings(links=LINKS))
    prompts = made_up()
    prompts = dataclasses.replace(prompts, phases=np.zeros_like(prompts.phases))
    with pytest.raises(InputError, match="no step of decoding to count: give a batch"):
        Replays(prompts, SweepSettings())
    assert sweep(prompts, [cache("0.5")], ["lru"], SweepSettings(batch=1))[0].accesses == 6 * 40 * 3 * 2
