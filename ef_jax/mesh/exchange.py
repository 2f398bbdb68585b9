"""Routed tokens go to the devices that serve their experts, and the outputs come back; inside `shard_map`.

`send` gives every device the tokens that it serves, as `Routed` of all its group: the tokens of the source with index s
on the `expert` axis are in block s, and experts that the device does not serve are -1. `collect` brings each output
back to its token's device, in the order of the token's own ids: no sum is made on the way, so that what a token gets
does not depend on the placement, nor on the transport.

Sequences are the same along `tensor`: there each device sends and serves for its own experts, and the outputs are
shared in `collect`.
"""

from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from ef_jax.choices import chosen
from ef_jax.errors import InputError
from ef_jax.mesh import padded, ragged
from ef_jax.mesh.routes import Run, alone
from ef_jax.runtime.steps import Routed

Transport = Literal["padded", "ragged"]
"""How rows move: whole blocks to everybody, or only to where they are needed (`ragged_all_to_all`, on GPUs)."""


def choose_transport(devices: Sequence[jax.Device], name: str | None = None) -> Transport:
    """The transport of that name, or the one for these devices: "ragged" on GPUs of one process, "padded" elsewhere.

    Between processes XLA's `ragged_all_to_all` depends on its version, flags and network: it may gather whole blocks
    after all, or fail when it first runs ("fallback to NCCL is not allowed"). Where it is known to work, name it.

    Raises:
      InputError: there is no such transport, or these devices cannot run it.
    """
    others = sorted({device.platform for device in devices} - {"gpu"})
    if name is None:
        one_process = len({device.process_index for device in devices}) == 1
        return "ragged" if one_process and not others else "padded"
    transport: Transport = chosen("exchange", name, Transport)
    if transport == "ragged" and others:
        raise InputError(f"exchange 'ragged' does not run on {others[0]}: give exchange='padded' or none")
    return transport


def send(routed: Routed, serves: Int32[Array, "X E"], *, transport: Transport = "padded", run: Run = alone) -> Routed:
    """What this device serves of its group's tokens.

    Args:
      routed: of this device's own tokens, `[B, T, ...]`.
      serves: owner number of the device that computes each expert for the tokens of each index of the `expert` axis.
      transport: how.
      run: runs the collective that moves rows, unless there is one source only.

    Returns:
      `[X * B, T, ...]`, X the size of the `expert` axis; `x` is `h`. Where a token stands in its source's block is up
      to the transport; tokens with no expert here may be missing, and have ids of -1 if they are not.
    """
    return _module(transport).send(routed, serves, run)


def collect(
    outputs: Float[Array, "R D"],
    routed: Routed,
    serves: Int32[Array, "X E"],
    *,
    transport: Transport = "padded",
    run: Run = alone,
) -> Float[Array, "M D"]:
    """The outputs of this device's own tokens, from wherever they were computed.

    Args:
      outputs: of every `[X * B, T, K]` of what `send` gave, in that order; what was not served here is anything.
      routed: what `send` was given.
      serves: the same.
      transport: the same.
      run: as for `send`.

    Returns:
      One row for every id of `routed`, in order; zeros where it is -1.
    """
    # As whole numbers: XLA:CPU copies 16-bit floats by way of 32 bits, which changes those that are none.
    bits = jax.lax.bitcast_convert_type(outputs, jnp.dtype(f"uint{8 * outputs.dtype.itemsize}"))
    mine = _module(transport).collect(bits, routed, serves, run)
    return jax.lax.bitcast_convert_type(mine, outputs.dtype)


def _module(transport: Transport):  # type: ignore[no-untyped-def]
    """Among one source all transports are the same."""
    return ragged if transport == "ragged" and jax.lax.axis_size("expert") > 1 else padded
