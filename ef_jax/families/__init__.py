"""Model families: from a Hugging Face `config.json` to a `ModelSpec`, a file a family.

The fields, their defaults and their meaning are those of transformers 5.23 (`models/<model_type>/`); the spellings of
transformers 4 are read too. Every field is read, or must have the one value that is implemented, or is known to do
nothing at inference. Anything else raises: no field is silently ignored.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ef_jax.errors import UnsupportedError
from ef_jax.families import (
    _common,
    deepseek_v2,
    deepseek_v3,
    ernie4_5_moe,
    glm4_moe,
    gpt_oss,
    granitemoe,
    kimi_k2,
    llama4,
    llama4_text,
    minimax_m2,
    mixtral,
    olmoe,
    phimoe,
    qwen2_moe,
    qwen3_5_moe,
    qwen3_5_moe_text,
    qwen3_moe,
    qwen3_next,
    switch_transformers,
)
from ef_jax.families._family import Family
from ef_jax.families._fields import ConfigFields, show
from ef_jax.families._names import ExpertLayout as ExpertLayout
from ef_jax.families._names import TensorNames as TensorNames
from ef_jax.families._quantization import FP8_AS_RELEASED as FP8_AS_RELEASED
from ef_jax.families._quantization import Fp8Blocks as Fp8Blocks
from ef_jax.families._quantization import fp8_blocks as fp8_blocks
from ef_jax.families._quantization import fp8_experts as fp8_experts
from ef_jax.spec import ModelSpec

FAMILIES: Mapping[str, Family] = {
    module.FAMILY.model_type: module.FAMILY
    for module in (
        qwen3_moe,
        qwen2_moe,
        mixtral,
        olmoe,
        deepseek_v2,
        deepseek_v3,
        kimi_k2,
        glm4_moe,
        minimax_m2,
        gpt_oss,
        granitemoe,
        ernie4_5_moe,
        phimoe,
        llama4,
        llama4_text,
        qwen3_next,
        qwen3_5_moe,
        qwen3_5_moe_text,
        switch_transformers,
    )
}
"""By `model_type`."""

_MAX_LAYERS = 10_000

_OUTER = ("architectures", "dtype", "torch_dtype", "quantization_config", "tie_word_embeddings")


def spec_from_config(config: Mapping[str, object]) -> ModelSpec:
    """The model that a Hugging Face `config.json` describes.

    Args:
      config: the parsed JSON object.

    Raises:
      UnsupportedError: an unknown architecture, or a field that is unknown, of the wrong type, out of range, at odds
        with another, or asks for something that is not implemented; the message names field and value.
    """
    if not isinstance(config, Mapping):
        raise UnsupportedError(f"config.json must hold an object, got {show(config)}")
    model_type = config.get("model_type")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None or not isinstance(model_type, str):
        raise UnsupportedError(f"model_type {show(model_type)} is not supported; supported: {', '.join(FAMILIES)}")
    if family.text is not None and family.text in config:
        config = _language_model(config, family)
    fields = ConfigFields(config, family.defaults)
    _check_quantization(fields, family)
    in_fp8 = fp8_experts(config)
    known = (None, [], *([name] for name in family.architectures))
    expected = " or ".join(family.architectures)
    fields.must_be("architectures", known, f"only {expected} is supported for {model_type}")
    spec = _spec(fields, family)
    others = {name: value for name, value in _common.MUST_BE.items() if not fields.has_read(name)}
    for name, value in (others | dict(family.must_be)).items():
        fields.must_be(name, (None, value), f"only {value!r} is supported for {model_type}")
    fields.close(_common.INERT | family.inert)
    return dataclasses.replace(spec, experts=dataclasses.replace(spec.experts, quantization="fp8")) if in_fp8 else spec


def _spec(fields: ConfigFields, family: Family) -> ModelSpec:
    hidden, count = fields.integer(*family.hidden), fields.integer(*family.layer_count)
    if count > _MAX_LAYERS:
        raise UnsupportedError(f"{family.layer_count[0]} must be at most {_MAX_LAYERS}, got {count}")
    layers = family.layers(fields, count)
    dense_width = None if family.dense_width is None else fields.integer(family.dense_width)
    return ModelSpec(
        family=family.model_type,
        vocab=fields.integer("vocab_size"),
        hidden=hidden,
        max_position=fields.integer("max_position_embeddings"),
        norm=family.norm,
        norm_eps=fields.number(family.norm_eps),
        tie_embeddings=fields.flag("tie_word_embeddings"),
        dtype=fields.choice("dtype", "torch_dtype", choices=_common.DTYPES),
        layers=layers,
        attention=family.attention(fields, hidden),
        delta_net=family.delta_net(fields),
        router=family.router(fields),
        experts=family.experts(fields),
        shared=family.shared(fields),
        dense_width=dense_width if any(layer.ffn == "dense" for layer in layers) else None,
        bos_id=fields.optional_integer("bos_token_id", minimum=0),
        eos_ids=fields.integers("eos_token_id", below=2**31),
        **family.more(fields),
    )


def _language_model(config: Mapping[str, object], family: Family) -> dict[str, Any]:
    """The language model's own config, with what the whole file says of it."""
    inner = config[family.text or ""]
    if not isinstance(inner, Mapping):
        raise UnsupportedError(f"{family.text} must be an object, got {show(inner)}")
    beside = ConfigFields(config, {})
    beside.close({family.text or "", *_OUTER} | _common.INERT | family.outer)
    return {name: config[name] for name in _OUTER if name in config} | dict(inner)


def _check_quantization(fields: ConfigFields, family: Family) -> None:
    for name in ("quantization_config", "compression_config"):
        given = fields.mapping(name)
        if given is None or (name == "quantization_config" and given.get("quant_method") in family.quantization):
            continue
        raise UnsupportedError(
            f"{name} is {show(given)}: such quantized checkpoints are not supported; use the original weights"
        )
