"""The slots of this process's devices behind one face: each has its own table, link, predictor and scheduler.

Every device is asked for the experts that it serves of what all sequences of its group chose, which every process sees.
What a device then does, and when, is its own affair: nothing of it changes which programs run, so that no process can
wait for one that another does not run.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Int, Int32, UInt8

from ef_jax.memory.residency import Admission, Residency
from ef_jax.memory.slot_pool import Slots
from ef_jax.mesh.layout import MeshLayout
from ef_jax.placement import Placement
from ef_jax.schedule.device_link import DeviceLink
from ef_jax.schedule.emulated_link import EmulatedLink
from ef_jax.schedule.scheduler import Scheduler
from ef_jax.stats import Stats
from ef_jax.timeline import Timeline


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Member:
    """One device of this process: its number, the experts `[L, E]` that it holds, and what serves them."""

    number: int
    holds: Bool[np.ndarray, "L E"]
    residency: Residency
    link: DeviceLink | EmulatedLink
    scheduler: Scheduler[Any]
    stats: Stats

    def holds_all_of(self, layer: int) -> bool:
        """All that the device holds of a layer is in its slots."""
        return bool((self.residency.slot_of[layer][self.holds[layer]] >= 0).all())


class Fleet:
    """The members of this process, as an engine asks them. See `Scheduler` for what the methods have in common."""

    def __init__(self, layout: MeshLayout, placement: Placement, members: Sequence[Member], *, predicts: bool) -> None:
        self.members = list(members)
        self._layout, self._predicts = layout, predicts
        # The device number that serves expert e of layer l to sequences of part p.
        serves = np.stack([servers_of(layout, placement, layer) for layer in range(placement.holds.shape[0])])
        groups = np.arange(layout.data) * layout.owners
        self._server = (groups[None, :, None, None] + serves[:, None]).reshape(len(serves), -1, serves.shape[-1])

    @property
    def on_trial(self) -> bool:
        """Never: by the clock, processes would not agree on which programs to run."""
        return False

    @property
    def hears(self) -> bool:
        """Whether a step that begins now would listen to predictions."""
        return self._predicts

    def listens(self) -> bool:
        """Whether the steps that follow listen to predictions."""
        for member in self.members:
            member.scheduler.listens()
        return self._predicts

    def show(self, timeline: Timeline | None) -> None:
        """Note stalls and copies of the first device in `timeline` from now on; None: nowhere."""
        self.members[0].scheduler.show(timeline)

    def begin_step(
        self,
        tokens: Sequence[int],
        ahead: UInt8[np.ndarray, "distances E"] | None = None,
        *,
        diversity: float | None = None,
        paths: UInt8[np.ndarray, "L E"] | None = None,
        following: UInt8[np.ndarray, "L E"] | None = None,
    ) -> None:
        """A decode step begins."""
        for member in self.members:
            member.scheduler.begin_step(tokens, self._own(member, -1, ahead), diversity=diversity)

    def cannot_miss(self, layer: int) -> bool:
        """Every expert of `layer` that this process's devices hold is in a slot."""
        return all(member.holds_all_of(layer) for member in self.members)

    def note(self, layer: int, rows: Sequence[Sequence[int]], parts: Sequence[int] = ()) -> None:
        """A layer that could not miss chose the experts `rows`, of sequences of these parts of the devices."""
        for member, own in self._shares(layer, rows, parts):
            member.scheduler.note(layer, own)

    def serve(
        self,
        layer: int,
        rows: Sequence[Sequence[int]],
        parts: Sequence[int],
        ahead: UInt8[np.ndarray, "distances E"] | None,
    ) -> Int32[np.ndarray, "N E"]:
        """Have the experts of one layer of a step in slots.

        Args:
          layer: MoE layer.
          rows: the experts of each active sequence.
          parts: which part of the devices has each.
          ahead: what the pre-gate sees from this layer.

        Returns:
          As `slot_rows`.

        Raises:
          LinkError: blocks could not be copied.
        """
        asked: list[Admission] = []
        for member, own in self._shares(layer, rows, parts):
            asked.append(member.scheduler.ask(layer, own, self._own(member, layer, ahead)))
        for member, admission in zip(self.members, asked, strict=True):
            if admission.missing or admission.late:
                member.scheduler.complete(admission)
        return self._slot_rows(
            member.residency.slot_row(layer, admission) for member, admission in zip(self.members, asked, strict=True)
        )

    def slot_rows(self, layer: int) -> Int32[np.ndarray, "N E"]:
        """The slots of a layer's experts by device number; -1: not there, or of another process."""
        return self._slot_rows(member.residency.slot_of[layer] for member in self.members)

    def serve_prompt(
        self,
        layer: int,
        counts: Sequence[Int[np.ndarray, "E"]],
        run: Callable[[int, Slots, Int32[np.ndarray, "E"]], None],
        *,
        keeps_last: bool = False,
    ) -> Int32[np.ndarray, "N E"]:
        """Run the waves of one layer of a prompt's chunk on each device, those of all devices by turns.

        Args:
          layer: MoE layer.
          counts: rows of each expert, of each member.
          run: starts a wave: the index of a member, its pool, and slots `[E]`.
          keeps_last: not each device's last, whose blocks stay in their slots until the next layer is served.

        Returns:
          The slots of the waves that were kept, by device number; -1 elsewhere.

        Raises:
          LinkError: blocks could not be copied.
        """
        waves = [
            (index, member.scheduler.serve_prompt(layer, count))
            for index, (member, count) in enumerate(zip(self.members, counts, strict=True))
        ]
        kept = [np.full(self._server.shape[-1], -1, np.int32) for _ in self.members]
        while waves:
            left = []
            for index, its in waves:
                wave = next(its, None)
                if wave is None:
                    continue
                if wave.last and keeps_last:
                    kept[index] = wave.slot_row
                else:
                    run(index, self.members[index].link.pool.array, wave.slot_row)
                left.append((index, its))
            waves = left
        return self._slot_rows(kept)

    def pools(self) -> Slots:
        """The slots of all devices as one array; it shares their memory, and is lost with the next insert."""
        sharding, count = self._layout.each, self._layout.count

        def together(*parts: jax.Array) -> jax.Array:
            shape = (count * parts[0].shape[0], *parts[0].shape[1:])
            return jax.make_array_from_single_device_arrays(shape, sharding, list(parts))

        arrays = [member.link.pool.array for member in self.members]
        whole: Slots = jax.tree.map(together, *arrays)
        return whole

    def restore(self) -> bool:
        """Make slots anew that an insert which failed has taken; whether there were any."""
        lost = [member.link.pool.restore() for member in self.members]
        return any(lost)

    def end_run(self) -> None:
        """No step follows for now."""
        for member in self.members:
            member.scheduler.end_run()

    def forget(self) -> None:
        """What the slots hold is lost."""
        for member in self.members:
            member.scheduler.forget()

    def shares(
        self, layer: int, rows: Sequence[Sequence[int]], parts: Sequence[int], numbers: Sequence[int]
    ) -> list[list[list[int]]]:
        """What devices serve of the experts of a layer's sequences, of which they may leave some out.

        Args:
          layer: MoE layer.
          rows: the experts of each active sequence, perhaps not as many of each.
          parts: which part of the devices has each.
          numbers: of the devices.

        Returns:
          For each device the experts of each sequence that it serves any of, in the order of `rows`.
        """
        width = max(map(len, rows), default=0)
        square = [row if len(row) == width else [*row, *[-1] * (width - len(row))] for row in rows]
        experts = np.array(square, np.int64).reshape(len(rows), width)
        server = self._server[layer][np.array(parts, np.int64)[:, None], experts]
        shares = []
        for number in numbers:
            mine = ((server == number) & (experts >= 0)).tolist()
            served = [
                [expert for expert, its in zip(row, flags, strict=False) if its]
                for row, flags in zip(rows, mine, strict=True)
            ]
            shares.append([row for row in served if row])
        return shares

    def _shares(
        self, layer: int, rows: Sequence[Sequence[int]], parts: Sequence[int]
    ) -> Iterable[tuple[Member, list[list[int]]]]:
        shares = self.shares(layer, rows, parts, [member.number for member in self.members])
        return zip(self.members, shares, strict=True)

    def _own(
        self, member: Member, layer: int, ahead: UInt8[np.ndarray, "distances E"] | None
    ) -> UInt8[np.ndarray, "distances E"] | None:
        """Predictions with the lowest chance for what a device does not hold; row d is of layer `layer + d`."""
        if ahead is None:
            return None
        own = np.zeros_like(ahead)
        layers = np.arange(layer, layer + len(ahead))
        known = (layers >= 0) & (layers < len(member.holds))
        own[known] = np.where(member.holds[layers[known]], ahead[known], 0)
        return own

    def _slot_rows(self, rows: Iterable[np.ndarray]) -> Int32[np.ndarray, "N E"]:
        whole = np.full((self._layout.count, self._server.shape[-1]), -1, np.int32)
        for member, row in zip(self.members, rows, strict=True):
            whole[member.number] = row
        return whole


def servers_of(layout: MeshLayout, placement: Placement, layer: int) -> Int32[np.ndarray, "X E"]:
    """The owner that serves each expert of a layer to sequences of each index of the `expert` axis; for `send`."""
    return np.ascontiguousarray(placement.serves[layer].T[:: layout.tensor].astype(np.int32))
