"""Part "replayed" of `bench.throughput`: requests of mixed length on a virtual clock, with forced tokens and routes.

Requests are sequences of the trace after the first `--fit`, as long as they are, a prompt of 8 tokens to a third of
each; all arrive at once, in an order drawn with a seed. Every arm goes through the batch engine, residency, policy,
predictor and scheduler of the library (`ef_jax.replay.served`), on a roofline of an H100 (3.35 TB/s, of which 80 % are
reached; 500 of 989 TFLOP/s; 50 us a layer for dispatch) for a named model's shape (`bench/_shapes.py`) and one of two
links: "balanced" carries K blocks of every layer while a step of one sequence computes it, as in `bench.horizon`, part
"stall"; "pcie" 50 GB/s and 10 us a call. Tokens a second count all that is generated, over all the time.

on demand, one by one: no cache; a request after another. Prompts stream through the staging ring, in every arm but one.
on demand, batched: no cache; B requests together, the next B when the last of them has ended.
lru, batched: the same with a cache for 25 % of the experts, and nothing ahead of need.
ours: R rows of caches of which B take a step, continuous batching, groups by predicted routes (`regroup`), `next_use`
  with predicted routes, automatic prefetching, staged prompts.
no ...: ours without continuous batching (R requests together, the next R when all have ended); without the cache, so
  without prefetches; without prefetches; without routing paths in cache and prefetch (history predicts), groups as
  before; without groups; without staged prompts (a chunk goes through the cache like a step).
narrow: ours with B rows, so without groups. wide: ours with steps of R. on demand, wide: as batched, R together.
knowing: ours with routing paths that are always right. all resident: no copies; nothing can be faster.

On routes of DeepSeek-V2-Lite the target of 5 times on demand, batched, is out of reach at equal steps: 8 wide over the
balanced link, an engine with all experts resident is 4.1 times as fast, ours 2.3 times, with true paths 2.9 times.

`token scheduler` is the ratio with groups to without, in ours, with `lru` and no prefetching, and on demand.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from bench import _report
from bench._shapes import SHAPES, Shape
from bench.token_scheduler import with_paths
from ef_jax.memory.policies import Policy
from ef_jax.predict import History, Predictor
from ef_jax.predict.paths import Paths
from ef_jax.replay.roofline import Roofline
from ef_jax.replay.served import Served
from ef_jax.replay.simulator import Replay
from ef_jax.replay.trace import RoutingTrace
from ef_jax.sampling_options import SamplingOptions
from ef_jax.schedule.link_model import LinkModel
from ef_jax.schedule.token_scheduler import regroup
from ef_jax.serving.batch_engine import BatchEngine
from ef_jax.serving.output import Output
from ef_jax.serving.request import Request

TARGETS = {"ours_of_on_demand_batched": 5.0, "token_scheduler": 1.1}
LINKS = ("balanced", "pcie")
RESIDENT = 0.25
_LEAST_PROMPT, _PROMPT_SHARE = 8, 3
_CHUNK = 256
_POSITIONS = 256  # of the cache, for the layer time that defines the balanced link
_OURS: dict[str, Any] = {"policy": "next_use", "predictor": "paths", "prefetch": "auto", "groups": True}
_ON_DEMAND: dict[str, Any] = {"policy": "none"}


class Uncached(Policy):
    """Lets nothing in once the slots are taken."""

    def victims(self, layer: int, missing: Any, needed: Any, spare: Any) -> list[None]:
        return [None] * len(missing)


def h100(shape: Shape) -> Roofline:
    """Compute times of a model on an H100."""
    return Roofline(
        flops=500e12,
        bandwidth=0.8 * 3.35e12,
        dispatch=50e-6,
        dense_bytes=shape.layer_bytes,
        block_bytes=shape.block_bytes,
        cache_bytes=2 * shape.cache,
        top_k=shape.top_k,
    )


def run(
    trace: RoutingTrace,
    *,
    fit: int | None,
    paths: Path | None,
    shape: str,
    requests: int,
    batch: int,
    rows: int,
    longest: int,
    links: tuple[str, ...] = LINKS,
) -> dict[str, Any]:
    """All arms over each link."""
    counted, bins = with_paths(trace, fit, paths)
    results = {link: _Arms(counted, bins, SHAPES[shape], link, requests, batch, rows, longest).run() for link in links}
    setting = {"shape": shape, "requests": requests, "batch": batch, "rows": rows, "resident": RESIDENT}
    return {**setting, "paths": "token id" if paths is None else "file", "targets": TARGETS, **results}


class _Arms:
    """Serves the same requests in different ways over one link."""

    def __init__(
        self,
        trace: RoutingTrace,
        bins: np.ndarray,
        shape: Shape,
        link: str,
        requests: int,
        batch: int,
        rows: int,
        longest: int,
    ) -> None:
        self._trace, self._bins, self._shape = trace, bins, shape
        self._costs, self._name = h100(shape), link
        self._batch, self._rows = batch, rows
        self._requests = _requests(trace, requests, longest)
        alone = self._costs.layer_seconds(tokens=1, positions=_POSITIONS, experts=np.array([trace.top_k]))
        balanced = LinkModel(bandwidth=trace.top_k * shape.block_bytes / float(alone[0]))
        self._link = balanced if link == "balanced" else LinkModel(bandwidth=50e9, latency=10e-6)

    def run(self) -> dict[str, Any]:
        """Every arm; prints a table."""
        batch, rows = self._batch, self._rows
        arms: dict[str, Callable[[], dict[str, Any]]] = {
            "on demand, one by one": lambda: self._serve(1, 1, **_ON_DEMAND),
            "on demand, batched": lambda: self._serve(batch, batch, static=True, **_ON_DEMAND),
            "lru, batched": lambda: self._serve(batch, batch, static=True, policy="lru"),
            "ours": lambda: self._serve(rows, batch, **_OURS),
            "no continuous batching": lambda: self._serve(rows, batch, static=True, **_OURS),
            "no cache": lambda: self._serve(rows, batch, groups=True, **_ON_DEMAND),
            "no prefetch": lambda: self._serve(rows, batch, **{**_OURS, "prefetch": "off"}),
            "no routing path": lambda: self._serve(rows, batch, **{**_OURS, "predictor": "history"}),
            "no token scheduler": lambda: self._serve(rows, batch, **{**_OURS, "groups": False}),
            "no staging": lambda: self._serve(rows, batch, staging=False, **_OURS),
            "narrow": lambda: self._serve(batch, batch, **_OURS),
            "wide": lambda: self._serve(rows, rows, **_OURS),
            "on demand, wide": lambda: self._serve(rows, rows, static=True, **_ON_DEMAND),
            "knowing": lambda: self._serve(rows, batch, knowing=True, **_OURS),
            "all resident": lambda: self._serve(rows, batch, policy="lru", resident=1.0),
            "lru, groups": lambda: self._serve(rows, batch, policy="lru", groups=True),
            "lru, no groups": lambda: self._serve(rows, batch, policy="lru"),
            "on demand, no groups": lambda: self._serve(rows, batch, **_ON_DEMAND),
        }
        found = {}
        for name, arm in arms.items():
            found[name] = arm()
        speed = {name: each["tokens_per_second"] for name, each in found.items()}
        result = {
            "bandwidth": _report.rounded(self._link.bandwidth),
            "prompt_tokens": sum(prompt for _, prompt, _ in self._requests),
            "generated_tokens": sum(count for _, _, count in self._requests),
            "ours_of": {
                name: _report.rounded(speed["ours"] / speed[name]) for name in [*list(arms)[:3], "all resident"]
            },
            "token_scheduler": {
                "ours": _report.rounded(speed["ours"] / speed["no token scheduler"]),
                "lru": _report.rounded(speed["lru, groups"] / speed["lru, no groups"]),
                "on demand": _report.rounded(speed["no cache"] / speed["on demand, no groups"]),
            },
            "arms": found,
        }
        self._show(result)
        return result

    def _serve(
        self,
        rows: int,
        batch: int,
        *,
        policy: str,
        predictor: str = "none",
        prefetch: str = "off",
        groups: bool = False,
        static: bool = False,
        staging: bool = True,
        knowing: bool = False,
        resident: float = RESIDENT,
    ) -> dict[str, Any]:
        trace, shape = self._trace, self._shape
        size = {"layers": trace.layers, "experts": trace.num_experts}
        slots = 1 if policy == "none" else round(resident * trace.layers * trace.num_experts)
        replay = Replay(
            **size,
            slots=slots,
            staging_slots=trace.num_experts,
            policy=Uncached(**size, cache_slots=slots) if policy == "none" else policy,
            block_bytes=shape.block_bytes,
            link=self._link,
            predictor=_predictor(predictor, trace),
            prefetch=prefetch,
        )
        paths = _true_bins(trace) if knowing else self._bins
        stepper = Served(trace, replay, self._costs, rows=rows, batch=batch, chunk=_CHUNK, paths=paths, staging=staging)
        engine = BatchEngine(stepper, regroup=regroup if groups else None, clock=lambda: replay.now)
        requests = [_request(trace, *each) for each in self._requests]
        together = rows if static else len(requests)
        for first in range(0, len(requests), together):
            engine.submit(requests[first : first + together])
            while not engine.idle:
                engine.turn()
        return _figures(replay, requests, shape.block_bytes)

    def _show(self, result: dict[str, Any]) -> None:
        columns = ("tokens_per_second", "steps", "width", "hit", "blocks", "wasted", "stall")
        head = ["", "tokens/s", "of on demand, batched", *columns[1:]]
        base = result["arms"]["on demand, batched"]["tokens_per_second"]
        rows = [
            (name, each["tokens_per_second"], each["tokens_per_second"] / base, *(each[key] for key in columns[1:]))
            for name, each in result["arms"].items()
        ]
        print(
            f"{self._name} link, {result['bandwidth'] / 1e9:.4g} GB/s; steps of {self._batch}, {self._rows} rows; "
            "blocks a token and layer; shares of 1"
        )
        print(_report.table(head, rows))
        print(f"token scheduler: {result['token_scheduler']}\n")


def _requests(trace: RoutingTrace, count: int, longest: int) -> list[tuple[int, int, int]]:
    """Sequence, tokens of its prompt, and tokens to generate, of each request."""
    random, lengths = np.random.default_rng(0), np.minimum(np.diff(trace.offsets), longest).tolist()
    requests = []
    for number in range(count):
        sequence = number % trace.sequences
        length = lengths[sequence]
        prompt = int(random.integers(min(_LEAST_PROMPT, length - 1), max(length // _PROMPT_SHARE, _LEAST_PROMPT) + 1))
        requests.append((sequence, min(prompt, length - 1), length - min(prompt, length - 1)))
    return [requests[place] for place in random.permutation(count)]


def _request(trace: RoutingTrace, sequence: int, prompt: int, count: int) -> Request:
    first = int(trace.offsets[sequence])
    options = SamplingOptions(max_new_tokens=count)
    output = Output(None, options, eos=(), limit=count)
    return Request(trace.tokens[first : first + prompt], options, output, draw=sequence)


def _predictor(name: str, trace: RoutingTrace) -> Predictor | None:
    shape = {"layers": trace.layers, "experts": trace.num_experts}
    if name == "none":
        return None
    return History(**shape) if name == "history" else Paths(**shape, top_k=trace.top_k)


def _true_bins(trace: RoutingTrace) -> np.ndarray:
    bins = np.zeros((trace.count, trace.layers, trace.num_experts), np.uint8)
    np.put_along_axis(bins, trace.experts.astype(np.intp), 255, axis=2)
    return bins


def _figures(replay: Replay, requests: list[Request], block_bytes: int) -> dict[str, Any]:
    """What came of serving some requests."""
    decode, prefill = replay.stats.decode, replay.stats.prefill
    asked = sum(decode.hits) + sum(decode.late_hits) + sum(decode.misses)
    moved = decode.bytes_demand + decode.bytes_prefetch
    values = {
        "tokens_per_second": sum(len(one.output.tokens) for one in requests) / replay.now,
        "seconds": replay.now,
        "prefill_seconds": prefill.seconds,
        "steps": decode.steps,
        "width": decode.tokens / decode.steps,
        "hit": sum(decode.hits) / asked,
        "blocks": moved / block_bytes / decode.tokens / len(decode.hits),
        "prefill_blocks": prefill.bytes_demand / block_bytes,
        "wasted": decode.bytes_wasted / max(moved, 1),
        "stall": decode.stall_seconds / decode.seconds,
    }
    return {name: _report.rounded(value) for name, value in values.items()}
