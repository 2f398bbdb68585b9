"""Timelines: the file against Chrome's trace event format, bounded memory, lanes, and what saving refuses."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ef_jax.errors import InputError
from ef_jax.timeline import COMPUTE, DEMAND, PREFETCH, STALLS, Timeline

_NUMBERS = (int, float)


def events(timeline: Timeline, path: Path) -> list[dict[str, Any]]:
    """The events of a saved timeline, after checks that hold for every file."""
    timeline.save(path, overwrite=True)
    contents = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert contents["displayTimeUnit"] == "ms"
    assert contents["otherData"] == {"dropped_events": timeline.dropped}
    found = contents["traceEvents"]
    named = {event["tid"] for event in found if event["name"] == "thread_name"}
    assert [event["args"] for event in found if event["name"] == "process_name"] == [{"name": "ef_jax"}]
    for event in found:
        assert event["pid"] == 1
        if event["ph"] == "X":
            assert event["tid"] in named
            for figure in (event["ts"], event["dur"]):
                assert isinstance(figure, _NUMBERS)
                assert figure >= 0
        elif event["ph"] == "C":
            assert all(isinstance(value, _NUMBERS) for value in event["args"].values())
        else:
            assert event["ph"] == "M"
    times = [event["ts"] for event in found if event["ph"] != "M"]
    assert times == sorted(times)
    return found


def tracks(found: list[dict[str, Any]]) -> dict[int, str]:
    """Names of the tracks in the order in which they are shown."""
    order = {event["tid"]: event["args"]["sort_index"] for event in found if event["name"] == "thread_sort_index"}
    names = {event["tid"]: event["args"]["name"] for event in found if event["name"] == "thread_name"}
    return {tid: names[tid] for tid in sorted(order, key=order.__getitem__)}


def test_spans_and_counters_in_microseconds_from_the_first(tmp_path: Path) -> None:
    timeline = Timeline()
    timeline.counter("horizon", 1000.0005, 2)
    timeline.span(DEMAND, "layer 1", 1000.0, 1000.00025, layer=1, expert=7)
    timeline.span(COMPUTE, "layer 0", 999.999, 1000.0)
    found = events(timeline, tmp_path / "t.json")
    assert tracks(found) == {1: COMPUTE, 2: DEMAND}
    assert [event for event in found if event["ph"] != "M"] == [
        {"name": "layer 0", "cat": COMPUTE, "ph": "X", "ts": 0.0, "dur": 1000.0, "pid": 1, "tid": 1},
        {
            "name": "layer 1",
            "cat": DEMAND,
            "ph": "X",
            "ts": 1000.0,
            "dur": 250.0,
            "pid": 1,
            "tid": 2,
            "args": {"layer": 1, "expert": 7},
        },
        {"name": "horizon", "ph": "C", "ts": 1500.0, "pid": 1, "args": {"horizon": 2}},
    ]


def test_an_empty_timeline_is_a_valid_file(tmp_path: Path) -> None:
    assert [event["name"] for event in events(Timeline(), tmp_path / "t.json")] == ["process_name"]


def test_known_tracks_come_first_and_in_order(tmp_path: Path) -> None:
    timeline = Timeline()
    for track in ("apart", PREFETCH, STALLS, COMPUTE, DEMAND):
        timeline.span(track, "x", 0.0, 1.0)
    shown = tracks(events(timeline, tmp_path / "t.json"))
    assert list(shown.values()) == [COMPUTE, STALLS, DEMAND, PREFETCH, "apart"]


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 10)), max_size=40))
def test_no_track_of_the_file_has_two_spans_at_a_time(
    tmp_path_factory: pytest.TempPathFactory, times: list[tuple[int, int]]
) -> None:
    timeline = Timeline()
    for begin, length in times:
        timeline.span(DEMAND, "copy", begin * 1e-7 / 3, (begin + length) * 1e-7 / 3)
    found = events(timeline, tmp_path_factory.getbasetemp() / "lanes.json")
    spans = [event for event in found if event["ph"] == "X"]
    assert len(spans) == len(times)
    for lane, name in tracks(found).items():
        assert name == DEMAND or name == f"{DEMAND} ({lane})"
        ends = 0
        for span in (span for span in spans if span["tid"] == lane):
            assert round(1000 * span["ts"]) >= ends
            ends = round(1000 * span["ts"]) + round(1000 * span["dur"])


def test_the_oldest_are_dropped_and_counted(tmp_path: Path) -> None:
    timeline = Timeline(limit=3)
    for number in range(5):
        timeline.span(COMPUTE, f"layer {number}", number, number + 1)
        timeline.counter("horizon", number, number)
    assert timeline.dropped == 4
    found = events(timeline, tmp_path / "t.json")
    assert [event["name"] for event in found if event["ph"] == "X"] == ["layer 2", "layer 3", "layer 4"]
    assert [event["args"]["horizon"] for event in found if event["ph"] == "C"] == [2, 3, 4]
    with pytest.raises(InputError, match="limit 0: give at least 1 span"):
        Timeline(limit=0)


def test_a_counter_that_does_not_change_takes_no_place(tmp_path: Path) -> None:
    timeline = Timeline()
    for time, value in enumerate([2, 2, 3, 3, 2]):
        timeline.counter("horizon", time, value)
        timeline.counter("other", time, 1)
    found = events(timeline, tmp_path / "t.json")
    assert [(event["ts"], event["args"]) for event in found if event["name"] == "horizon"] == [
        (0, {"horizon": 2}),
        (2e6, {"horizon": 3}),
        (4e6, {"horizon": 2}),
    ]
    assert timeline.dropped == 0


def test_wasted_marks_the_last_prefetch_of_the_key(tmp_path: Path) -> None:
    timeline = Timeline()
    timeline.wasted(0, 3)
    for begin in (0, 1):
        timeline.span(PREFETCH, "prefetch", begin, begin + 1, layer=0, expert=3)
    timeline.span(DEMAND, "demand", 2, 3, layer=0, expert=3)
    timeline.span(PREFETCH, "prefetch", 2, 3, layer=1, expert=3)
    timeline.wasted(0, 3)
    timeline.wasted(0, 3)
    found = [event for event in events(timeline, tmp_path / "t.json") if event["ph"] == "X"]
    assert sorted(event["name"] for event in found) == ["demand", "prefetch", "prefetch", "wasted prefetch"]
    wasted = next(event for event in found if event["name"] == "wasted prefetch")
    assert (wasted["ts"], wasted["cname"]) == (1e6, "terrible")


@pytest.mark.parametrize(("begin", "end"), [(2.0, 1.0), (float("nan"), 1.0), (0.0, float("inf")), (0.0, float("nan"))])
def test_what_is_no_time_is_refused(begin: float, end: float) -> None:
    timeline = Timeline()
    with pytest.raises(ValueError, match="is no span of time"):
        timeline.span(COMPUTE, "x", begin, end)
    if end != 1.0:
        with pytest.raises(ValueError, match="counter 'horizon' cannot be"):
            timeline.counter("horizon", 0.0, end)


def test_a_file_is_not_overwritten_unasked(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    Timeline().save(path)
    with pytest.raises(InputError, match="exists: remove it or choose another name"):
        Timeline().save(path)
    Timeline().save(path, overwrite=True)
    with pytest.raises(InputError, match="there is no directory"):
        Timeline().save(tmp_path / "no" / "t.json")


def test_a_failed_save_leaves_nothing(tmp_path: Path) -> None:
    timeline = Timeline()
    timeline.span(COMPUTE, "x", 0.0, 1.0, array=object())
    with pytest.raises(TypeError):
        timeline.save(tmp_path / "t.json")
    assert os.listdir(tmp_path) == []
