"""Which K experts each token goes to, and with which weights, for every router that `RouterSpec` describes."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Int32

from ef_jax.errors import UnsupportedError
from ef_jax.nn.exponential import invariant_exp
from ef_jax.nn.linear import along_last, linear, normal_param
from ef_jax.nn.sums import row_sum
from ef_jax.spec import RouterGroups, RouterSpec


def router_logits(
    x: Float[Array, "*rows D"],
    weight: Float[Array, "E D"],
    bias: Float[Array, " E"] | None,
    spec: RouterSpec,
) -> Float[Array, "*rows E"]:
    """Router logits: in x's dtype, or wholly in float32 where the spec says so (`RouterSpec.exact_logits`)."""
    if spec.exact_logits:
        x = x.astype(jnp.float32)
    return linear(x, weight.astype(x.dtype), bias)


def choice_scores(
    logits: Float[Array, "*rows E"],
    spec: RouterSpec,
    select_bias: Float32[Array, "*last E"] | None = None,
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> Float32[Array, "*rows E"]:
    """What the router takes its top-k of.

    It is the logits where nothing is added to the scores and no group is masked, since scores rise with logits (a
    sparse mixer's choices, each the best of those that are left, are their top-k too); else the scores with the
    selection bias, every expert outside the best groups at the groups' mask. `dtype` is the model's, to which some
    round their scores before they choose one expert: those that then are the best alike get the best one's logit.
    """
    raw = logits.astype(jnp.float32)
    if spec.rounded_choice and jnp.dtype(dtype).itemsize == 2:
        raw = _best_alike(raw, dtype)
    if select_bias is None and spec.groups is None:
        return raw
    choice = _score(raw, spec)
    if select_bias is not None:
        choice = choice + along_last(select_bias, choice)
    return choice if spec.groups is None else _limit_to_groups(choice, spec.groups)


def route(
    logits: Float[Array, "*rows E"],
    spec: RouterSpec,
    top_k: int,
    select_bias: Float32[Array, " E"] | None = None,
    dtype: jax.typing.DTypeLike | None = None,
    lift: Float32[Array, " E"] | None = None,
) -> tuple[Int32[Array, "*rows K"], Float[Array, "*rows K"]]:
    """Expert ids, best first (equal scores: the lower id first), and their weights.

    Scores are float32. Weights come back in the model's `dtype` (None: the logits') where the spec casts them back
    (`RouterSpec.casts_back`), else in float32. `lift` is added to the logits for the choice alone, not for the weights,
    and experts outside the best groups stay out.
    """
    choice = choice_scores(logits, spec, select_bias, dtype or logits.dtype)
    if lift is not None:
        lift = along_last(lift, choice)
        of_logits = select_bias is None and spec.groups is None
        choice = choice + lift if of_logits else _lifted(choice, logits.astype(jnp.float32), spec, lift)
    chosen, ids = jax.lax.top_k(choice, top_k)
    if spec.sparse_mixer is not None:
        weights = _sparse_mixer(logits, ids, spec.sparse_mixer)
    elif spec.order == "topk_then_score":
        if lift is not None:
            chosen = jnp.take_along_axis(logits.astype(jnp.float32), ids, axis=-1)
        weights = _score(chosen, spec)
    else:
        weights = jnp.take_along_axis(_score(logits.astype(jnp.float32), spec), ids, axis=-1)
    if spec.normalize is not None:
        total = jnp.sum(weights, axis=-1, keepdims=True)
        if spec.normalize.minimum is not None:
            total = jnp.maximum(total, spec.normalize.minimum)
        weights = weights / (total + spec.normalize.eps)
    if spec.scale != 1.0:
        weights = weights * spec.scale
    return ids.astype(jnp.int32), weights.astype(dtype or logits.dtype) if spec.casts_back else weights


def _lifted(
    choice: Float32[Array, "*rows E"], logits: Float32[Array, "*rows E"], spec: RouterSpec, lift: Float32[Array, "*any"]
) -> Float32[Array, "*rows E"]:
    """Choices by scores as they would be with higher logits; those outside the best groups stay where they are."""
    score = _score(logits, spec)
    # Of a softmax, as if its sum were the same.
    higher = score * jnp.exp(lift) if spec.score == "softmax" else _score(logits + lift, spec)
    lifted = choice + (higher - score)
    return lifted if spec.groups is None else jnp.where(choice == spec.groups.mask, choice, lifted)


def _sparse_mixer(
    logits: Float[Array, "*rows E"], ids: Int32[Array, "*rows K"], jitter: float
) -> Float32[Array, "*rows K"]:
    """Each choice's share of a softmax over the experts not chosen before whose logits are near its own.

    Near is a distance, relative to the larger of the choice's logit and an expert's size, of at most `2 * jitter`. As
    in transformers, it is reckoned in the logits' dtype.
    """
    info = jnp.finfo(logits.dtype)

    def rounded(x: Array) -> Array:  # XLA may leave out a conversion there and back, but not this
        return jax.lax.reduce_precision(x, info.nexp, info.nmant)

    left = logits = logits.astype(jnp.float32)
    threshold = rounded(jnp.float32(2 * jitter))
    weights = []
    for choice in jnp.split(ids, ids.shape[-1], axis=-1):
        best = jnp.take_along_axis(logits, choice, axis=-1)
        distance = rounded(rounded(best - logits) / jnp.maximum(jnp.abs(logits), best))
        near = jnp.where(distance > threshold, -jnp.inf, left)
        weights.append(jnp.take_along_axis(jax.nn.softmax(near, axis=-1), choice, axis=-1))
        left = jnp.where(along_last(jnp.arange(logits.shape[-1]), left) == choice, -jnp.inf, left)
    return jnp.concatenate(weights, axis=-1)


def _score(logits: Float32[Array, "*rows E"], spec: RouterSpec) -> Float32[Array, "*rows E"]:
    if spec.score == "softmax":
        return jax.nn.softmax(logits, axis=-1)
    if spec.score == "sigmoid":
        return jax.nn.sigmoid(logits)
    return jnp.sqrt(jax.nn.softplus(logits))


def _best_alike(logits: Float32[Array, "*rows E"], dtype: jax.typing.DTypeLike) -> Float32[Array, "*rows E"]:
    """The logits, the highest one where a softmax rounded to `dtype` is what it is there."""
    highest = logits.max(axis=-1, keepdims=True)
    powers = invariant_exp(logits - highest)
    rounded = (powers / row_sum(powers)).astype(dtype)
    return jnp.where(rounded == rounded.max(axis=-1, keepdims=True), highest, logits)


def _limit_to_groups(choice: Float32[Array, "*rows E"], groups: RouterGroups) -> Float32[Array, "*rows E"]:
    """Scores with every expert outside the best `groups.keep` groups set to `groups.mask`."""
    grouped = choice.reshape(*choice.shape[:-1], groups.count, -1)
    best = jax.lax.top_k(grouped, 1 if groups.score == "max" else min(2, grouped.shape[-1]))[0].sum(axis=-1)
    kept = jax.lax.top_k(best, groups.keep)[1]
    keep = jnp.any(jax.nn.one_hot(kept, groups.count, dtype=jnp.bool_), axis=-2)
    return jnp.where(keep[..., None], grouped, groups.mask).reshape(choice.shape)


class Router(nnx.Module):
    """`weight` [E, D] and, where the spec has them, `bias` [E] and `select_bias` float32 [E].

    `dtype` is the model's; the weight's own is what `RouterSpec.weight_dtype` says.
    """

    def __init__(
        self, spec: RouterSpec, *, hidden: int, experts: int, top_k: int, dtype: jax.typing.DTypeLike, rngs: nnx.Rngs
    ):
        if spec.groups is not None and experts % spec.groups.count:
            raise UnsupportedError(f"{experts} experts cannot be split into {spec.groups.count} equal router groups")
        self.spec = spec
        self.top_k = top_k
        stored = jnp.float32 if spec.weight_dtype == "float32" else dtype
        self.weight = normal_param((experts, hidden), jnp.dtype(stored), rngs)
        self.bias = nnx.Param(jnp.zeros((experts,), dtype)) if spec.bias else None
        self.select_bias = nnx.Param(jnp.zeros((experts,), jnp.float32)) if spec.select_bias else None

    def __call__(
        self, h: Float[Array, "*rows D"], lift: Float32[Array, " E"] | None = None
    ) -> tuple[Int32[Array, "*rows K"], Float[Array, "*rows K"]]:
        """Expert ids and weights of normed hidden states; `lift` as `route` has it."""
        bias = None if self.bias is None else self.bias[...]
        select_bias = None if self.select_bias is None else self.select_bias[...]
        logits = router_logits(h, self.weight[...], bias, self.spec)
        return route(logits, self.spec, self.top_k, select_bias, h.dtype, lift)
