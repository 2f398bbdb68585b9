"""`OffloadedMoE` against a dense layer with the same weights, under every transformation, and what it copies."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ef_jax import nn
from ef_jax.errors import InputError, UnsupportedError
from ef_jax.nn import TRAINABLE, HostParam, OffloadedMoE, host_blocks
from ef_jax.spec import RouterGroups, RouterNormalize, RouterSpec

E, K, D, F = 8, 2, 16, 24
COUNTED = 9
"""A tile height of the counting tests alone, so that no other test has compiled their programs without counting."""
TRAINED = nnx.DiffState(0, TRAINABLE)


def make(slots: int = 4, *, seed: int = 0, **options: Any) -> OffloadedMoE:
    return OffloadedMoE(D, F, **{"experts": E, "top_k": K, **options}, slots=slots, rngs=nnx.Rngs(seed))


def rows(*shape: int, seed: int = 1, dtype: Any = jnp.float32) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (*shape, D), dtype)


def dense(x: jax.Array, router: jax.Array, blocks: jax.Array) -> jax.Array:
    """Every expert on every token, the chosen ones summed: softmax router, silu."""
    ids, weights = nn.route(nn.router_logits(x, router, None, RouterSpec()), RouterSpec(), K)
    gate, up = (jnp.einsum("nd,efd->nef", x, blocks[:, part]) for part in (0, 1))
    out = jnp.einsum("nef,efd->ned", jax.nn.silu(gate) * up, blocks[:, 2])
    return jnp.einsum("nkd,nk->nd", jnp.take_along_axis(out, ids[..., None], 1), weights)


def weights_of(layer: OffloadedMoE) -> tuple[jax.Array, jax.Array]:
    return layer.router.weight[...], jnp.asarray(np.asarray(layer.experts.get_value()))


def count_calls(monkeypatch: pytest.MonkeyPatch, name: str) -> list[int]:
    """The places that the compiled program really hands to a function of `host_blocks`, as they come."""
    places: list[int] = []
    real: Callable[..., jax.Array] = getattr(host_blocks, name)

    def counting(*args: Any) -> jax.Array:
        jax.debug.callback(lambda place: places.append(int(place)), args[-1])
        return real(*args)

    monkeypatch.setattr(host_blocks, name, counting)
    return places


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_any_number_of_slots_gives_the_same_bits_and_the_dense_layers_result(dtype: Any) -> None:
    x = rows(3, 5, dtype=dtype)
    outputs = [np.asarray(nnx.jit(make(slots, dtype=dtype))(x)) for slots in (2, 6, 2 * E)]
    for output in outputs[1:]:
        np.testing.assert_array_equal(output, outputs[0])
    router, blocks = weights_of(make(dtype=dtype))
    expected = dense(x.reshape(-1, D).astype(jnp.float32), *(w.astype(jnp.float32) for w in (router, blocks)))
    if dtype == jnp.float32:
        np.testing.assert_allclose(outputs[0].reshape(-1, D), expected, rtol=1e-5, atol=1e-6)
    else:  # tokens whose experts rounding swaps may differ by more
        error = np.abs(outputs[0].reshape(-1, D).astype(np.float32) - expected).max(axis=1)
        assert np.median(error) < 1e-2


@pytest.mark.parametrize(("slots", "tokens"), [(2, 3), (6, 3), (6, 40), (2 * E, 1)])
def test_every_expert_in_use_is_fetched_once_a_pass_and_no_other(
    monkeypatch: pytest.MonkeyPatch, slots: int, tokens: int
) -> None:
    layer, x = make(slots, tile_rows=COUNTED), rows(tokens)
    used = sorted({*np.asarray(layer.router(x)[0]).flat})
    fetched = count_calls(monkeypatch, "fetch")
    jax.block_until_ready(layer(x))
    jax.effects_barrier()
    assert sorted(fetched) == used
    assert (len(used) == E) == (tokens == 40)
    fetched.clear()
    jax.block_until_ready(nnx.jit(nnx.grad(lambda layer: layer(x).sum(), argnums=TRAINED))(layer))
    jax.effects_barrier()
    assert sorted(fetched) == sorted(used * 2)


@pytest.mark.parametrize(("slots", "tokens"), [(2, 15), (6, 2), (2 * E, 15)])
def test_gradients_are_the_dense_layers(slots: int, tokens: int) -> None:
    layer, x, target = make(slots), rows(tokens), rows(tokens, seed=2)
    grads = nnx.jit(nnx.grad(lambda layer: (layer(x) * target).sum(), argnums=TRAINED))(layer)
    dx = jax.jit(jax.grad(lambda x: (layer(x) * target).sum()))(x)
    expected = jax.grad(lambda *args: (dense(*args) * target).sum(), (0, 1, 2))(x, *weights_of(layer))
    experts = grads.experts.get_value()
    assert jax.typeof(experts) == jax.typeof(layer.experts.get_value())
    assert experts.sharding.memory_kind == "pinned_host"
    for ours, theirs in zip((dx, grads.router.weight[...], experts), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_frozen_experts_cost_no_gradients_of_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = make(tile_rows=COUNTED), rows(5)
    written = count_calls(monkeypatch, "write")
    router_only = nnx.jit(nnx.grad(lambda layer: layer(x).sum()))(layer)
    jax.effects_barrier()
    assert written == []
    router, blocks = weights_of(layer)
    expected = jax.grad(lambda router: dense(x, router, blocks).sum())(router)
    np.testing.assert_allclose(router_only.router.weight[...], expected, rtol=1e-4, atol=1e-5)


def test_tokens_without_experts_and_calls_without_tokens() -> None:
    layer, x = make(), rows(3)
    assert layer(rows(0)).shape == (0, D)
    ids, weights = layer.router(x)
    some = layer.run(x, ids.at[1].set(-1), weights.at[1].set(0))
    np.testing.assert_array_equal(some[1], 0)
    np.testing.assert_array_equal(some[::2], layer(x)[::2])
    np.testing.assert_array_equal(layer.run(x, jnp.full_like(ids, -1), jnp.zeros_like(weights)), 0)


def test_layers_can_be_made_by_vmap_and_run_by_scan() -> None:
    layers = nnx.vmap(lambda rngs: OffloadedMoE(D, F, experts=E, top_k=K, rngs=rngs))(nnx.Rngs(0).split(3))
    graphdef, state = nnx.split(layers)
    assert jax.typeof(layers.experts.get_value()).memory_space == jax.memory.Space.Host
    x = rows(7)

    def scanned(state: Any) -> jax.Array:
        return jax.lax.scan(lambda h, layer: (h + nnx.merge(graphdef, layer)(h), None), x, state)[0]

    def unrolled(state: Any) -> jax.Array:
        h = x
        for index in range(3):
            h = h + nnx.merge(graphdef, jax.tree.map(lambda leaf, index=index: leaf[index], state))(h)
        return h

    (y, grads), (expected, expected_grads) = (
        jax.jit(jax.value_and_grad(lambda state, run=run: run(state).sum()))(state) for run in (scanned, unrolled)
    )
    np.testing.assert_allclose(y, expected, rtol=1e-5)
    for ours, theirs in zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_host_arrays_split_from_the_others() -> None:
    layer, x = make(), rows(4)
    graphdef, host, device = nnx.split(layer, HostParam, nnx.Param)
    assert [path for path, _ in nnx.to_flat_state(host)] == [("experts",)]
    assert [path for path, _ in nnx.to_flat_state(device)] == [("router", "weight")]
    merged = jax.jit(lambda host, device: nnx.merge(graphdef, host, device)(x))(host, device)
    np.testing.assert_array_equal(merged, nnx.jit(layer)(x))


@pytest.mark.parametrize("layout", ["in_out", "out_in"])
def test_from_dense(layout: str) -> None:
    spec = RouterSpec(bias=True, select_bias=True, score="sigmoid", normalize=RouterNormalize())
    rng = np.random.default_rng(0)
    gate, up, down = (rng.normal(size=shape).astype(np.float32) for shape in ((E, F, D), (E, F, D), (E, D, F)))
    router, bias, select = (rng.normal(size=shape).astype(np.float32) for shape in ((E, D), (E,), (E,)))
    given = (
        (gate, up, down, router) if layout == "out_in" else tuple(w.swapaxes(-1, -2) for w in (gate, up, down, router))
    )
    layer = OffloadedMoE.from_dense(
        *given, layout=layout, top_k=K, router=spec, router_bias=bias, select_bias=select, activation="relu2"
    )
    x = rows(6)
    ids, weights = nn.route(
        nn.router_logits(x, jnp.asarray(router), jnp.asarray(bias), spec), spec, K, jnp.asarray(select)
    )
    expected = np.zeros((6, D), np.float32)
    for token, k in np.ndindex(6, K):
        expert = int(ids[token, k])
        inner = np.maximum(gate[expert] @ x[token], 0) ** 2 * (up[expert] @ x[token])
        expected[token] += float(weights[token, k]) * (down[expert] @ inner)
    np.testing.assert_allclose(layer(x), expected, rtol=1e-4, atol=1e-3)
    assert layer.experts.get_value().sharding.memory_kind == "pinned_host"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"slots": 3}, "slots must be even, .* got 3"),
        ({"slots": 0}, "slots must be even, .* got 0"),
        ({"top_k": 9}, "top_k must be between 1 and the 8 experts, got 9"),
        ({"activation": "swish"}, "activation 'swish' is not one of silu, "),
        ({"tile_rows": 0}, "tile_rows must be positive, got 0"),
        ({"router": RouterSpec(groups=RouterGroups(count=3, keep=1, score="max"))}, "8 experts cannot be split into 3"),
    ],
)
def test_sizes_that_cannot_be(change: dict[str, Any], message: str) -> None:
    with pytest.raises((InputError, UnsupportedError), match=message):
        make(**change)


def test_inputs_that_cannot_be() -> None:
    layer = make()
    with pytest.raises(InputError, match=r"x must be float32 of 16 columns as the experts are, got bfloat16\[2, 16\]"):
        layer(rows(2, dtype=jnp.bfloat16))
    layer.experts.set_value(jnp.asarray(np.asarray(layer.experts.get_value())))
    with pytest.raises(InputError, match=r"the experts are float32\[8,3,24,16\], not in host memory"):
        layer(rows(2))
    gate, down, router = np.zeros((E, D, F)), np.zeros((E, F, D)), np.zeros((D, E))
    with pytest.raises(InputError, match=r"down must be \[8, 24, 16\] as gate is \[E, D, F\], got \[8, 16, 24\]"):
        OffloadedMoE.from_dense(gate, gate, gate, router, layout="in_out", top_k=K)
    with pytest.raises(InputError, match="router_bias is given, but the router has none"):
        OffloadedMoE.from_dense(gate, gate, down, router, layout="in_out", top_k=K, router_bias=np.zeros(E))
