"""What the parts of a layer take in a pass of prompts: measured on the devices before a model is loaded, on zeros."""

import functools
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.multihost_utils import broadcast_one_to_all
from jaxtyping import Int32

from ef_jax.mesh.exchange import collect, send
from ef_jax.mesh.fleet import servers_of
from ef_jax.mesh.overlap import LayerCosts, LinearCost, choose_split
from ef_jax.mesh.overlap_option import Overlap
from ef_jax.mesh.programs import MeshPrograms
from ef_jax.nn import reach_of
from ef_jax.placement import Placement
from ef_jax.runtime.steps import Routed, SortedRows

_REPEATS = 3


class WithoutExchange(MeshPrograms):
    """The programs of a mesh on which every device takes its own rows for those of all: the same compute."""

    def _send(self, routed: Routed, serves: jax.Array) -> Routed:
        return jax.tree.map(lambda array: jnp.concatenate([array] * self.layout.expert), routed)

    def _collect(self, outputs: jax.Array, routed: Routed, serves: jax.Array) -> jax.Array:
        return outputs[: routed.ids.size]

    @property
    def _place(self) -> Any:
        return super()._place, "without exchange"


def measured_overlap(
    programs: MeshPrograms, computing: WithoutExchange, placement: Placement, *, last_wave: int | None
) -> Overlap:
    """Whether two of the widest passes that may have company are faster side by side than one after the other.

    The costs are by a pass's rows on one device, and a pass is run whole, so none is fixed. Only a layer's last wave
    can be computed beside an exchange, so `experts` is that wave, and the others are part of `attend`; copies of blocks
    are in neither. All processes measure together, and decide by what the first has measured.

    Args:
      programs: those that will run.
      computing: the same without an exchange.
      placement: of the experts.
      last_wave: experts in it; None: all.
    """
    width = max(width for width in programs.chunk_widths if programs.company(width))
    rows = programs.lanes(width) * width
    held = int(placement.holds[0].sum(axis=0).max())
    last = held if last_wave is None else min(last_wave, held)
    layer = _layer_seconds(computing, width)
    there, back = _exchange_seconds(programs, placement, width)
    experts = _wave_seconds(programs, width, held, held)
    hidden = _wave_seconds(programs, width, held, last) if last < held else experts
    seconds = np.array([layer + experts - min(hidden, experts), there, min(hidden, experts), back], np.float32)
    attend, there, hidden, back = (max(float(one), 0.0) / rows for one in broadcast_one_to_all(seconds))
    by_row = functools.partial(LinearCost, fixed=0.0)
    costs = LayerCosts(
        attend=by_row(per_row=attend),
        send=by_row(per_row=there),
        experts=by_row(per_row=hidden),
        collect=by_row(per_row=back),
    )
    split = choose_split(costs, 2 * rows, layers=len(programs.spec.moe_layers), counts=(1, 2))
    return Overlap(passes=split.micro_batches, reason="predicted from what was measured", costs=costs, split=split)


def _layer_seconds(programs: WithoutExchange, width: int) -> float:
    """From one layer's experts to the next one's, but for the exchange: a prompt's first chunk."""
    spec, layout, lanes = programs.spec, programs.layout, programs.lanes(width)
    layer = spec.layers[spec.moe_layers[0]]
    between = programs.between(width, programs.span(width), layer.kind, layer.kind)
    finish, carried, leaves, cache, (_, serves), *_ = _zeros(between)
    reach = layout.put(np.asarray(reach_of(layer)), layout.everywhere)
    positions = np.tile(np.arange(width, dtype=np.int32), (layout.row_shards * lanes, 1))
    places = layout.put((positions, np.tile(np.arange(lanes, dtype=np.int32), layout.row_shards)), layout.rows)

    def run() -> Any:
        nonlocal cache
        entered, cache, _ = between(finish, carried, leaves, cache, (reach, serves), places, None, None)
        return entered

    return _seconds(run)


def _exchange_seconds(programs: MeshPrograms, placement: Placement, width: int) -> tuple[float, float]:
    """There and back, of tokens whose experts are anywhere."""
    spec, layout, lanes = programs.spec, programs.layout, programs.lanes(width)
    k, mesh, rows = spec.experts.top_k, layout.mesh, layout.row_shards * lanes
    first = np.random.default_rng(0).integers(spec.experts.count, size=(rows, width, 1))
    ids = ((first + np.arange(k) * (spec.experts.count // k)) % spec.experts.count).astype(np.int32)
    dtype, weight = jnp.dtype(spec.dtype), jnp.dtype(spec.dtype if spec.router.casts_back else np.float32)
    h = jnp.zeros((rows, width, spec.hidden), dtype, device=layout.rows)
    weights = jnp.zeros(ids.shape, weight, device=layout.rows)
    routed = Routed(h, h, layout.put(ids, layout.rows), weights)
    serves = layout.put(servers_of(layout, placement, 0), layout.everywhere)
    shape = (layout.count * layout.expert * lanes * width * k, spec.hidden)
    outputs = jnp.zeros(shape, dtype, device=layout.each)

    def mapped(function: Callable[..., Any], inputs: Any, out: Any) -> Callable[..., Any]:
        function = functools.partial(function, transport=programs.transport)
        specs = tuple(sharding.spec for sharding in inputs)
        return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=out.spec, check_vma=False))

    there = mapped(send, (layout.rows, layout.everywhere), layout.each)
    back = mapped(collect, (layout.each, layout.rows, layout.everywhere), layout.rows)
    return _seconds(lambda: there(routed, serves)), _seconds(lambda: back(outputs, routed, serves))


def _wave_seconds(programs: MeshPrograms, width: int, held: int, computed: int) -> float:
    """On all of this process's devices, rows of `held` experts each, of which the wave computes some."""
    layout, spec = programs.layout, programs.spec
    rows = programs.lanes(width) * width * spec.experts.top_k // layout.tensor
    sizes = _of_first(spec.experts.count, held, np.full(held, rows // held))
    slot_row = _of_first(spec.experts.count, computed, np.arange(computed) % programs.pool_slots, rest=-1)
    waves = [programs.wave_of(width, number) for number in layout.local]
    given = []
    for wave, number in zip(waves, layout.local, strict=True):
        held_rows, outputs, pool, _ = _zeros(wave)
        of_device = jax.device_put(sizes, layout.devices[number])
        given.append([SortedRows(held_rows.rows, held_rows.order, of_device), outputs, pool])

    def run() -> Any:
        for wave, arguments in zip(waves, given, strict=True):
            arguments[1] = wave(*arguments, slot_row)
        return [arguments[1] for arguments in given]

    return _seconds(run)


def _of_first(experts: int, count: int, values: np.ndarray, rest: int = 0) -> Int32[np.ndarray, "E"]:
    row = np.full(experts, rest, np.int32)
    row[:count] = values
    return row


def _zeros(program: Any) -> Any:
    """Arguments of a program."""

    def array(info: Any, sharding: Any) -> Any:
        if isinstance(sharding, jax.sharding.Sharding):
            return jnp.zeros(info.shape, info.dtype, device=sharding)
        return np.zeros(info.shape, info.dtype)  # it is not read

    return jax.tree.map(array, program.args_info[0], program.input_shardings[0])


def _seconds(run: Callable[[], Any]) -> float:
    """The best of a few runs, after one that may compile."""
    jax.block_until_ready(run())
    best = math.inf
    for _ in range(_REPEATS):
        began = time.perf_counter()
        jax.block_until_ready(run())
        best = min(best, time.perf_counter() - began)
    return best
