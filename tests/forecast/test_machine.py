"""Machines and their profiles."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from ef_jax.errors import InputError
from ef_jax.forecast import MACHINES, Machine, find_machine
from ef_jax.forecast.profile import Profile, default_profile, read_profile, write_profile
from ef_jax.schedule.link_model import LinkModel

CPU, GPU = MACHINES["cpu-emulated-pcie3"], MACHINES["rtx4090-pcie4"]


@pytest.mark.parametrize("machine", MACHINES.values(), ids=list(MACHINES))
def test_known_machines(machine: Machine, tmp_path: Path) -> None:
    assert find_machine(machine.name) is machine
    assert machine.source
    assert Machine.from_dict(json.loads(json.dumps(machine.as_dict()))) == machine
    path = tmp_path / "deep" / "machine.json"
    write_profile(path, Profile(machine=machine, measured={"link": {"bandwidth": 1.0}}))
    write_profile(path, Profile(machine=machine, measured={"link": {"bandwidth": 2.0}}))  # over the first
    assert find_machine(str(path)) == machine
    assert read_profile(path).measured == {"link": {"bandwidth": 2.0}}
    assert [file.name for file in path.parent.iterdir()] == ["machine.json"]


@pytest.mark.parametrize("name", ["", "h200", "no/such/file", "x" * 5000, "nul\0"])
def test_unknown_machines(name: str) -> None:
    with pytest.raises(InputError, match="the known ones are h100-sxm-pcie5, a100-pcie4, rtx4090-pcie4"):
        find_machine(name)


def test_figures_lean_to_either_side() -> None:
    bad, good = GPU.leaning(-1), GPU.leaning(1)
    assert GPU.leaning(0) is GPU
    assert bad.link_bandwidth < GPU.link_bandwidth < good.link_bandwidth
    assert bad.insert_bandwidth < GPU.insert_bandwidth < good.insert_bandwidth
    assert bad.miss_seconds > GPU.miss_seconds > good.miss_seconds
    assert (bad.device_memory, bad.host_memory) == (GPU.device_memory, GPU.host_memory)


def test_another_link() -> None:
    link = LinkModel(bandwidth=1e9, latency=3e-6)
    assert (GPU.with_link(link).link_bandwidth, GPU.with_link(link).link_latency) == (1e9, 3e-6)
    assert GPU.with_link(link).insert_bandwidth == GPU.insert_bandwidth
    # A CPU's own link becomes what blocks enter their slots by, once they have come over an emulated one.
    own = dataclasses.replace(CPU, link_bandwidth=9e9, insert_bandwidth=None)
    assert own.with_link(link).insert_bandwidth == 9e9


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("device_memory", 0, "device_memory is 0, and must be more than 0"),
        ("host_memory", 1.5, "host_memory is 1.5, and must be whole bytes"),
        ("link_bandwidth", -1.0, "link_bandwidth is -1.0"),
        ("device_flops", float("nan"), "device_flops is nan"),
        ("disk_bandwidth", float("inf"), "disk_bandwidth is inf"),
        ("host_bandwidth", "fast", "host_bandwidth is 'fast'"),
        ("insert_bandwidth", 0, "insert_bandwidth is 0"),
        ("miss_seconds", -1e-6, "miss_seconds is -1e-06, and must be 0 or more"),
        ("row_seconds", None, "row_seconds is None"),
        ("doubt", 1.0, "doubt is 1.0, and must be from 0 to below 1"),
        ("doubt", True, "doubt is True"),
        ("platform", "tpu", "platform 'tpu' is neither gpu nor cpu"),
        ("name", 3, "name and source are text"),
    ],
)
def test_figures_that_no_machine_has(field: str, value: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Machine.from_dict({**GPU.as_dict(), field: value})


def _contents(**changes: Any) -> dict[str, Any]:
    return {"kind": "ef-jax machine profile", "version": 1, "machine": GPU.as_dict(), "measured": {}} | changes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "it is not JSON: run ef-jax doctor again"),
        ("[" * 10000, "it is not JSON"),
        ("\udcff", "it is not JSON"),
        ("[]", "is not a profile that ef-jax doctor wrote"),
        (json.dumps(_contents(kind="else")), "is not a profile that ef-jax doctor wrote"),
        (json.dumps(_contents(version=2)), "has version 2, and this one reads 1"),
        (json.dumps(_contents(machine=None)), "is damaged: not the figures of a machine: .* NoneType"),
        (json.dumps(_contents(machine={"name": "x"})), "is damaged: .*missing or unknown are"),
        (json.dumps(_contents(machine={**GPU.as_dict(), "x": 1})), r"missing or unknown are \['x'\]"),
        (json.dumps(_contents(machine={**GPU.as_dict(), "device_memory": -3})), "device_memory is -3"),
    ],
)
def test_malformed_profiles(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "machine.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(InputError, match=message):
        read_profile(path)


def test_where_the_profile_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_profile() == tmp_path / "ef_jax" / "machine.json"
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")  # which the XDG specification has us ignore
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_profile() == tmp_path / ".cache" / "ef_jax" / "machine.json"
    with pytest.raises(InputError, match="run ef-jax doctor first"):
        read_profile(default_profile())
