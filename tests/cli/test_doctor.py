"""`ef-jax doctor` and `ef-jax plan --forecast`: profiles written, shown and gone by, and what is refused."""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import pytest

from ef_jax.cli import main
from ef_jax.doctor import measure
from ef_jax.errors import InputError
from ef_jax.forecast import MACHINES
from ef_jax.forecast.profile import Profile, write_profile
from ef_jax.memory.sizes import format_bytes
from tests.cli.test_bad_input import stderr_of
from tests.cli.test_plan_and_info import output
from tests.replay.traces import made_up
from tests.weights.synthetic import CONFIGS

_ENGINE = {"layer_seconds": 1e-4, "row_seconds": 1e-5, "miss_seconds": 2e-5, "block_seconds": 3e-6, "step_seconds": {}}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache directory, empty; what is measured is small, and the bundled model does not run."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("ef_jax.inline_dispatch.dispatch_inline", lambda: None)
    monkeypatch.setattr(measure, "measure_link", functools.partial(measure.measure_link, widths=(1, 2)))
    monkeypatch.setattr(measure, "measure_device", functools.partial(measure.measure_device, blocks=8))
    monkeypatch.setattr(measure, "measure_disk", functools.partial(measure.measure_disk, nbytes=8 << 20))
    monkeypatch.setattr(measure, "measure_engine", lambda **rates: _ENGINE if min(rates.values()) > 0 else {})
    return tmp_path / "cache"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A directory with nothing but a model's configuration."""
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(CONFIGS["qwen2_moe"]))
    return directory


