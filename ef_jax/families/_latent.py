"""Readers that the families of DeepSeek's design share: latent attention, their router, shared experts."""

import math
from collections.abc import Callable

from ef_jax.errors import UnsupportedError
from ef_jax.families._fields import ConfigFields
from ef_jax.families._rope import rope_from_config
from ef_jax.spec import (
    LatentAttentionSpec,
    RopeSpec,
    RouterGroups,
    RouterNormalize,
    RouterSpec,
    SharedExpertSpec,
)

EXPERT_COUNT = ("n_routed_experts", "num_experts", "num_local_experts")

INERT = frozenset(
    {
        "aux_loss_alpha",
        "ep_size",
        "head_dim",  # transformers writes the width of a rotated key there and does not read it back
        "num_mtp_layers",
        "num_nextn_predict_layers",
        "qk_head_dim",
        "seq_aux",
    }
)


def latent_attention(
    *, interleave: str | None = None, precise: bool = False
) -> Callable[[ConfigFields, int], LatentAttentionSpec]:
    """Reader of latent attention; `interleave` is the field that tells how pairs lie, None: they are neighbours."""

    def read(fields: ConfigFields, hidden: int) -> LatentAttentionSpec:
        heads = fields.integer("num_attention_heads")
        kv_heads = fields.optional_integer("num_key_value_heads") or heads
        if kv_heads != heads:
            raise UnsupportedError(
                f"num_key_value_heads must be num_attention_heads ({heads}) in latent attention, got {kv_heads}"
            )
        nope = fields.integer("qk_nope_head_dim")
        interleaved = fields.flag(interleave) if interleave else True
        rope = rope_from_config(fields, fields.integer("qk_rope_head_dim"), interleaved=interleaved, precise=precise)
        return LatentAttentionSpec(
            heads=heads,
            query_rank=fields.optional_integer("q_lora_rank"),
            kv_rank=fields.integer("kv_lora_rank"),
            nope_dim=nope,
            value_dim=fields.integer("v_head_dim"),
            rope=rope,
            bias=fields.flag("attention_bias"),
            scale=_scale(nope + rope.dim, rope),
        )

    return read


def _scale(width: int, rope: RopeSpec) -> float:
    """Of the scores: YaRN's factor for the whole width goes here, squared, not into the rotation."""
    scale = float(width**-0.5)
    if rope.mscale_all_dim and rope.factor > 1:
        scale *= (0.1 * rope.mscale_all_dim * math.log(rope.factor) + 1.0) ** 2
    return scale


def biased_sigmoid_router(fields: ConfigFields) -> RouterSpec:
    """Sigmoid scores, a bias for selection, the best groups by their two best (DeepSeek-V3, GLM-4.5)."""
    count, keep = fields.integer("n_group"), fields.integer("topk_group")
    return RouterSpec(
        score="sigmoid",
        select_bias=True,
        groups=RouterGroups(count=count, keep=keep, score="top2_sum") if count > 1 else None,
        normalize=RouterNormalize(eps=1e-20) if fields.flag("norm_topk_prob") else None,
        scale=fields.number("routed_scaling_factor"),
        dtype="f32",
    )


def shared_experts(fields: ConfigFields) -> SharedExpertSpec | None:
    """Always-on experts as one of their joint width; `n_shared_experts` of 0 or null: none."""
    count = fields.optional_integer("n_shared_experts", minimum=0)
    return SharedExpertSpec(width=count * fields.integer("moe_intermediate_size"), gated=False) if count else None
