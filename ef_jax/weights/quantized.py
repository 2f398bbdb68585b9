"""A checkpoint of floats whose experts are handed out in fewer bits: what `lossy_quantize` and `--quantize` mean."""

import dataclasses
from collections.abc import Iterator

import numpy as np

from ef_jax.errors import InputError, UnsupportedError
from ef_jax.lossy import GROUPS
from ef_jax.lossy import quantization as parse
from ef_jax.spec import ModelSpec
from ef_jax.weights.checkpoint import Checkpoint, Scratch
from ef_jax.weights.quantize import IntFormat, quantize_block


class QuantizedCheckpoint(Checkpoint):
    """Another checkpoint with its experts rounded to nearest while they are read (see `Checkpoint`).

    `spec.experts.quantization` says so; all else, the layout and the bytes on disk too, is the other checkpoint's.
    """

    def __init__(self, source: Checkpoint, quantization: str) -> None:
        """Args:
          source: a checkpoint of experts in floats; closed with this one.
          quantization: "int8", "int4" or "int4:64".

        Raises:
          InputError: no such format, or a group that does not divide the model's sizes.
          UnsupportedError: such experts cannot be quantized.
        """
        self.spec = quantized_spec(source.spec, quantization)
        self.path, self.format, self.layout = source.path, source.format, source.layout
        self.nbytes, self.tokenizer_dir = source.nbytes, source.tokenizer_dir
        self.generation_config = source.generation_config
        self._source = source
        self._scratch = Scratch()

    def dense(self) -> Iterator[tuple[str, np.ndarray]]:
        return self._source.dense()

    def read_block(self, layer: int, expert: int, out: np.ndarray) -> None:
        self._check_block(layer, expert, out)
        form = self._source.spec.block_format
        plain = self._scratch.take(form.nbytes).view(form.dtype).reshape(form.shape)
        self._source.read_block(layer, expert, plain)
        quantize_block(plain, form, out, self.spec.block_format)

    def close(self) -> None:
        self._source.close()


def quantized_spec(spec: ModelSpec, quantization: str) -> ModelSpec:
    """The spec of the same model with experts in "int8", "int4" (a scale for 32 weights) or for example "int4:64".

    Raises:
      InputError: no such format, or a group that does not divide the expert width and half of the hidden size.
      UnsupportedError: experts that are quantized already, or have no gate.
    """
    _, group = parse(quantization)
    format: IntFormat = "int8" if group is None else "int4"
    experts = spec.experts
    if experts.quantization is not None:
        fix = "give a dtype too, to read them as floats" if experts.quantization == "fp8" else "leave that out"
        raise UnsupportedError(
            f"the experts are {spec.block_dtype} already and cannot be quantized to {quantization}: {fix}"
        )
    if not experts.gated:
        raise UnsupportedError(
            f"experts without a gate ({spec.family}) cannot be quantized to {quantization}: leave that out"
        )
    if group is not None and group not in (fitting := _fitting_groups(spec)):
        offered = f"{', '.join(map(str, fitting))} would" if fitting else "int8 would do"
        raise InputError(
            f"int4 groups of {group} do not divide both the expert width {experts.width} and half of the hidden size"
            f" {spec.hidden}: {offered}"
        )
    return dataclasses.replace(spec, experts=dataclasses.replace(experts, quantization=format, group=group))


def _fitting_groups(spec: ModelSpec) -> list[int]:
    return [group for group in GROUPS if spec.experts.width % group == 0 and spec.hidden % (2 * group) == 0]
