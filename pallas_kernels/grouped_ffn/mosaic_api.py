"""How a Mosaic kernel is launched on either end of the supported range of jax, on a GPU or in the interpreter."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

# Names of the axes that a kernel asks for its place.
CORE, WARPGROUP = "core", "warpgroup"


def call_kernel(
    body: Callable[..., None],
    operands: Sequence[jax.Array],
    out: jax.Array | jax.ShapeDtypeStruct,
    scratch: Sequence[Any],
    *,
    cores: int,
    warpgroups: int,
    interpret: bool,
    name: str,
) -> jax.Array:
    """`out` after `body(*operands, out, *scratch)` by `warpgroups` on each of `cores`.

    An array is updated in place; of a shape, what the kernel does not write is anything.
    """
    in_place = isinstance(out, jax.Array)

    def scoped(*refs: Any) -> None:
        pl.run_scoped(lambda *allocated: body(*refs, *allocated), *scratch, collective_axes=WARPGROUP)

    kernel = pl.kernel(
        scoped,
        out_type=() if in_place else out,
        mesh=plgpu.Mesh(grid=(cores,), grid_names=(CORE,), num_threads=warpgroups, thread_name=WARPGROUP),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=_interpreter() if interpret else False,
        name=name,
    )
    if not in_place:
        return jax.jit(kernel)(*operands)

    @jax.jit  # references to device memory are made in a jitted function only
    def update(out: jax.Array, *operands: jax.Array) -> jax.Array:
        held = jax.new_ref(out, memory_space=plgpu.GMEM)
        kernel(*operands, held)
        return jax.freeze(held)

    return update(out, *operands)


def load_any(ref: Any) -> jax.Array:
    """What `ref` holds, read in whatever layout the result is used in, at whatever speed."""
    # jax 0.10.2 wants an index, later ones have none.
    index = ((),) if "idx" in inspect.signature(plgpu.load).parameters else ()
    return plgpu.load(ref, *index, optimized=False)


def _interpreter() -> Any:
    later: Any = plgpu  # than 0.10.2, which has it in private
    return later.InterpretGPUParams()
