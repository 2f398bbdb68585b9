"""What a family is: which config field means what, and how its tensors are named."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

from ef_jax.families._fields import ConfigFields
from ef_jax.families._names import TensorNames
from ef_jax.spec import (
    AttentionSpec,
    DeltaNetSpec,
    ExpertSpec,
    LatentAttentionSpec,
    LayerSpec,
    RelativeAttentionSpec,
    RouterSpec,
    SharedExpertSpec,
)


def _none(fields: ConfigFields) -> None:
    return None


def _nothing(fields: ConfigFields) -> dict[str, Any]:
    return {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """One entry of data, with functions for what is not a field's name.

    Attributes:
      model_type: of config.json.
      architectures: those that are this model.
      names: of its tensors.
      defaults: of transformers' config class, by field, and what else `Family` reads.
      layers: the decoder layers, given their number.
      attention: given the hidden size.
      delta_net: None where there is none.
      shared: None where there is none.
      dense_width: the field with the width of dense layers; None: there are none.
      hidden, layer_count: spellings of the fields with the hidden size and the number of layers.
      more: other fields of `ModelSpec`.
      norm: of all layers, as `ModelSpec` has it, and `norm_eps` the field with its epsilon.
      text: the field that holds the language model's own config where the file describes more than that; `outer` are
        fields beside it that do not concern the language model.
      quantization: the methods of `quantization_config` that can be read.
      must_be: fields with the one value that is implemented.
      inert: fields without effect here, beyond those that are so everywhere.
    """

    model_type: str
    architectures: tuple[str, ...]
    names: TensorNames
    defaults: Mapping[str, object]
    layers: Callable[[ConfigFields, int], tuple[LayerSpec, ...]]
    attention: Callable[[ConfigFields, int], AttentionSpec | LatentAttentionSpec | RelativeAttentionSpec]
    router: Callable[[ConfigFields], RouterSpec]
    experts: Callable[[ConfigFields], ExpertSpec]
    shared: Callable[[ConfigFields], SharedExpertSpec | None] = _none
    delta_net: Callable[[ConfigFields], DeltaNetSpec | None] = _none
    dense_width: str | None = None
    hidden: tuple[str, ...] = ("hidden_size",)
    layer_count: tuple[str, ...] = ("num_hidden_layers",)
    more: Callable[[ConfigFields], dict[str, Any]] = _nothing
    norm: Literal["rms", "rms_f32", "rms_offset", "layer"] = "rms"
    norm_eps: str = "rms_norm_eps"
    text: str | None = None
    outer: frozenset[str] = frozenset()
    quantization: frozenset[str] = frozenset()
    must_be: Mapping[str, object] = dataclasses.field(default_factory=dict)
    inert: frozenset[str] = frozenset()
