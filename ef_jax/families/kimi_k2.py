"""Kimi-K2: DeepSeek-V3 under another name."""

import dataclasses

from ef_jax.families.deepseek_v3 import FAMILY as DEEPSEEK_V3

FAMILY = dataclasses.replace(DEEPSEEK_V3, model_type="kimi_k2")
