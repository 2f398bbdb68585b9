"""Dropping experts beyond a share of a token's weight, and choosing among near experts those that are held."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ef_jax import nn
from ef_jax.spec import RouterGroups, RouterNormalize, RouterSpec

IDS = jnp.array([[7, 2, 5, 1], [3, 0, 6, 4], [8, 9, 1, 0]], jnp.int32)
WEIGHTS = jnp.array([[0.5, 0.3, 0.15, 0.05], [0.25, 0.25, 0.25, 0.25], [0.1, 0.2, 0.3, 0.4]], jnp.float32)


def test_a_token_keeps_as_few_experts_as_have_the_share():
    ids, weights = nn.keep_share(IDS, WEIGHTS, 0.7, normalized=False)
    np.testing.assert_array_equal(ids, [[7, 2, -1, -1], [3, 0, 6, -1], [1, 0, -1, -1]])
    np.testing.assert_array_equal(weights, np.float32([[0.5, 0.3, 0, 0], [0.25, 0.25, 0.25, 0], [0.3, 0.4, 0, 0]]))


def test_weights_that_had_a_sum_keep_it_and_untouched_tokens_keep_their_bits():
    weights = WEIGHTS.at[1].set(jnp.array([1.0, 1e-3, 1e-3, 1e-3])).astype(jnp.bfloat16)
    ids, kept = nn.keep_share(IDS, weights, 0.97, normalized=True)
    np.testing.assert_array_equal((ids >= 0).sum(axis=1), [4, 1, 4])
    np.testing.assert_array_equal(kept[::2], weights[::2])
    assert kept[1].astype(jnp.float32).sum() == pytest.approx(1.003, rel=2**-8)


@pytest.mark.parametrize("share", [1e-12, 1e-3, 1.0])
def test_the_first_expert_stays_and_a_share_of_one_changes_nothing(share):
    weights = WEIGHTS.at[1].set(0.0)
    ids, kept = jax.jit(lambda: nn.keep_share(IDS, weights, share, normalized=True))()
    if share == 1:
        np.testing.assert_array_equal(ids, IDS)
        np.testing.assert_array_equal(kept, weights)
    else:
        np.testing.assert_array_equal(ids[0], [7, -1, -1, -1])
        np.testing.assert_array_equal(ids[1], IDS[1])  # of no weight at all, so none is beyond the others
        np.testing.assert_array_equal(kept[0], [1, 0, 0, 0])


ROUTERS = {
    "softmax": RouterSpec(normalize=RouterNormalize()),
    "topk_then_softmax": RouterSpec(order="topk_then_score"),
    "sigmoid_bias": RouterSpec(score="sigmoid", select_bias=True, normalize=RouterNormalize(eps=1e-20)),
    "groups": RouterSpec(groups=RouterGroups(count=2, keep=1, score="max")),
    "zero_mask": RouterSpec(
        score="sigmoid", select_bias=True, groups=RouterGroups(count=2, keep=1, score="max", mask=0.0)
    ),
}


@pytest.mark.parametrize("spec", ROUTERS.values(), ids=ROUTERS)
def test_held_experts_within_the_margin_replace_others_and_weights_are_the_routers_own(spec):
    """Expert 2 is 0.5 below the second of the two chosen; 4 is of the other group of four."""
    logits = jnp.array([[3.0, 2.0, 1.5, 0.0, 1.0, 0.0, -1.0, -1.0]])
    held = jnp.zeros(8, bool).at[jnp.array([2, 3, 4])].set(True)
    bias = jnp.zeros(8, jnp.float32) if spec.select_bias else None

    def chosen(margin):
        lift = None if margin is None else jnp.where(held, jnp.float32(margin), 0)
        ids, weights = nn.route(logits, spec, 2, bias, lift=lift)
        return ids[0].tolist(), weights

    before, weights = chosen(None)
    same, as_before = chosen(0.0)
    assert before == same == [0, 1]
    np.testing.assert_array_equal(as_before, weights)
    assert chosen(0.25)[0] == [0, 1]
    near, of_near = chosen(0.75)
    assert near == [0, 2]
    if spec.normalize is not None or spec.order == "topk_then_score":
        without = nn.route(logits.at[0, 1].set(-9.0), spec, 2, bias)
        np.testing.assert_allclose(of_near, without[1], rtol=1e-6)
    assert set(chosen(8.0)[0]) == ({2, 3} if spec.groups else {2, 4})
