"""Reading the `quantization_config` of a `config.json`."""

import dataclasses
from collections.abc import Mapping

from ef_jax.errors import UnsupportedError
from ef_jax.families._fields import ConfigFields, show


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Fp8Blocks:
    """Weights in FP8 (e4m3), `rows` x `columns` elements of a matrix to a scale; edges may be cut short."""

    rows: int
    columns: int

    def scales_of(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Shape of the scales of a matrix."""
        return -(-shape[0] // self.rows), -(-shape[1] // self.columns)


FP8_AS_RELEASED = Fp8Blocks(rows=128, columns=128)
"""The blocks of every FP8 checkpoint known, and the only ones that experts are computed in."""


def fp8_experts(config: Mapping[str, object]) -> bool:
    """Whether a checkpoint's experts are FP8 that stays FP8: with scales as released, and not to be dequantized.

    Raises:
      UnsupportedError: the config describes FP8 that is not implemented.
    """
    values = config.get("quantization_config")
    wanted = isinstance(values, Mapping) and not values.get("dequantize")
    return wanted and fp8_blocks(config) == FP8_AS_RELEASED


def fp8_blocks(config: Mapping[str, object]) -> Fp8Blocks | None:
    """How a checkpoint stores its FP8 weights, as DeepSeek-V3, Kimi-K2 and MiniMax-M2 are released; None: it has none.

    Which weights are FP8 the checkpoint itself says, by their dtype and their scales: `modules_to_not_convert` (or
    `ignored_layers`) is not needed, nor is `scale_fmt` (DeepSeek-V3.1 says "ue8m0", powers of two, and stores float32
    that are not). `activation_scheme` "dynamic" is for kernels that compute in FP8; here as in
    transformers' dequantization the weights alone are FP8.

    Raises:
      UnsupportedError: a field asks for something that is not implemented.
    """
    values = config.get("quantization_config")
    if not isinstance(values, Mapping) or values.get("quant_method") != "fp8":
        return None
    fields = ConfigFields(values, {"weight_block_size": [128, 128]}, prefix="quantization_config.")
    fields.must_be("quant_method", ("fp8",), "")
    fields.must_be("fmt", (None, "e4m3", "float8_e4m3fn"), "only e4m3 is supported")
    fields.must_be("activation_scheme", (None, "dynamic"), "only 'dynamic' is supported")
    fields.must_be("scale_fmt", (None, "float", "ue8m0"), "only 'float' and 'ue8m0' are supported")
    fields.must_be("expert_dtype", (None, "fp8"), "only FP8 experts are supported")
    fields.must_be("modules_to_convert", (None, []), "only a model's linear layers may be FP8")
    block = fields.raw("weight_block_size")
    if not (isinstance(block, list | tuple) and len(block) == 2 and all(type(n) is int and n > 0 for n in block)):
        raise UnsupportedError(f"quantization_config.weight_block_size must be [rows, columns], got {show(block)}")
    fields.close({"modules_to_not_convert", "ignored_layers", "dequantize"})
    return Fp8Blocks(rows=block[0], columns=block[1])
