"""T5's attention: against transformers' module, and that company, rows and how much is read change no bit."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ef_jax import nn
from ef_jax.nn.t5_attention import CrossAttention, RelativeAttention, distance_buckets, relative_cache
from ef_jax.spec import ExpertSpec, LayerSpec, ModelSpec, RelativeAttentionSpec, RouterSpec

ATTENTION = RelativeAttentionSpec(heads=3, head_dim=8, buckets=8, max_distance=20)
SPEC = ModelSpec(
    family="switch_transformers",
    vocab=16,
    hidden=24,
    max_position=512,
    norm_eps=1e-6,
    tie_embeddings=True,
    dtype="float32",
    layers=(LayerSpec(ffn="moe"), LayerSpec(ffn="moe", stack="encoder")),
    attention=ATTENTION,
    router=RouterSpec(),
    experts=ExpertSpec(count=2, top_k=1, width=8, gated=False),
    decoder_start=0,
)
REACH = jnp.asarray(nn.reach_of())


def attention(*, both_ways: bool, dtype: str = "float32") -> RelativeAttention:
    spec = dataclasses.replace(SPEC, dtype=dtype)
    made = RelativeAttention(spec, ATTENTION, both_ways=both_ways, rngs=nnx.Rngs(1))
    made.bias.weight[...] = jax.random.normal(jax.random.key(2), (8, 3), dtype)
    return made


def empty(rows: int, context: int, dtype: str = "float32") -> tuple[jax.Array, ...]:
    shapes = relative_cache(dataclasses.replace(SPEC, dtype=dtype), ATTENTION, rows, context)
    return tuple(jnp.full(shape.shape, 3, shape.dtype) for shape in shapes)


def tokens(count: int, batch: int = 2, dtype: str = "float32") -> jax.Array:
    return jax.random.normal(jax.random.key(3), (batch, count, SPEC.hidden), dtype)


def places(*lengths: int, width: int) -> jax.Array:
    """Positions of sequences of such lengths, padded to a width."""
    positions = np.broadcast_to(np.arange(width), (len(lengths), width))
    return jnp.asarray(np.where(positions < np.array(lengths)[:, None], positions, -1), jnp.int32)


@nnx.jit(static_argnames="span")
def run(module, x, cache, positions, rows=None, span=None):
    return module(x, cache, positions, REACH, span, rows)


@nnx.jit
def read(module, x, cache, positions, rows=None):
    return module(x, cache, positions, rows)


@nnx.jit
def remember(module, memory, cache, positions, rows=None):
    return module.remember(memory, cache, positions, rows)


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
class TestAgainstTransformers:
    """One module of each kind, with the same weights."""

    def theirs(self, ours, *, decoder: bool, biased: bool):
        torch = pytest.importorskip("torch")
        from transformers.models.switch_transformers import modeling_switch_transformers as reference
        from transformers.models.switch_transformers.configuration_switch_transformers import SwitchTransformersConfig

        config = SwitchTransformersConfig(
            d_model=24, d_kv=8, num_heads=3, relative_attention_num_buckets=8, relative_attention_max_distance=20
        )
        config.is_decoder, config._attn_implementation = decoder, "eager"
        made = reference.SwitchTransformersAttention(config, has_relative_attention_bias=biased, layer_idx=0)
        if biased:
            weights = dict(zip("qkv", jnp.split(ours.qkv_proj.weight[...], 3), strict=True))
        else:
            weights = {"q": ours.q_proj.weight[...]} | dict(
                zip("kv", jnp.split(ours.kv_proj.weight[...], 2), strict=True)
            )
        state = {
            f"{name}.weight": np.array(weight) for name, weight in (weights | {"o": ours.o_proj.weight[...]}).items()
        }
        if biased:
            state["relative_attention_bias.weight"] = np.array(ours.bias.weight[...])
        made.load_state_dict({name: torch.tensor(value) for name, value in state.items()})
        return made.eval()

    def output(self, theirs, x, *, mask=None, memory=None) -> np.ndarray:
        import torch

        arguments = [None if array is None else torch.tensor(np.array(array)) for array in (mask, memory)]
        with torch.no_grad():
            return theirs(torch.tensor(np.array(x)), arguments[0], arguments[1])[0].numpy()

    @pytest.mark.parametrize("count", [5, 40, 70])
    def test_an_encoder(self, count: int) -> None:
        ours, x = attention(both_ways=True), tokens(count)
        positions = places(count, count - 3, width=count)
        hidden = np.where(np.asarray(positions) < 0, np.finfo(np.float32).min, 0)[:, None, None]
        expected = self.output(self.theirs(ours, decoder=False, biased=True), x, mask=hidden.astype(np.float32))
        out, _ = run(ours, x, (), positions)
        for row, length in enumerate((count, count - 3)):
            np.testing.assert_allclose(out[row, :length], expected[row, :length], atol=3e-7)

    def test_a_decoder_in_one_pass_and_in_steps(self) -> None:
        ours, x = attention(both_ways=False), tokens(30)
        back = np.triu(np.full((30, 30), np.finfo(np.float32).min, np.float32), 1)[None, None]
        expected = self.output(self.theirs(ours, decoder=True, biased=True), x, mask=back)
        at_once, _ = run(ours, x, empty(2, 40), places(30, 30, width=30))
        np.testing.assert_allclose(at_once, expected, atol=3e-7)
        cache = empty(2, 40)
        for position in range(30):
            out, cache = run(ours, x[:, position : position + 1], cache, jnp.full((2, 1), position, jnp.int32))
            np.testing.assert_allclose(out[:, 0], expected[:, position], atol=3e-7)

    def test_a_reader(self) -> None:
        ours, x = CrossAttention(SPEC, ATTENTION, rngs=nnx.Rngs(4)), tokens(6)
        memory = jax.random.normal(jax.random.key(5), (2, 9, SPEC.hidden))
        theirs = self.theirs(ours, decoder=True, biased=False)
        cache = remember(ours, memory, empty(2, 12), places(9, 4, width=9))
        out = read(ours, x, cache, places(6, 6, width=6))
        for row, length in enumerate((9, 4)):
            expected = self.output(theirs, x[row : row + 1], memory=memory[row : row + 1, :length])
            np.testing.assert_allclose(out[row], expected[0], atol=3e-7)

    @pytest.mark.parametrize(("count", "farthest"), [(8, 20), (32, 128), (32, 100), (20, 64), (64, 1000)])
    def test_buckets(self, count: int, farthest: int) -> None:
        torch = pytest.importorskip("torch")
        from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersAttention

        distances = np.arange(2 * farthest)
        for kinds, both_ways in ((count, False), (count // 2, True)):
            bucket = SwitchTransformersAttention._relative_position_bucket
            expected = bucket(torch.tensor(-distances), both_ways, count, farthest).numpy()
            np.testing.assert_array_equal(distance_buckets(kinds, farthest)[np.minimum(distances, farthest)], expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_prompt_does_not_depend_on_its_company(dtype: str) -> None:
    ours, x = attention(both_ways=True, dtype=dtype), tokens(20, 3, dtype)
    together, _ = run(ours, x, (), places(20, 13, 1, width=20))
    for row, length in enumerate((20, 13, 1)):
        other = x.at[:, length:].set(9)
        lanes = jnp.stack([other[2 - row], other[row], other[0]])
        alone, _ = run(ours, lanes, (), places(3, length, 20, width=20))
        np.testing.assert_array_equal(alone[1, :length], together[row, :length])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_does_not_depend_on_its_row_or_on_what_is_read(dtype: str) -> None:
    own = attention(both_ways=False, dtype=dtype)
    reader = CrossAttention(dataclasses.replace(SPEC, dtype=dtype), ATTENTION, rngs=nnx.Rngs(4))
    prompt, x = tokens(7, 1, dtype), tokens(6, 1, dtype)

    def steps(rows: int, row: int, context: int, span: int | None) -> list[np.ndarray]:
        index = jnp.asarray([row], jnp.int32)
        cache = remember(reader, prompt, empty(rows, context, dtype), places(5, width=7), index)
        found = []
        for position in range(6):
            place = jnp.full((1, 1), position, jnp.int32)
            out, cache = run(own, x[:, position : position + 1], cache, place, index, span)
            found += [np.asarray(out), np.asarray(read(reader, out, cache, place, index))]
        return found

    expected = steps(1, 0, 512, None)
    for how in ((3, 2, 512, None), (3, 1, 1024, 256), (1, 0, 512, 256)):
        for got, wanted in zip(steps(*how), expected, strict=True):
            np.testing.assert_array_equal(got, wanted)


def test_padding_writes_nothing() -> None:
    own, reader = attention(both_ways=False), CrossAttention(SPEC, ATTENTION, rngs=nnx.Rngs(4))
    cache, nobody = empty(2, 8), jnp.full((2, 1), -1, jnp.int32)
    out, after = run(own, tokens(1), cache, nobody)
    assert np.isfinite(out).all()
    assert np.isfinite(read(reader, tokens(1), cache, nobody)).all()
    kept = remember(reader, tokens(4), cache, places(4, 2, width=4), jnp.asarray([2, 2], jnp.int32))
    for before, *others in zip(cache, after, kept, strict=True):
        for other in others:
            np.testing.assert_array_equal(other, before)


def test_capacity() -> None:
    ids = jnp.asarray([[[1], [0], [1], [1], [1], [-1]], [[2], [2], [-1], [2], [0], [0]]], jnp.int32)
    kept = jax.jit(nn.within_capacity, static_argnums=(1, 2))(ids, 3, 2)
    assert kept[..., 0].tolist() == [[1, 0, 1, -1, -1, -1], [2, 2, -1, -1, 0, 0]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decoder_start": None}, "begins with a token of its vocabulary, got None"),
        ({"decoder_start": 16}, "begins with a token of its vocabulary, got 16"),
        ({"layers": SPEC.layers[::-1]}, "decoder layers and then encoder layers"),
        ({"layers": SPEC.layers[:1]}, "decoder layers and then encoder layers"),
        (
            {"layers": (LayerSpec(ffn="dense"), SPEC.layers[1]), "dense_width": 8},
            "the decoder has no MoE layer",
        ),
        ({"dtype": "float16"}, "not run in float16"),
    ],
)
def test_specs_that_cannot_be(changes: dict, message: str) -> None:
    from ef_jax.errors import UnsupportedError

    with pytest.raises(UnsupportedError, match=message):
        dataclasses.replace(SPEC, **changes)


def test_layers_of_a_stack_share_its_bias() -> None:
    spec = dataclasses.replace(SPEC, layers=(SPEC.layers[0],) * 2 + (SPEC.layers[1],) * 2)
    biases = [name for name in nn.dense_shapes(spec) if name.endswith("attn.bias.weight")]
    assert biases == ["layers.0.attn.bias.weight", "layers.2.attn.bias.weight"]
    assert biases[0] in nn.leaf_names(spec, 1)
    assert biases[1] in nn.leaf_names(spec, 3)
    assert ModelSpec.from_dict(spec.as_dict()) == spec
    assert (spec.step_layers, spec.prompt_layers, spec.step_moe_layers) == ((0, 1), (2, 3), (0, 1))
