"""Tile configurations: written by the tuner, found by what they are keyed with, and used."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from pallas_kernels import BACKENDS, Problem, default_target, tune
from pallas_kernels.grouped_ffn import backends, tiles, xla

SHAPE = ["--shape", "64,32,4,2", "--rows", "16", "--seconds", "0.01"]


def problem(**change: Any) -> Problem:
    whole = {
        "rows": 16,
        "groups": 4,
        "slots": 4,
        "contract": 64,
        "width": 32,
        "dtype": np.dtype("float32"),
        "activation": "silu",
        "target": default_target(),
    }
    return Problem(**(whole | change))


@pytest.fixture
def tiled(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A backend like `xla` whose tiles have a depth; it is wrong at depth 3, cannot be compiled at 4."""
    seen: list[dict[str, Any]] = []

    def ffn(x: jax.Array, *arguments: Any) -> jax.Array:
        found = {op: tiles.find_tiles("tiled", op, arguments[-1]) or {"depth": 1} for op in ("gate_up", "down")}
        seen.append(found)
        depths = [each["depth"] for each in found.values()]
        if 4 in depths:
            raise RuntimeError("too deep")
        y = xla.BACKEND.ffn(x, *arguments)
        return y + 1 if 3 in depths else y

    backend = dataclasses.replace(
        xla.BACKEND, name="tiled", ffn=ffn, candidates=lambda operation, _: [{"depth": d} for d in (1, 2, 3, 4)]
    )
    monkeypatch.setitem(backends.BACKENDS, "tiled", backend)
    return seen


def test_what_is_tuned_is_found(
    tiled: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert tune.main([*SHAPE, "--dtype", "float32", "--backend", "tiled", "--out", str(tmp_path), "--json"]) == 0
    out, err = capsys.readouterr()
    entries = json.loads(out.splitlines()[-1])["entries"]
    assert [entry["operation"] for entry in entries] == ["gate_up", "down"]
    assert all(
        entry["tiles"]["depth"] in (1, 2) and entry["seconds"] <= entry["heuristic_seconds"] for entry in entries
    )
    assert "wrong by 1" in err
    assert "too deep" in err
    # Down is tuned on top of the best gate-and-up.
    assert {"gate_up": entries[0]["tiles"], "down": {"depth": 2}} in tiled
    monkeypatch.setenv(tiles.VARIABLE, str(tmp_path))
    assert tiles.find_tiles("tiled", "down", problem(tile_rows=8)) == entries[1]["tiles"]
    for other in ({"width": 64}, {"tile_rows": 16}, {"dtype": np.dtype("float16")}, {"storage": "int4"}):
        assert tiles.find_tiles("tiled", "down", problem(**({"tile_rows": 8} | other))) is None
    # The number of rows is no key: a row's result must not depend on it.
    assert tiles.find_tiles("tiled", "down", problem(tile_rows=8, rows=17, groups=3)) == entries[1]["tiles"]


def test_entries_replace_those_of_the_same_key(tmp_path: Path) -> None:
    path = tmp_path / tiles.file_name("NVIDIA H100 80GB HBM3")
    assert path.name == "nvidia_h100_80gb_hbm3.json"
    entry = dict(zip(tiles.KEY_FIELDS, tiles.key("triton", "down", problem()), strict=True)) | {"tiles": {"depth": 1}}
    tiles.write_entries(path, "a card", [entry])
    tiles.write_entries(path, "a card", [entry | {"tiles": {"depth": 2}}, entry | {"width": 7}])
    assert sorted(each["tiles"]["depth"] for each in tiles.read_entries(path)) == [1, 2]


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "card.json"
    path.write_text('{"entries": [{"backend": "triton"}]}')
    with pytest.raises(ValueError, match=r"card\.json is no file of tile configurations"):
        tiles.read_entries(path)


def test_files_of_the_package_can_be_read() -> None:
    for path in tiles.DIRECTORY.glob("*.json"):
        for entry in tiles.read_entries(path):
            assert entry["backend"] in BACKENDS
            assert entry["seconds"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "64,32,4"], "4 positive integers with commas between are needed, got '64,32,4'"),
        ([*SHAPE, "--rows", "0"], "--rows must be positive integers"),
        ([*SHAPE, "--out", "nowhere"], "--out 'nowhere' is not a directory"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    try:
        code = tune.main(arguments)
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    assert message in capsys.readouterr().err


def test_nothing_to_tune_is_said(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    assert tune.main([*SHAPE, "--backend", "xla", "--out", str(tmp_path)]) == 0
    assert "nothing to tune" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
