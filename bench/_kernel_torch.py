"""The same feed-forward networks by torch's grouped matmul, on the same kind of device."""

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench._kernel_cases import Case
from bench._kernel_timing import Turn

_CALLS_ON_DEVICE = 20


def prepare(case: Case) -> tuple[Turn, Any]:
    """Seconds of one call, and a function that gives the result as float32.

    Raises:
      NotImplementedError: torch has none for this dtype, or sees no such device.
    """
    import torch

    if case.dtype.name != "bfloat16":
        raise NotImplementedError(f"its grouped matmul takes bfloat16, not {case.dtype}")
    device = "cpu" if jax.default_backend() == "cpu" else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        raise NotImplementedError("torch sees no GPU")

    def moved(array: jax.Array) -> torch.Tensor:
        bits = np.array(jax.lax.bitcast_convert_type(array, jnp.int16))
        return torch.from_numpy(bits).view(torch.bfloat16).to(device)

    x, gate_up, down = (moved(array) for array in (case.x, case.weights.gate_up, case.weights.down))
    ends = torch.from_numpy(np.cumsum(case.sizes, dtype=np.int32)).to(device)

    def run() -> torch.Tensor:
        gate, up = torch._grouped_mm(x, gate_up, offs=ends).chunk(2, dim=-1)
        return torch._grouped_mm(torch.nn.functional.silu(gate) * up, down, offs=ends)

    def turn() -> float:
        calls = 1 if device == "cpu" else _CALLS_ON_DEVICE
        began = time.perf_counter()
        for _ in range(calls):
            run()
        if device == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - began) / calls

    return turn, lambda: run().float().cpu().numpy()
