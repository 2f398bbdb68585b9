"""The engine's programs on a mesh: each device runs those of one device on its own sequences and its own slots.

Every function of `Programs` is wrapped in one `jax.shard_map`. Two things are different inside: a layer's routed tokens
are exchanged, sent where their experts are right behind the router and collected before the next layer begins; and what
the host reads of a step is gathered from all devices, so that every process sees all routes and tokens.

Devices may need different numbers of waves for a chunk of prompts. So waves (`wave_of`) are programs of single devices:
nothing in them waits for another device.

Key/value caches are each device's own: axis 0 of the global arrays counts devices times rows. Arguments that the host
gives as numpy arrays are whole on every device, which takes its part inside the program.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from ef_jax.memory.slot_pool import pool_shapes
from ef_jax.mesh.exchange import Transport, collect, send
from ef_jax.mesh.layout import AXES, ROW_AXES, MeshLayout, no_mesh_set
from ef_jax.mesh.overlap_option import ALONE, Overlap
from ef_jax.mesh.routes import alone
from ef_jax.mesh.tensor import DenseShares
from ef_jax.nn import cache_shapes, unsorted, weighted_sum
from ef_jax.runtime import steps
from ef_jax.runtime.executables import Compiled
from ef_jax.runtime.look_ahead import look_shapes, report_ids
from ef_jax.runtime.programs import LOGIT_ROWS, Programs
from ef_jax.spec import LayerSpec


class _Given(jax.ShapeDtypeStruct):
    """A host array of one device's shape. What is given has one for every `part`: for each part of the sequences, side
    by side along axis 0, for each device, along an axis of its own, or one that is the same for all."""

    def __init__(self, shape: tuple[int, ...], dtype: Any, part: Literal["rows", "each", "all"]) -> None:
        super().__init__(shape, dtype)
        self.part = part


class MeshPrograms(Programs):
    """Executables of an engine on a mesh. `shares` is the model as a device has it, and sizes are one device's: `batch`
    sequences, `pool_slots` slots. `overlap` says whether passes of prompts run side by side."""

    def __init__(
        self,
        shares: DenseShares,
        *,
        layout: MeshLayout,
        transport: Transport,
        overlap: Overlap = ALONE,
        **sizes: Any,
    ) -> None:
        super().__init__(shares.spec, sharding=layout.rows, **sizes)
        self.layout, self.transport, self._shares = layout, transport, shares
        self.overlap = overlap

    def company(self, width: int) -> bool:
        """Whether a pass over `width` tokens of each prompt may leave prompts of a device for another."""
        return width > 1 and self.rows > self.lanes(width)

    def passes(self, width: int) -> int:
        """Passes of that width that run side by side."""
        return self.overlap.passes if self.company(width) else 1

    @property
    def workspace_bytes(self) -> int:
        """See `Programs`; where passes run side by side, each has been given its outputs."""
        workspace = super().workspace_bytes
        if any(self.passes(width) > 1 for width in self.chunk_widths):
            workspace += max(
                analysis.output_size_in_bytes - analysis.alias_size_in_bytes for analysis in self._analyses()
            )
        return int(workspace)

    def besides(self, width: int, span: int) -> list[Compiled | None]:
        """Of each `between` of a pass, the program that is `beside` another pass's last wave; None where no rows are
        exchanged."""
        pairs = itertools.pairwise(self.pass_kinds(width))
        return [self.beside(width, span, *pair) if _exchanges(*pair) else None for pair in pairs]

    def beside(self, width: int, span: int, before: LayerSpec, after: LayerSpec) -> Compiled:
        """`(sorted rows, outputs, pool, slot_rows [N, E], *arguments of between) -> outputs, *results of between`: one
        pass goes from one layer into the next, and the last wave of another runs while its rows are exchanged. Outputs
        and the cache are donated."""

        def beside(rows, outputs, pool, slot_row, finish, carried, leaves, cache, reach, places, look, state):  # type: ignore[no-untyped-def]
            compute = functools.partial(steps.run_wave, self.spec, self.kernels, rows)
            parts = _halves(slot_row, rows.sizes) if before.ffn == after.ffn else [slot_row]
            wave = _Wave(lambda out, part: compute(out, pool, part), outputs, parts)
            x = self._leave(width, before, finish, carried, wave.beside)
            entered = self._enter(width, span, after, leaves, x, cache, reach, places, look, state, None, wave.beside)
            return wave.finished(), *entered

        def inputs() -> tuple[Any, ...]:
            slot_row = _Given((self.spec.experts.count,), np.int32, "each")
            lanes = self.lanes(width)
            places = (self._device_int(lanes, width), self._device_int(lanes))
            layer = (self._leaves(after), *self._layer_inputs(after), places, None, None)
            return (
                *self._sorted(width),
                self._pool(),
                slot_row,
                self._finish(before),
                self._carried(width, before),
                *layer,
            )

        return self._program(("beside", width, span, before, after), beside, inputs, donate=(1, 7))

    def wave_of(self, width: int, number: int) -> Compiled:
        """`wave`, on one of this process's devices."""
        sharding = jax.sharding.SingleDeviceSharding(self.layout.devices[number])

        def wave(rows, outputs, pool, slot_row):  # type: ignore[no-untyped-def]
            return steps.run_wave(self.spec, self.kernels, rows, outputs, pool, slot_row)

        def inputs() -> tuple[Any, ...]:
            rows, out = self._sorted(width)
            arrays = jax.tree.map(
                lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), (rows, out, self._pool())
            )
            return (*arrays, jax.ShapeDtypeStruct((self.spec.experts.count,), np.int32))

        return self._program(("wave", width, number), wave, inputs, donate=(1,))

    def join(self) -> Compiled:
        """As on one device; the row is one of all devices'."""

        def join(seen, state, row, mask):  # type: ignore[no-untyped-def]
            own = row - jax.lax.axis_index(ROW_AXES) * self.rows
            own = jnp.where(own < 0, self.rows, own)  # negative ones would count from the end
            return seen.at[own].set(mask, mode="drop"), state

        def inputs() -> tuple[Any, ...]:
            mask = _Given((self.spec.vocab,), np.bool_, "all")
            return (self._seen(), None, _Given((), np.int32, "all"), mask)

        return self._program(("join",), join, inputs, donate=(0,))

    def logits(self) -> Compiled:
        """As on one device, the same on all."""

        def logits(rows, top):  # type: ignore[no-untyped-def]
            return self._top(top).logits(rows)

        def inputs() -> tuple[Any, ...]:
            rows = _Given((LOGIT_ROWS, self.spec.hidden), jnp.dtype(self.spec.dtype), "all")
            return (rows, self._top_leaves())

        return self._program(("logits",), logits, inputs)

    def whole(self, array: jax.Array) -> np.ndarray:
        """An array that sequences divide, gathered from all devices; a program that all processes have to run."""
        sharding = self.layout.everywhere
        shape = jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=self.layout.rows)
        key = ("whole", array.shape, array.dtype)
        if key not in self._compiled:
            gather = jax.jit(lambda x: x, out_shardings=sharding)
            self._compiled[key] = gather.lower(shape).compile()
        return np.asarray(self._compiled[key](array))

    def gather(self, arrays: list[jax.Array]) -> list[jax.Array]:
        """Arrays of one shape, however devices have them, gathered on all devices together; as `whole`, but that
        nothing is waited for."""
        return self._gather_all(arrays)

    @functools.cached_property
    def _gather_all(self) -> Callable[[list[jax.Array]], list[jax.Array]]:
        everywhere = self.layout.everywhere
        return jax.jit(lambda arrays: list(jax.lax.with_sharding_constraint(jnp.stack(arrays), everywhere)))

    # What the programs are made of.

    def _pass(self, width: int, span: int) -> list[Callable[[], Compiled]]:
        programs = super()._pass(width, span)
        if width == 1:
            return programs
        waves = [functools.partial(self.wave_of, width, number) for number in self.layout.local]
        if self.passes(width) > 1:
            pairs = dict.fromkeys(itertools.pairwise(self.pass_kinds(width)))
            waves += [functools.partial(self.beside, width, span, *pair) for pair in pairs if _exchanges(*pair)]
        return [program for program in programs if getattr(program, "func", None) != self.wave] + waves

    def _reads_pool(self, key: tuple[Any, ...]) -> bool:
        return key[0] == "beside" or super()._reads_pool(key)

    def _of_misses(self) -> list[Callable[[], Compiled]]:
        return []

    def _enter(self, width, span, kind, leaves, x, cache, reach, places, look, state, held, run=alone):  # type: ignore[no-untyped-def]
        reach, serves = reach
        carried, cache, ahead = super()._enter(width, span, kind, leaves, x, cache, reach, places, look, state, held)
        if kind.ffn == "dense":
            return carried, cache, ahead
        routed = carried if width == 1 else carried[0]
        with jax.named_scope("send"):
            arrived = send(routed, serves, transport=self.transport, run=run)
        if width == 1:
            if ahead is None:
                ahead = report_ids(self._together(routed.ids[:, 0])), None
            return (routed, arrived), cache, ahead
        rows = steps.sort_rows(self.spec, arrived)
        return (routed, rows, jnp.zeros_like(rows.rows)), cache, None

    def _leave(self, width, kind, finish, carried, run=alone):  # type: ignore[no-untyped-def]
        if kind.ffn == "dense":
            return carried
        if width == 1:
            routed, arrived, serves, *slots = carried
            outputs = steps.in_order(self.spec, arrived, steps.run_experts(self.spec, self.kernels, arrived, *slots))
        else:
            routed, serves, order, outputs = carried
            outputs = unsorted(outputs, order)
        with jax.named_scope("collect"):
            own = collect(outputs, routed, serves, transport=self.transport, run=run)
        output = weighted_sum(own.reshape(*routed.ids.shape, -1), steps.output_weights(self.spec, routed))
        return steps.finish_experts(self.spec, finish, routed, output)

    def _told(self, tokens: jax.Array, logprobs: jax.Array) -> Any:
        return self._together(tokens), self._together(logprobs)

    def _together(self, of_sequences: jax.Array) -> jax.Array:
        return jax.lax.all_gather(of_sequences, ROW_AXES, axis=0, tiled=True)

    @property
    def _place(self) -> Any:
        return self.layout, self.transport

    def _compile(
        self, key: tuple[Any, ...], function: Callable[..., Any], inputs: tuple[Any, ...], donate: tuple[int, ...]
    ) -> jax.stages.Compiled:
        if key[0] == "wave":
            with no_mesh_set():
                return super()._compile(key, function, inputs, donate)
        layout, inputs = self.layout, jax.tree.map(_given, inputs)

        def on_each(*arguments):  # type: ignore[no-untyped-def]
            return function(*jax.tree.map(_own_part, inputs, arguments))

        mapped = jax.shard_map(
            on_each,
            mesh=layout.mesh,
            in_specs=jax.tree.map(_spec, inputs),
            out_specs=self._results(key),
            check_vma=False,  # what is the same along "tensor", or on all devices, is so by what is computed
        )
        whole = jax.tree.map(functools.partial(_of_all, layout), inputs)
        hides = key[0] == "beside" and layout.devices[0].platform == "gpu"  # a ragged exchange is not, by default
        options: dict[str, str | bool] | None = {"xla_gpu_enable_latency_hiding_scheduler": True} if hides else None
        with no_mesh_set():
            return jax.jit(mapped, donate_argnums=donate).lower(*whole).compile(compiler_options=options)

    def _results(self, key: tuple[Any, ...]) -> Any:
        """Where the results of a program are, as prefixes of their trees."""
        rows, each, everywhere = self.layout.rows.spec, self.layout.each.spec, self.layout.everywhere.spec

        def carried(width: int, kind: LayerSpec) -> Any:
            if kind.ffn == "dense":
                return rows
            return (rows, each) if width == 1 else (rows, each, each)

        match key:
            case ("begin", width, _):
                return carried(width, self.pass_kinds(width)[0]), each, everywhere, rows
            case ("between", width, _, _, kind):
                return carried(width, kind), each, everywhere
            case ("beside", width, _, _, kind):
                return each, carried(width, kind), each, everywhere
            case ("end_chunk", _):
                return rows, rows
            case ("head",):
                return rows, everywhere, rows, everywhere
            case ("join",) | ("end_step",):
                return rows
            case ("logits",):
                return everywhere
        raise ValueError(f"there is no program {key} on a mesh")

    # The shapes and places of arguments: one device's shapes, and how the devices share the global array.

    def _dense(self, name: str) -> jax.ShapeDtypeStruct:
        shape = self._shares.shapes[name]
        sharding = NamedSharding(self.layout.mesh, self._shares.partition(name))
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)

    def _pool(self) -> Any:
        return pool_shapes(self.spec.block_format, self.pool_slots, self.layout.each)

    def _serves(self) -> jax.ShapeDtypeStruct:
        shape = (self.layout.expert, self.spec.experts.count)
        return jax.ShapeDtypeStruct(shape, np.int32, sharding=self.layout.everywhere)

    def _layer_inputs(self, kind: LayerSpec) -> tuple[Any, ...]:
        each = self.layout.each
        shapes = cache_shapes(self.spec, kind, self.rows, self.context)
        caches = tuple(jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=each) for shape in shapes)
        reach = jax.ShapeDtypeStruct((2,), np.int32, sharding=self.layout.everywhere)
        return caches, (reach, self._serves() if kind.ffn == "moe" else None)

    def _arrived(self, width: int) -> Any:
        """What `send` gives of a pass of that width."""
        each, sources = self.layout.each, self.layout.expert
        return jax.tree.map(
            lambda a: jax.ShapeDtypeStruct((sources * a.shape[0], *a.shape[1:]), a.dtype, sharding=each),
            self._routed(width),
        )

    def _sorted(self, width: int) -> tuple[Any, jax.ShapeDtypeStruct]:
        each, sources = self.layout.each, self.layout.expert
        rows = sources * self.lanes(width) * width * self.spec.experts.top_k
        flat = jax.ShapeDtypeStruct((rows, self.spec.hidden), jnp.dtype(self.spec.dtype), sharding=each)
        order = jax.ShapeDtypeStruct((rows,), np.int32, sharding=each)
        sizes = jax.ShapeDtypeStruct((self.spec.experts.count,), np.int32, sharding=each)
        return steps.SortedRows._make((flat, order, sizes)), flat

    def _carried(self, width: int, kind: LayerSpec) -> Any:
        if kind.ffn == "dense":
            return super()._carried(width, kind)
        if width == 1:
            slot_row = _Given((self.spec.experts.count,), np.int32, "each")
            return self._routed(1), self._arrived(1), self._serves(), self._pool(), slot_row
        rows, outputs = self._sorted(width)
        return self._routed(width), self._serves(), rows.order, outputs

    def _look(self, width: int, kind: LayerSpec | None = None) -> tuple[Any, Any]:
        if self.look_ahead is None or width > 1 or (kind is not None and kind.ffn == "dense"):
            return None, None
        return look_shapes(self.spec, self.look_ahead, self.layout.everywhere), None


