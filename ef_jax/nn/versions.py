"""Two versions of what a layer remembers of a sequence, for memories that are not indexed by position.

Keys and values by position can be written twice: a pass that a failed copy has ended in a later layer runs again, and
writes what is there already. A state that every token changes must not take a token twice. So each row keeps two
versions of its state and how many tokens each has seen. Tokens from position p on read the version that has seen p
tokens and write the other one; a pass that comes again reads the same version again.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32, Shaped

_NEVER = -1


class Places(NamedTuple):
    """Where some sequences find their states, and leave them.

    Attributes:
      start: int32 `[B]`, the first token's position; negative where there is no token.
      tokens: int32 `[B]`, how many there are.
      known: bool `[B]`, whether a version has seen `start` tokens.
      read, write: int32 `[B]`, indices of versions, `row * 2` and `row * 2 + 1` of each row; beyond the end for a
        sequence that has no row or no token, which writes nothing.
    """

    start: Int32[Array, " B"]
    tokens: Int32[Array, " B"]
    known: Bool[Array, " B"]
    read: Int32[Array, " B"]
    write: Int32[Array, " B"]


def seen_shape(rows: int) -> jax.ShapeDtypeStruct:
    """Shape and dtype of the tokens that each row's versions have seen: int32 `[R, 2]`."""
    return jax.ShapeDtypeStruct((rows, 2), jnp.int32)


def find(
    seen: Int32[Array, "R 2"], positions: Int32[Array, "B T"], rows: Int32[Array, " B"] | None = None
) -> tuple[Places, Int32[Array, "R 2"]]:
    """Where the sequences of a pass find their states, and `seen` after it.

    Args:
      seen: tokens that each version has seen.
      positions: of each sequence's tokens, one after the other; negative ones, padding, come last.
      rows: each sequence's row; R and beyond: none. None: sequence b has row b.
    """
    limit = seen.shape[0]
    row = jnp.arange(limit, dtype=jnp.int32) if rows is None else rows
    start = jnp.where(row < limit, positions[:, 0], -1)
    count = jnp.sum(positions >= 0, axis=1, dtype=jnp.int32)
    held = seen if rows is None else seen.at[row].get(mode="clip")
    first = start == 0
    # A new sequence writes version 0, and what its row's last one has left in version 1 is nobody's.
    newer = jnp.where(first, 1, (held[:, 1] == start).astype(jnp.int32))
    known = (held[:, 0] == start) | (held[:, 1] == start)
    row = jnp.where(start < 0, limit, row)
    old, new = jnp.where(first, _NEVER, start), start + count
    after = jnp.stack([jnp.where(newer == 1, new, old), jnp.where(newer == 1, old, new)], axis=1)
    places = Places(start, count, known, row * 2 + newer, row * 2 + 1 - newer)
    return places, seen.at[row].set(after, mode="drop")


def read(states: Shaped[Array, "R 2 *state"], places: Places) -> Shaped[Array, "B *state"]:
    """The states that the tokens of a pass start from: zeros at position 0.

    A float state that is not there, because no version has seen as many tokens, is NaN.
    """
    flat = states.reshape(-1, *states.shape[2:])
    state = flat.at[places.read].get(mode="clip")
    apart = (-1, *[1] * (state.ndim - 1))
    state = jnp.where((places.start > 0).reshape(apart), state, 0)
    if jnp.issubdtype(state.dtype, jnp.floating):
        lost = (places.start > 0) & ~places.known
        state = jnp.where(lost.reshape(apart), jnp.nan, state)
    # Not fused into what is written back: a scatter that also reads what it replaces first copies all of it.
    return jax.lax.optimization_barrier(state)


def write(
    states: Shaped[Array, "R 2 *state"], new: Shaped[Array, "B *state"], places: Places
) -> Shaped[Array, "R 2 *state"]:
    """The states with those after the pass, where the next one finds them."""
    flat = states.reshape(-1, *states.shape[2:])
    return flat.at[places.write].set(new, mode="drop").reshape(states.shape)
