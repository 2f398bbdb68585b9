import json
from pathlib import Path

import pytest

import checkpoints_tools.cli
from ef_jax.cli import main
from tests.weights.synthetic import CONFIGS, random_tensors, write_checkpoint

CONFIG = CONFIGS["qwen2_moe"]
ITEMS = ("dense", "kv_cache", "cache_slots", "staging", "transfers", "state", "workspace", "reserve")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same tiny model as `full` and as `converted`, and its config.json alone as `bare`."""
    base = tmp_path_factory.mktemp("models")
    write_checkpoint(base / "full", CONFIG, random_tensors(CONFIG))
    assert checkpoints_tools.cli.main([str(base / "full"), str(base / "converted")]) == 0
    (base / "bare").mkdir()
    (base / "bare" / "config.json").write_bytes((base / "full" / "config.json").read_bytes())
    return base


def output(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main(words) == 0
    return capsys.readouterr().out


def test_plan_needs_the_configuration_only(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plans = [
        json.loads(output(["plan", str(models / name), "--expert-fraction", "0.5", "--batch", "2", "--json"], capsys))
        for name in ("bare", "full", "converted")
    ]
    bare = plans[0]["plan"]
    assert [plan["plan"] for plan in plans] == [bare] * 3
    assert bare["total"] == sum(bare[name] for name in ITEMS) == bare["budget"]
    assert (bare["slots"], bare["experts"], bare["batch"]) == (4, 8, 2)
    assert plans[0]["step_bytes_at_most"] == bare["token_cycle"] * bare["block_bytes"] > 0


def test_plan_for_people(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = output(["plan", str(models / "bare"), "--expert-fraction", "1"], capsys)
    assert table.startswith("memory plan: ")
    assert "8 of 8 expert blocks" in table
    assert table.endswith("moves at most 0 B\n")


def test_plan_says_the_smallest_budget_and_it_works(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", str(models / "bare"), "--json", "--device-memory"]
    assert main([*words, "1kB"]) == 2
    line = capsys.readouterr().err
    least = line.split("at least ")[1].split()[0]
    assert json.loads(output([*words, least], capsys))["plan"]["total"] <= int(least)


def test_plan_in_another_dtype(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", str(models / "bare"), "--expert-fraction", "0", "--json"]
    as_stored = json.loads(output(words, capsys))["plan"]
    wide = json.loads(output([*words, "--dtype", "float32"], capsys))["plan"]
    assert wide["block_bytes"] == 2 * as_stored["block_bytes"]


@pytest.mark.parametrize("name", ["bare", "full", "converted"])
def test_info(models: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    contents = json.loads(output(["info", str(models / name), "--json"], capsys))
    model, runtime = contents["model"], contents["runtime"]
    assert model["format"] == {"bare": "config.json only", "full": "huggingface", "converted": "converted"}[name]
    assert model["tokenizer"] is (name != "bare")
    assert model["family"] == "qwen2_moe"
    assert model["experts"] == model["moe_layers"] * model["experts_per_layer"] == 8
    assert model["parameters"] * 2 == model["dense_bytes"] + model["expert_bytes"]
    assert model["stored_bytes"] == (None if name == "bare" else model["parameters"] * 2)
    assert model["expert_bytes"] == 8 * model["block_bytes"]
    assert "pinned_host" in runtime["devices"][0]["memories"]
    assert runtime["kernels"] == {"decode": "xla", "prompt": "xla"}


def test_info_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    lines = output(["info"], capsys).splitlines()
    assert "  family             qwen3_moe" in lines
    assert "  parameters         11,161,536" in lines
    assert "  tokenizer          yes" in lines


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert "commands" in output([], capsys)
    assert output(["--version"], capsys).startswith("ef-jax ")
