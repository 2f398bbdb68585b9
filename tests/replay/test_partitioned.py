"""Partitioned replays: one device is the plain replay, and time adds up."""

import json

import numpy as np
import pytest

from ef_jax.cli import main
from ef_jax.errors import InputError
from ef_jax.placement import Placement, dispatch, place, read_placement
from ef_jax.replay.partitioned import PartitionedSettings, replay_partitioned
from ef_jax.replay.simulator import simulate
from ef_jax.schedule.link_model import LinkModel
from tests.replay.traces import made_up

LINK = LinkModel(bandwidth=1e9, latency=1e-5)


@pytest.mark.parametrize("policy", ["lru", "plec"])
def test_one_device_counts_and_waits_as_a_plain_replay(policy: str) -> None:
    trace = made_up(sequences=6, skew=2.0, block_bytes=1000)
    placement = Placement.contiguous(layers=3, experts=16, devices=1)
    ours = replay_partitioned(
        trace, placement, dispatch(trace, 1, batch=2),
        PartitionedSettings(share=0.25, policy=policy, block_bytes=1000, link=LINK, layer_seconds=2e-6),
    )  # fmt: skip
    theirs = simulate(
        trace, slots=12, policy=policy, batch=2, link=LINK, block_bytes=1000, compute_seconds=2e-6, staging_slots=16
    ).decode
    assert ours.slots == 12
    assert (ours.hits, ours.misses) == (sum(theirs.hits), sum(theirs.misses))
    assert ours.misses > 0 < ours.hits
    assert ours.stall_seconds == pytest.approx(theirs.stall_seconds)
    assert ours.seconds == pytest.approx(theirs.seconds)
    assert ours.exchange.returned == 0


def test_time_is_what_stalls_exchanges_and_computing_take() -> None:
    trace = made_up(sequences=8, block_bytes=1000)
    placement, run = place("balanced", trace, 4), dispatch(trace, 4, batch=8)
    network = LinkModel(bandwidth=1e8, latency=1e-6)
    settings = PartitionedSettings(
        share=0.5, block_bytes=1000, link=LINK, row_bytes=64, network=network, layer_seconds=1e-5, block_seconds=1e-7
    )
    found = replay_partitioned(trace, placement, run, settings)
    layers, counts = found.steps * trace.layers, found.exchange
    computing = layers * 1e-5 + counts.experts.sum() * 1e-7
    assert found.exchange_seconds == pytest.approx(2 * layers * 1e-6 + counts.busiest.sum() * 64 / 1e8)
    assert found.seconds == pytest.approx(computing + found.exchange_seconds + found.stall_seconds)
    assert found.stall_seconds > 0
    whole = replay_partitioned(trace, placement, run, PartitionedSettings(share=1.0))
    assert (whole.misses, whole.seconds) == (0, 0)


def test_more_devices_hold_more() -> None:
    """Four devices with a quarter of their experts in slots hit as one with a quarter: slots grow with devices, and
    the work of each falls."""
    trace = made_up(sequences=8, skew=2.0, block_bytes=1000)
    seconds = []
    for devices in (1, 2, 4):
        placement = place("balanced", trace, devices)
        run = dispatch(trace, devices, batch=8)
        found = replay_partitioned(
            trace, placement, run, PartitionedSettings(share=0.25, block_bytes=1000, link=LINK)
        )  # fmt: skip
        assert found.slots * devices == 12
        seconds.append(found.stall_seconds)
    assert seconds[2] < seconds[1] < seconds[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"share": 0.0}, "share 0.0"),
        ({"link": LINK}, "give block_bytes"),
        ({"network": LINK}, "give row_bytes"),
    ],
)
def test_settings_that_cannot_be(changes: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        PartitionedSettings(**{"share": 0.5, **changes})


def test_a_placement_of_another_model_is_refused() -> None:
    trace = made_up()
    with pytest.raises(InputError, match="2 layers of 16 experts, and the trace has 3"):
        replay_partitioned(
            trace,
            Placement.contiguous(layers=2, experts=16, devices=2),
            dispatch(trace, 2, batch=2),
            PartitionedSettings(share=0.5),
        )


def test_the_command_compares_placements(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "trace.npz"
    made_up(sequences=8, block_bytes=1000).save(path)
    words = ["replay", str(path), "--mesh", "expert=4", "--fit", "4", "--capacity", "0.5", "--row-bytes", "64"]
    timed = ["--bandwidth", "1GB/s", "--network", "1GB/s+5us", "--layer-time", "10us", "--batch", "8"]
    assert main([*words, *timed, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["placement"] for row in found["results"]] == ["contiguous", "balanced", "affine"]
    for row in found["results"]:
        assert 0 < row["stall_share"] < 1 > row["exchange_share"] > 0
        assert row["exchanged_bytes_per_token"] == pytest.approx((row["sent"] + row["returned"]) * 3 * 64)
    assert main([*words, "--placement", "affine"]) == 0
    head, line = capsys.readouterr().out.splitlines()
    assert head.split()[0] == "placement"
    assert line.split()[0] == "affine"
    saved = tmp_path / "affine.npz"
    assert main([*words, "--placement", "affine", "--replicas", "1", "--save-placement", str(saved)]) == 0
    placement = place("affine", made_up(sequences=8, block_bytes=1000).select(0, 4), 4, replicas=1)
    assert (read_placement(saved).serves == placement.serves).all()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--mesh", "data=2", "--fit", "4"], "write expert=N"),
        (["--mesh", "expert=3", "--fit", "4"], "evenly: give 1, 2 or 4"),
        (["--mesh", "expert=4"], "needs --fit"),
        (["--mesh", "expert=4", "--fit", "4", "--batch", "6"], "give a multiple of 4"),
        (["--mesh", "expert=4", "--fit", "4", "--network", "1GB/s"], "give row_bytes"),
        (["--mesh", "expert=4", "--fit", "4", "--placement", "best"], "placement 'best'"),
        (["--mesh", "expert=4", "--fit", "4", "--policy", "belady"], "policy 'belady'"),
        (["--mesh", "expert=4", "--fit", "4", "--save-placement", "p.npz"], "writes one placement: name it"),
        (["--mesh", "expert=4", "--fit", "4", "--placement", "affine", "--save-placement", "/"], "is a directory"),
    ],
)
def test_words_that_cannot_be(words: list[str], message: str, tmp_path, capsys) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "trace.npz"
    made_up(sequences=8).save(path)
    assert main(["replay", str(path), "--capacity", "0.5", *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_homes_go_round_the_devices() -> None:
    run = dispatch(made_up(sequences=5, length=3), 2, batch=4)
    assert np.unique(run.homes).tolist() == [0, 1]
