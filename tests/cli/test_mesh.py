"""Options of several devices on the command line."""

import json
from pathlib import Path

import pytest

from ef_jax.cli import main
from ef_jax.cli.options import EXCHANGES
from ef_jax.mesh.exchange import Transport
from ef_jax.placement import Placement, save_placement
from ef_jax.runtime.programs import Programs
from tests.weights.synthetic import CONFIGS, random_tensors, write_checkpoint

CONFIG = CONFIGS["qwen2_moe"]  # two layers of 4 experts


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = write_checkpoint(tmp_path_factory.mktemp("models") / "tiny", CONFIG, random_tensors(CONFIG))
    (path / "tokenizer.json").unlink()
    return str(path)


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main(words) == 2
    found = capsys.readouterr()
    assert found.out == ""
    assert found.err.count("\n") == 1
    return found.err


def test_a_plan_of_each_device(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of devices that are there, and of more than there are."""
    words = ["plan", model, "--expert-fraction", "0.5", "--context", "16", "--chunk", "4", "--json"]
    save_placement(Placement.contiguous(layers=2, experts=4, devices=4), tmp_path / "p.npz")
    assert main([*words, "--mesh", "expert=4", "--placement", str(tmp_path / "p.npz")]) == 0
    there = json.loads(capsys.readouterr().out)["plan"]
    share = there["share"]
    assert (share["mesh"], share["devices"], share["estimated"]) == ("expert=4", 4, False)
    assert share["placement"] == str(tmp_path / "p.npz")
    assert (there["experts"], there["slots"], there["batch"], there["host_bytes"]) == (
        2,
        1,
        4,
        8 * there["block_bytes"],
    )
    monkeypatch.setattr(Programs, "compile_largest", lambda self: None)  # tests/mesh/test_mesh_plan.py does
    monkeypatch.setattr(Programs, "workspace_bytes", 1000)
    assert main([*words, "--mesh", "data=8,expert=4"]) == 0
    estimate = json.loads(capsys.readouterr().out)["plan"]
    assert (estimate["share"]["devices"], estimate["share"]["estimated"], estimate["batch"]) == (32, True, 32)
    assert any("estimate" in text for text in estimate["warnings"])
    same = ("dense", "kv_cache", "cache_slots", "staging", "slots", "experts")
    assert [there[name] for name in same] == [estimate[name] for name in same]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--mesh", "expert=3"], "4 experts a layer cannot be shared by 3 devices: on as many devices give data=3"),
        (["--mesh", "experts=2"], "'experts' is not one of data, expert, tensor"),
        (["--mesh", "expert=4", "--batch", "6"], "batch 6 cannot be shared by expert=4 evenly: give batch 4 or 8"),
        (["--mesh", "expert=4", "--placement", "affine"], "made from recorded routing: give the file"),
        (["--mesh", "expert=4", "--placement", "none.npz"], "'none.npz' is not a usable placement: it cannot be read"),
        (["--mesh", "expert=4", "--exchange", "ragged"], "exchange 'ragged'"),
        (["--placement", "p.npz"], "--placement is for several devices: give --mesh too"),
        (["--exchange", "padded"], "--exchange is for several devices: give --mesh too"),
    ],
)
def test_what_a_mesh_cannot_be(model: str, words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in refused(["plan", model, *words], capsys)
    assert message in refused(["generate", "--model", model, "--token-ids", "1,2", *words], capsys)


def test_a_forecast_is_of_one_device(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", model, "--mesh", "expert=4", "--forecast", "--machine", "h100-sxm-pcie5"]
    assert "--forecast is of one device" in refused(words, capsys)


def test_exchanges_are_the_transports() -> None:
    assert set(EXCHANGES) == set(Transport.__args__)
