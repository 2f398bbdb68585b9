"""The bench of the kernels: its table and JSON, how rows fall to experts, and contenders that agree."""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bench import kernels
from bench._kernel_cases import ROUTINGS, SHAPES, Case, group_sizes, make_weights, parse_shape
from bench._kernel_contenders import contenders
from bench._kernel_timing import in_a_row


def test_prints_a_table_and_one_line_of_json(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = tmp_path / "kernels.json"
    names = ["xla", "triton", "reference", "ragged_dot", "dense_loop"]
    options = ["--repeats", "2", "--copy-megabytes", "1", "--matrix", "64", "--save", str(saved)]
    chosen = ["--shape", "64,32,6,2", "--rows", "5", "70", "--routing", "empty", "--contender", *names]
    monkeypatch.setattr(sys, "argv", ["kernels", *chosen, *options])
    assert kernels.main() == 0
    *table, line = capsys.readouterr().out.splitlines()
    result = json.loads(line)
    assert result == json.loads(saved.read_text())
    assert result["shapes"] == {"64,32,6,2": {"D": 64, "F": 32, "E": 6, "K": 2}}

    rows = {(row["contender"], row["rows"]): row for row in result["rows"]}
    assert set(rows) == {(name, count) for name in names for count in (5, 70)} - {
        ("triton", 5),
        ("triton", 70),
        ("reference", 70),
    }
    assert sum(text.startswith(tuple(names)) for text in table) == len(rows) + 2
    assert {(row["contender"], row["rows"]) for row in result["refused"]} == {
        ("triton", 5),
        ("triton", 70),
        ("reference", 70),
    }
    for row in rows.values():
        seconds = row["seconds"]["median"]
        assert row["error"] < 2e-2
        assert row["active_experts"] == 3
        assert row["bytes_per_second"] == pytest.approx(3 * 3 * 64 * 32 * 2 / seconds, rel=1e-4)
        assert row["operations_per_second"] == pytest.approx(6 * row["rows"] * 64 * 32 / seconds, rel=1e-4)
    assert rows["ragged_dot", 5]["x_ragged_dot"] == 1


@pytest.mark.parametrize("routing", ROUTINGS)
def test_every_row_falls_to_an_expert(routing: str) -> None:
    sizes = group_sizes(SHAPES["olmoe"], 100, routing)
    assert sizes.dtype == np.int32
    assert sizes.sum() == 100
    assert np.count_nonzero(sizes) == {"balanced": 64, "one": 1, "empty": 32}.get(routing, np.count_nonzero(sizes))
    if routing in ("balanced", "empty"):
        assert np.ptp(sizes[sizes > 0]) <= 1


def test_a_shape_is_a_name_or_sizes() -> None:
    assert parse_shape("mixtral").width == 14336
    assert parse_shape("8,4,2,1").experts == 2
    for text in ("mistral", "1,2,3", "1,2,3,0"):
        with pytest.raises(Exception, match="neither D,F,E,K nor one of"):
            parse_shape(text)


def test_torch_agrees() -> None:
    pytest.importorskip("torch")
    from bench import _kernel_torch

    shape, dtype = parse_shape("32,16,3,1"), np.dtype("bfloat16")
    case = Case(shape=shape, dtype=dtype, sizes=np.int32([4, 0, 9]), weights=make_weights(shape, dtype))
    turn, result = _kernel_torch.prepare(case)
    prepare = contenders()["xla"]
    assert prepare is not None
    run, arguments = prepare(case)
    expected = np.asarray(run(*arguments).astype(np.float32))
    assert turn() > 0
    assert np.abs(result() - expected).max() < 2e-2 * np.abs(expected).max()


def test_calls_in_a_row_all_happen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    calls = []

    def noted(x: np.ndarray) -> np.ndarray:
        calls.append(float(x[0, 0]))
        return np.asarray(x)

    turn = in_a_row(lambda x: jax.pure_callback(noted, x, x), [jnp.ones((2, 2))])
    assert turn() > 0
    assert calls == [1.0] * 20
