"""What the parts of a layer take in passes of prompts: measured on the devices, before a model is loaded."""

import functools
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.multihost_utils import broadcast_one_to_all

from ef_jax.mesh.exchange import collect, send
from ef_jax.mesh.fleet import servers_of
from ef_jax.mesh.overlap import LayerCosts, LinearCost, choose_split
from ef_jax.mesh.overlap_option import Overlap
from ef_jax.mesh.programs import MeshPrograms
from ef_jax.mesh.side_by_side import local_parts
from ef_jax.nn import reach_of
from ef_jax.placement import Placement
from ef_jax.runtime.steps import SortedRows

_REPEATS = 4


def measured_overlap(programs: MeshPrograms, placement: Placement, *, last_wave: int | None) -> Overlap:
    """Whether two of the widest passes that may have company are faster side by side than one after the other.

    Measured are the exchange there and back, a layer's last wave, with all experts and with those that wait for one,
    the program of a layer, and the same beside a wave. Costs are by a pass's rows on one device; a pass is run whole,
    so none is fixed. `experts` is the last wave, since only that is computed beside an exchange; the others are part of
    `attend`, and so is as much of the exchange as the device was not seen to hide. Copies of blocks are in neither. All
    processes measure together, and decide by what the first has measured.

    Args:
      programs: those that will run.
      placement: of the experts.
      last_wave: experts in it at most; None: all.
    """
    width = max(width for width in programs.chunk_widths if programs.company(width))
    measured = np.array(_Measured(programs, placement, width, last_wave).seconds(), np.float32)
    there, back, every, wave, layer, beside = broadcast_one_to_all(measured).tolist()
    exchange = there + back
    hidden = min(max((layer + wave - beside) / min(exchange, wave), 0.0), 1.0)
    alone = max(layer - exchange, 0.0) + max(every - wave, 0.0) + (1 - hidden) * exchange
    rows = programs.lanes(width) * width
    costs = LayerCosts(
        attend=LinearCost(fixed=0.0, per_row=alone / rows),
        send=LinearCost(fixed=0.0, per_row=hidden * there / rows),
        experts=LinearCost(fixed=0.0, per_row=wave / rows),
        collect=LinearCost(fixed=0.0, per_row=hidden * back / rows),
    )
    split = choose_split(costs, 2 * rows, layers=len(programs.spec.moe_layers), counts=(1, 2))
    return Overlap(
        passes=split.micro_batches, reason=f"{hidden:.0%} of the exchange was hidden", costs=costs, split=split
    )


