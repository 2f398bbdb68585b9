"""Expert blocks computed where they lie: in pinned host memory, by the host's processor, one block a call."""

import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from ef_jax.errors import UnsupportedError
from ef_jax.memory.host_store import aligned_empty
from ef_jax.memory.slot_pool import split_block
from ef_jax.runtime.expert_kernels import DECODE_TILE_ROWS, ExpertKernels, choose_kernels
from ef_jax.runtime.slot_weights import slot_weights
from ef_jax.runtime.steps import expert_inputs
from ef_jax.spec import ModelSpec
from pallas_kernels import from_storage, grouped_ffn, storage_dtype, to_storage

_PROBES = 3
_SMALL = 0x3C  # the byte: 0.011 in bfloat16, 1.06 in float16, 0.0115 in float32


class HostExperts:
    """One compiled program that runs the rows of one expert of a decode step straight from its pinned block.

    On a machine without an accelerator this is the device that everything runs on: the same kernel with the same tiles
    as the step's own, so that its results have the same bits. Beside an accelerator it is JAX's CPU backend, whose
    kernel rounds otherwise than the accelerator's.

    Args:
      spec: the model.
      kernels: the engine's.
      batch: sequences of a decode step, B.
      device: the engine's device.

    Attributes:
      shares_device: the host's processor is the engine's device.
      processor: what computes, in words.
      batch: B.
      block_bytes: bytes of a block.

    Raises:
      UnsupportedError: JAX has no CPU backend beside the accelerator.
    """

    def __init__(self, spec: ModelSpec, kernels: ExpertKernels, *, batch: int, device: jax.Device) -> None:
        self.shares_device = device.platform == "cpu"
        host = device if self.shares_device else _host_of(device)
        if not self.shares_device or not kernels.take(spec, 1):
            kernels = choose_kernels(spec, host)
        self.processor = f"{host.device_kind}, kernel {kernels.decode}"
        self.batch, self._rows = batch, batch * spec.experts.top_k
        self.block_bytes = spec.block_bytes
        self._device = jax.sharding.SingleDeviceSharding(device)
        self._host = jax.sharding.SingleDeviceSharding(host)
        self._blocks = jax.sharding.SingleDeviceSharding(
            host, memory_kind="pinned_host" if self.shares_device else None
        )
        self._compile(spec, kernels)

    def _compile(self, spec: ModelSpec, kernels: ExpertKernels) -> None:
        form, dtype, batch, top_k = spec.block_format, jnp.dtype(spec.dtype), self.batch, spec.experts.top_k
        weights_dtype = jnp.dtype(spec.dtype if spec.router.casts_back else np.float32)

        def compute(block, h, weights, places, count, to, outputs):  # type: ignore[no-untyped-def]
            pool = jax.tree.map(lambda of: of[None], split_block(form, jax.device_put(block, jax.memory.Space.Device)))
            blocks, biases = slot_weights(spec, pool)
            x = h.reshape(-1, h.shape[-1])[places // top_k]
            y = grouped_ffn(
                expert_inputs(spec, x, weights.reshape(-1)[places]),
                blocks,
                jnp.zeros(1, jnp.int32),
                None if batch == 1 else count,
                biases=biases,
                activation=spec.experts.activation,
                tile_rows=DECODE_TILE_ROWS,
                implementation=kernels.decode,
                target=kernels.target,
            )
            bits = to_storage(outputs).at[to].set(to_storage(y), mode="drop", unique_indices=True)
            return from_storage(bits, dtype)

        def array(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape, dtype, sharding=self._host)

        block = jax.ShapeDtypeStruct(form.shape, storage_dtype(form.dtype), sharding=self._blocks)
        inputs = array((batch, 1, spec.hidden), dtype), array((batch, 1, top_k), weights_dtype)
        numbers, one = jax.ShapeDtypeStruct((batch,), np.int32), jax.ShapeDtypeStruct((1,), np.int32)
        outputs = array((self._rows, spec.hidden), dtype)
        self._run = jax.jit(compute).lower(block, *inputs, numbers, one, numbers, outputs).compile()
        self._block, self._inputs, self._outputs = block, inputs, outputs
        self._nothing = jnp.zeros(outputs.shape, dtype, device=self._host)
        self._merge = None
        if not self.shares_device:
            on_device = jax.ShapeDtypeStruct(outputs.shape, dtype, sharding=self._device)
            mask = jax.ShapeDtypeStruct((self._rows, 1), np.bool_)
            self._merge = jax.jit(_merged).lower(on_device, on_device, mask).compile()

    def probe(self, rows: int) -> float:
        """Seconds that `run` takes for an expert of so many rows: the median of a few blocks that no cache holds."""
        blocks = [jax.device_put(self.any_block(), self._blocks) for _ in range(1 + _PROBES)]
        h, weights = (jnp.ones(of.shape, of.dtype, device=self._host) for of in self._inputs)
        places = np.arange(rows, dtype=np.int32)
        seconds = []
        for block in blocks:  # the first call is not like the others
            began = time.perf_counter()
            self._call(block, (h, weights), places, places, self._nothing)
            seconds.append(time.perf_counter() - began)
        return statistics.median(seconds[1:])

    def copy_seconds(self) -> float | None:
        """Seconds that the host takes to copy a block within its memory, where that is what copying means; None: it
        does not."""
        if not self.shares_device:
            return None
        blocks, seconds = [self.any_block() for _ in range(1 + _PROBES)], []
        for block in blocks[1:]:
            began = time.perf_counter()
            np.copyto(blocks[0], block)
            seconds.append(time.perf_counter() - began)
        return statistics.median(seconds)

    def any_block(self) -> np.ndarray:
        """A block of weights that are small numbers, in memory that is really there."""
        block = aligned_empty(self._block.shape, self._block.dtype)
        block.view(np.uint8)[:] = _SMALL
        return block

    def inputs(self, h: jax.Array, weights: jax.Array) -> tuple[Any, Any]:
        """The normed input `[B, 1, D]` and the router's weights `[B, 1, K]` of a step, for `run`; waits for them."""
        return (h, weights) if self.shares_device else jax.device_put(jax.device_get((h, weights)), self._host)

    def begin(self, outputs: jax.Array) -> jax.Array:
        """What the first `run` of a layer gets as its outputs."""
        return outputs.block_until_ready() if self.shares_device else self._nothing

    def run(
        self,
        block: Shaped[Array, "*block"],
        inputs: tuple[Any, Any],
        places: Int[np.ndarray, " n"],
        to: Int[np.ndarray, " n"],
        outputs: Float[Array, "M D"],
    ) -> Float[Array, "M D"]:
        """`outputs` with the rows of one expert in them; waits until they are there.

        Args:
          block: the expert's, in pinned host memory.
          inputs: as `inputs` returns them.
          places: of its rows in the flat ids `[B * K]`, at most B, by token.
          to: the rows of `outputs` that they fill.
          outputs: as `begin` or the last call has returned them.
        """
        held = block if self.shares_device else jax.device_put(_in_place(block), self._blocks)
        return self._call(held, inputs, places, to, outputs)

    def end(self, computed: jax.Array, filled: np.ndarray, outputs: jax.Array) -> jax.Array:
        """The device's `outputs` with the rows `filled` of what the last `run` returned; never waits."""
        if self._merge is None:
            return computed
        mask = np.zeros((self._rows, 1), np.bool_)
        mask[filled] = True
        return self._merge(outputs, jax.device_put(computed, self._device), mask)

    def _call(self, block, inputs, places, to, outputs):  # type: ignore[no-untyped-def]
        padded, filled = np.zeros(self.batch, np.int32), np.arange(self._rows, self._rows + self.batch, dtype=np.int32)
        padded[: len(places)], filled[: len(to)] = places, to
        count = np.array([len(places)], np.int32)
        return self._run(block, *inputs, padded, count, filled, outputs).block_until_ready()


def _merged(outputs: jax.Array, computed: jax.Array, mask: jax.Array) -> jax.Array:
    return jnp.where(mask, computed, outputs)


def _in_place(block: jax.Array) -> np.ndarray:
    """An accelerator's pinned block as the host sees it: the same memory where JAX lends it out, else a copy."""
    try:
        return np.from_dlpack(block)  # type: ignore[arg-type]
    except (BufferError, RuntimeError, ValueError):
        return np.asarray(block)


def _host_of(device: jax.Device) -> jax.Device:
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        raise UnsupportedError(
            f"computing missing experts on the host needs JAX's CPU backend beside {device.platform}: set "
            f'JAX_PLATFORMS={device.platform},cpu, or give miss="fetch"'
        ) from None
