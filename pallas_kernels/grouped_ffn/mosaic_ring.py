"""The ring of stages through which one warpgroup hands tiles in shared memory to those that multiply them."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

# Registers a thread: the warpgroups of a block share 65,536, and the one that copies needs few.
COPIER_REGISTERS = 40
CONSUMER_REGISTERS = 232


@dataclass(frozen=True, kw_only=True)
class Ring:
    """Stages are filled and read in turn, by position: the count of steps that this block has begun before.

    Attributes:
      stages: number of stages.
      full: a barrier for each stage, at which its copies arrive.
      empty: a barrier for each stage, at which its readers arrive.
    """

    stages: int
    full: Any
    empty: Any

    def to_fill(self, position: jax.Array) -> jax.Array:
        """The stage at `position`, once nobody reads it any more."""
        stage = lax.rem(position, self.stages)

        @pl.when(position >= self.stages)
        def _() -> None:
            plgpu.barrier_wait(self.empty.at[stage])

        return stage

    def drain(self, done: jax.Array) -> None:
        """Waits until every stage that was filled has been read, after `done` steps."""

        def wait(position: jax.Array, carry: None) -> None:
            plgpu.barrier_wait(self.empty.at[lax.rem(position, self.stages)])

        lax.fori_loop(jnp.maximum(done - self.stages, 0), done, wait, None)

    def to_read(self, position: jax.Array) -> jax.Array:
        """The stage at `position`, once its copies are there."""
        stage = lax.rem(position, self.stages)
        plgpu.barrier_wait(self.full.at[stage])
        return stage

    def release_but_last(self, position: jax.Array, step: jax.Array) -> None:
        """After the wgmma of `step` of a tile, at `position`: the one before has ended, so its stage is free."""
        plgpu.wgmma_wait(1)

        @pl.when(step > 0)
        def _() -> None:
            plgpu.barrier_arrive(self.empty.at[lax.rem(position - 1, self.stages)])

    def release_last(self, position: jax.Array, steps: jax.Array | int) -> None:
        """After all `steps` of a tile, which end before `position`: the last wgmma ends, and its stage is free."""
        plgpu.wgmma_wait(0)

        @pl.when(jnp.asarray(steps) > 0)
        def _() -> None:
            plgpu.barrier_arrive(self.empty.at[lax.rem(position - 1, self.stages)])

    def skip(self, before: jax.Array, steps: int) -> None:
        """Lets `steps` stages go by unread, as a warpgroup does that has no part in a tile."""

        def step(k: jax.Array, carry: None) -> None:
            plgpu.barrier_arrive(self.empty.at[self.to_read(before + k)])

        lax.fori_loop(0, steps, step, None)
