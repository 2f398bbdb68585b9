"""Measurements of `ef-jax doctor`: figures that hang together, whatever this machine's are."""

from pathlib import Path

import jax
import pytest

from ef_jax.doctor import engine
from ef_jax.doctor.compute import measure_device, measure_host
from ef_jax.doctor.disk import measure_disk
from ef_jax.doctor.link import Point, measure_link
from ef_jax.doctor.timing import least_seconds


def test_link() -> None:
    found = measure_link(jax.devices()[0], widths=(1, 4))
    assert found["mode"] == "in_program"
    assert list(found["by_block_bytes"]) == ["6144", "24576"]
    assert found["bandwidth"] == found["by_block_bytes"]["24576"] > 0
    assert found["knee_bytes"] in (6144, 24576)
    assert min(found["latency"], found["block_seconds"]) >= 0
    assert Point(1000, one=1.0, eight=2.0).bandwidth == 4000


def test_device_and_host() -> None:
    found = measure_device(jax.devices()[0], blocks=8)
    assert min(found.values()) > 0
    assert min(measure_host().values()) > 0


def test_disk_leaves_nothing_behind(tmp_path: Path) -> None:
    found = measure_disk(tmp_path, (16 << 20) + 5)
    assert found["bytes"] == 16 << 20
    assert found["bandwidth"] > 0
    assert not list(tmp_path.iterdir())


def test_the_shortest_run_counts() -> None:
    runs = []
    assert least_seconds(lambda: runs.append(0), seconds=0) >= 1e-9
    assert len(runs) == 4  # one that does not count, and three


@pytest.mark.parametrize(
    ("longer", "expected"),
    [
        ([8 * 5.0 + 10 * 0.5, 8 * 5.0 + 24 * 0.5], (5.0, 0.5)),
        ([10 * 0.5 - 8.0, 24 * 0.5 - 8.0], (0.0, None)),  # less than no time a layer
        ([48.0, 40.0], (5.5, 0.0)),  # less than none a miss
        ([0.0, 0.0], (0.0, 0.0)),
    ],
)
def test_two_runs_give_two_unknowns(longer: list[float], expected: tuple[float, float | None]) -> None:
    layer, block = engine._solve(8, [10.0, 24.0], longer)
    assert layer == pytest.approx(expected[0], abs=1e-9)
    assert block >= 0
    if expected[1] is not None:
        assert block == pytest.approx(expected[1], abs=1e-9)


def test_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "_BATCH", 2)
    found = engine.measure_engine(device_bandwidth=1e12, device_flops=1e15, link_bandwidth=1e12, tokens=3, repeats=1)
    steps = found.pop("step_seconds")
    assert list(steps) == ["resident", "batch 8", "half", "eighth"]
    assert found["layer_seconds"] == pytest.approx(steps["resident"] / 9, rel=0.05)
    assert min(found.values()) >= 0
