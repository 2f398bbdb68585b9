"""The router of Switch Transformers, with its limited capacity, against transformers' own, choice by choice."""

import jax
import numpy as np
import pytest
from flax import nnx

from ef_jax import nn
from ef_jax.errors import UnsupportedError
from ef_jax.nn.router import Router
from ef_jax.spec import RouterGroups, RouterSpec

EXPERTS, HIDDEN, TOKENS = 6, 24, 200


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("capacity", [3, 30, TOKENS])
@pytest.mark.parametrize("scale", [0.01, 1.0])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_choices_and_weights(dtype: str, scale: float, capacity: int) -> None:
    """Among scores that are nearly alike (a small scale) many are alike once they are rounded to bfloat16."""
    torch = pytest.importorskip("torch")
    from transformers.models.switch_transformers.configuration_switch_transformers import SwitchTransformersConfig
    from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersTop1Router

    spec = RouterSpec(bias=True, dtype="f32_cast_back", rounded_choice=True, capacity=capacity)
    ours = Router(spec, hidden=HIDDEN, experts=EXPERTS, top_k=1, dtype=dtype, rngs=nnx.Rngs(0))
    ours.weight[...] = scale * jax.random.normal(jax.random.key(1), (EXPERTS, HIDDEN), dtype)
    ours.bias[...] = scale * jax.random.normal(jax.random.key(2), (EXPERTS,), dtype)
    x = jax.random.normal(jax.random.key(3), (2, TOKENS, HIDDEN), dtype)
    ids, weights = nnx.jit(lambda router, x: router(x))(ours, x)
    ids = nn.within_capacity(ids, EXPERTS, capacity)

    config = SwitchTransformersConfig(d_model=HIDDEN, num_experts=EXPERTS, expert_capacity=capacity, router_bias=True)
    theirs = SwitchTransformersTop1Router(config).eval()
    exact = {"weight": ours.weight[...], "bias": ours.bias[...]}
    theirs.classifier.load_state_dict({name: torch.tensor(np.array(a, np.float32)) for name, a in exact.items()})
    with torch.no_grad():
        chosen, scores, _ = theirs(torch.tensor(np.array(x, np.float32)).to(getattr(torch, dtype)))
    expected = np.where(chosen.sum(-1) > 0, chosen.argmax(-1), -1)
    np.testing.assert_array_equal(ids[..., 0], expected)
    assert ((expected < 0).any()) == (capacity < TOKENS)
    rounding = 2**-8 if dtype == "bfloat16" else 3e-6
    np.testing.assert_allclose(np.asarray(weights, np.float32), scores.float().numpy(), rtol=rounding)
    if dtype == "bfloat16" and scale < 1:
        logits = nn.router_logits(x, ours.weight[...], ours.bias[...], spec)
        assert (
            nn.choice_scores(logits, spec).argmax(-1) != nn.choice_scores(logits, spec, None, dtype).argmax(-1)
        ).any()


def test_a_choice_by_rounded_scores_takes_no_groups() -> None:
    with pytest.raises(UnsupportedError, match="chooses by rounded scores"):
        RouterSpec(rounded_choice=True, groups=RouterGroups(count=2, keep=1, score="max"))
    with pytest.raises(UnsupportedError, match="expert capacity must be positive, got 0"):
        RouterSpec(capacity=0)
