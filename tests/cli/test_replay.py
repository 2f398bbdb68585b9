import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ef_jax.cli import main
from ef_jax.memory.policies import POLICIES
from tests.replay.traces import made_up

LINK = ["--bandwidth", "2GB/s,8GB/s", "--layer-time", "100us", "--latency", "5us", "--block-overhead", "2us"]


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`own.npz` knows its blocks' bytes, `plain.npz` is the same as a plain npz, `uniform.npz` has no favourites."""
    directory = tmp_path_factory.mktemp("traces")
    trace = made_up(sequences=4, length=30, block_bytes=1_000_000)
    trace.save(directory / "own.npz")
    arrays = {"experts": trace.experts, "tokens": trace.tokens, "offsets": trace.offsets}
    np.savez(directory / "plain.npz", **arrays, num_experts=trace.num_experts)
    made_up(sequences=8, length=80, skew=0.0).save(directory / "uniform.npz")
    return directory


def contents(words: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["replay", *words, "--jobs", "1", "--json"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    return json.loads(out)


def untimed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**row, "replay_seconds": None} for row in rows]


def test_every_policy_and_both_bounds_by_default(traces: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = contents([str(traces / "own.npz")], capsys)
    names = [*POLICIES, "belady", "belady_bypass"]
    rows = result["results"]
    assert [(row["capacity"], row["policy"]) for row in rows] == [(c, p) for c in (0.125, 0.25, 0.5) for p in names]
    assert {row["slots"] for row in rows} == {6, 12, 24}
    assert all(row["hit_rate"] == row["hits"] / row["accesses"] for row in rows)
    assert result["recommended"]["policy"] in POLICIES
    assert (result["moe_layers"], result["experts_per_layer"], result["experts_per_token"]) == (3, 16, 2)
    assert any("uses of 48 experts" in line for line in result["warnings"])


def test_a_plain_npz_gives_the_same(traces: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--policy", "lru,belady", "--capacity", "25%,24", "--batch", "2", "--fit", "1", *LINK]
    own = contents([str(traces / "own.npz"), *words], capsys)
    plain = contents([str(traces / "plain.npz"), *words, "--block-bytes", "1MB"], capsys)
    assert untimed(own["results"]) == untimed(plain["results"])
    assert [row["bandwidth"] for row in own["results"]] == [2e9] * 4 + [8e9] * 4
    assert "fewest slots within 5 %" in own["recommended"]["reason"]
    assert own["recommended"]["reason"].endswith("at 2 GB/s")


def test_sequences_choose_a_part(traces: Path, capsys: pytest.CaptureFixture[str]) -> None:
    part = contents([str(traces / "own.npz"), "--policy", "lru", "--sequences", "1:3"], capsys)
    assert (part["sequences"], part["results"][0]["tokens"]) == (2, 60)
    rest = contents([str(traces / "own.npz"), "--policy", "lru", "--sequences", "3:"], capsys)
    assert rest["sequences"] == 1


def test_uniform_routing_and_too_few_slots_are_pointed_out(traces: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["replay", str(traces / "uniform.npz"), "--policy", "lru,lfu", "--capacity", "5,0.5", "--jobs", "1"]
    assert main(words) == 0
    out, err = capsys.readouterr()
    assert "recommended: " in out
    assert "no policy helps" in out
    assert err == (
        "warning: 5 slots are fewer than the 6 experts that one step touches: most are evicted before they are needed "
        "again\n"
    )


def test_the_table_has_columns_of_the_link(traces: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["replay", str(traces / "own.npz"), "--policy", "lru,belady", "--capacity", "0.5,1", "--jobs", "1"]
    assert main([*words, *LINK, "--predictor", "oracle", "--prefetch", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "made-up: 4 sequences, 120 tokens, 3 layers x 16 experts, top-2"
    head = next(line for line in lines if line.startswith("policy"))
    assert head.split()[-2:] == ["wasted", "MB"]
    assert sum(line.startswith(("2 GB/s: no scheduler", "8 GB/s: no scheduler")) for line in lines) == 4
    assert sum(line.startswith("lru ") for line in lines) == 4


def test_pre_gate_scores_of_the_trace_are_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "pregate.npz"
    made_up(sequences=4, length=30, pregate=2, block_bytes=1_000_000).save(path)
    words = [str(path), "--policy", "lru", "--capacity", "0.5", *LINK, "--prefetch", "2", "--fit", "1"]
    stalls = {
        predictor: contents([*words, "--predictor", predictor], capsys)["results"][0]["stall_seconds"]
        for predictor in ("history", "pregate", "pregate+cache")
    }
    assert stalls["pregate"] < stalls["history"]
    assert stalls["pregate"] <= stalls["pregate+cache"]


def test_a_picture(traces: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "out.png"
    contents(
        [str(traces / "own.npz"), "--capacity", "0.25,1", "--policy", "all", *LINK, "--plot", str(picture)], capsys
    )
    assert picture.read_bytes().startswith(b"\x89PNG")
    contents([str(traces / "own.npz"), "--policy", "belady", "--plot", str(tmp_path / "out.svg")], capsys)
    assert b"<svg" in (tmp_path / "out.svg").read_bytes()


def test_a_picture_without_matplotlib(
    traces: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    assert main(["replay", str(traces / "own.npz"), "--plot", "out.png"]) == 2
    assert capsys.readouterr().err == 'ef-jax: error: --plot needs matplotlib: pip install "ef_jax[plot]"\n'


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--capacity", "0"], "capacity '0' is no slot at all"),
        (["--capacity", "0.25,49"], "capacity '49' is more than all 48 experts"),
        (["--capacity", ","], "no capacity"),
        (["--policy", "fifo"], "policy 'fifo' is not one of lru, "),
        (["--policy", ""], "no policy"),
        (["--fit", "4"], "fit 4: leave at least one of the 4 sequences"),
        (["--sequences", "2:9"], "sequences 2 to 9 of a trace of 4"),
        (["--sequences", "2-3"], "expected FIRST:LAST"),
        (["--batch", "0"], "expected a whole number"),
        (["--bandwidth", "25"], "'25' is not a bandwidth"),
        (["--bandwidth", "25GB/s", "--latency", "3"], "'3' is not a duration"),
        (["--layer-time", "3ms"], "--layer-time needs a link: give --bandwidth"),
        (["--bandwidth", "1GB/s", "--prefetch", "1"], "prefetch 1 needs a predictor"),
        (["--bandwidth", "1GB/s", "--prefetch", "9", "--predictor", "history"], "prefetch 9: give"),
        (["--predictor", "pregate"], "no pre-gate scores: record one with ef-jax trace --pregate"),
        (["--bandwidth", "1GB/s", "--prefetch", "most"], "expected a whole number"),
    ],
)
def test_bad_input_is_one_line(
    traces: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["replay", str(traces / "own.npz"), "--jobs", "1", *words]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert message in err


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nowhere/out.png", "there is no directory 'nowhere'"),
        ("out.xyz", "cannot draw 'out.xyz': end its name in one of"),
    ],
)
def test_a_picture_that_cannot_be_written(
    traces: Path, path: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    assert main(["replay", str(traces / "own.npz"), "--plot", path]) == 2
    assert message in capsys.readouterr().err


def test_a_link_needs_the_bytes_of_a_block(traces: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", str(traces / "plain.npz"), "--bandwidth", "25GB/s"]) == 2
    assert "the trace does not have: give --block-bytes" in capsys.readouterr().err


@pytest.mark.parametrize("size", [None, 0, 100, 2000])
def test_no_trace_or_a_damaged_one(
    traces: Path, tmp_path: Path, size: int | None, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "cut.npz"
    if size is not None:
        path.write_bytes((traces / "own.npz").read_bytes()[:size])
    assert main(["replay", str(path)]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "is not a usable routing trace" in err


def test_it_does_not_wait_for_jax(traces: Path) -> None:
    code = (
        "import sys; from ef_jax.cli import main; code = main(sys.argv[1:]); "
        "print(code, sorted({'jax', 'matplotlib', 'transformers'} & sys.modules.keys()))"
    )
    words = ["replay", str(traces / "own.npz"), "--policy", "lru", "--jobs", "1", "--json"]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 []"


def test_a_timeline_of_one_replay(traces: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "t.json"
    one = [str(traces / "own.npz"), "--policy", "lru", "--capacity", "25%", "--bandwidth", "2GB/s"]
    words = [*one, "--layer-time", "100us", "--timeline", str(path)]
    row = contents(words, capsys)["results"][0]
    spans = [event for event in json.loads(path.read_text())["traceEvents"] if event["ph"] == "X"]
    stalls = sum(span["dur"] for span in spans if span["cat"] == "stalls") / 1e6
    assert stalls == pytest.approx(row["stall_seconds"])
    assert main(["replay", *words]) == 2
    assert "exists: remove it or choose another name" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ["--policy", "lru,lfu", "--capacity", "25%", "--bandwidth", "2GB/s"],
        ["--policy", "lru", "--capacity", "25%,50%", "--bandwidth", "2GB/s"],
        ["--policy", "lru", "--capacity", "25%", "--bandwidth", "2GB/s,4GB/s"],
        ["--policy", "lru", "--capacity", "25%"],
        ["--policy", "belady", "--capacity", "25%", "--bandwidth", "2GB/s"],
    ],
    ids=["policies", "capacities", "bandwidths", "no link", "bound"],
)
def test_a_timeline_of_a_sweep_is_refused(
    traces: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    assert main(["replay", str(traces / "own.npz"), *words, "--timeline", str(tmp_path / "t.json")]) == 2
    assert "--timeline shows one replay over a link: give one --policy" in capsys.readouterr().err
    assert not (tmp_path / "t.json").exists()
