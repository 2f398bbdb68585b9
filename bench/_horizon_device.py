"""Part "device" of `bench.horizon`: what looking ahead adds to a layer's program, at the shape of a real model.

One layer boundary of Qwen3-30B-A3B (48 layers, 128 experts, top-8) is compiled with and without the look ahead and run
on random weights, all its experts in slots; the bytes that each reads are counted from the shapes.
"""

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench._report import spread, table
from ef_jax.nn.correction import CorrectionSpec
from ef_jax.runtime.look_ahead import LookAheadSpec
from ef_jax.runtime.programs import Programs
from ef_jax.spec import AttentionSpec, ExpertSpec, LayerSpec, ModelSpec, RopeSpec, RouterNormalize, RouterSpec

MODEL = ModelSpec(
    family="qwen3_moe",
    vocab=4096,  # the head is not timed
    hidden=2048,
    max_position=4096,
    norm_eps=1e-6,
    tie_embeddings=True,
    dtype="bfloat16",
    layers=(LayerSpec(ffn="moe"),) * 48,
    attention=AttentionSpec(heads=32, kv_heads=4, head_dim=128, rope=RopeSpec(theta=1e6, dim=128), qk_norm="head"),
    router=RouterSpec(normalize=RouterNormalize()),
    experts=ExpertSpec(count=128, top_k=8, width=768),
)
VOCAB = 151_936
SPAN = 256
SLOTS = 16


class _Keeping(Programs):
    """Programs that keep what they were compiled for, to be fed with arrays of that."""

    arguments: dict[tuple[Any, ...], tuple[Any, ...]]

    def _program(self, key, function, inputs, donate=()):  # type: ignore[no-untyped-def]
        self.arguments = {**getattr(self, "arguments", {}), key: inputs()}
        return super()._program(key, function, inputs, donate)


def run(repeats: int) -> dict[str, Any]:
    """Seconds and bytes of a layer, without a look ahead, with one at 1, 3 and 6 distances, and with a correction."""
    device = jax.devices()[0]
    sharding = jax.sharding.SingleDeviceSharding(device)
    correction = CorrectionSpec(layers=48, experts=128, top_k=8, distances=6, vocab=VOCAB)
    cases = {
        "none": None,
        "1 layer": LookAheadSpec(distances=1),
        "3 layers": LookAheadSpec(distances=3),
        "6 layers": LookAheadSpec(distances=6),
        "6 layers, corrected": LookAheadSpec(distances=6, correction=correction),
    }
    layers = {name: _Layer(look, sharding) for name, look in cases.items()}
    samples: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(repeats):
        for name, layer in layers.items():  # in turns, so that a change of the machine's load hits all alike
            samples[name].append(layer.seconds())
    base = layers["none"]
    rows = {
        name: {
            "seconds": spread(samples[name]),
            "added_share": spread([s / b - 1 for s, b in zip(samples[name], samples["none"], strict=True)]),
            "bytes_read": layer.bytes_read,
            "added_bytes_share": layer.bytes_read / base.bytes_read - 1,
        }
        for name, layer in layers.items()
    }
    head = ("look ahead", "ms a layer", "added %", "MB read", "added %")
    print(
        table(
            head,
            [
                (
                    name,
                    1e3 * row["seconds"]["median"],
                    100 * row["added_share"]["median"],
                    row["bytes_read"] / 1e6,
                    100 * row["added_bytes_share"],
                )
                for name, row in rows.items()
            ],
        )
    )
    return {"device": device.device_kind, "layer": rows}


class _Layer:
    """A boundary between two MoE layers in a decode step of one sequence."""

    def __init__(self, look: LookAheadSpec | None, sharding: jax.sharding.Sharding) -> None:
        programs = _Keeping(
            MODEL, batch=1, context=SPAN, chunk=16, pool_slots=SLOTS, sharding=sharding, look_ahead=look
        )
        self._program = programs.between(1, SPAN, "moe", "moe")
        shapes = programs.arguments["between", 1, SPAN, "moe", "moe"]
        random = np.random.default_rng(0)
        arguments = jax.tree.map(lambda shape: _fill(shape, random, sharding), shapes)
        _, (routed, pool, _, outputs), *rest = arguments
        experts = MODEL.experts
        slots = np.full(experts.count, -1, np.int32)
        slots[: experts.top_k] = range(experts.top_k)
        routed = routed._replace(ids=jnp.arange(experts.top_k, dtype=jnp.int32)[None, None])
        leaves, k, v, window, positions, looked, state = rest
        self._fixed = (arguments[0], (routed, pool, slots, outputs), leaves)
        self._donated = [k, v, state]
        self._others = (window + MODEL.max_position, jnp.full_like(positions, SPAN - 1), looked)
        self.bytes_read = _nbytes((leaves, routed, k, v)) + experts.top_k * MODEL.block_bytes
        if look is not None:
            rows = look.distances + 1
            self.bytes_read += rows * (experts.count + 1) * MODEL.hidden * 2
            if look.correction is not None:
                embedded = (experts.top_k + 1) * look.correction.width * 4
                self.bytes_read += _nbytes((looked.trained.source, state)) + embedded

    def seconds(self) -> float:
        """One run."""
        k, v, state = self._donated
        window, positions, look = self._others
        began = time.perf_counter()
        _, k, v, ahead = jax.block_until_ready(self._program(*self._fixed, k, v, window, positions, look, state))
        seconds = time.perf_counter() - began
        self._donated = [k, v, None if ahead is None else ahead[1]]
        return seconds


def _fill(shape: jax.ShapeDtypeStruct, random: np.random.Generator, sharding: jax.sharding.Sharding) -> jax.Array:
    if shape.dtype == np.uint16:  # a pool's or cache's bits
        bits = (0.02 * random.standard_normal(shape.shape, np.float32)).astype(jnp.bfloat16)
        return jax.device_put(bits.view(np.uint16), sharding)
    if np.issubdtype(shape.dtype, np.integer):
        return jax.device_put(np.zeros(shape.shape, shape.dtype), sharding)
    return jax.device_put((0.02 * random.standard_normal(shape.shape, np.float32)).astype(shape.dtype), sharding)


def _nbytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
