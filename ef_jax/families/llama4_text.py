"""Llama 4's language model by itself."""

import dataclasses

from ef_jax.families import llama4
from ef_jax.families._family import Family

FAMILY: Family = dataclasses.replace(
    llama4.FAMILY,
    model_type="llama4_text",
    architectures=("Llama4ForCausalLM",),
    names=dataclasses.replace(llama4.FAMILY.names, model="model", head="lm_head", unused=()),
    text=None,
)
