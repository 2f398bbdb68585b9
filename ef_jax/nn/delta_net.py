"""Gated DeltaNet (arXiv 2412.06464) as Qwen3-Next has it: a recurrent state a head instead of keys and values."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Float32, Int32

from ef_jax.nn import versions
from ef_jax.nn.delta_rule import delta_chunks, delta_step, unit_vectors
from ef_jax.nn.exponential import invariant_exp
from ef_jax.nn.gates import sigmoid, silu, softplus
from ef_jax.nn.linear import Linear, along_last, normal_param
from ef_jax.nn.norm import rms_norm
from ef_jax.spec import DeltaNetSpec, ModelSpec
from pallas_kernels import from_storage, storage_dtype, to_storage


def delta_net_cache(spec: ModelSpec, delta_net: DeltaNetSpec, rows: int) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Shapes and dtypes of what one layer remembers of `rows` sequences, however long they are.

    Two versions each (`ef_jax.nn.versions`) of the convolution's last inputs, 16-bit floats as their bits, and of the
    recurrent states, float32 `[R, 2, Hv, dk, dv]`; and the tokens that they have seen.
    """
    net = delta_net
    inputs = (rows, 2, net.conv_width - 1, net.conv_channels)
    states = (rows, 2, net.value_heads, net.key_dim, net.value_dim)
    return (
        jax.ShapeDtypeStruct(inputs, storage_dtype(spec.dtype)),
        jax.ShapeDtypeStruct(states, jnp.float32),
        versions.seen_shape(rows),
    )


def causal_conv(x: Float[Array, "B W C"], weight: Float[Array, "C 1 w"]) -> Float[Array, "B T C"]:
    """Each channel's last w values up to each token, weighted; then SiLU. The first w - 1 tokens only lead in."""
    width = weight.shape[-1]
    tokens = x.shape[1] - width + 1
    taps = weight.astype(jnp.float32)
    total = along_last(taps[:, 0, 0], x) * x[:, :tokens]
    for tap in range(1, width):
        total = total + along_last(taps[:, 0, tap], x) * x[:, tap : tap + tokens]
    return silu(total.astype(x.dtype).astype(jnp.float32)).astype(x.dtype)


