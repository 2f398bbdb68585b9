"""Placements: every expert is held and served, evenly, and better ones cost less on the routing they were made from."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ef_jax.errors import InputError
from ef_jax.placement import PLACEMENTS, Placement, dispatch, exchange, place, request_scores, token_affinity
from ef_jax.placement.solve import flows_of, usage
from ef_jax.replay.trace import RoutingTrace
from tests.replay.traces import made_up


@settings(max_examples=25)
@given(
    name=st.sampled_from(PLACEMENTS),
    devices=st.sampled_from([1, 2, 4, 8]),
    replicas=st.integers(0, 3),
    seed=st.integers(0, 5),
)
def test_every_expert_is_held_and_served_evenly(name: str, devices: int, replicas: int, seed: int) -> None:
    trace = made_up(sequences=9, length=12, seed=seed)
    if replicas > 16 - 16 // devices:
        with pytest.raises(InputError, match="replicas"):
            place(name, trace, devices, replicas=replicas)
        return
    placement = place(name, trace, devices, replicas=replicas)
    held = placement.holds.sum(axis=1)
    assert (held == 16 // devices + replicas).all()
    assert placement.copies == trace.layers * devices * (16 // devices + replicas)
    own = np.broadcast_to(np.arange(devices), placement.holds.shape)
    assert (placement.serves[placement.holds] == own[placement.holds]).all()


def two_kinds(seed: int = 0) -> RoutingTrace:
    """Sequences of two kinds: even ones use experts 0, 2, 4 ..., odd ones the others; tokens tell them apart."""
    random = np.random.default_rng(seed)
    sequences, length, layers = 16, 30, 2
    kind = np.repeat(np.arange(sequences) % 2, length)
    half = np.argsort(random.random((sequences * length, layers, 4)), axis=-1)[..., :2]
    return RoutingTrace(
        experts=(2 * half + kind[:, None, None]).astype(np.uint8),
        tokens=(2 * random.integers(0, 20, sequences * length) + kind).astype(np.int32),
        offsets=np.arange(0, sequences * length + 1, length, dtype=np.int64),
        num_experts=8,
        phases=np.ones(sequences * length, np.uint8),
    )


def test_kinds_of_requests_that_share_experts_are_found() -> None:
    """Where requests fall into two kinds, an affine placement and a dispatch by tokens leave nothing to exchange, on
    sequences that it has not seen; other placements leave what chance does."""
    trace, unseen = two_kinds(), two_kinds(seed=1)
    crossing = {}
    for name in PLACEMENTS:
        placement = place(name, trace, 2)
        scores = request_scores(unseen, token_affinity(trace, placement), 2)
        found = exchange(unseen, placement, dispatch(unseen, 2, batch=4, scores=scores))
        crossing[name] = found.returned
        assert found.local == pytest.approx(1 - found.returned / 2)
    assert crossing["affine"] == 0
    assert min(crossing["contiguous"], crossing["balanced"]) > 0.5


def test_experts_that_tokens_use_together_share_a_device() -> None:
    """With pairs that are always used together, a token needs one device a layer."""
    random = np.random.default_rng(0)
    pair = random.integers(0, 8, (400, 2))
    shuffled = random.permutation(16)
    trace = RoutingTrace(
        experts=shuffled[np.stack([2 * pair, 2 * pair + 1], axis=-1)].astype(np.uint8),
        tokens=np.zeros(400, np.int32),
        offsets=np.arange(0, 401, 20, dtype=np.int64),
        num_experts=16,
        phases=np.ones(400, np.uint8),
    )
    run = dispatch(trace, 4, batch=8)
    apart = exchange(trace, place("contiguous", trace, 4), run)
    together = exchange(trace, place("affine", trace, 4), run)
    assert together.sent == pytest.approx(together.returned / 2)
    assert together.sent < 0.6 * apart.sent


def test_balance_shares_hot_experts_out() -> None:
    """The four hottest experts are on four devices, not on one."""
    random = np.random.default_rng(0)
    chances = np.where(np.arange(16) < 4, 3.0, 0.0) + random.gumbel(size=(600, 1, 16))
    trace = RoutingTrace(
        experts=np.argsort(-chances, axis=-1)[..., :2].astype(np.uint8),
        tokens=np.zeros(600, np.int32),
        offsets=np.arange(0, 601, 20, dtype=np.int64),
        num_experts=16,
        phases=np.ones(600, np.uint8),
    )
    run = dispatch(trace, 4, batch=16)
    contiguous = exchange(trace, place("contiguous", trace, 4), run)
    balanced = exchange(trace, place("balanced", trace, 4), run)
    assert place("balanced", trace, 4).holds[0, :4].any(axis=0).all()
    assert balanced.rows_imbalance < 0.75 * contiguous.rows_imbalance


def test_replicas_keep_rows_at_home() -> None:
    trace = made_up(sequences=8, skew=2.0)
    flows = flows_of(usage(trace), np.arange(8) % 4, 4)
    found = [place("contiguous", trace, 4, replicas=count) for count in (0, 2, 6, 12)]
    local = [placement.local_rows(flows) for placement in found]
    assert local == sorted(local)
    assert local[-1] == flows.sum()
    for placement in found:
        assert placement.load(flows).sum() == pytest.approx(flows.sum())


def test_what_is_exchanged_by_hand() -> None:
    """Two devices, one token on each: the first needs experts 0 and 3, the second 2 and 3."""
    trace = RoutingTrace(
        experts=np.array([[[0, 3]], [[2, 3]]], np.uint8),
        tokens=np.zeros(2, np.int32),
        offsets=np.array([0, 1, 2]),
        num_experts=4,
        phases=np.ones(2, np.uint8),
    )
    run = dispatch(trace, 2, batch=2)
    assert run.homes.tolist() == [0, 1]
    found = exchange(trace, Placement.contiguous(layers=1, experts=4, devices=2), run)
    assert (found.sent, found.returned, found.local) == (0.5, 0.5, 0.75)
    assert found.busiest.tolist() == [[1]]
    assert found.experts.tolist() == [[2]]
    assert found.rows_imbalance == pytest.approx(3 / 2)
    other = Placement.of(np.array([[[False, True], [True, False], [True, False], [True, False]]]))
    # The second token's experts are both on the first device: its row goes there once, and two come back.
    found = exchange(trace, other, run)
    assert (found.sent, found.returned) == (1.0, 1.5)
    assert found.busiest.tolist() == [[3]]
    assert found.busiest_far.tolist() == [[0]]
    assert exchange(trace, other, run, node=1).busiest_far.tolist() == [[3]]


def test_sequences_run_once_each_on_one_device() -> None:
    trace = made_up(sequences=11, length=7)
    scores = np.random.default_rng(0).random((11, 2))
    for given_scores in (None, scores):
        run = dispatch(trace, 2, batch=4, scores=given_scores)
        assert sorted(run.order.rows.tolist()) == list(range(trace.count))
        for sequence in range(11):
            assert len(set(run.homes[7 * sequence : 7 * sequence + 7].tolist())) == 1
        for begin, end in zip(run.order.bounds[:-1], run.order.bounds[1:], strict=True):
            assert np.bincount(run.homes[run.order.rows[begin:end]], minlength=2).max() <= 2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda trace: place("best", trace, 2), "placement 'best' is not one of"),
        (lambda trace: place("balanced", trace, 3), "evenly: give 1, 2 or 4"),
        (lambda trace: place("balanced", trace, 2, replicas=9), "0 to 8"),
        (lambda trace: dispatch(trace, 2, batch=3), "give a multiple of 2"),
        (lambda trace: Placement.of(np.zeros((1, 4, 2), bool)), "no device holds expert 0"),
    ],
)
def test_what_cannot_be(call, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(InputError, match=message):
        call(made_up(sequences=4, length=5))
