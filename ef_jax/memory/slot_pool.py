"""The device pool of slots: one array for every part of a block, updated in place by donation."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32, Shaped

from ef_jax.memory.program_memory import program_memory
from ef_jax.spec import BlockFormat, BlockPart, ModelSpec
from pallas_kernels import storage_dtype

MAX_INSERT = 8

# `[S, 3, F, D]` weights, or the arrays `[S, ...]` of a block's parts by name; floats of 16 and 8 bits as their bits.
Slots = Shaped[Array, "S _ _ _"] | dict[str, Shaped[Array, "S ..."]]


class SlotPool:
    """`slots` expert blocks in device memory.

    Every insert donates the arrays and replaces them, so nobody else may keep a reference to them. Inserts of 1 to
    `MAX_INSERT` blocks from one `memory_kind` are compiled at construction: nothing compiles later.

    Args:
      spec: the model.
      slots: S.
      device: where the pool lives.
      memory_kind: where inserted blocks come from: "device", or "pinned_host", whose copy is then part of the insert
        (11 us against 92 us for `device_put` and insert of a 74 kB block on CPU, 0.27 ms against 0.69 ms for 3 MB).

    Attributes:
      array: the blocks, as programs take them.
    """

    def __init__(self, spec: ModelSpec, slots: int, device: jax.Device, *, memory_kind: str) -> None:
        sharding = jax.sharding.SingleDeviceSharding(device)
        form = spec.block_format
        pool = pool_shapes(form, slots, sharding)
        source = jax.sharding.SingleDeviceSharding(device, memory_kind=memory_kind)
        block = jax.ShapeDtypeStruct(form.shape, storage_dtype(form.dtype), sharding=source)
        self._zeros = jax.jit(
            lambda: jax.tree.map(lambda one: jnp.zeros(one.shape, one.dtype), pool), out_shardings=sharding
        )
        self.array: Slots = self._zeros()
        insert = jax.jit(insert_blocks, static_argnums=0, donate_argnums=1)
        self._insert = [
            insert.lower(form, pool, [block] * n, jax.ShapeDtypeStruct((n,), np.int32)).compile()
            for n in range(1, min(MAX_INSERT, slots) + 1)
        ]

    def insert(self, blocks: Sequence[jax.Array], slots: Sequence[int]) -> None:
        """Write `blocks` (perhaps still arriving) into `slots`, at most `MAX_INSERT` a dispatch."""
        for start in range(0, len(blocks), MAX_INSERT):
            part = list(blocks[start : start + MAX_INSERT])
            where = np.asarray(slots[start : start + MAX_INSERT], np.int32)
            self.array = self._insert[len(part) - 1](self.array, part, where)

    def restore(self) -> bool:
        """Make the arrays anew, empty, if an insert that failed has taken them; whether it has."""
        lost = any(array.is_deleted() for array in jax.tree.leaves(self.array))
        if lost:
            self.array = self._zeros()
        return lost

    @property
    def latest(self) -> jax.Array:
        """An array that is there when the last insert is done."""
        first: jax.Array = jax.tree.leaves(self.array)[0]
        return first

    @property
    def temp_bytes(self) -> int:
        """Temporary device bytes of the largest insert."""
        return max(int(program_memory(compiled).temp_size_in_bytes) for compiled in self._insert)


def pool_shapes(
    form: BlockFormat, slots: int, sharding: jax.sharding.Sharding | None = None
) -> jax.ShapeDtypeStruct | dict[str, jax.ShapeDtypeStruct]:
    """The shapes and dtypes of a pool's arrays."""

    def array(part: BlockPart) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((slots, *part.shape), storage_dtype(part.dtype), sharding=sharding)

    if len(form.parts) == 1:
        return array(form.parts[0])
    return {part.name: array(part) for part in form.parts}


def insert_blocks(
    form: BlockFormat, pool: Slots, blocks: Sequence[Shaped[Array, "*block"]], slots: Int32[Array, " n"]
) -> Slots:
    """The pool with `blocks`, wherever they are, in `slots`; in place where the pool is donated."""
    for index, block in enumerate(blocks):
        on_device = jax.device_put(block, jax.memory.Space.Device)
        pool = jax.tree.map(
            lambda held, new, slot=slots[index]: jax.lax.dynamic_update_index_in_dim(held, new, slot, 0),
            pool,
            split_block(form, on_device),
        )
    return pool


def split_block(form: BlockFormat, block: Shaped[Array, "*block"]) -> Shaped[Array, "_ _ _"] | dict[str, jax.Array]:
    """A block that is several arrays, taken apart."""
    if len(form.parts) == 1:
        return block
    item = block.dtype.itemsize

    def array(part: BlockPart) -> jax.Array:
        run = block[part.offset // item : part.end // item]
        stored = storage_dtype(part.dtype)
        if stored.itemsize > item:
            run = run.reshape(-1, stored.itemsize // item)
        return jax.lax.bitcast_convert_type(run, stored).reshape(part.shape)

    return {part.name: array(part) for part in form.parts}