class _Wave:
    """A wave whose parts are computed while rows move, while tracing.

    XLA's schedulers do not know how long a kernel takes, and would leave the wave for the end. So a part begins once
    rows can move, and those that have come are not read before the part is done.
    """

    def __init__(
        self, compute: Callable[[jax.Array, jax.Array], jax.Array], outputs: jax.Array, parts: list[jax.Array]
    ) -> None:
        self._compute, self._outputs, self._parts = compute, outputs, parts

    def beside(self, collective: Callable[[Any], Any], given: Any) -> Any:
        """A `Run` that also computes the next part."""
        given, outputs, part = jax.lax.optimization_barrier((given, self._outputs, self._parts.pop(0)))
        moved, self._outputs = jax.lax.optimization_barrier((collective(given), self._compute(outputs, part)))
        return moved

    def finished(self) -> jax.Array:
        """The outputs, with what nothing has moved beside."""
        for part in self._parts:
            self._outputs = self._compute(self._outputs, part)
        return self._outputs


def _halves(slot_row: jax.Array, sizes: jax.Array) -> list[jax.Array]:
    """A wave's slots by expert, in two parts with about as many rows."""
    rows = jnp.cumsum(jnp.where(slot_row >= 0, sizes, 0))
    early = 2 * rows <= rows[-1]
    return [jnp.where(early, slot_row, -1), jnp.where(early, -1, slot_row)]


