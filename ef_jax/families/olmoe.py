"""OLMoE."""

from ef_jax.errors import UnsupportedError
from ef_jax.families import _common
from ef_jax.families._family import Family
from ef_jax.families._fields import ConfigFields
from ef_jax.families._names import TensorNames
from ef_jax.spec import AttentionSpec

_read_attention = _common.grouped_query(
    qkv_bias="attention_bias", out_bias="attention_bias", qk_norm="full", clip_qkv=True
)


def _attention(fields: ConfigFields, hidden: int) -> AttentionSpec:
    """transformers sizes the norms of queries and keys by the hidden size."""
    attention = _read_attention(fields, hidden)
    if attention.heads * attention.head_dim != hidden:
        raise UnsupportedError(
            f"head_dim must be hidden_size / num_attention_heads where queries and keys are normed whole, "
            f"got {attention.head_dim} with hidden_size {hidden} and {attention.heads} heads"
        )
    return attention


FAMILY = Family(
    model_type="olmoe",
    architectures=("OlmoeForCausalLM",),
    names=TensorNames(),
    defaults=_common.DEFAULTS
    | {
        "vocab_size": 50304,
        "hidden_size": 2048,
        "intermediate_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "eos_token_id": 50279,
        "num_experts_per_tok": 8,
        "num_experts": 64,
    },
    layers=_common.full_layers,
    attention=_attention,
    router=_common.softmax_router(normalize="norm_topk_prob"),
    experts=_common.experts("intermediate_size"),
)
