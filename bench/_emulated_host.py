"""A host processor of given figures beside an accelerator, in stretched time: real results, held back until they may
be there."""

from typing import Any

import jax

from ef_jax.runtime.host_experts import HostExperts
from ef_jax.schedule.wall_clock import WallClock


def emulated_host(*, bandwidth: float, flops: float, stretch: float) -> type[HostExperts]:
    """A host that streams a block's bytes at `bandwidth`, multiplies at `flops` a second, and takes the longer of both.

    It takes `stretch` times as long: where the CPU of this machine plays the accelerator, it must be slower by as much
    as that CPU is. It must not be faster than this CPU, which computes the results.
    """

    class EmulatedHost(HostExperts):
        def seconds(self, rows: int) -> float:
            """What an expert of so many rows takes."""
            nbytes = self.block_bytes
            return stretch * max(nbytes / bandwidth, nbytes * rows / flops)  # two bytes and two operations a weight

        def run(self, block: Any, inputs: Any, places: Any, to: Any, outputs: Any) -> jax.Array:
            clock = WallClock()
            ready = clock.now + self.seconds(len(places))
            outputs = super().run(block, inputs, places, to, outputs)
            clock.wait_until(ready)
            return outputs

        def probe(self, rows: int) -> float:
            return self.seconds(rows)

        def copy_seconds(self) -> None:
            return None

    return EmulatedHost
