"""The passes of an engine: layer after layer, with experts served from slots as the routers ask for them."""

import time
from collections.abc import Generator, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from ef_jax.lossy import LOSSLESS, LossyOptions
from ef_jax.memory.plan import MemoryPlan
from ef_jax.runtime.dense import DenseWeights
from ef_jax.runtime.look_ahead import LookAhead
from ef_jax.runtime.lookout import Lookout
from ef_jax.runtime.programs import Programs
from ef_jax.runtime.recorder import Listener
from ef_jax.runtime.routing_paths import RoutingPaths
from ef_jax.runtime.rows import Rows
from ef_jax.schedule.step_scheduler import StepScheduler
from ef_jax.spec import ModelSpec
from ef_jax.stats import Stats
from ef_jax.timeline import Timeline

_Of = TypeVar("_Of")


class LayerPasses:
    """What an engine holds, and how one pass of sequences, chunks of prompts or a decode step, goes through its layers.

    Python decides over ids; compiled programs hold the arrays. Where the experts are and how they come there is seen to
    by `_serve` and `_serve_prompt`.

    Args:
      spec, plan, programs, dense, look_ahead, routing_paths: of the model.
      rows: the sequences.
      reaches: argument "reach" of each decoder layer's program.
      stats: counters to add to.
      scheduler: has the experts in slots.
      off_because: why nothing is prefetched, if that was left to be decided.
      lossy: what may change results.
    """

    def __init__(
        self,
        spec: ModelSpec,
        plan: MemoryPlan,
        programs: Programs,
        dense: DenseWeights,
        *,
        rows: Rows,
        reaches: Sequence[Any],
        stats: Stats,
        scheduler: StepScheduler,
        look_ahead: LookAhead | None = None,
        routing_paths: RoutingPaths | None = None,
        off_because: str | None = None,
        lossy: LossyOptions = LOSSLESS,
    ) -> None:
        self.spec, self.plan, self.stats = spec, plan, stats
        self.lookout = Lookout(spec, programs, look_ahead)
        self.routing_paths = routing_paths
        self.recorder: Listener | None = None
        self.timeline: Timeline | None = None
        self._scheduler = scheduler
        self._off_because = off_because
        self._served_at = 0.0
        self._dense, self._rows, self._reaches = dense, rows, reaches
        self._moe_index = {layer: index for index, layer in enumerate(spec.moe_layers)}
        self._prompt_layers, self._step_layers = spec.prompt_layers, spec.step_layers
        self._first_token = spec.decoder_start or 0  # of a decoder with an encoder
        self._fed: tuple[list[int], jax.Array] | None = None  # tokens as the last head left them, and their rows
        self._age_order: list[int] | None = None  # places of a step's sequences, the oldest first; None: as they stand
        self._resting = True
        self._drops, self._lifts = lossy.adaptive_experts is not None, lossy.cache_bias is not None
        self._last = self._no_last()

    def _no_last(self) -> jax.Array:
        """Residual rows `[B, D]` of prompts that end, none yet."""
        return jnp.zeros((self._rows.batch, self.spec.hidden), jnp.dtype(self.spec.dtype), device=self._rows.sharding)

    def _serve(self, deferred, index, carried):  # type: ignore[no-untyped-def]
        """Have every expert that MoE layer `index` of a step chose in a slot; what the next program takes. A layer that
        cannot miss need not be waited for: its routes go to `deferred`."""
        raise NotImplementedError

    def _serve_prompt(self, width, absorb, index, carried):  # type: ignore[no-untyped-def]
        """Have the outputs of every routed row of MoE layer `index` of a chunk of prompts; what the next program takes.
        A trained predictor hears of its routes by `absorb`."""
        raise NotImplementedError

    def _held(self, layer: int) -> tuple[np.ndarray, ...]:
        """Argument "held" of the program that ends in a decoder layer; none for a dense one."""
        raise NotImplementedError

    def _runs(self, width, span):  # type: ignore[no-untyped-def]
        """What runs each layer of a pass, see `Programs.layers`."""
        return self.lookout.running.layers(width, span)

    def _layers(self, width, span, tokens, positions, index, serve):  # type: ignore[no-untyped-def]
        """Every layer of a pass; `serve(layer, carried)` sees to the experts of each MoE layer. What it gives is
        yielded, in a list from which the next layer takes it: nobody else keeps its arrays. Returns what the last layer
        carries."""
        rows, reaches, lookout = self._rows, self._reaches, self.lookout
        layers, finish = self._dense.layers, self._dense.finish
        before, *others = self._step_layers if width == 1 else self._prompt_layers
        run = self._runs(width, span)
        lifts = self._lifts and width == 1
        if self.recorder is not None:
            serve = self.recorder.listen(serve, tokens, positions, rows.numbers(index))
        self._served_at = time.perf_counter()
        carried, rows.caches[before], ahead, places = run[0](
            self._dense.top,
            tokens,
            layers[before],
            rows.caches[before],
            reaches[before],
            (positions, index),
            *lookout.from_layer(before, width),
            *(self._held(before) if lifts else ()),
        )
        lookout.hear(ahead)
        for program, layer in zip(run[1:], others, strict=True):
            if before in self._moe_index:
                place = [serve(self._moe_index[before], carried)]
                yield place
                carried = place.pop()
                self._served_at = time.perf_counter()
            carried, rows.caches[layer], ahead = program(
                finish[before],
                carried,
                layers[layer],
                rows.caches[layer],
                reaches[layer],
                places,
                *lookout.from_layer(layer, width),
                *(self._held(layer) if lifts else ()),
            )
            lookout.hear(ahead)
            before = layer
        if before in self._moe_index:
            place = [serve(self._moe_index[before], carried)]
            yield place
            carried = place.pop()
            self._served_at = time.perf_counter()
        return carried

    def _by_age(self, rows: Sequence[_Of]) -> Sequence[_Of]:
        """What is of each of a step's sequences, that of the oldest first."""
        return rows if self._age_order is None else [rows[place] for place in self._age_order]

    def _note(self, track: str, name: str, began: float) -> None:
        if self.timeline is not None:
            self.timeline.span(track, name, began, time.perf_counter())


def through(steps: Generator[Any, None, _Of]) -> _Of:
    """Run a pass to its end, by itself."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: _Of = end.value
            return result


def routed_rows(ids: Any, *, dropping: bool = False) -> list[list[int]]:
    """The experts of each active sequence of a step, `[B, 1, K]`, without -1 where a run is `dropping` some; waits for
    them."""
    rows = [row for row in np.asarray(ids)[:, 0].tolist() if row[0] >= 0]
    return [[expert for expert in row if expert >= 0] for row in rows] if dropping else rows
