"""The configurations of released models: read, counted, planned, and described by the commands."""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ef_jax.cli import main
from ef_jax.families import FAMILIES, spec_from_config
from ef_jax.memory.parameters import count_parameters
from tests.released import CONFIGS, RELEASED, read_config

FAMILY_OF = {name: read_config(name)["model_type"] for name in RELEASED}
# One of each family is planned in every run: their programs differ in sizes alone, and take seconds each to compile.
FIRST_OF = {family: name for name, family in reversed(FAMILY_OF.items())}


def test_every_configuration_has_a_published_size() -> None:
    assert {path.stem for path in CONFIGS.glob("*.json")} == RELEASED.keys()
    # A language model by itself (`_text`) has been released with the rest of its model.
    assert set(FAMILY_OF.values()) == {family for family in FAMILIES if not family.endswith("_text")}


@pytest.mark.parametrize("name", FAMILY_OF)
def test_parameters_are_as_published(name: str) -> None:
    spec = spec_from_config(read_config(name))
    parameters, published = count_parameters(spec), RELEASED[name]
    assert parameters.total / 1e9 == pytest.approx(published.total, rel=0.01)
    # Publishers count embedding and head among the active ones, or one of them, or none; most round to billions.
    ends = 2 * spec.vocab * spec.hidden / 1e9
    active = parameters.active / 1e9
    assert (active - ends) * 0.95 - 0.1 < published.active < active * 1.05 + 0.1
    assert spec.dtype == ("float32" if name.startswith("switch") else "bfloat16")


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """A command on a directory that holds nothing but a configuration."""

    def run(command: str, name: str, *words: str) -> str:
        (tmp_path / "config.json").write_bytes((CONFIGS / f"{name}.json").read_bytes())
        assert main([command, str(tmp_path), *words]) == 0
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize("name", FAMILY_OF)
def test_info(name: str, run: Callable[..., str]) -> None:
    model: dict[str, Any] = json.loads(run("info", name, "--json"))["model"]
    assert model["family"] == FAMILY_OF[name]
    assert model["parameters"] > model["active_parameters"] > 0
    assert model["expert_bytes"] == model["experts"] * model["block_bytes"]


def test_experts_released_in_fp8_take_a_byte_a_weight_and_their_scales() -> None:
    for name in ("deepseek-v3", "kimi-k2-instruct", "minimax-m2"):
        spec = spec_from_config(read_config(name))
        weights = math.prod(spec.block_shape)
        assert weights % 128**2 == 0
        assert spec.block_bytes == weights + weights // 128**2 * 4
        halves = dataclasses.replace(spec, experts=dataclasses.replace(spec.experts, quantization=None))
        assert spec.block_bytes / halves.block_bytes == pytest.approx(0.5, rel=3e-4)


def test_info_for_people(run: Callable[..., str]) -> None:
    lines = run("info", "mixtral-8x7b").splitlines()
    assert "  parameters         46,702,792,704" in lines
    assert "  active parameters  12,879,925,248" in lines


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in FIRST_OF.values() else pytest.mark.slow) for name in FAMILY_OF]
)
def test_plan(name: str, run: Callable[..., str]) -> None:
    plan: dict[str, Any] = json.loads(run("plan", name, "--json", "--context", "512", "--expert-fraction", "0.25"))
    parameters = count_parameters(spec_from_config(read_config(name)))
    plan = plan["plan"]
    assert plan["dense"] == parameters.dense_bytes
    assert 0 < plan["workspace"] < plan["total"]
    assert plan["cache_slots"] == pytest.approx(parameters.expert_bytes / 4, rel=0.02)


def test_a_plan_of_hundreds_of_gigabytes_is_readable(run: Callable[..., str]) -> None:
    lines = run("plan", "qwen3-235b-a22b", "--context", "512").splitlines()
    assert lines[0] == "memory plan: 249 GB of 249 GB on the device"
    items = {line.split()[0]: line for line in lines[1:] if line.startswith("  ")}
    assert items["host"].split(maxsplit=3)[1:3] == ["454", "GB"]
    assert "6016 of 12032 expert blocks of 37.7 MB" in items["cache_slots"]
    assert len({line.index(line.split(maxsplit=3)[3]) for line in items.values()}) == 1, "one column of remarks"
