"""A checkpoint whose experts are rounded by what they read of a text: the model runs over it, layer by layer.

Each expert's projections are rounded by `gptq` for the rows that its router sends it, and its down projection for what
the rounded ones then give. The text passes through the layers as released, so that a conversion that goes on after an
interruption finds what it would have found without one. One layer's blocks are in memory at a time.
"""

import threading
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from checkpoints_tools.gptq import gptq
from ef_jax import nn
from ef_jax.errors import InputError
from ef_jax.spec import ModelSpec
from ef_jax.weights import Checkpoint
from ef_jax.weights.quantize import IntFormat, as_float32, quantize_block, store_codes
from ef_jax.weights.quantized import QuantizedCheckpoint
from pallas_kernels import ACTIVATIONS, QuantizedPool, dequantize

WINDOW = 512


class CalibratedCheckpoint(QuantizedCheckpoint):
    """A checkpoint with its experts rounded for a text (see `QuantizedCheckpoint`); layers are read in order.

    Attributes:
      tokens: of the text that are used.
    """

    def __init__(self, source: Checkpoint, quantization: str, ids: Sequence[int]) -> None:
        """Args:
          source: a checkpoint of experts in floats; closed with this one.
          quantization: "int8", "int4" or "int4:64".
          ids: the text's tokens; they are used in windows of `WINDOW`, or of the model's positions if it has fewer.

        Raises:
          InputError: as `QuantizedCheckpoint`, or the text is shorter than a window.
        """
        super().__init__(source, quantization)
        window = _window(source.spec)
        self.tokens = calibration_tokens(source.spec, ids)
        self._plain = nn.settle_rope(source.spec, window)
        dense = {name: jnp.asarray(array) for name, array in source.dense()}
        definition, paths = nn.top_definition(self._plain)
        top = nn.merge_top(definition, [dense[path] for path in paths])
        windows = np.asarray(ids[: self.tokens], np.int32).reshape(-1, 1, window)
        self._streams = [top.embed_tokens(jnp.asarray(part)) for part in windows]
        self._leaves = [[dense[name] for name in nn.leaf_names(self._plain, i)] for i in range(len(self._plain.layers))]
        self._done = 0
        self._blocks: np.ndarray | None = None
        self._lock = threading.Lock()
        self._kinds: dict[Any, Any] = {}

    def read_block(self, layer: int, expert: int, out: np.ndarray) -> None:
        self._check_block(layer, expert, out)
        with self._lock:
            while self._done <= layer:
                self._advance(wanted=self._done == layer)
        if self._done != layer + 1 or self._blocks is None:
            raise InputError(f"layer {layer} is behind: layers of a calibration are read in order")
        out[...] = self._blocks[expert]

    def _advance(self, *, wanted: bool) -> None:
        """Run the text through the next layer, whose blocks are rounded if they are `wanted`."""
        layer = self._done
        attend, finish = self._programs(layer)
        reach = jnp.asarray(nn.reach_of(self._plain.layers[layer]))
        parts = [attend(self._leaves[layer], stream, reach) for stream in self._streams]
        routed: list[Any] = [None] * len(parts)
        if self._plain.layers[layer].ffn == "moe":
            h, ids, weights = (np.concatenate([np.asarray(part[i])[0] for part in parts]) for i in (1, 2, 3))
            output = self._experts(layer, as_float32(h), ids, as_float32(weights), wanted=wanted)
            routed = np.split(output.astype(h.dtype)[None], len(parts), axis=1)
        self._streams = [
            finish(self._leaves[layer], part[0], part[1], output) for part, output in zip(parts, routed, strict=True)
        ]
        self._leaves[layer] = []
        self._done += 1

    def _experts(
        self,
        layer: int,
        h: Float[np.ndarray, "M D"],
        ids: np.ndarray,
        weights: Float[np.ndarray, "M K"],
        *,
        wanted: bool,
    ) -> Float[np.ndarray, "M D"]:
        """The routed experts' sum in float32; rounds their blocks if they are `wanted`."""
        spec, form = self._plain, self._plain.block_format
        plain = np.empty(form.shape, form.dtype)
        self._blocks = None
        rounded = np.empty((spec.experts.count, *self.spec.block_format.shape), self.spec.block_format.dtype)
        total = np.zeros_like(h)
        for expert in range(spec.experts.count):
            self._source.read_block(layer, expert, plain)
            tokens, choice = np.nonzero(ids == expert)
            weight = weights[tokens, choice, None]
            rows = h[tokens] * weight if spec.experts.scale_input else h[tokens]
            parts = {name: as_float32(part) for name, part in form.split(plain).items()}
            inner = self._inner(rows, parts["weights"][:2], parts)
            output = inner @ parts["weights"][2] + parts.get("down_bias", np.float32(0))
            total[tokens] += output if spec.experts.scale_input else output * weight
            if wanted:
                self._round(plain, parts, rows, rounded[expert])
        if wanted:
            self._blocks = rounded
        return total

    def _inner(
        self, rows: Float[np.ndarray, "N D"], projections: Float[np.ndarray, "2 F D"], parts: dict[str, np.ndarray]
    ) -> Float[np.ndarray, "N F"]:
        """What an expert's down projection reads."""
        biases = [parts.get(name, np.float32(0)) for name in ("gate_bias", "up_bias")]
        gate, up = (rows @ matrix.T + bias for matrix, bias in zip(projections, biases, strict=True))
        # A power of two, so that few shapes are compiled.
        padding = ((0, (1 << len(rows).bit_length()) - len(rows)), (0, 0))
        activation = ACTIVATIONS[self._plain.experts.activation]
        return np.asarray(activation(*(jnp.asarray(np.pad(of, padding)) for of in (gate, up))))[: len(rows)]

    def _round(
        self, plain: np.ndarray, parts: dict[str, np.ndarray], rows: Float[np.ndarray, "N D"], out: np.ndarray
    ) -> None:
        """Write an expert's rounded block; its biases as they are."""
        form = self.spec.block_format
        quantize_block(plain, self._plain.block_format, out, form)
        target = form.split(out)
        values, weights = target["values"], parts["weights"]
        format: IntFormat = "int8" if values.dtype == np.int8 else "int4"
        wide = rows.astype(np.float64)
        scales = target["gate_up_scales"].reshape(-1, target["gate_up_scales"].shape[-1])
        codes = gptq(weights[:2].reshape(len(scales), -1).T.copy(), wide.T @ wide, scales.T, format)
        store_codes(codes.T.reshape(weights[:2].shape), values[:2])
        inner = self._inner(rows, self._floats(target)[:2], parts).astype(np.float64)
        store_codes(gptq(weights[2].copy(), inner.T @ inner, target["down_scales"], format), values[2])

    def _floats(self, parts: dict[str, np.ndarray]) -> Float[np.ndarray, "3 F D"]:
        """What a block's whole numbers and scales stand for."""
        format = self.spec.experts.quantization
        if format is None:
            raise InputError("experts that are calibrated are quantized")
        arrays = {name: jnp.asarray(parts[name][None]) for name in ("values", "gate_up_scales", "down_scales")}
        return np.asarray(dequantize(QuantizedPool(**arrays, format=format)))[0]

    def _programs(self, layer: int) -> tuple[Any, Any]:
        """What comes before a layer's experts, and what comes after them; shared by layers of a kind."""
        spec, kind = self._plain, self._plain.layers[layer].kind
        if kind in self._kinds:
            return self._kinds[kind]
        definition, _ = nn.layer_definition(spec, kind)

        def attend(leaves: list[jax.Array], x: jax.Array, reach: jax.Array) -> tuple[jax.Array, ...]:
            module, length = nn.merge_layer(definition, leaves), x.shape[1]
            cache = tuple(jnp.zeros(one.shape, one.dtype) for one in nn.cache_shapes(spec, kind, 1, length))
            x, _ = module.attend(x, cache, jnp.arange(length, dtype=jnp.int32)[None], reach)
            return (x, *module.route(x)) if kind.ffn == "moe" else (x, module.ffn_input(x))

        def finish(leaves: list[jax.Array], x: jax.Array, h: jax.Array, routed: jax.Array | None) -> jax.Array:
            return nn.merge_layer(definition, leaves).finish(x, h, routed)

        self._kinds[kind] = jax.jit(attend), jax.jit(finish)
        return self._kinds[kind]


def calibration_tokens(spec: ModelSpec, ids: Sequence[int]) -> int:
    """How many tokens of a text a calibration uses: whole windows.

    Raises:
      InputError: there is not one.
    """
    window = _window(spec)
    if len(ids) < window:
        raise InputError(f"the text to calibrate with has {len(ids)} tokens: give at least {window}")
    return len(ids) // window * window


def _window(spec: ModelSpec) -> int:
    return min(WINDOW, spec.max_position)
