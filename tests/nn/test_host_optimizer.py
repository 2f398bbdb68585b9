"""Training with experts in host memory: as with a dense layer, in place, and through a checkpoint."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from ef_jax.nn import TRAINABLE, HostOptimizer, HostVariable, OffloadedMoE, restore, restore_target
from tests.nn.test_offloaded_moe import D, E, F, K, dense, make, rows, weights_of

X, TARGET = rows(15), rows(15, seed=2)


def train_step(layer: OffloadedMoE, optimizer: HostOptimizer) -> jax.Array:
    loss, grads = nnx.value_and_grad(
        lambda layer: ((layer(X) - TARGET) ** 2).mean(), argnums=nnx.DiffState(0, TRAINABLE)
    )(layer)
    optimizer.update(layer, grads)
    return loss


def kinds(state: Any) -> set[tuple[bool, str]]:
    """Whether a variable says it is in host memory, and where it is."""
    return {
        (isinstance(variable, HostVariable), variable.get_value().sharding.memory_kind)
        for _, variable in nnx.to_flat_state(state)
    }


@pytest.mark.parametrize("tx", [optax.sgd(0.5), optax.adamw(1e-2)], ids=["sgd", "adamw"])
def test_losses_are_the_dense_layers_step_by_step(tx: optax.GradientTransformation) -> None:
    layer = make()
    params = jax.tree.map(jax.numpy.array, weights_of(layer))
    state, optimizer = tx.init(params), HostOptimizer(layer, tx)
    step = nnx.jit(train_step, donate_argnums=(0, 1))

    @jax.jit
    def dense_step(params: Any, state: Any) -> Any:
        loss, grads = jax.value_and_grad(lambda params: ((dense(X, *params) - TARGET) ** 2).mean())(params)
        updates, state = tx.update(grads, state, params)
        return loss, optax.apply_updates(params, updates), state

    losses = []
    for _ in range(8):
        expected, params, state = dense_step(params, state)
        losses.append((float(step(layer, optimizer)), float(expected)))
    ours, theirs = np.array(losses).T
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    assert ours[-1] < 0.9 * ours[0]
    assert kinds(nnx.state((layer, optimizer))) == {(False, "device"), (True, "pinned_host")}


def test_a_donated_step_updates_in_place_and_slots_change_no_bit() -> None:
    step = nnx.jit(train_step, donate_argnums=(0, 1))
    after = []
    for slots in (2, 2 * E):
        layer = make(slots)
        optimizer = HostOptimizer(layer, optax.adam(1e-2))
        before = layer.experts.get_value()
        for _ in range(3):
            step(layer, optimizer)
        assert before.is_deleted()
        after.append(np.asarray(layer.experts.get_value()))
    np.testing.assert_array_equal(*after)


def test_only_what_wrt_names_is_updated() -> None:
    layer = make()
    router, experts = weights_of(layer)
    optimizer = HostOptimizer(layer, optax.sgd(0.5), wrt=nnx.Param)
    grads = nnx.grad(lambda layer: ((layer(X) - TARGET) ** 2).mean())(layer)
    optimizer.update(layer, grads)
    assert not np.array_equal(layer.router.weight[...], router)
    np.testing.assert_array_equal(layer.experts.get_value(), experts)


def test_orbax_restores_into_pinned_memory(tmp_path: Path) -> None:
    ocp = pytest.importorskip("orbax.checkpoint.experimental.v1")

    def build() -> tuple[OffloadedMoE, HostOptimizer]:
        layer = OffloadedMoE(D, F, experts=E, top_k=K, rngs=nnx.Rngs(3))
        return layer, HostOptimizer(layer, optax.adam(1e-2))

    trained, restored = build(), nnx.eval_shape(build)
    step = nnx.jit(train_step)
    step(*trained)
    ocp.save(tmp_path / "state", nnx.to_pure_dict(nnx.state(trained)))
    restore(restored, ocp.load(tmp_path / "state", restore_target(restored)))
    assert kinds(nnx.state(restored)) == {(False, "device"), (True, "pinned_host")}
    for ours, saved in zip(jax.tree.leaves(nnx.state(restored)), jax.tree.leaves(nnx.state(trained)), strict=True):
        assert jax.typeof(ours) == jax.typeof(saved)
        np.testing.assert_array_equal(ours, saved)
    assert float(step(*restored)) == float(step(*trained))
