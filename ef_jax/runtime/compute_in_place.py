"""Missing experts of a decode step computed by the host's processor instead of being copied to the device."""

import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Int, Int32

from ef_jax.errors import LinkError
from ef_jax.memory.host_store import Store
from ef_jax.memory.residency import Residency
from ef_jax.runtime.expert_kernels import DECODE_TILE_ROWS
from ef_jax.runtime.host_experts import HostExperts
from ef_jax.runtime.miss_handlers import MissError
from ef_jax.runtime.steps import Routed
from ef_jax.schedule.link import Link, PrefetchLink
from ef_jax.schedule.miss_costs import Miss, MissCosts

_HOST_ERRORS = (RuntimeError, MemoryError, OSError, ValueError)  # JAX's are RuntimeErrors


class ComputeInPlace:
    """A `MissHandler` that computes experts where they are, while the others are copied and resident ones run.

    Decode at batch 1 has one row an expert: to compute it reads the block once, at the bandwidth of host memory, which
    is higher than the link's (Fiddler, arXiv:2402.07033). With more rows computing takes longer and copying does not.

    Beside an accelerator results differ by the rounding of another kernel. On a machine without one they are the same,
    bit for bit.

    Args:
      host: computes.
      store: where the blocks are.
      link: copies the others.
      residency: knows what is on its way, and before them on the link.
      choice: "compute" computes all that is missing, "auto" what is done sooner that way, see `MissCosts`.

    Attributes:
      counter, block_bytes, free, lingers: see `MissHandler`.
    """

    counter = "computed"
    block_bytes = 0
    free = False

    def __init__(self, host: HostExperts, store: Store, link: Link[Any], residency: Residency, choice: Miss) -> None:
        self._host, self._store, self._link, self._choice = host, store, link, choice
        self._residency = residency
        self._off_because: str | None = None
        if choice == "auto" and not (host.shares_device or isinstance(link, PrefetchLink)):
            self._off_because = 'the link does not measure its copies: leave out copy_mode, or give miss="compute"'
        take_over = host.copy_seconds()
        self.lingers = take_over is None  # on a host that is the device, what is in a slot is computed no sooner
        self._costs = MissCosts(tile_rows=DECODE_TILE_ROWS, take_over=take_over)
        if choice == "auto" and self._off_because is None:
            for rows in sorted({1, host.batch}):
                self._costs.computed(rows, host.probe(rows))

    def keep(
        self,
        layer: int,
        rows: Sequence[Sequence[int]],
        absent: Sequence[int],
        weights: Sequence[Sequence[float]] | None,
    ) -> list[int]:
        """See `MissHandler`."""
        if self._off_because is not None:
            return []
        if self._choice == "compute":
            return list(absent)
        counts = {expert: sum(expert in row for row in rows) for expert in absent} if len(rows) > 1 else {}
        fewest = sorted(absent, key=lambda expert: counts.get(expert, 1))
        pace = self._link.pace.block_seconds if isinstance(self._link, PrefetchLink) else 0.0
        busy = max(0.0, len(self._residency.in_flight) - 0.5) * pace
        return fewest[: self._costs.split([counts.get(expert, 1) for expert in fewest], pace, busy)]

    def run(self, layer: int, routed: Routed, kept: Sequence[int], outputs: jax.Array) -> jax.Array:
        """See `MissHandler`.

        Raises:
          MissError: the host's program has failed; nothing is kept any more.
          LinkError: a block is not in host memory and cannot be had.
        """
        host = self._host
        self._store.request([(layer, expert) for expert in kept])
        began = time.perf_counter()
        try:
            inputs = host.inputs(routed.h, routed.weights)
            places, ends = rows_by_expert(np.asarray(routed.ids), kept)
            around = time.perf_counter() - began
            computed = host.begin(outputs)
            for expert, of, to in zip(kept, places, ends, strict=True):
                block = self._store.block(layer, expert)
                began = time.perf_counter()
                computed = host.run(block, inputs, of, to, computed)
                self._costs.computed(len(of), time.perf_counter() - began)
            began = time.perf_counter()
            outputs = host.end(computed, np.concatenate(ends), outputs)
        except LinkError:
            raise
        except _HOST_ERRORS as error:
            said = (str(error).splitlines() or [type(error).__name__])[0]
            self._off_because = f"the host could not compute experts of MoE layer {layer}: {said:.200}"
            raise MissError(self._off_because) from error
        self._costs.around(around + time.perf_counter() - began)
        return outputs

    def report(self) -> dict[str, Any]:
        """What was chosen by what figures, as plain JSON types: `Stats.miss`."""
        pace = self._link.pace.block_seconds if isinstance(self._link, PrefetchLink) else None
        return {
            "choice": self._choice,
            "off_because": self._off_because,
            "processor": self._host.processor,
            "copy_seconds": pace,
            **self._costs.report(),
        }


def rows_by_expert(
    ids: Int32[np.ndarray, "B 1 K"], experts: Sequence[int]
) -> tuple[list[Int[np.ndarray, " n"]], list[Int[np.ndarray, " n"]]]:
    """Of each expert the places of its rows in the flat ids, by token, and their rows in the outputs of
    `run_experts`."""
    flat = ids.reshape(-1)
    if ids.shape[0] == 1:
        of_one = [np.flatnonzero(flat == expert) for expert in experts]
        return of_one, of_one
    group = np.where(flat < 0, np.iinfo(np.int32).max, flat)
    order = np.argsort(group, kind="stable")
    ordered = group[order]
    spans = [(np.searchsorted(ordered, expert), np.searchsorted(ordered, expert, "right")) for expert in experts]
    return [order[first:end] for first, end in spans], [np.arange(first, end) for first, end in spans]