def _exchanges(before: LayerSpec, after: LayerSpec) -> bool:
    """Whether a program from one layer into another exchanges rows."""
    return "moe" in (before.ffn, after.ffn)


def _given(shape: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """What one device takes of an argument: as it is, or of a host array its sequences' part."""
    return (
        shape if shape.sharding is not None or isinstance(shape, _Given) else _Given(shape.shape, shape.dtype, "rows")
    )


def _spec(shape: jax.ShapeDtypeStruct) -> PartitionSpec:
    return shape.sharding.spec if isinstance(shape.sharding, NamedSharding) else PartitionSpec()


def _of_all(layout: MeshLayout, shape: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """The global argument of which every device takes a part of this shape."""
    whole, sharding = list(shape.shape), shape.sharding
    if isinstance(shape, _Given):
        sharding = layout.everywhere
        if shape.part == "each":
            whole = [layout.count, *whole]
        elif shape.part == "rows":
            whole[0] *= layout.row_shards
    for axis, names in enumerate(_spec(shape)):
        for name in (names,) if isinstance(names, str) else names or ():
            whole[axis] *= layout.mesh.shape[name]
    return jax.ShapeDtypeStruct(tuple(whole), shape.dtype, sharding=sharding)


def _own_part(shape: jax.ShapeDtypeStruct, given: jax.Array) -> jax.Array:
    """This device's part of an argument, while tracing."""
    if not isinstance(shape, _Given) or shape.part == "all":
        return given
    if shape.part == "each":
        return given[jax.lax.axis_index(AXES)]
    return jax.lax.dynamic_slice_in_dim(given, jax.lax.axis_index(ROW_AXES) * shape.shape[0], shape.shape[0])
