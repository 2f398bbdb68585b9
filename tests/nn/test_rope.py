"""Rotary embeddings: which elements turn, against transformers' own functions; longrope by context."""

import dataclasses
import math
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ef_jax import nn
from ef_jax.spec import RopeSpec
from tests.nn.test_decoder import model_spec

WIDTH, DTYPES = 16, ("float32", "bfloat16")


def example(dtype: str) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries and keys [2, 5, heads, WIDTH], positions [2, 5]."""
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.normal(size=(2, 5, heads, WIDTH)), dtype) for heads in (4, 2))
    return q, k, jnp.asarray(rng.integers(0, 90, (2, 5)), jnp.int32)


def rotate(x: jax.Array, positions: jax.Array, spec: RopeSpec) -> jax.Array:
    return nn.apply_rope(x, *nn.rope_tables(spec, positions), spec)


def torch_of(x: jax.Array) -> Any:
    torch = pytest.importorskip("torch")
    return torch.from_numpy(np.array(x.astype(jnp.float32))).to(getattr(torch, x.dtype.name))


def check(ours: jax.Array, theirs: Any) -> None:
    exact = ours.dtype == jnp.float32
    expected = theirs.float().numpy()
    np.testing.assert_allclose(ours.astype(jnp.float32), expected, atol=2e-6 if exact else 2**-6, rtol=0)
    if not exact:
        assert (np.asarray(ours.astype(jnp.float32)) == expected).mean() > 0.98


def config(**fields: Any) -> Any:
    rope = {"rope_type": "default", "rope_theta": 1e4}
    sizes = {"head_dim": WIDTH, "hidden_size": 4 * WIDTH, "num_attention_heads": 4, "max_position_embeddings": 128}
    return SimpleNamespace(rope_parameters=rope, **sizes, **fields)


@pytest.mark.parity
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["granitemoe", "ernie4_5_moe", "phimoe", "llama4", "glm4_moe", "deepseek_v2"])
def test_against_transformers(family: str, dtype: str) -> None:
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    modeling = getattr(getattr(transformers.models, family), f"modeling_{family}")
    prefix = {"granitemoe": "GraniteMoe", "ernie4_5_moe": "Ernie4_5_Moe", "phimoe": "Phimoe", "llama4": "Llama4Text"}
    prefix |= {"glm4_moe": "Glm4Moe", "deepseek_v2": "DeepseekV2"}
    half, neighbours = family == "glm4_moe", family in ("ernie4_5_moe", "llama4", "deepseek_v2")
    spec = RopeSpec(theta=1e4, dim=WIDTH // 2 if half else WIDTH, interleaved=neighbours, precise=neighbours)
    fields = config(qk_rope_head_dim=WIDTH)
    if half:
        fields.rope_parameters["partial_rotary_factor"] = 0.5
    embedding = getattr(modeling, f"{prefix[family]}RotaryEmbedding")(fields)
    q, k, positions = example(dtype)
    tables = embedding(torch_of(q), torch_of(positions.astype(jnp.float32)).long())
    if family == "llama4":
        pairs = modeling.apply_rotary_emb(torch_of(q), torch_of(k), tables)
    elif family == "deepseek_v2":
        swapped = (torch_of(x).transpose(1, 2) for x in (q, k))
        pairs = [x.transpose(1, 2) for x in modeling.apply_rotary_emb(*swapped, tables)]
    else:
        pairs = modeling.apply_rotary_pos_emb(torch_of(q), torch_of(k), *tables, unsqueeze_dim=2)
    for ours, theirs in zip((q, k), pairs, strict=True):
        check(rotate(ours, positions, spec), theirs)


@pytest.mark.parity
def test_pairs_that_move_score_as_those_that_stay() -> None:
    """DeepSeek-V3 rotates neighbours and leaves them halves apart: the products of queries and keys are the same."""
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    modeling = transformers.models.deepseek_v3.modeling_deepseek_v3
    q, k, positions = example("float32")
    spec = RopeSpec(theta=1e4, dim=WIDTH, interleaved=True)
    cos, sin = (torch_of(jnp.concatenate([table, table], -1)) for table in nn.rope_tables(spec, positions))
    theirs = modeling.apply_rotary_pos_emb_interleave(torch_of(q), torch_of(k), cos, sin, unsqueeze_dim=2)
    expected = np.einsum("bthd,bsnd->bhnts", *(x.numpy() for x in theirs))
    ours = np.einsum("bthd,bsnd->bhnts", *(np.asarray(rotate(x, positions, spec)) for x in (q, k)))
    np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_elements_beyond_dim_pass() -> None:
    q, _, positions = example("bfloat16")
    for interleaved in (False, True):
        out = rotate(q, positions, RopeSpec(theta=1e4, dim=6, interleaved=interleaved))
        np.testing.assert_array_equal(out[..., 6:], q[..., 6:])
        assert (np.asarray(out[..., :6]) != np.asarray(q[..., :6])).mean() > 0.8


def test_precise_rounds_once() -> None:
    q, _, positions = example("bfloat16")
    spec = RopeSpec(theta=1e4, dim=WIDTH, precise=True)
    exact = rotate(q.astype(jnp.float32), positions, spec)
    np.testing.assert_array_equal(rotate(q, positions, spec), exact.astype(jnp.bfloat16))
    rough = rotate(q, positions, dataclasses.replace(spec, precise=False))
    assert (np.asarray(rough) != np.asarray(exact.astype(jnp.bfloat16))).any()


LONG = RopeSpec(
    kind="longrope",
    theta=1e4,
    dim=WIDTH,
    factor=16.0,
    original_max_position=32,
    short_factors=tuple(1 + 0.1 * i for i in range(WIDTH // 2)),
    long_factors=tuple(2 + 0.5 * i for i in range(WIDTH // 2)),
)


@pytest.mark.parity
@pytest.mark.parametrize("context", [32, 33])
@pytest.mark.parametrize("given", [None, 1.3])
def test_longrope(context: int, given: float | None) -> None:
    pytest.importorskip("torch")
    utilities = pytest.importorskip("transformers.modeling_rope_utils")
    fields = config(standardize_rope_params=lambda: None)
    fields.rope_parameters = {
        "rope_theta": LONG.theta,
        "factor": LONG.factor,
        "attention_factor": given,
        "original_max_position_embeddings": LONG.original_max_position,
        "short_factor": list(LONG.short_factors),
        "long_factor": list(LONG.long_factors),
    }
    expected, factor = utilities.ROPE_INIT_FUNCTIONS["longrope"](fields, seq_len=context)
    rope = settled(dataclasses.replace(LONG, attention_factor=given), context)
    frequencies, our_factor = nn.rope_frequencies(rope)
    np.testing.assert_allclose(frequencies, expected.numpy(), rtol=1e-6)
    assert our_factor == pytest.approx(factor)


def settled(rope: RopeSpec, context: int) -> RopeSpec:
    spec = model_spec()
    attention = dataclasses.replace(spec.attention, head_dim=WIDTH, rope=rope)
    return nn.settle_rope(dataclasses.replace(spec, attention=attention), context).attention.rope


def test_the_context_settles_longrope_once() -> None:
    short, long = settled(LONG, 32), settled(LONG, 33)
    assert short == LONG
    assert long == dataclasses.replace(LONG, stretched=True)
    frequencies = [nn.rope_frequencies(rope)[0] for rope in (short, long)]
    np.testing.assert_allclose(frequencies[0] / frequencies[1], np.divide(LONG.long_factors, LONG.short_factors), 1e-5)
    assert nn.rope_frequencies(short)[1] == pytest.approx(math.sqrt(1 + math.log(16) / math.log(32)))
    two = dataclasses.replace(LONG, attention_factor=1.1, long_attention_factor=1.2)
    assert [nn.rope_frequencies(settled(two, context))[1] for context in (32, 33)] == [1.1, 1.2]
    spec = model_spec()
    assert nn.settle_rope(spec, 64) is spec