def test_doctor_measures_and_plan_goes_by_it(cache: Path, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = json.loads(output(["doctor", "--json"], capsys))
    assert told["profile"] == str(cache / "ef_jax" / "machine.json")
    assert [path.name for path in (cache / "ef_jax").iterdir()] == ["machine.json"]  # the file that was read is gone
    machine, measured = told["machine"], told["measured"]
    assert (machine["platform"], machine["insert_bandwidth"]) == ("cpu", None)
    assert machine["dispatch_seconds"] + machine["kernel_seconds"] == _ENGINE["layer_seconds"]
    assert machine["block_seconds"] == _ENGINE["block_seconds"]
    assert list(measured["link"]["by_block_bytes"]) == ["6144", "12288"]
    assert measured["disk"]["page_cache"] in ("cold", "warm", "unknown")
    assert any("without an accelerator the device is this CPU" in note for note in told["notes"])

    shown = json.loads(output(["doctor", "--show", "--json"], capsys))
    assert shown == told
    lines = output(["doctor", "--show"], capsys).splitlines()
    assert lines[0] == "this CPU (measured by ef-jax doctor)"
    assert lines[-1] == f"profile: {told['profile']}"
    assert any(line.startswith("  device memory") for line in lines)

    forecast = json.loads(output(["plan", str(config), "--forecast", "--json"], capsys))["forecast"]
    assert forecast["machine"] == machine
    assert forecast["slots"] == 4  # half of the experts, as `load` does on a CPU


def test_notes_say_what_figures_mean(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    machine = MACHINES["a100-pcie4"]
    for measured, notes in (
        ({"disk": {"page_cache": "cold"}, "run": {"load_average": 0.1, "cores": 2}}, []),
        ({"disk": {"page_cache": "warm"}}, ["the disk rate is one of memory"]),
        ({"disk": {"page_cache": "unknown"}}, ["does not say"]),
        ({"run": {"load_average": 7.0, "cores": 2}}, ["the load average was 7.0 on 2 cores"]),
        ({}, []),
    ):
        write_profile(cache / "ef_jax" / "machine.json", Profile(machine=machine, measured=measured))
        told = json.loads(output(["doctor", "--show", "--json"], capsys))["notes"]
        assert len(told) == len(notes)
        assert all(part in note for part, note in zip(notes, told, strict=True))
        assert "a100-pcie4" in output(["doctor", "--show"], capsys)


def test_doctor_refuses_what_it_cannot_write(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "measure_link", None)  # nothing is measured first
    file = tmp_path / "file"
    file.write_text("")
    assert "give another --profile" in stderr_of(["doctor", "--profile", str(file / "x.json")], capsys)
    assert "is a directory" in stderr_of(["doctor", "--profile", str(tmp_path)], capsys)
    assert "there is no directory" in stderr_of(["doctor", "--disk-directory", str(tmp_path / "none")], capsys)
    assert "is not the name of a file" in stderr_of(["doctor", "--profile", ""], capsys)
    assert "run ef-jax doctor first" in stderr_of(["doctor", "--show"], capsys)
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert "Permission denied: give another --profile" in stderr_of(["doctor"], capsys)


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(InputError, match=r"cannot write 8 MiB in .*: No space left on device"):
        measure.measure_disk(tmp_path, 8 << 20)
    assert not list(tmp_path.iterdir())


def test_forecast_for_a_machine_that_is_not_here(cache: Path, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", str(config), "--forecast", "--machine", "rtx4090-pcie4", "--batch", "2"]
    told = json.loads(output([*words, "--json"], capsys))
    forecast, plan = told["forecast"], told["plan"]
    assert forecast["machine"] == MACHINES["rtx4090-pcie4"].as_dict()
    assert plan["budget"] == int(0.9 * MACHINES["rtx4090-pcie4"].device_memory)
    assert forecast["device_bytes"] == plan["total"]
    assert forecast["fits"]
    assert (forecast["single"]["batch"], forecast["batched"]["batch"]) == (1, 2)
    lines = output(words, capsys).splitlines()
    assert any(line.startswith("forecast on rtx4090-pcie4") for line in lines)
    assert [line.split()[0:2] for line in lines if line.startswith("  decode")] == [["decode,", "1"], ["decode,", "2"]]


def test_forecast_options(cache: Path, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = ["plan", str(config), "--forecast", "--machine", "rtx4090-pcie4", "--expert-fraction", "0.25", "--json"]

    def forecast(*words: str) -> dict[str, Any]:
        return json.loads(output([*base, *words], capsys))["forecast"]

    slow, fast = forecast("--bandwidth", "1MB/s"), forecast("--bandwidth", "100GB/s+1us")
    assert slow["single"]["bound"] == "link"
    assert slow["single"]["tokens_per_second"] < fast["single"]["tokens_per_second"]
    assert fast["machine"]["link_latency"] == 1e-6

    computed = forecast("--bandwidth", "1MB/s", "--miss", "compute")
    assert (computed["miss"], computed["single"]["link_bytes_per_token"]) == ("compute", 0)
    assert computed["single"]["tokens_per_second"] > slow["single"]["tokens_per_second"]

    little = tmp_path / "little.json"
    machine = dataclasses.replace(MACHINES["rtx4090-pcie4"], host_memory=500 * 10**6)
    write_profile(little, Profile(machine=machine, measured={}))
    small = forecast("--machine", str(little))
    assert small["host_short"] == small["host_bytes"] - 500 * 10**6 > 0
    assert not small["fits"]
    assert format_bytes(small["host_short"]) in small["warnings"][-1]

    trace = tmp_path / "trace.npz"
    made_up(layers=2, experts=4, top_k=2).save(trace)
    assert "recorded tokens" in forecast("--trace", str(trace))["single"]["hit_rate"]["source"]


def test_a_plan_that_the_machine_has_no_room_for(
    cache: Path, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = dataclasses.replace(MACHINES["a100-pcie4"], device_memory=10**4, name="tiny")
    write_profile(tmp_path / "tiny.json", Profile(machine=tiny, measured={}))
    words = ["plan", str(config), "--forecast", "--machine", str(tmp_path / "tiny.json"), "--context", "32"]
    table = output([*words, "--device-memory", "900MB"], capsys)
    assert "does not fit" in table
    assert "on the device and tiny has 10 kB" in table
    assert "too small" in stderr_of(words, capsys)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--machine", "h100-sxm-pcie5"], "--machine is for forecasts: give --forecast too"),
        (["--miss", "compute"], "--miss is for forecasts"),
        (["--forecast"], "this machine has not been measured: run ef-jax doctor first, or give --machine h100"),
        (["--forecast", "--machine", "abacus"], "the known ones are h100-sxm-pcie5, a100-pcie4"),
        (["--forecast", "--machine", "a100-pcie4", "--bandwidth", "25"], "'25' is not a bandwidth"),
        (["--forecast", "--machine", "a100-pcie4", "--host-memory", "much"], "'much' is not a size in bytes"),
        (["--forecast", "--machine", "a100-pcie4", "--trace", "none.npz"], "none.npz"),
    ],
)
def test_refused_forecasts(
    words: list[str], message: str, cache: Path, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in stderr_of(["plan", str(config), *words], capsys)


def test_a_malformed_profile(cache: Path, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = cache / "ef_jax" / "machine.json"
    path.parent.mkdir(parents=True)
    path.write_text("{")
    for words in (["doctor", "--show"], ["plan", str(config), "--forecast"]):
        assert "it is not JSON: run ef-jax doctor again" in stderr_of(words, capsys)


def test_help_lists_the_machines(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["doctor", "--help"])
    assert "--disk-directory" in capsys.readouterr().out
