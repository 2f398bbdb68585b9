"""A memory plan by arithmetic alone: where nothing may be compiled, the workspace is estimated."""

from ef_jax.forecast.machine import Platform
from ef_jax.memory.plan import FixedBytes, MemoryPlan, MemoryRequest, kv_cache_bytes, make_plan
from ef_jax.memory.slot_pool import MAX_INSERT
from ef_jax.nn import dense_shapes
from ef_jax.spec import ModelSpec

_FLOOR = 64 << 20


def arithmetic_plan(spec: ModelSpec, request: MemoryRequest, platform: Platform) -> MemoryPlan:
    """The plan of a request on a GPU, or on a CPU, with the workspace estimated: `12 T K (D + F)` bytes, for three
    float32 copies of a chunk's routed rows in and inside the experts, and 64 MiB. Compiled programs of
    Qwen3-30B-A3B take 122 MB where this says 136, and of Mixtral-8x7B 113 where it says 180.

    Raises:
      BudgetError: the budget is too small.
    """
    rows, experts = request.rows or request.batch, spec.experts
    routed = request.chunk * experts.top_k
    fixed = FixedBytes(
        dense=sum(shape.size * shape.dtype.itemsize for shape in dense_shapes(spec).values()),
        kv_cache=kv_cache_bytes(spec, rows, request.context),
        look_ahead=0,
        state=rows * (spec.vocab + 64),
        workspace=_FLOOR + 12 * routed * (spec.hidden + experts.width),
        transfer_blocks=MAX_INSERT if platform == "gpu" else 0,
        transfer_rings=2 if platform == "gpu" else 0,
    )
    return make_plan(spec, request, fixed)
