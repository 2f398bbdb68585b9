"""Eviction policies by name."""

from ef_jax.errors import InputError
from ef_jax.memory.policies.base import Key as Key
from ef_jax.memory.policies.base import Policy as Policy
from ef_jax.memory.policies.lfru import Lfru
from ef_jax.memory.policies.lfu import Lfu
from ef_jax.memory.policies.lru import Lru
from ef_jax.memory.policies.next_use import NextUse
from ef_jax.memory.policies.plec import Plec
from ef_jax.memory.policies.static import Static
from ef_jax.memory.policies.two_level import TwoLevel

POLICIES: dict[str, type[Policy]] = {
    "lru": Lru,
    "lfu": Lfu,
    "lfru": Lfru,
    "two_level": TwoLevel,
    "plec": Plec,
    "static": Static,
    "next_use": NextUse,
}


def make_policy(name: str, *, layers: int, experts: int, cache_slots: int) -> Policy:
    """The policy called `name` for a cache of `cache_slots` slots over `layers` MoE layers of `experts` experts.

    Raises:
      InputError: no such policy.
    """
    if name not in POLICIES:
        raise InputError(f"policy {name!r} is not one of {', '.join(POLICIES)}")
    return POLICIES[name](layers=layers, experts=experts, cache_slots=cache_slots)
