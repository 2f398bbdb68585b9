"""What ran when: compute, copies and stalls of every step, in a file that Perfetto (ui.perfetto.dev) opens.

The file is JSON in Chrome's trace event format ("Trace Event Format", Google, 2016, sections on complete, counter and
metadata events). Times in it are microseconds since the first thing that was noted.
"""

import itertools
import json
import math
import os
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

from ef_jax.errors import InputError
from ef_jax.new_file import new_file

STEPS, COMPUTE, STALLS = "steps", "compute", "stalls"
DEMAND, PREFETCH = "copies: demand", "copies: prefetch"
DISK = "reads"
TRACKS = (STEPS, COMPUTE, STALLS, DEMAND, PREFETCH)

_LIMIT = 250_000
_PROCESS = 1


class _Span:
    __slots__ = ("args", "begin", "end", "name", "track", "wasted")

    def __init__(self, track: str, name: str, begin: float, end: float, args: dict[str, Any]) -> None:
        self.track, self.name, self.begin, self.end, self.args = track, name, begin, end, args
        self.wasted = False


class Timeline:
    """Spans on tracks and values of counters, in seconds of any one clock.

    Tracks are shown in the order of `TRACKS`, others below. Spans of a track that overlap are shown on lanes of their
    own, because the format has no place for two at a time.

    Memory is bounded: of more than `limit` spans, and of more than `limit` values of counters, the oldest are dropped,
    so that the end of a long run is there. The file says how many were.

    Attributes:
      dropped: spans and values that were dropped.

    Args:
      limit: spans to keep, about 0.5 kB and a line of 120 bytes in the file each.

    Raises:
      InputError: a limit below 1.
    """

    def __init__(self, *, limit: int = _LIMIT) -> None:
        if limit < 1:
            raise InputError(f"limit {limit}: give at least 1 span")
        self._spans: deque[_Span] = deque(maxlen=limit)
        self._values: deque[tuple[str, float, float]] = deque(maxlen=limit)
        self._last_value: dict[str, float] = {}
        self._prefetched: dict[tuple[int, int], _Span] = {}
        self._noted = 0

    @property
    def dropped(self) -> int:
        return self._noted - len(self._spans) - len(self._values)

    def span(self, track: str, name: str, begin: float, end: float, **args: Any) -> None:
        """Note that something took from `begin` to `end`.

        Args:
          track: row of the picture; one of `TRACKS`, or another.
          name: what it was; equal names have equal colours.
          begin, end: seconds.
          **args: shown when the span is chosen; plain JSON. A copy's `layer` and `expert` are what `wasted` finds.

        Raises:
          ValueError: it ends before it begins, or a time is not finite.
        """
        if not -math.inf < begin <= end < math.inf:
            raise ValueError(f"{name!r} on track {track!r} from {begin} to {end} s is no span of time")
        span = _Span(track, name, begin, end, args)
        self._spans.append(span)
        self._noted += 1
        if track == PREFETCH and "expert" in args:
            self._prefetched[args["layer"], args["expert"]] = span

    def counter(self, name: str, time: float, value: float) -> None:
        """Note that `name` has the `value` from `time` on; a value that has not changed takes no place.

        Raises:
          ValueError: `time` or `value` is not finite.
        """
        if not (math.isfinite(time) and math.isfinite(value)):
            raise ValueError(f"counter {name!r} cannot be {value} at {time} s")
        if self._last_value.get(name) != value:
            self._last_value[name] = value
            self._values.append((name, time, value))
            self._noted += 1

    def wasted(self, layer: int, expert: int) -> None:
        """The block of a key has left its slot unused: its last prefetch is shown as wasted."""
        if (span := self._prefetched.pop((layer, expert), None)) is not None:
            span.wasted = True

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write the timeline to a file, whole or not at all.

        Raises:
          InputError: the file exists and `overwrite` is not given, or it cannot be written.
        """
        with new_file(path, overwrite=overwrite) as file:
            about = json.dumps({"dropped_events": self.dropped})
            file.write(f'{{"displayTimeUnit": "ms", "otherData": {about}, "traceEvents": [\n'.encode())
            before = ""
            for event in self._events():
                file.write(f"{before}{json.dumps(event, allow_nan=False)}".encode())
                before = ",\n"
            file.write(b"\n]}\n")

    def _events(self) -> Iterator[dict[str, Any]]:
        """Events of the format: first the names of the tracks, then everything by time."""
        spans = sorted(self._spans, key=lambda span: (span.begin, span.end))
        order = {track: number for number, track in enumerate(TRACKS)}
        used = sorted({span.track for span in spans}, key=lambda track: (order.get(track, len(TRACKS)), track))
        thread: dict[int, int] = {}
        names: list[str] = []
        for track in used:
            of_track = [span for span in spans if span.track == track]
            lanes = _lanes(of_track)
            for span, lane in zip(of_track, lanes, strict=True):
                thread[id(span)] = len(names) + lane + 1
            names += [track, *(f"{track} ({lane})" for lane in range(2, max(lanes) + 2))]
        yield _metadata("process_name", 0, name="ef_jax")
        for number, name in enumerate(names, 1):
            yield _metadata("thread_name", number, name=name)
            yield _metadata("thread_sort_index", number, sort_index=number)
        begins = itertools.chain((span.begin for span in spans), (time for _, time, _ in self._values))
        origin = _ticks(min(begins, default=0))
        timed = [_complete(span, thread[id(span)], origin) for span in spans]
        timed += [
            {"name": name, "ph": "C", "ts": (_ticks(time) - origin) / 1000, "pid": _PROCESS, "args": {name: value}}
            for name, time, value in self._values
        ]
        yield from sorted(timed, key=lambda event: event["ts"])


def _lanes(spans: Iterable[_Span]) -> list[int]:
    """The lane of each span, all ordered by their begin: the first one that is free by then."""
    free_at: list[int] = []
    lanes = []
    for span in spans:
        begin, end = _ticks(span.begin), _ticks(span.end)
        lane = next((lane for lane, free in enumerate(free_at) if free <= begin), len(free_at))
        free_at[lane : lane + 1] = [end]
        lanes.append(lane)
    return lanes


def _complete(span: _Span, thread: int, origin: int) -> dict[str, Any]:
    begin, end = _ticks(span.begin), _ticks(span.end)
    event: dict[str, Any] = {
        "name": span.name,
        "cat": span.track,
        "ph": "X",
        "ts": (begin - origin) / 1000,
        "dur": (end - begin) / 1000,
        "pid": _PROCESS,
        "tid": thread,
    }
    if span.wasted:  # Perfetto colours by name, chrome://tracing by cname
        event |= {"name": f"wasted {span.name}", "cname": "terrible"}
    return event | {"args": span.args} if span.args else event


def _metadata(kind: str, thread: int, **args: Any) -> dict[str, Any]:
    return {"name": kind, "ph": "M", "pid": _PROCESS, "tid": thread, "args": args}


def _ticks(seconds: float) -> int:
    """Nanoseconds, the resolution of the viewers: whole ones add up without overlaps."""
    return round(seconds * 1e9)
