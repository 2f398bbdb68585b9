"""Reading the rotary embedding of a `config.json`, in both spellings that transformers has had."""

import dataclasses
import functools
from typing import Literal

from ef_jax.errors import UnsupportedError
from ef_jax.families._fields import ConfigFields
from ef_jax.spec import RopeSpec

_ROPE_DEFAULTS: dict[str, object] = {"rope_type": "default", "truncate": True}

_STREAMS = frozenset({"mrope_interleaved", "mrope_section"})
"""Which frequencies turn by an image's rows and columns; those of text all turn by the token's position."""

_ROPE_KINDS: dict[str | None, Literal["default", "linear", "yarn", "llama3", "longrope"]] = {
    "default": "default",
    "linear": "linear",
    "yarn": "yarn",
    "llama3": "llama3",
    "longrope": "longrope",
}


def rope_from_config(
    fields: ConfigFields,
    width: int,
    *,
    rotary: str | None = None,
    interleaved: bool = False,
    precise: bool = False,
    mscales: bool = False,
) -> RopeSpec:
    """The rope of a config: `rope_parameters` (transformers 5), or `rope_scaling` beside a `rope_theta` (4).

    Args:
      fields: the whole config.
      width: of a head, or of what is rotated of it.
      rotary: the field with the share of a head that is rotated; None: all of it.
      interleaved: see `RopeSpec`.
      precise: see `RopeSpec`.
      mscales: longrope's attention factors are `short_mscale` and `long_mscale` (Phi-3.5-MoE).
    """
    part = fields.optional_number(rotary) if rotary else None
    theta = fields.number("rope_theta")
    original = fields.optional_integer("original_max_position_embeddings")
    context = fields.integer("max_position_embeddings")
    found: list[RopeSpec] = []
    for name in ("rope_parameters", "rope_scaling"):
        values = fields.mapping(name)
        if not values:
            continue
        inner = ConfigFields(values, _ROPE_DEFAULTS | {"rope_theta": theta}, prefix=f"{name}.")
        share = (inner.optional_number("partial_rotary_factor") if rotary else None) or part or 1.0
        inner.must_be(
            "partial_rotary_factor", (None, share), "rotating only a part of each head is not supported in this family"
        )
        spec = _rope_spec(inner, original, context, int(width * share), mscales)
        found.append(dataclasses.replace(spec, interleaved=interleaved, precise=precise))
        if fields.given("rope_theta") and found[-1].theta != theta:
            raise UnsupportedError(f"rope_theta is {theta:g} but {name}.rope_theta is {found[-1].theta:g}")
    if len(set(found)) > 1:
        raise UnsupportedError("rope_parameters and rope_scaling describe different embeddings: they must agree")
    if found:
        return found[0]
    return RopeSpec(theta=theta, dim=int(width * (part or 1.0)), interleaved=interleaved, precise=precise)


def _rope_spec(fields: ConfigFields, original: int | None, context: int, dim: int, mscales: bool) -> RopeSpec:
    kind = fields.choice("rope_type", "type", choices=_ROPE_KINDS)
    theta = fields.number("rope_theta")
    base = functools.partial(RopeSpec, kind=kind, theta=theta, dim=dim)
    if kind == "default":
        spec = base()
    elif kind == "linear":
        spec = base(factor=fields.number("factor"))
    elif kind == "yarn":
        if theta <= 1:
            raise UnsupportedError(f"rope_theta must be above 1 for yarn, got {theta:g}")
        spec = base(
            factor=fields.number("factor"),
            original_max_position=_original_context(fields, original, context),
            attention_factor=fields.optional_number("attention_factor"),
            beta_fast=fields.optional_number("beta_fast") or 32.0,
            beta_slow=fields.optional_number("beta_slow") or 1.0,
            mscale=fields.optional_number("mscale"),
            mscale_all_dim=fields.optional_number("mscale_all_dim"),
            truncate=fields.flag("truncate"),
        )
    elif kind == "longrope":
        before = _original_context(fields, original, context)
        spec = base(
            factor=fields.optional_number("factor") or context / before,
            original_max_position=before,
            attention_factor=fields.number("short_mscale") if mscales else fields.optional_number("attention_factor"),
            long_attention_factor=fields.number("long_mscale") if mscales else None,
            short_factors=fields.numbers("short_factor"),
            long_factors=fields.numbers("long_factor"),
        )
    else:
        low, high = fields.number("low_freq_factor"), fields.number("high_freq_factor")
        if high < low:
            raise UnsupportedError(f"high_freq_factor must not be below low_freq_factor, got {high:g} and {low:g}")
        spec = base(
            factor=fields.number("factor"),
            original_max_position=_original_context(fields, original, context),
            low_freq_factor=low,
            high_freq_factor=high,
        )
    fields.close(_STREAMS)
    return spec


def _original_context(fields: ConfigFields, original: int | None, context: int) -> int:
    """The context length before stretching: from the rope parameters or beside them, else the whole context."""
    inner = fields.optional_integer("original_max_position_embeddings")
    if original is not None and inner not in (None, original):
        raise UnsupportedError(f"original_max_position_embeddings is {original}, but {inner} in the rope parameters")
    return inner or original or context
