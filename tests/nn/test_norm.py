"""Norms of every kind against those of transformers, in float32 and as they round bfloat16."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from ef_jax.nn.norm import Norm, NormKind, l2_norm, make_norm
from tests.nn.test_decoder import model_spec

WIDTH, EPS = 24, 1e-3

# A kind, the module of transformers and the class that are to be matched.
CASES: list[tuple[NormKind | None, str, str]] = [
    ("rms", "deepseek_v2", "DeepseekV2RMSNorm"),
    ("rms", "deepseek_v3", "DeepseekV3RMSNorm"),
    ("rms", "glm4_moe", "Glm4MoeRMSNorm"),
    ("rms_f32", "gpt_oss", "GptOssRMSNorm"),
    ("rms", "granitemoe", "GraniteMoeRMSNorm"),
    ("rms", "ernie4_5_moe", "Ernie4_5_MoeRMSNorm"),
    ("layer", "phimoe", "LayerNorm"),
    ("rms", "minimax_m2", "MiniMaxM2RMSNorm"),
    ("rms", "llama4", "Llama4TextRMSNorm"),
    (None, "llama4", "Llama4TextL2Norm"),
    ("rms_offset", "qwen3_next", "Qwen3NextRMSNorm"),
    ("rms_offset", "qwen3_5_moe", "Qwen3_5MoeRMSNorm"),
]


@pytest.mark.parity
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("kind", "family", "name"), CASES, ids=[name for _, _, name in CASES])
def test_against_transformers(kind: NormKind | None, family: str, name: str, dtype: str) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    if kind == "layer":
        theirs = torch.nn.LayerNorm(WIDTH, eps=EPS)
    else:
        modeling = getattr(getattr(transformers.models, family), f"modeling_{family}")
        theirs = getattr(modeling, name)(*[] if kind is None else [WIDTH], eps=EPS)
    theirs = theirs.to(getattr(torch, dtype))
    rng = np.random.default_rng(0)
    # A mean of its own and an eps that counts.
    x = torch.from_numpy(rng.normal(0.3, 0.1, (5, 3, WIDTH)).astype(np.float32)).to(getattr(torch, dtype))
    ours = Norm(WIDTH, kind=kind or "rms", eps=EPS, dtype=dtype)
    with torch.no_grad():
        for key, parameter in theirs.named_parameters():
            parameter.normal_(0.7, 0.5)
            getattr(ours, key)[...] = jnp.asarray(parameter.float().numpy(), dtype)
        expected = theirs(x).float().numpy()
    given = jnp.asarray(x.float().numpy(), dtype)
    out = l2_norm(given, EPS) if kind is None else ours(given)
    assert out.dtype == dtype
    # Of the values rounded to bfloat16 all but a few fall on the same side.
    np.testing.assert_allclose(out.astype(jnp.float32), expected, rtol=2e-6 if dtype == "float32" else 2**-7, atol=1e-6)
    assert (np.asarray(out.astype(jnp.float32)) == expected).mean() > (0 if dtype == "float32" else 0.98)


@pytest.mark.parametrize("kind", ["rms", "rms_f32", "rms_offset", "layer"])
def test_a_new_norm_only_normalises(kind: Any) -> None:
    norm = make_norm(dataclasses.replace(model_spec(), norm=kind, norm_eps=0.0), 4)
    x = jnp.array([[1.0, 2.0, 3.0, 6.0]])
    centred = x - 3 if kind == "layer" else x
    np.testing.assert_allclose(norm(x), centred / jnp.sqrt((centred**2).mean()), rtol=1e-6)
    assert (norm.bias is not None) == (kind == "layer")


def test_kinds_round_at_different_places() -> None:
    weight = jnp.full((WIDTH,), 1.171875, jnp.bfloat16)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(64, WIDTH)), jnp.bfloat16)
    kinds: tuple[NormKind, ...] = ("rms", "rms_f32")
    outs = []
    for kind in kinds:
        norm = Norm(WIDTH, kind=kind, eps=1e-6, dtype="bfloat16")
        norm.weight[...] = weight
        outs.append(np.asarray(norm(x).astype(jnp.float32)))
    assert 0.1 < (outs[0] != outs[1]).mean() < 0.6
