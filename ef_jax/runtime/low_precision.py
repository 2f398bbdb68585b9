"""What computes missing experts of little weight in 4 bits: the model with such blocks, its kernels, its few slots."""

from dataclasses import dataclass

from ef_jax.runtime.expert_kernels import ExpertKernels
from ef_jax.spec import ModelSpec


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

    @property
    def host_bytes(self) -> int:
        """Bytes of all blocks in low precision."""
        return self.spec.total_experts * self.spec.block_bytes
