from typing import Any

import pytest

import ef_jax
from bench._emulated import EmulatedModels


@pytest.fixture(scope="module")
def models() -> Any:
    """Makes models for a batch of 2, on one set of programs and over emulated links.

    The all-resident one is loaded to look ahead, so that the programs of the others are compiled by then. They are made
    anew for each file, which compiles nothing: arrays that stayed would count among those of other files.
    """
    lm = ef_jax.load(expert_fraction=1.0, batch=2, context=32, chunk=16, emulate_link="20GB/s", progress=False)
    return EmulatedModels(lm)
