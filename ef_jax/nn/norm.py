"""Normalisations over the last axis, each rounded as transformers rounds it."""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32

from ef_jax.nn.linear import along_last
from ef_jax.spec import ModelSpec

NormKind = Literal["rms", "rms_f32", "rms_offset", "layer"]
"""What `ModelSpec.norm` says of each."""


def unit(x: Float[Array, "*rows D"], kind: NormKind, eps: float) -> Float32[Array, "*rows D"]:
    """`x / rms(x)` in float32, of x less its mean for "layer": what is left to do are weights and bias."""
    x32 = x.astype(jnp.float32)
    if kind == "layer":
        x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    return x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)


def gain(weight: Float[Array, "*last D"], kind: NormKind) -> Float32[Array, "*last D"]:
    """What `unit(x)` is multiplied by."""
    weight = weight.astype(jnp.float32)
    return 1 + weight if kind == "rms_offset" else weight


def normalize(
    x: Float[Array, "*rows D"],
    weight: Float[Array, "*last D"],
    bias: Float[Array, "*last D"] | None = None,
    *,
    kind: NormKind,
    eps: float,
) -> Float[Array, "*out D"]:
    """The norm of x, in x's dtype. Weights of more axes than one are broadcast along x's last ones, and x along them.

    "rms" rounds `unit(x)` and then multiplies in the weights' dtype; the others compute in float32 and round once.
    """
    y = unit(x, kind, eps)
    if kind == "rms":
        return along_last(weight, x) * y.astype(x.dtype)
    y = y * along_last(gain(weight, kind), x)
    if bias is not None:
        y = y + along_last(bias.astype(jnp.float32), x)
    return y.astype(x.dtype)


def rms_norm(x: Float[Array, "*rows D"], weight: Float[Array, " D"], eps: float) -> Float[Array, "*rows D"]:
    """`normalize` of kind "rms"."""
    return normalize(x, weight, kind="rms", eps=eps)


def l2_norm(x: Float[Array, "*rows D"], eps: float) -> Float[Array, "*rows D"]:
    """`x / rms(x)`, without weights; computed in float32 and rounded to x's dtype (Llama 4 calls it an L2 norm)."""
    return unit(x, "rms", eps).astype(x.dtype)


class Norm(nnx.Module):
    """`weight` [width] and, for "layer", `bias` [width]; new ones only normalise."""

    def __init__(self, width: int, *, kind: NormKind, eps: float, dtype: jax.typing.DTypeLike):
        self.kind, self.eps = kind, eps
        self.weight = nnx.Param(jnp.full((width,), 0 if kind == "rms_offset" else 1, dtype))
        self.bias = nnx.Param(jnp.zeros((width,), dtype)) if kind == "layer" else None

    def __call__(self, x: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
        bias = None if self.bias is None else self.bias[...]
        return normalize(x, self.weight[...], bias, kind=self.kind, eps=self.eps)


def make_norm(spec: ModelSpec, width: int) -> Norm:
    """A norm as the model's layers have them (`ModelSpec.norm`), over `width` elements."""
    return Norm(width, kind=spec.norm, eps=spec.norm_eps, dtype=jnp.dtype(spec.dtype))