class GatedDeltaNet(nnx.Module):
    """Projection, causal convolution, gated delta rule, gated norm, output; called as `Attention` is.

    `in_proj` gives queries, keys, values, output gates, rates and decays, all heads of each together. `a_log` and
    `dt_bias` [Hv] and the norm's weight [dv] are float32, as released models have them.
    """

    def __init__(self, spec: ModelSpec, delta_net: DeltaNetSpec, *, rngs: nnx.Rngs):
        dtype = jnp.dtype(spec.dtype)
        values = delta_net.value_heads * delta_net.value_dim
        self.spec = delta_net
        self.eps = spec.norm_eps
        self.in_proj = Linear(
            spec.hidden, delta_net.conv_channels + values + 2 * delta_net.value_heads, dtype=dtype, rngs=rngs
        )
        self.conv = normal_param((delta_net.conv_channels, 1, delta_net.conv_width), dtype, rngs)
        self.a_log = nnx.Param(jnp.zeros((delta_net.value_heads,), jnp.float32))
        self.dt_bias = nnx.Param(jnp.ones((delta_net.value_heads,), jnp.float32))
        self.norm = nnx.Param(jnp.ones((delta_net.value_dim,), jnp.float32))
        self.out_proj = Linear(values, spec.hidden, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        cache: tuple[Array, ...],
        positions: Int32[Array, "B T"],
        reach: Int32[Array, "2"],
        span: int | None = None,
        rows: Int32[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "B T D"], tuple[Array, ...]]:
        """The mixed tokens and the states after them; see `DecoderLayer.attend`.

        A sequence's tokens of a call follow one another, padding last. From position 0 on they start from nothing, else
        from the states after the tokens before them, which must have run. `reach` and `span` mean nothing here.
        """
        inputs, states, seen = cache
        net = self.spec
        places, seen = versions.find(seen, positions, rows)
        ends = np.cumsum([net.conv_channels, net.value_heads * net.value_dim, net.value_heads])
        mixed, gate, rate, step = jnp.split(self.in_proj(x), ends, axis=-1)
        window = jnp.concatenate([from_storage(versions.read(inputs, places), x.dtype), mixed], axis=1)
        inputs = versions.write(inputs, to_storage(_last_inputs(window, places.tokens, net.conv_width)), places)
        heads = self._heads(causal_conv(window, self.conv[...]))
        rates = self._rates(rate, step, positions >= 0)
        state = versions.read(states, places).reshape(x.shape[0], *rates[0].shape[2:], net.key_dim, net.value_dim)
        out, state = _follow(*heads, *rates, state)
        states = versions.write(states, state.reshape(-1, *states.shape[2:]), places)
        out = out.astype(x.dtype).reshape(*x.shape[:2], net.value_heads, net.value_dim)
        out = rms_norm(out, self.norm[...].astype(x.dtype), self.eps)
        gated = out.astype(jnp.float32) * silu(gate.reshape(out.shape).astype(jnp.float32))
        return self.out_proj(gated.astype(x.dtype).reshape(*x.shape[:2], -1)), (inputs, states, seen)

    def _heads(
        self, mixed: Float[Array, "B T C"]
    ) -> tuple[Float32[Array, "B T N dk"], Float32[Array, "B T N dk"], Float32[Array, "B T N G dv"]]:
        """Queries, keys and values by key head, in float32."""
        net = self.spec
        width = net.key_heads * net.key_dim
        both, value = jnp.split(mixed.astype(jnp.float32), (2 * width,), axis=-1)
        both = unit_vectors(both.reshape(*mixed.shape[:2], 2, net.key_heads, net.key_dim))
        value = value.reshape(*mixed.shape[:2], net.key_heads, -1, net.value_dim)
        return both[:, :, 0] * net.key_dim**-0.5, both[:, :, 1], value

    def _rates(
        self, rate: Float[Array, "B T Hv"], step: Float[Array, "B T Hv"], real: Bool[Array, "B T"]
    ) -> tuple[Float32[Array, "B T N G"], Float32[Array, "B T N G"]]:
        """Rates and log decays by key head; of padding 0, which leaves the state as it is."""
        # In the model's dtype, as transformers rounds rates.
        rates = sigmoid(rate.astype(jnp.float32)).astype(rate.dtype).astype(jnp.float32)
        steps = softplus(step.astype(jnp.float32) + along_last(self.dt_bias[...], step))
        decays = -steps * along_last(invariant_exp(self.a_log[...]), steps)
        rates, decays = (jnp.where(real[..., None], part, 0) for part in (rates, decays))
        by_head = (*rate.shape[:2], self.spec.key_heads, -1)
        return rates.reshape(by_head), decays.reshape(by_head)


def _follow(
    query: Float32[Array, "B T N dk"],
    key: Float32[Array, "B T N dk"],
    value: Float32[Array, "B T N G dv"],
    rate: Float32[Array, "B T N G"],
    log_decay: Float32[Array, "B T N G"],
    state: Float32[Array, "B N G dk dv"],
) -> tuple[Float32[Array, "B T N G dv"], Float32[Array, "B N G dk dv"]]:
    """The delta rule over all tokens: as a step where there is one, else in chunks."""
    if key.shape[1] == 1:
        out, state = delta_step(query[:, 0], key[:, 0], value[:, 0], rate[:, 0], log_decay[:, 0], state)
        return out[:, None], state
    query, key, value = jnp.moveaxis(query, 1, 2), jnp.moveaxis(key, 1, 2), jnp.moveaxis(value, 1, 3)
    rate, log_decay = jnp.moveaxis(rate, 1, 3), jnp.moveaxis(log_decay, 1, 3)
    out, state = delta_chunks(query, key, value, rate, log_decay, state)
    return jnp.moveaxis(out, 3, 1), state


def _last_inputs(window: Float[Array, "B W C"], count: Int32[Array, " B"], width: int) -> Float[Array, "B w C"]:
    """The last `width - 1` of each sequence's inputs, of which `count` are of this call."""
    if window.shape[1] == width:
        return window[:, 1:]  # of one token; where there is none, nothing is written
    at = count[:, None] + jnp.arange(width - 1, dtype=jnp.int32)[None]
    return jnp.take_along_axis(window, at[..., None], axis=1)
