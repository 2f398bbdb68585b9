"""Part "host" of `bench.overhead`: what the host does for a layer and a token of decoding."""

import collections
import contextlib
import time
from collections.abc import Iterator
from typing import Any, cast

import jax
import numpy as np

from bench import _run
from bench._report import spread
from bench._stand_ins import Clocks, NullPrograms, Playback, null_inserts, timed
from ef_jax.memory.residency import Residency
from ef_jax.runtime.engine import Engine
from ef_jax.runtime.programs import Programs
from ef_jax.sampling_options import SamplingOptions

COMPONENTS = ("read_back", "admit", "link_start", "link_finish", "dispatch")


class HostWork:
    """Times decode steps of one engine after one prompt, with the real programs and without any device work.

    Every run begins from an empty cache and a policy that has seen nothing (or from the filled cache, where all experts
    are resident) and the prompt, so all decide the same about residency; those without device work play the first run's
    routes back.

    Args:
      engine: of a batch of one.
      prompt: int32 `[T]`.
      steps: tokens to decode after the prompt's own.
    """

    def __init__(self, engine: Engine, prompt: np.ndarray, steps: int) -> None:
        self._engine, self._prompt, self._steps = engine, prompt, steps
        self._layers = len(engine.spec.layers)
        self._sampling = SamplingOptions(temperature=0.8, top_p=0.9)
        self._programs, self._inserts = engine.programs, engine.link.pool._insert
        self._null_programs = NullPrograms.of(self._programs)
        self._null_inserts = null_inserts(engine.link)
        engine.prepare(len(prompt), len(prompt) + steps)
        self._null_programs.compile_for(len(prompt), len(prompt) + steps)
        self._begin()
        recorder = Playback(self._programs)
        with self._replaced(recorder, self._inserts):
            self._walk()
        self._routes = [np.asarray(ids) for ids in recorder.taken]
        self._null(None)  # compiles what is not yet
        self._samples: dict[str, list[float]] = collections.defaultdict(list)

    def repeat(self) -> None:
        """Take one sample of everything: real, null, null with clocks, real with clocks."""
        self._begin()
        self._note("real", self._walk())
        self._note("host", self._null(None))
        clocks: Clocks = collections.defaultdict(float)
        total = self._null(clocks)
        for name in COMPONENTS:
            self._note(name, clocks[name])
        self._note("other", total - sum(clocks[name] for name in COMPONENTS))
        clocks = collections.defaultdict(float)
        self._begin()
        with self._replaced(Playback(self._programs, clocks=clocks), self._inserts):
            self._note("real_unblocked", self._walk() - clocks["read_back"])

    def result(self) -> dict[str, Any]:
        """Microseconds a layer and token by figure, as `spread` gives them, and what was cached."""
        stats = self._engine.stats
        return {
            "slots": stats.slots,
            "experts": stats.experts,
            "misses_per_token": sum(stats.decode.misses) / stats.decode.steps,
            "us_per_layer_token": {name: spread(samples) for name, samples in self._samples.items()},
        }

    def _note(self, name: str, seconds: float) -> None:
        self._samples[name].append(seconds / self._layers / self._steps * 1e6)

    def _begin(self) -> None:
        engine = self._engine
        if not engine.residency.all_resident:
            engine.scheduler.residency = _emptied(engine.residency)
        _run.start(engine, [self._prompt], self._sampling, len(self._prompt) + self._steps)
        jax.block_until_ready(engine.link.pool.array)

    def _walk(self) -> float:
        began = time.perf_counter()
        for _ in range(self._steps):
            self._engine.step([0])
        return time.perf_counter() - began

    def _null(self, clocks: Clocks | None) -> float:
        """Seconds of the steps with no device work."""
        engine = self._engine
        self._begin()
        # Fresh arrays, for an array that was read once keeps its copy on the host.
        routes = jax.block_until_ready(jax.device_put(self._routes, engine._rows.sharding))
        programs = Playback(self._null_programs, routes=iter(routes), clocks=clocks)
        with self._replaced(programs, self._null_inserts), _clocked(engine, clocks):
            return self._walk()

    @contextlib.contextmanager
    def _replaced(self, programs: Playback, inserts: list[Any]) -> Iterator[None]:
        engine = self._engine
        engine.lookout.programs, engine.link.pool._insert = cast(Programs, programs), inserts
        try:
            yield
        finally:
            engine.lookout.programs, engine.link.pool._insert = self._programs, self._inserts


def _emptied(residency: Residency) -> Residency:
    """A table of the same slots with nothing in them, under a policy of the same kind that has seen nothing."""
    shape = {"layers": residency.layers, "experts": residency.experts, "cache_slots": residency.cache_slots}
    policy = type(residency.policy)(**shape)
    return Residency(**shape, staging_slots=residency.staging_slots, policy=policy)


@contextlib.contextmanager
def _clocked(engine: Engine, clocks: Clocks | None) -> Iterator[None]:
    """Time `residency.admit`, `link.start` and `link.finish` of `engine`."""
    if clocks is None:
        yield
        return
    patched = [(engine.residency, "admit", "admit"), (engine.link, "start", "link_start")]
    patched.append((engine.link, "finish", "link_finish"))
    for owner, method, name in patched:
        setattr(owner, method, timed(getattr(owner, method), clocks, name))
    try:
        yield
    finally:
        for owner, method, _ in patched:
            delattr(owner, method)
