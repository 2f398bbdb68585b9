import io
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ef_jax.errors import InputError
from ef_jax.new_file import check_new_file
from ef_jax.replay.trace import DECODE, PROMPT, Pass, RoutingTrace

L, E, K = 2, 5, 3


def arrays(lengths: list[int], seed: int = 0, **changes: Any) -> dict[str, Any]:
    """A plain trace's arrays: the token of row n is 100 + n."""
    count = sum(lengths)
    rng = np.random.default_rng(seed)
    experts = rng.permuted(np.broadcast_to(np.arange(E), (count, L, E)), axis=-1)[..., :K]
    return {
        "experts": experts.astype(np.uint8),
        "tokens": np.arange(100, 100 + count, dtype=np.int32),
        "offsets": np.cumsum([0, *lengths]),
        "num_experts": E,
        "phases": np.full(count, DECODE, np.uint8),
        **changes,
    }


def trace(lengths: list[int], **changes: Any) -> RoutingTrace:
    return RoutingTrace(**arrays(lengths, **changes))


def recorded() -> RoutingTrace:
    """Two sequences in one batch (prompts of 3 and 1 in chunks of 2, the first ends early), then one alone."""
    passes = [0, 0, 1, 2, 0, 2, 3, 4, 5]
    phases = [PROMPT, PROMPT, PROMPT, DECODE, PROMPT, DECODE, DECODE, PROMPT, DECODE]
    return trace([4, 3, 2], passes=np.array(passes), phases=np.array(phases, np.uint8))


def rows(steps: Any) -> list[list[int]]:
    return [step.rows for step in steps]


def same_pass(step: Pass, of: RoutingTrace) -> None:
    """What a pass says is what the trace has in its rows."""
    assert step.tokens == of.tokens[step.rows].tolist()
    begins = set(of.offsets[:-1].tolist())
    assert list(step.starts) == [place for place, row in enumerate(step.rows) if row in begins]
    if step.prompt:
        assert step.routes == []
        assert step.counts is not None
        for layer in range(of.layers):
            expected = np.bincount(of.experts[step.rows, layer].ravel(), minlength=of.num_experts)
            np.testing.assert_array_equal(step.counts[layer], expected)
    else:
        assert step.counts is None
        assert step.routes == [of.experts[step.rows, layer].tolist() for layer in range(of.layers)]


def test_a_recorded_trace_runs_as_recorded() -> None:
    t = recorded()
    steps = list(t.steps())
    assert rows(steps) == [[0, 1, 4], [2], [3, 5], [6], [7], [8]]
    assert [step.prompt for step in steps] == [True, True, False, False, True, False]
    assert [list(step.starts) for step in steps] == [[0, 2], [], [], [], [0], []]
    for step in steps:
        same_pass(step, t)


def test_without_passes_sequences_run_one_by_one() -> None:
    assert rows(trace([2, 1]).steps()) == [[0], [1], [2]]
    phases = np.array([PROMPT, PROMPT, DECODE, PROMPT, PROMPT, DECODE], np.uint8)
    t = trace([3, 1, 2], phases=phases)
    assert rows(t.steps()) == [[0, 1], [2], [3], [4], [5]]
    for step in t.steps():
        same_pass(step, t)


def test_a_batch_fills_a_place_when_its_sequence_ends() -> None:
    # Places: the first holds rows 0 to 3, the second 4, then 5 and 6, then 7.
    t = trace([4, 1, 2, 1])
    assert rows(t.steps(2)) == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert rows(t.steps(3)) == [[0, 4, 5], [1, 7, 6], [2], [3]]
    assert rows(recorded().steps(2)) == [[0, 4], [1, 5], [2, 6], [3, 7], [8]]
    assert not any(step.prompt for step in recorded().steps(2))
    with pytest.raises(InputError, match="batch 0: give at least 1"):
        next(t.steps(0))


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=12), batch=st.integers(1, 5))
def test_every_row_runs_once_and_sequences_in_order(lengths: list[int], batch: int) -> None:
    t = trace(lengths)
    at = [0] * len(lengths)
    owner = np.repeat(np.arange(len(lengths)), lengths)
    for step in t.steps(batch):
        same_pass(step, t)
        sequences = owner[step.rows].tolist()
        assert len(set(sequences)) == len(sequences) <= batch
        for row, sequence in zip(step.rows, sequences, strict=True):
            assert row == t.offsets[sequence] + at[sequence]
            at[sequence] += 1
        # A place is empty only when no sequence waits.
        assert len(sequences) == batch or max(sequences) == len(lengths) - 1 or at[-1] == lengths[-1]
    assert at == lengths


def test_order_is_what_steps_run() -> None:
    for t, batch in ((recorded(), None), (trace([3, 1, 2]), 2)):
        order = t.order(batch)
        assert rows(t.steps(batch)) == [
            order.rows[first:last].tolist() for first, last in zip(order.bounds[:-1], order.bounds[1:], strict=True)
        ]
        assert order.prompt.tolist() == [step.prompt for step in t.steps(batch)]