class _Measured:
    """Programs of a pass with what they take: random rows and dense weights, blocks of zeros, any experts."""

    def __init__(self, programs: MeshPrograms, placement: Placement, width: int, last_wave: int | None) -> None:
        self._programs, self._width = programs, width
        spec, layout, lanes = programs.spec, programs.layout, programs.lanes(width)
        layer, self._span = spec.layers[spec.moe_layers[0]], programs.span(width)
        self._beside = programs.beside(width, self._span, layer.kind, layer.kind)
        self._between = programs.between(width, self._span, layer.kind, layer.kind)
        rows, self._outputs, self._pool, _, finish, carried, leaves, self._cache, _, _ = _zeros(self._beside)[:10]
        finish, leaves = _noise((finish, leaves))
        self._routed, *others = carried
        _, k = self._routed.ids.shape[-2:]
        first = np.random.default_rng(0).integers(spec.experts.count, size=(*self._routed.ids.shape[:2], 1))
        ids = ((first + np.arange(k) * (spec.experts.count // k)) % spec.experts.count).astype(np.int32)
        self._routed = self._routed._replace(x=_noise(self._routed.x), ids=layout.put(ids, layout.rows))
        self._serves = layout.put(servers_of(layout, placement, 0), layout.everywhere)
        reach = layout.put(np.asarray(reach_of(layer)), layout.everywhere)
        positions = np.tile(np.arange(width, dtype=np.int32), (len(ids), 1))
        places = layout.put((positions, np.tile(np.arange(lanes, dtype=np.int32), layout.row_shards)), layout.rows)
        self._before = finish, (self._routed, self._serves, *others[1:]), leaves
        self._after = (reach, self._serves), places, None, None

        held = int(placement.holds[0].sum(axis=0).max())
        sizes, slots = np.zeros(spec.experts.count, np.int32), np.full(spec.experts.count, -1, np.int32)
        sizes[:held] = lanes * width * k // layout.tensor // held
        slots[:held] = np.arange(held) % programs.pool_slots
        self._every, self._last = slots, np.where(np.arange(len(slots)) < (last_wave or held), slots, -1)
        order = np.zeros(rows.order.shape, np.int32)  # waves do not read it
        self._rows = SortedRows(rows.rows, *layout.put((order, np.tile(sizes, layout.count)), layout.each))

    def seconds(self) -> list[float]:
        """There, back, all experts, the last wave, from one layer into the next, and the same beside a wave."""
        layout, transport = self._programs.layout, self._programs.transport
        on_rows, each, everywhere = layout.rows.spec, layout.each.spec, layout.everywhere.spec

        def mapped(function: Callable[..., Any], inputs: Any, out: Any) -> Callable[..., Any]:
            function = functools.partial(function, transport=transport)
            return jax.jit(jax.shard_map(function, mesh=layout.mesh, in_specs=inputs, out_specs=out, check_vma=False))

        there = mapped(send, (on_rows, everywhere), each)
        back = mapped(collect, (each, on_rows, everywhere), on_rows)
        return _seconds(
            lambda: there(self._routed, self._serves),
            lambda: back(self._outputs, self._routed, self._serves),
            lambda: self._wave(self._every),
            lambda: self._wave(self._last),
            self._layer,
            self._layer_beside,
        )

    def _wave(self, slot_row: np.ndarray) -> Any:
        """On all of this process's devices."""
        layout = self._programs.layout
        devices = [layout.devices[number] for number in layout.local]
        local = [
            jax.tree.map(lambda array, at=at: local_parts(array, [at])[0], (self._rows, self._pool)) for at in devices
        ]
        done = []
        for number, part, (rows, pool) in zip(layout.local, local_parts(self._outputs, devices), local, strict=True):
            done.append(self._programs.wave_of(self._width, number)(rows, part, pool, slot_row))
        self._outputs = jax.make_array_from_single_device_arrays(self._outputs.shape, self._outputs.sharding, done)
        return self._outputs

    def _layer(self) -> Any:
        result, self._cache, _ = self._between(*self._before, self._cache, *self._after)
        return result

    def _layer_beside(self) -> Any:
        slot_rows = np.tile(self._last, (self._programs.layout.count, 1))
        wave = self._rows, self._outputs, self._pool, slot_rows
        self._outputs, result, self._cache, _ = self._beside(*wave, *self._before, self._cache, *self._after)
        return result, self._outputs


def _zeros(program: Any) -> Any:
    """Arguments of a program."""

    def array(info: Any, sharding: Any) -> Any:
        if isinstance(sharding, jax.sharding.Sharding):
            return jnp.zeros(info.shape, info.dtype, device=sharding)
        return np.zeros(info.shape, info.dtype)  # it is not read

    return jax.tree.map(array, program.args_info[0], program.input_shardings[0])


def _noise(tree: Any) -> Any:
    """Random numbers in place of floats, so that routers choose any experts."""
    random = np.random.default_rng(0)

    def array(zeros: Any) -> Any:
        if not jnp.issubdtype(zeros.dtype, jnp.floating):
            return zeros
        numbers = (0.02 * random.standard_normal(zeros.shape, np.float32)).astype(zeros.dtype)
        return jax.make_array_from_callback(zeros.shape, zeros.sharding, numbers.__getitem__)

    return jax.tree.map(array, tree)


def _seconds(*runs: Callable[[], Any]) -> list[float]:
    """The best of a few of each, by turns, after one that may compile."""
    best = [math.inf] * len(runs)
    for run in runs:
        jax.block_until_ready(run())
    for _ in range(_REPEATS):
        for index, run in enumerate(runs):
            began = time.perf_counter()
            jax.block_until_ready(run())
            best[index] = min(best[index], time.perf_counter() - began)
    return best
