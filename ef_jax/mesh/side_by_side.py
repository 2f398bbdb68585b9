"""Prompt passes side by side: a layer of each by turns, while another's last wave of experts is kept back.

A pass stops behind every layer whose experts are served: all their blocks are in slots, and all waves but the last have
been started on each device. That one may wait, for the program that takes another pass into its next layer to run it
too: its experts are computed while the other's rows are exchanged (`MeshPrograms.beside`). It cannot wait for longer:
the blocks of the next layer that is served may take its slots.
"""

import dataclasses
import functools
from collections import deque
from collections.abc import Generator, Iterable
from typing import Any, TypeVar

import jax
import numpy as np
from jaxtyping import Int32

from ef_jax.mesh.fleet import Fleet
from ef_jax.mesh.programs import MeshPrograms
from ef_jax.runtime.executables import Compiled
from ef_jax.runtime.steps import SortedRows

_Of = TypeVar("_Of")


@dataclasses.dataclass(slots=True)
class LastWave:
    """The last wave of one layer of a pass, on all devices.

    Attributes:
      width: of the pass.
      rows: of each device, in the order of their experts.
      outputs: of the waves before; once it has run, of all.
      slot_rows: slots of the experts that it computes, by device number.
    """

    width: int
    rows: SortedRows
    outputs: jax.Array
    slot_rows: Int32[np.ndarray, "N E"]


class SideBySide:
    """Runs passes, and the waves that they leave to one another.

    Attributes:
      keeps: passes that run now keep their last waves back.
    """

    def __init__(self, programs: MeshPrograms, fleet: Fleet) -> None:
        self.keeps = False
        self._programs, self._fleet = programs, fleet
        self._waiting: LastWave | None = None

    def run(self, passes: Iterable[Generator[list[Any], None, _Of]], most: int) -> list[_Of]:
        """Run passes, in order, up to `most` of them at a time.

        Returns:
          What each has returned, in the order in which they end.

        Raises:
          LinkError: blocks of one could not be copied; none that has not ended goes on.
        """
        self.keeps = most > 1
        try:
            return _by_turns(passes, most, self._settled)
        finally:
            self.keeps, self._waiting = False, None

    def keep(self, wave: LastWave) -> LastWave:
        """A wave is left for the next program of another pass to run; it stands for its outputs until then."""
        self._waiting = wave
        return wave

    def finish(self) -> None:
        """Start the wave that waits, if there is one, by itself."""
        wave, self._waiting = self._waiting, None
        if wave is None:
            return
        devices = [self._programs.layout.devices[member.number] for member in self._fleet.members]
        done = []
        for member, *rows, outputs in zip(
            self._fleet.members, *(local_parts(array, devices) for array in (*wave.rows, wave.outputs)), strict=True
        ):
            run = self._programs.wave_of(wave.width, member.number)
            slot_row = wave.slot_rows[member.number]
            done.append(run(SortedRows._make(rows), outputs, member.link.pool.array, slot_row))
        wave.outputs = jax.make_array_from_single_device_arrays(wave.outputs.shape, wave.outputs.sharding, done)

    def programs(self, programs: list[Compiled], width: int, span: int) -> list[Compiled]:
        """`programs`, of the layers of a pass, that also run the wave that waits, where rows are exchanged."""
        begin, *others = programs
        fused = zip(others, self._programs.besides(width, span), strict=True)
        return [
            begin,
            *(alone if beside is None else functools.partial(self._beside, alone, beside) for alone, beside in fused),
        ]

    def _beside(self, alone: Compiled, fused: Compiled, *arguments: Any) -> Any:
        wave, self._waiting = self._waiting, None
        if wave is None:
            return alone(*arguments)
        pools = self._fleet.pools()
        wave.outputs, *results = fused(wave.rows, wave.outputs, pools, wave.slot_rows, *arguments)
        return results

    def _settled(self, carried: Any) -> Any:
        """What a layer carries, with the outputs of its last wave."""
        if not isinstance(carried[-1], LastWave):
            return carried
        if carried[-1] is self._waiting:
            self.finish()
        return *carried[:-1], carried[-1].outputs


def local_parts(array: jax.Array, devices: list[jax.Device]) -> list[jax.Array]:
    """The part of an array that each of some devices has, which are this process's."""
    by_device = {shard.device: shard.data for shard in array.addressable_shards}
    return [by_device[device] for device in devices]


def _by_turns(passes, most, settled):  # type: ignore[no-untyped-def]
    waiting, results = iter(passes), list[Any]()
    ring: deque[tuple[Generator[list[Any], None, Any], list[Any]]] = deque()
    while True:
        while len(ring) < most and (following := next(waiting, None)) is not None:
            ring.append((following, []))
        if not ring:
            return results
        steps, place = ring.popleft()
        place[:] = [settled(carried) for carried in place]
        try:
            ring.append((steps, next(steps)))
        except StopIteration as end:
            results.append(end.value)
