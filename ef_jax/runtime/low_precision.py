"""What computes missing experts of little weight in 4 bits: the model with such blocks, its kernels, its few slots."""

import contextlib
from dataclasses import dataclass

import jax

from ef_jax.errors import UnsupportedError
from ef_jax.memory.plan import experts_a_step
from ef_jax.runtime.expert_kernels import ExpertKernels, choose_kernels
from ef_jax.spec import ModelSpec
from ef_jax.weights.quantized import quantized_spec

FORMAT = "int4"
"""What blocks of low precision are, in the words of `lossy_quantize`."""

_FEW_MORE = 64


@dataclass(frozen=True, kw_only=True)
class LowPrecision:
    """The second, small pool of a run whose misses of little weight come in low precision.

    Attributes:
      spec: the model, but for its expert blocks, which are int4.
      kernels: what computes from them.
      slots: of the pool, one for each expert that one layer of one step can need.
    """

    spec: ModelSpec
    kernels: ExpertKernels
    slots: int

    @classmethod
    def of(cls, spec: ModelSpec, kernels: ExpertKernels, *, batch: int, device: jax.Device) -> "LowPrecision":
        """For a model with experts in floats, and steps of `batch` sequences; the kernel is the others' if it can be.

        Raises:
          InputError: groups of 32 weights do not divide the sizes of its experts.
          UnsupportedError: its experts cannot be quantized.
        """
        low, own = quantized_spec(spec, FORMAT), None
        with contextlib.suppress(UnsupportedError):
            own = choose_kernels(low, device, kernels.decode)
        chosen, least = own or choose_kernels(low, device), experts_a_step(spec, batch)
        readable = (slots for slots in range(least, least + _FEW_MORE) if chosen.take(low, slots))
        return cls(spec=low, kernels=chosen, slots=next(readable, least))

    @property
    def host_bytes(self) -> int:
        """Bytes of all blocks in low precision."""
        return self.spec.total_experts * self.spec.block_bytes
