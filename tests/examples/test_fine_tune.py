"""The example runs as its docstring says."""

import json

import pytest

from ef_jax.examples import fine_tune


def test_training_lowers_the_loss_and_experts_stay_on_the_host(capsys: pytest.CaptureFixture[str]) -> None:
    assert fine_tune.main(["--steps", "3", "--batch", "2", "--length", "24", "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["loss"]["after"] < result["loss"]["before"]
    experts = 8 * 32 * 3 * 64 * 192 * 4
    assert result["bytes"]["pinned_host"] >= experts > 2 * result["bytes"]["device"]


def test_bad_input_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert fine_tune.main(["--length", "100000"]) == 2
    assert "the text has" in capsys.readouterr().err
    assert fine_tune.main(["--slots", "1"]) == 2
