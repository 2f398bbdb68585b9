"""The gated delta rule (arXiv 2412.06464): a linear recurrence over tokens, one at a time and in chunks.

A head's state S `[dk, dv]` answers a query q with `q S`. A token with key k, value v, rate b and decay a makes it
`a S + k (b (v - k a S))`: what S answers to k moves towards v. All in float32.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32

from ef_jax.nn.exponential import invariant_exp
from ef_jax.nn.linear import along_last

CHUNK = 64
"""Tokens whose updates are condensed into a few matrix products."""

_EPS = 1e-6

# A GPU would multiply float32 matrices with 10 bits, and every token of the sequence reads what they lose.
_einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


def unit_vectors(x: Float32[Array, "*rows n"]) -> Float32[Array, "*rows n"]:
    """`x / sqrt(sum(x ** 2) + 1e-6)` along the last axis."""
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + _EPS)


def delta_step(
    query: Float32[Array, "B N dk"],
    key: Float32[Array, "B N dk"],
    value: Float32[Array, "B N G dv"],
    rate: Float32[Array, "B N G"],
    log_decay: Float32[Array, "B N G"],
    state: Float32[Array, "B N G dk dv"],
) -> tuple[Float32[Array, "B N G dv"], Float32[Array, "B N G dk dv"]]:
    """One token of each of B sequences.

    Args:
      query: of N key heads, a unit vector times the scale of the scores.
      key: a unit vector.
      value: of the G value heads of each key head.
      rate: b, 0 to 1.
      log_decay: log a, 0 or less.
      state: before the token.

    Returns:
      What the state after the token answers to the query, and that state. A token of rate 0 and log decay 0 leaves it
      as it is.
    """
    decay = invariant_exp(log_decay)[..., None]
    both = jnp.stack([key, query], axis=-2)[:, :, None]  # one pass over the state answers both
    both = jnp.broadcast_to(both, (*value.shape[:-1], *both.shape[-2:]))
    answers = _einsum("bngrk,bngkv->bngrv", both, state) * decay[..., None]
    of_key, of_query = answers[..., 0, :], answers[..., 1, :]
    change = (value - of_key) * rate[..., None]
    overlap = jnp.sum(query * key, axis=-1)[..., None, None]
    out = of_query + overlap * change
    return out, state * decay[..., None] + key[:, :, None, :, None] * change[..., None, :]


def delta_chunks(
    query: Float32[Array, "B N T dk"],
    key: Float32[Array, "B N T dk"],
    value: Float32[Array, "B N G T dv"],
    rate: Float32[Array, "B N G T"],
    log_decay: Float32[Array, "B N G T"],
    state: Float32[Array, "B N G dk dv"],
) -> tuple[Float32[Array, "B N G T dv"], Float32[Array, "B N G dk dv"]]:
    """T tokens of each of B sequences: `delta_step` after `delta_step` but for rounding, `CHUNK` tokens at a time.

    Within a chunk the changes u of the state solve a unit triangular system (the UT transform, arXiv 2406.06484): with
    c the running product of decays, `u_i = b_i (v_i - c_i k_i S - sum_{j<i} c_i / c_j (k_i k_j) u_j)`.
    """
    tokens = key.shape[2]
    size = min(CHUNK, 1 << (tokens - 1).bit_length())
    query, key, value, rate, log_decay = (
        _cut(x, axis, size) for x, axis in ((query, 2), (key, 2), (value, 3), (rate, 3), (log_decay, 3))
    )
    keys = jnp.broadcast_to(key[:, :, :, None], (*value.shape[:-1], key.shape[-1]))
    decays = _decays(log_decay)
    grown, within, left = decays[..., :1], decays[..., 1:], decays[..., -1, 1:, None]
    system = _einsum("cbnik,cbnjk->cbnij", key, key)[:, :, :, None] * within * rate[..., None]
    given = jnp.concatenate([value, keys * grown], axis=-1) * rate[..., None]
    solved = _einsum("cbngij,cbngjk->cbngik", unit_lower_inverse(system), given)
    scores = _einsum("cbnik,cbnjk->cbnij", query, key)[:, :, :, None] * within
    by_chunk = (solved, scores, query[:, :, :, None] * grown, keys * left, grown[..., -1:, :])

    def chunk(state, part):  # type: ignore[no-untyped-def]
        solved, scores, asked, left, decay = part
        change = solved[..., : value.shape[-1]] - _einsum("bngik,bngkv->bngiv", solved[..., value.shape[-1] :], state)
        out = _einsum("bngik,bngkv->bngiv", asked, state) + _einsum("bngij,bngjv->bngiv", scores, change)
        return state * decay + _einsum("bngik,bngiv->bngkv", left, change), out

    if len(key) == 1:
        state, out = chunk(state, [part[0] for part in by_chunk])
    else:
        state, out = jax.lax.scan(chunk, state, by_chunk)
        out = jnp.moveaxis(out, 0, 3)
        out = out.reshape(*out.shape[:3], -1, out.shape[-1])
    return out[:, :, :, :tokens], state


def _decays(log_decay: Float32[Array, "*batch n"]) -> Float32[Array, "*batch n m"]:
    """`[i, 1 + j]`: what is left at token i of what token j wrote, 0 for later tokens; `[i, 0]`: of what was before.

    The logs are summed from j to i, not taken from sums from the start, which lose its digits where much is forgotten.
    """
    size = log_decay.shape[-1]
    until = jnp.tri(size, size + 1, 1, dtype=jnp.float32)  # [i, 1 + j]: j is not after i
    steps = log_decay[..., None]
    steps = steps * along_last(jnp.tri(size, size + 1, dtype=jnp.float32), steps)  # [l, 1 + j]: l is after j
    apart = _einsum("il,...lj->...ij", until[:, 1:], steps)
    return invariant_exp(apart) * along_last(until, apart)


def unit_lower_inverse(matrix: Float32[Array, "*batch n n"]) -> Float32[Array, "*batch n n"]:
    """The inverse of the strictly lower triangle of `matrix` plus the identity; n is a power of two.

    From the inverses of its diagonal blocks of some size to those of twice the size: for blocks A, B and C below A, the
    corner is `-B^-1 C A^-1`. A library's triangular solver adds a call that is not a matrix product, and OpenBLAS's on
    a CPU lets its threads wait for one another (200 ms for 32 systems of 16).
    """
    size = matrix.shape[-1]
    index = jnp.arange(size, dtype=jnp.int32)
    inverse = jnp.broadcast_to(along_last(jnp.eye(size, dtype=jnp.float32), matrix), matrix.shape)
    block = 1
    while block < size:
        row, column = index[:, None] // block, index[None] // block
        corners = jnp.where(along_last((row % 2 == 1) & (column == row - 1), matrix), matrix, 0)
        if block > 1:
            corners = _einsum("...ij,...jk,...kl->...il", inverse, corners, inverse)
        inverse = inverse - corners
        block *= 2
    return inverse


def _cut(x: Float32[Array, "*dims"], axis: int, size: int) -> Float32[Array, "chunks *cut"]:
    """The axis in chunks of a size, the chunks first; zeros fill the last one."""
    padding = [(0, -x.shape[axis] % size if at == axis else 0) for at in range(x.ndim)]
    x = jnp.pad(x, padding)
    return jnp.moveaxis(x.reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1 :]), axis, 0)
