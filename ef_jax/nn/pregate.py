"""Coming layers' routers on the residual stream of now: which experts they would choose if nothing changed until then.

Source s is the residual stream of a token after s routers: s = 0 is its embedding, s = l + 1 what the router of MoE
layer l read. At distance d from source s stands the router of MoE layer s - 1 + d, so that distance 0 is a layer's
own. (Pre-gating on the residual stream: Eliseev and Mazur 2023, arXiv 2312.17238, section 3.2; ExpertFlow, Shen et al.
2025, arXiv 2510.26730, takes its scores as the base of a correction.)
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from ef_jax.nn.definition import dense_shapes, layer_definition, leaf_names
from ef_jax.nn.linear import along_last, matmul_f32, product_precision
from ef_jax.nn.norm import normalize
from ef_jax.nn.router import choice_scores
from ef_jax.spec import ModelSpec


class RouterStack(NamedTuple):
    """Norms and routers of the L MoE layers, stacked, then H rows of zeros: R = L + H.

    Attributes:
      norms: in the model's dtype.
      norm_biases: in the model's dtype; None where norms have none.
      routers: in the routers' own dtype.
      bias: in the model's dtype; None where routers have none.
      select_bias: None where routers have none.
    """

    norms: Float[Array, "R D"]
    norm_biases: Float[Array, "R D"] | None
    routers: Float[Array, "R E D"]
    bias: Float[Array, "R E"] | None
    select_bias: Float32[Array, "R E"] | None


def stack_routers(spec: ModelSpec, layers: Sequence[Sequence[jax.Array]], distances: int) -> RouterStack:
    """The norms and routers of every MoE layer that decode steps run, with room for `distances` layers past the last.

    Args:
      spec: the model.
      layers: leaves of each layer, dense ones included, in the order of `layer_definition`.
      distances: H, the largest distance that will be asked for.
    """
    leaves = [
        dict(zip(layer_definition(spec, spec.layers[i])[1], layers[i], strict=True)) for i in spec.step_moe_layers
    ]

    def stack(path: str) -> jax.Array | None:
        if path not in leaves[0]:
            return None
        rows = jnp.stack([of_layer[path] for of_layer in leaves])
        return jnp.pad(rows, [(0, distances), *[(0, 0)] * (rows.ndim - 1)])

    names = ("ffn_norm.weight", "ffn_norm.bias", "router.weight", "router.bias", "router.select_bias")
    return RouterStack._make(map(stack, names))


def router_stack_shapes(spec: ModelSpec, distances: int) -> RouterStack:
    """Shapes and dtypes of what `stack_routers` returns. Nothing is allocated."""
    shapes = dense_shapes(spec)
    layers = [[shapes[name] for name in leaf_names(spec, index)] for index in range(len(spec.layers))]
    stacked: RouterStack = jax.eval_shape(lambda leaves: stack_routers(spec, leaves, distances), layers)
    return stacked


def pregate(
    spec: ModelSpec,
    stack: RouterStack,
    x: Float[Array, "*rows D"],
    first: Int32[Array, ""],
    count: int,
    shift: Float[Array, "count E"] | None = None,
) -> Float32[Array, "*rows count E"]:
    """Choice scores that the routers of MoE layers `first` to `first + count - 1` give to a residual stream.

    Everything is rounded as the layer itself rounds it (`normalize`, `router_logits`), so that a layer's scores of its
    own input choose what it chooses: bit for bit on a CPU, elsewhere but for the order of sums.

    Args:
      spec: the model.
      stack: its routers.
      x: residual stream, in the model's dtype.
      first: in `[0, L]`, traced, so that one program serves every source. (What reaches past the stack is moved back
        into it, and is then of other layers than asked for.)
      count: static; `first + count` is at most L + H.
      shift: added to the logits, as `residual_means.logit_shifts` measures it; zeros change nothing.

    Returns:
      Scores, zeros for layers past the last.
    """

    def taken(rows: Array) -> Array:
        return jax.lax.dynamic_slice_in_dim(rows, first, count)

    with jax.named_scope("pregate"):
        biases = None if stack.norm_biases is None else taken(stack.norm_biases)
        h = normalize(x[..., None, :], taken(stack.norms), biases, kind=spec.norm, eps=spec.norm_eps)
        if spec.router.exact_logits:
            h = h.astype(jnp.float32)
        logits = _products(h.reshape(-1, *h.shape[-2:]), stack.routers, first).reshape(*h.shape[:-1], -1)
        if stack.bias is not None:
            logits = logits + along_last(taken(stack.bias).astype(jnp.float32), logits)
        if shift is not None:
            logits = logits + along_last(shift.astype(jnp.float32), logits)
        select_bias = None if stack.select_bias is None else taken(stack.select_bias)
        choice = choice_scores(logits.astype(h.dtype), spec.router, select_bias, x.dtype)
        known = first + jnp.arange(count) < len(spec.step_moe_layers)
        return jnp.where(along_last(known[:, None], choice), choice, 0)


def _products(
    h: Float[Array, "M count D"], routers: Float[Array, "R E D"], first: Int32[Array, ""]
) -> Float32[Array, "M count E"]:
    """`h[:, c] @ routers[first + c].T` for every c, in h's dtype, accumulated in float32."""
    count = h.shape[1]

    def one_by_one(h: Array, routers: Array, first: Array) -> Array:
        rows = (jax.lax.dynamic_index_in_dim(routers, first + c, keepdims=False) for c in range(count))
        return jnp.stack([matmul_f32(h[:, c], row.astype(h.dtype)) for c, row in enumerate(rows)], axis=1)

    def together(h: Array, routers: Array, first: Array) -> Array:
        taken = jax.lax.dynamic_slice_in_dim(routers, first, count).astype(h.dtype)
        exact = product_precision(h.dtype)
        y = jnp.einsum("mcd,ced->mce", h, taken, precision=exact, preferred_element_type=jnp.float32)
        return y.astype(jnp.float32)

    # XLA's CPU products of many matrices add up in another order than those of one, and are slower from 4 rows on.
    return jax.lax.platform_dependent(h, routers, first, cpu=one_by_one, default=together)
