"""Latent attention: transformers' numbers, and bits that depend on nothing but the sequence."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ef_jax import nn
from ef_jax.nn import latent_attention
from ef_jax.nn.latent_attention import LatentAttention, latent_cache
from ef_jax.spec import ExpertSpec, LatentAttentionSpec, LayerSpec, ModelSpec, RopeSpec, RouterSpec

ATTENTION = LatentAttentionSpec(
    heads=4,
    query_rank=12,
    kv_rank=16,
    nope_dim=8,
    value_dim=6,
    rope=RopeSpec(theta=1e4, dim=4, interleaved=True),
    bias=True,
)


def model(dtype: str = "float32", attention: LatentAttentionSpec = ATTENTION) -> ModelSpec:
    return ModelSpec(
        family="deepseek_v3",
        vocab=8,
        hidden=32,
        max_position=1024,
        norm_eps=1e-6,
        tie_embeddings=False,
        dtype=dtype,  # type: ignore[arg-type]
        layers=(LayerSpec(ffn="moe"),),
        attention=attention,
        router=RouterSpec(),
        experts=ExpertSpec(count=2, top_k=1, width=8, activation="silu"),
    )


@functools.lru_cache
def compiled(spec: ModelSpec, rows_at_once: int) -> tuple[dict[Any, jax.Array], Any]:
    """Random arrays of a module, and its call."""
    assert isinstance(spec.attention, LatentAttentionSpec)
    attention = spec.attention
    graphdef, state = nnx.split(nnx.eval_shape(lambda: LatentAttention(spec, attention, rngs=nnx.Rngs(0))))
    random = np.random.default_rng(1)
    arrays = {}
    for path, leaf in nnx.to_flat_state(state):
        shape = leaf.get_value().shape
        values = random.standard_normal(shape) * (shape[-1] ** -0.5 if len(shape) > 1 else 1)
        arrays[path] = jnp.asarray(values.astype(spec.dtype))

    def call(arrays: dict[Any, jax.Array], *rest: Any, span: int | None) -> Any:
        merged = nnx.merge(graphdef, nnx.from_flat_state({k: nnx.Param(v) for k, v in arrays.items()}))
        return merged(*rest[:4], span, rest[4])

    return arrays, jax.jit(call, static_argnames="span")


class Layer:
    """The module with random arrays, compiled; R rows of empty cache of C positions."""

    def __init__(self, spec: ModelSpec, context: int = 64, rows: int = 2):
        assert isinstance(spec.attention, LatentAttentionSpec)
        self.spec = spec
        self.arrays, self.call = compiled(spec, latent_attention.ROWS_AT_ONCE)
        shape = latent_cache(spec, spec.attention, rows, context)
        self.cache = (jnp.zeros(shape.shape, shape.dtype),)

    def __call__(self, x: jax.Array, positions: Any, span: int | None = None, rows: Any = None) -> np.ndarray:
        where = jnp.asarray(positions, jnp.int32)
        rows = None if rows is None else jnp.asarray(rows, jnp.int32)
        out, self.cache = self.call(self.arrays, x, self.cache, where, nn.reach_of(), rows, span=span)
        return np.asarray(out)


def inputs(batch: int, tokens: int, dtype: str = "float32") -> jax.Array:
    values = np.random.default_rng(tokens).standard_normal((batch, tokens, 32))
    return jnp.asarray(values.astype(dtype))


def places(batch: int, tokens: int) -> np.ndarray:
    return np.broadcast_to(np.arange(tokens), (batch, tokens))


@pytest.mark.parametrize("query_rank", [None, 12])
def test_however_a_prompt_is_cut(query_rank: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    attention = dataclasses.replace(ATTENTION, query_rank=query_rank)
    x, positions = inputs(2, 21), places(2, 21)
    whole = Layer(model(attention=attention))(x, positions)
    monkeypatch.setattr(latent_attention, "ROWS_AT_ONCE", 8)  # two queries of four heads
    few = Layer(model(attention=attention))
    np.testing.assert_allclose(few(x, positions), whole, atol=1e-5)
    cut = Layer(model(attention=attention))
    parts = [cut(x[:, a:b], positions[:, a:b]) for a, b in ((0, 16), (16, 17), (17, 21))]
    np.testing.assert_allclose(np.concatenate(parts, 1), whole, atol=1e-5)
    np.testing.assert_allclose(cut.cache[0], few.cache[0], atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tokens", [1, 20])
def test_span_rows_and_company_change_no_bit(tokens: int, dtype: str) -> None:
    spec, context = model(dtype), 2 * nn.KEY_BLOCK
    past, x = inputs(3, 9, dtype), inputs(3, tokens, dtype)
    layer = Layer(spec, context, rows=3)
    layer(past, places(3, 9))
    before = layer.cache
    expected = layer(x, places(3, tokens) + 9)
    written = layer.cache[0]
    layer.cache = before
    np.testing.assert_array_equal(layer(x, places(3, tokens) + 9, nn.KEY_BLOCK), expected)

    other = Layer(spec, context, rows=7)  # sequence 1 in row 5, beside others and one that is padding
    other(past, places(3, 9), rows=[0, 5, 2])
    company = x.at[0].set(x[2]).at[2].set(x[0])
    out = other(company, places(3, tokens) + np.array([[4], [9], [0]]), nn.KEY_BLOCK, rows=[2, 5, 7])
    np.testing.assert_array_equal(out[1], expected[1])
    np.testing.assert_array_equal(other.cache[0][5], written[1])
    assert not np.any(other.cache[0][jnp.array([1, 3, 4, 6])])
    np.testing.assert_array_equal(other.cache[0][0], before[0][0])


def test_padding_is_finite_and_writes_nothing() -> None:
    layer = Layer(model("bfloat16"))
    x = inputs(2, 4, "bfloat16")
    alone = Layer(model("bfloat16"))
    positions = np.array([[0, 1, -1, -1], [-1, -1, -1, -1]])
    out = layer(x, positions)
    assert np.isfinite(out.astype(np.float32)).all()
    np.testing.assert_array_equal(np.any(layer.cache[0] != 0, axis=(1, 3))[:, :5], [[1, 1, 0, 0, 0], [0] * 5])
    changed = alone(x.at[0, 2:].set(9).at[1].set(9), positions)
    np.testing.assert_array_equal(changed[0, :2], out[0, :2])
    np.testing.assert_array_equal(alone.cache[0], layer.cache[0])


def test_many_heads_bound_the_workspace() -> None:
    attention = dataclasses.replace(ATTENTION, heads=64)
    layer = Layer(model(attention=attention), 512, rows=1)
    arguments = inputs(1, 256), layer.cache, jnp.asarray(places(1, 256), jnp.int32), nn.reach_of(), None
    memory = layer.call.lower(layer.arrays, *arguments, span=None).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4 * 64 * 256 * 512 / 2  # half the scores of one pass


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    ("family", "query_rank", "dtype"),
    [
        ("deepseek_v2", None, "float32"),
        ("deepseek_v2", 12, "bfloat16"),
        ("deepseek_v3", None, "bfloat16"),
        ("deepseek_v3", 12, "float32"),
        ("deepseek_v3_halves", 12, "float32"),
    ],
)
def test_against_transformers(family: str, query_rank: int | None, dtype: str) -> None:
    torch = pytest.importorskip("torch")
    attention = dataclasses.replace(
        ATTENTION,
        query_rank=query_rank,
        rope=RopeSpec(
            theta=1e4,
            dim=4,
            kind="yarn",
            factor=4.0,
            original_max_position=16,
            mscale=1.0,
            mscale_all_dim=0.7,
            interleaved=family != "deepseek_v3_halves",
            precise=family == "deepseek_v2",
        ),
        scale=12**-0.5 * (0.1 * 0.7 * np.log(4.0) + 1) ** 2,
    )
    layer = Layer(model(dtype, attention))
    torch_call = torch_attention(layer, family)
    x = inputs(2, 40, dtype)
    expected = torch_call(torch.from_numpy(np.array(x, np.float32)))
    tolerance = 2e-5 if dtype == "float32" else 0.03 * expected.std()
    np.testing.assert_allclose(layer(x, places(2, 40)).astype(np.float32), expected, atol=tolerance)


def torch_attention(layer: Layer, family: str) -> Any:
    """transformers' attention module with the same weights, as a function of hidden states from position 0."""
    import torch
    import transformers
    from transformers.models.deepseek_v2 import modeling_deepseek_v2
    from transformers.models.deepseek_v3 import modeling_deepseek_v3

    spec = layer.spec.attention
    assert isinstance(spec, LatentAttentionSpec)
    rope = spec.rope
    version = family.split("_")[1]
    config = transformers.AutoConfig.for_model(
        f"deepseek_{version}",
        hidden_size=32,
        num_attention_heads=spec.heads,
        num_key_value_heads=spec.heads,
        q_lora_rank=spec.query_rank,
        kv_lora_rank=spec.kv_rank,
        qk_nope_head_dim=spec.nope_dim,
        qk_rope_head_dim=rope.dim,
        v_head_dim=spec.value_dim,
        attention_bias=True,
        max_position_embeddings=64,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": rope.theta,
            "factor": rope.factor,
            "original_max_position_embeddings": rope.original_max_position,
            "mscale": rope.mscale,
            "mscale_all_dim": rope.mscale_all_dim,
        },
        attn_implementation="eager",
        **({} if version == "v2" else {"rope_interleave": rope.interleaved}),
    )
    source, name = (modeling_deepseek_v2, "DeepseekV2") if version == "v2" else (modeling_deepseek_v3, "DeepseekV3")
    dtype = getattr(torch, layer.spec.dtype)
    module = getattr(source, name + "Attention")(config, 0).to(dtype)
    rotary = getattr(source, name + "RotaryEmbedding")(config)
    ours = {".".join(path): torch.from_numpy(np.array(v, np.float32)) for path, v in layer.arrays.items()}
    kv_up = torch.cat([ours.pop("k_up"), ours.pop("v_up")], dim=1).reshape(-1, spec.kv_rank)
    theirs = {"q_down": "q_a_proj", "q_norm": "q_a_layernorm", "q_up": "q_b_proj", "kv_norm": "kv_a_layernorm"}
    theirs |= {"kv_down": "kv_a_proj_with_mqa", "q_proj": "q_proj", "o_proj": "o_proj"}
    state = {f"{theirs[path.split('.')[0]]}.{path.split('.')[1]}": value for path, value in ours.items()}
    module.load_state_dict(state | {"kv_b_proj.weight": kv_up})

    def call(x: Any) -> np.ndarray:
        tokens = x.shape[1]
        mask = torch.full((tokens, tokens), torch.finfo(dtype).min, dtype=dtype).triu(1)[None, None]
        with torch.no_grad():
            tables = rotary(x.to(dtype), torch.arange(tokens)[None])
            tables = {"position_embeddings": tables, "attention_mask": mask}
            return module(hidden_states=x.to(dtype), **tables)[0].float().numpy()

    return call
