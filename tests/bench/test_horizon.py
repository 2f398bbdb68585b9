"""The replays of `bench.horizon` say what they mean, on a small trace."""

import itertools

import numpy as np
import pytest

from bench import _horizon_cost, _horizon_need, _horizon_rules, _horizon_stall
from bench._graded import Graded
from bench.horizon import cut
from ef_jax.schedule.need import NEEDS
from ef_jax.schedule.prefetch import CANDIDATES
from tests.replay.traces import made_up


def test_a_cell_compares_all_with_on_demand(capsys) -> None:
    trace = cut(made_up(length=30), 12)
    assert np.diff(trace.offsets).tolist() == [12] * trace.sequences
    result = _horizon_stall.run(trace.select(0, 4), ratios=(1.0, 16.0), residencies=(0.5,))
    assert (result["predictor"], result["tokens"], result["cells"]) == ("graded", 36, 2)
    slow, fast = result["rows"]
    assert fast["spare"]
    for row in (slow, fast):
        stall = row["stall"]
        order = [stall[name] for name in ("bound", "clairvoyant", "auto, knowing", "off")]
        assert all(low <= high + 1e-9 for low, high in itertools.pairwise([*order, 1.0]))
        assert row["step_time"]["on demand"] == 1 + 1 / row["ratio"]
        ratio = row["step_time"]["auto"] / row["step_time"][row["best_fixed"]]
        assert row["of_best"] == pytest.approx(ratio, rel=1e-4)
    assert "30 % to spare" in capsys.readouterr().out


def test_every_rule_and_every_estimate_is_compared(capsys, monkeypatch) -> None:
    trace = made_up(length=30)
    monkeypatch.setattr(_horizon_rules, "RATIOS", (2.0,))
    monkeypatch.setattr(_horizon_rules, "RESIDENCIES", (0.5,))
    (row,) = _horizon_rules.run(trace.select(0, 3))["rows"]
    assert set(row["stall"]) == set(CANDIDATES)
    monkeypatch.setattr(_horizon_need, "_STEPS", 200)
    result = _horizon_need.run(trace)
    assert set(result["error"]) == set(NEEDS)
    assert result["error"]["batch"]["mixed"] < result["error"]["mean"]["mixed"]
    assert "counts" not in result


def test_costs_are_of_whole_steps(capsys, monkeypatch) -> None:
    monkeypatch.setattr(_horizon_cost, "_WARM", 2)
    monkeypatch.setattr(_horizon_cost, "_STEPS", 2)
    result = _horizon_cost.run(1)
    assert len(result["rows"]) == 6
    assert all(0 < row["blocks_a_layer"] <= row["window"] for row in result["rows"])


def test_graded_predictions_are_true_on_average() -> None:
    trace = made_up(length=60)
    predictor = Graded((step.routes for step in trace.steps(1)), layers=3, experts=16, separation=(3.0, 1.0))
    said, came = [], []
    for step in trace.steps(1):
        predictor.on_step(step.tokens)
        predictor.on_route(0, step.routes[0])
        ahead = predictor.ahead(0, 2)
        for scores, rows in zip(ahead, step.routes[1:], strict=True):
            said.append(scores)
            came.append(np.isin(np.arange(16), rows))
    told, used = np.array(said), np.array(came)
    for distance in range(2):
        scores, uses = told[distance::2], used[distance::2]
        assert abs(scores.mean() - uses.mean()) < 0.02
        assert abs(uses[scores > 0.5].mean() - scores[scores > 0.5].mean()) < 0.1
    assert told[::2][used[::2]].mean() > told[1::2][used[1::2]].mean() + 0.2