def test_selected_sequences_are_a_trace() -> None:
    t = recorded()
    part = t.select(1, 3)
    assert (part.sequences, part.count) == (2, 5)
    assert part.tokens.tolist() == t.tokens[4:].tolist()
    assert rows(part.steps()) == [[0], [1], [2], [3], [4]]
    assert rows(t.select(2).steps()) == [[0], [1]]
    for first, last in ((0, 0), (2, 1), (0, 4), (-1, 2)):
        with pytest.raises(InputError, match=f"sequences {first} to {last} of a trace of 3"):
            t.select(first, last)


def test_a_file_holds_all_of_a_trace(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    pregate = rng.random((7, L, 2, E)).astype(np.float16)
    pregate[:, L - 1, 1:] = 0
    t = trace(
        [4, 3],
        passes=np.array([0, 0, 1, 2, 0, 1, 2]),
        phases=np.array([0, 0, 1, 1, 0, 1, 1], np.uint8),
        model="a model",
        block_bytes=6144,
        weights=rng.random((7, L, K)).astype(np.float16),
        pregate=pregate,
    )
    t.save(tmp_path / "t.npz")
    back = RoutingTrace.load(tmp_path / "t.npz")
    for name in ("experts", "tokens", "offsets", "phases", "passes", "weights", "pregate"):
        before, after = getattr(t, name), getattr(back, name)
        assert before.dtype == after.dtype
        np.testing.assert_array_equal(before, after)
    assert (back.model, back.block_bytes, back.num_experts) == ("a model", 6144, E)
    assert os.listdir(tmp_path) == ["t.npz"]


def test_a_plain_npz_is_a_trace_of_decoding(tmp_path: Path) -> None:
    plain = arrays([2, 3])
    del plain["phases"]
    plain["experts"] = plain["experts"].astype(np.int64)
    plain["tokens"] = plain["tokens"].astype(np.uint32)
    np.savez(tmp_path / "plain.npz", **plain, unrelated=np.zeros(3))
    t = RoutingTrace.load(tmp_path / "plain.npz")
    assert t.experts.dtype == np.uint8
    assert t.phases.tolist() == [DECODE] * 5
    assert t.passes is None
    assert (t.layers, t.top_k, t.num_experts, t.sequences, t.model) == (L, K, E, 2, "")


def test_many_experts_take_two_bytes(tmp_path: Path) -> None:
    np.savez(tmp_path / "t.npz", **arrays([3], num_experts=300))
    assert RoutingTrace.load(tmp_path / "t.npz").experts.dtype == np.uint16


def test_a_file_is_not_overwritten_unasked(tmp_path: Path) -> None:
    path = tmp_path / "t.npz"
    trace([2]).save(path)
    with pytest.raises(InputError, match="exists: remove it or choose another name"):
        trace([3]).save(path)
    assert RoutingTrace.load(path).count == 2
    trace([3]).save(path, overwrite=True)
    assert RoutingTrace.load(path).count == 3
    with pytest.raises(InputError, match="there is no directory"):
        trace([2]).save(tmp_path / "no" / "t.npz")
    for bad, message in ((tmp_path, "is a directory"), ("", "is a directory"), ("y" * 5000, "File name too long")):
        with pytest.raises(InputError, match=message):
            check_new_file(bad)


def test_a_failed_save_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(file: Any, **contents: Any) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", fail)
    with pytest.raises(InputError, match=r"cannot write .*t\.npz': No space left on device"):
        trace([2]).save(tmp_path / "t.npz")
    assert os.listdir(tmp_path) == []


def with_ids(*ids: int) -> dict[str, Any]:
    """Experts whose token 1 chose `ids` in layer 1."""
    experts = arrays([2, 2])["experts"].astype(np.int64)
    experts[1, 1] = ids
    return {"experts": experts}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"experts": None}, "it has no array 'experts'"),
        ({"num_experts": None}, "it has no array 'num_experts'"),
        ({"experts": np.zeros((4, L, K))}, "experts must hold whole numbers, got float64"),
        ({"experts": np.zeros((4, K), np.uint8)}, r"experts must be \[tokens, layers, top-k\] and not empty"),
        ({"experts": np.zeros((0, L, K), np.uint8)}, r"not empty, got shape \(0, 2, 3\)"),
        ({"tokens": np.zeros(3, np.int32)}, r"tokens has shape \(3,\), and the experts need \(4,\)"),
        ({"tokens": np.array([1, 2, 3, 2**40])}, "tokens holds 1099511627776"),
        ({"offsets": np.array([0, 2, 2, 4])}, r"offsets must rise, got 2 and then 2 \(sequence 1\)"),
        ({"offsets": np.array([0, 3, 2, 4])}, "offsets must rise, got 3 and then 2"),
        ({"offsets": np.array([0, 3])}, "offsets must run from 0 to the 4 tokens, got 0 to 3"),
        ({"offsets": np.array([], np.int64)}, "offsets must run from 0 to the 4 tokens, got nothing"),
        ({"offsets": np.array([[0, 4]])}, "offsets must have one dimension"),
        ({"num_experts": 0}, "num_experts is 0"),
        ({"num_experts": np.array([5, 5])}, "num_experts must be one whole number"),
        ({"num_experts": 10**6}, "num_experts is 1000000"),
        (with_ids(0, 1, E), "experts holds 5, and only 0 to 4 is possible"),
        (with_ids(0, 1, -1), "experts holds -1"),
        (with_ids(3, 1, 3), r"token 1 chose an expert of layer 1 twice: \[3, 1, 3\]"),
        ({"phases": np.array([0, 1, 2, 0])}, "phases holds 2"),
        ({"passes": np.array([0, 1, -1, 0])}, "passes holds -1"),
        ({"passes": np.array([1, 1, 2, 3])}, r"passes of a sequence must rise, got 1 and then 1 \(token 1\)"),
        (
            {"passes": np.array([0, 1, 0, 1]), "phases": np.array([0, 1, 1, 1])},
            "pass 0 mixes tokens of prompts with tokens of decoding",
        ),
        ({"weights": np.zeros((4, L, K))}, "weights must be float16, got float64"),
        ({"weights": np.zeros((4, L), np.float16)}, r"weights has shape \(4, 2\)"),
        ({"pregate": np.zeros((4, L, 1, E - 1), np.float16)}, r"pregate has shape .* need \(4, 2, 1, 5\)"),
        ({"pregate": np.zeros((4, L, 0, E), np.float16)}, r"pregate has shape .* need \(4, 2, 1, 5\)"),
        ({"pregate": np.ones((4, L, 2, E), np.float16)}, "pregate has scores of source 1 for layers past the last, 1:"),
        ({"block_bytes": 0}, "block_bytes is 0"),
        ({"block_bytes": np.array("much")}, "block_bytes must be one whole number"),
        ({"format": "other"}, "its format is 'other'"),
        ({"format": "ef_jax routing trace", "version": 2}, "its version is 2, and only version 1 is known"),
        ({"format": "ef_jax routing trace"}, "its version is None"),
        ({"tokens": np.array(["a", None, 1, 2], object)}, "allow_pickle"),
    ],
)
def test_files_that_are_no_traces(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "t.npz"
    contents = {name: value for name, value in arrays([2, 2], **changes).items() if value is not None}
    np.savez(path, **contents)
    with pytest.raises(InputError, match=message) as caught:
        RoutingTrace.load(path)
    assert str(caught.value).startswith(f"{str(path)!r} is not a usable routing trace: ")
    assert "\n" not in str(caught.value)


def test_arrays_are_checked_when_a_trace_is_made() -> None:
    for changes, message in (
        ({"experts": np.full((4, L, K), E, np.uint8)}, "expert id 5 of token 0, layer 0: the trace has 5 experts"),
        ({"experts": np.zeros((4, L, K), np.int32)}, "experts must be uint8 or uint16, got int32"),
        ({"phases": np.full(4, 2, np.uint8)}, "phases must be 0"),
        ({"passes": np.arange(-1, 3)}, "passes must count from 0, got -1"),
    ):
        with pytest.raises(InputError, match=message):
            trace([2, 2], **changes)


def test_files_that_are_no_npz(tmp_path: Path) -> None:
    path = tmp_path / "t.npz"
    with pytest.raises(InputError, match="No such file"):
        RoutingTrace.load(path)
    with pytest.raises(InputError, match="Is a directory"):
        RoutingTrace.load(tmp_path)
    for contents in (b"", b"text", b"PK\x03\x04"):
        path.write_bytes(contents)
        with pytest.raises(InputError, match=r"not an npz file|truncated or damaged"):
            RoutingTrace.load(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("experts", b"no array")
    with pytest.raises(InputError, match="'experts' is not an array"):
        RoutingTrace.load(path)


def npz() -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, **arrays([3, 4]), format="ef_jax routing trace", version=1)
    return file.getvalue()


_NPZ = npz()


@settings(max_examples=200)
@given(at=st.integers(0, len(_NPZ) - 1), value=st.integers(0, 255), cut=st.booleans())
def test_damaged_files_are_refused_or_read_the_same(
    at: int, value: int, cut: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    data = bytearray(_NPZ)
    if cut:
        del data[at:]
    else:
        data[at] = value
    path = tmp_path_factory.getbasetemp() / "damaged.npz"
    path.write_bytes(data)
    try:
        t = RoutingTrace.load(path)
    except InputError as error:
        assert "\n" not in str(error)
    else:
        np.testing.assert_array_equal(t.experts, arrays([3, 4])["experts"])


def test_the_shared_trace(shared_dir: Path) -> None:
    t = RoutingTrace.load(shared_dir / "traces" / "deepseek_v2_lite.npz")
    assert (t.count, t.sequences, t.layers, t.num_experts, t.top_k) == (85024, 360, 26, 64, 6)
    part = t.select(300)
    first, *_ = part.steps(4)
    assert first.rows == part.offsets[:4].tolist()
    same_pass(first, part)
