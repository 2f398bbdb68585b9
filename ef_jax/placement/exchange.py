"""`exchange`: what a placement sends between devices, and how evenly it shares the work, counted over a trace."""

import dataclasses
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int64

from ef_jax.placement.dispatch import Dispatch
from ef_jax.placement.placement import Placement
from ef_jax.replay.trace import RoutingTrace


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Exchange:
    """Means over tokens, steps and layers, and the busiest device of each.

    A token's row goes once to every other device that serves one of its experts, and comes back once for every expert,
    since the device of the token sums them in the router's order: with any other sum the bits would depend on the
    placement.

    Attributes:
      sent: rows that a token sends in a layer.
      returned: rows that come back to it.
      local: share of its experts that its own device serves.
      busiest: rows that the busiest device sends or gets, the larger, int64 `[P, L]` by step and layer.
      busiest_far: the same of rows between nodes.
      experts: distinct experts in use on the device that uses most, int64 `[P, L]`.
      rows_imbalance: rows that the busiest device of a layer computes in a step, over the mean of all devices.
      experts_imbalance: distinct experts that a layer of a step uses on the device that uses most, over the mean: what
        bounds decoding, which reads weights.
    """

    sent: float
    returned: float
    local: float
    busiest: Int64[np.ndarray, "P L"]
    busiest_far: Int64[np.ndarray, "P L"]
    experts: Int64[np.ndarray, "P L"]
    rows_imbalance: float
    experts_imbalance: float

    def as_dict(self) -> dict[str, float]:
        """Plain JSON types; means of the arrays."""
        fields = (field.name for field in dataclasses.fields(self))
        return {name: float(np.mean(getattr(self, name))) for name in fields}


def exchange(trace: RoutingTrace, placement: Placement, run: Dispatch, *, node: int | None = None) -> Exchange:
    """What the steps of `run` exchange under a placement; `node` devices make a node, None: all of them."""
    devices, layers = placement.devices, trace.layers
    rows, bounds, _ = run.order
    step_of = np.empty(trace.count, np.int64)
    step_of[rows] = np.repeat(np.arange(len(bounds) - 1), np.diff(bounds))
    steps = len(bounds) - 1
    sent = returned = 0
    rows_ratio = experts_ratio = 0.0
    busiest, busiest_far, most = np.zeros((3, steps, layers), np.int64)
    for layer in range(layers):
        experts = trace.experts[:, layer].astype(np.int64)
        server = placement.serves[layer][experts, run.homes[:, None]].astype(np.int64)
        remote = server != run.homes[:, None]
        ordered = np.sort(np.where(remote, server, -1), axis=1)
        first = np.ones_like(ordered, bool)
        first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
        goes = first & (ordered >= 0)  # once a device
        sent += int(goes.sum())
        returned += int(remote.sum())
        place = step_of * devices
        moves = _Moves(place + run.homes, place[:, None] + ordered, place[:, None] + server, steps * devices)
        busiest[:, layer] = _per_step(moves.rows(goes, remote), devices).max(axis=1)
        if node is not None:
            near = (run.homes // node)[:, None]
            far = moves.rows(goes & (ordered // node != near), remote & (server // node != near))
            busiest_far[:, layer] = _per_step(far, devices).max(axis=1)
        work = _per_step(np.bincount((place[:, None] + server).ravel(), minlength=steps * devices), devices)
        rows_ratio += float((work.max(axis=1) / work.mean(axis=1)).mean())
        keys = np.unique((place[:, None] + server) * trace.num_experts + experts)
        distinct = _per_step(np.bincount(keys // trace.num_experts, minlength=steps * devices), devices)
        most[:, layer] = distinct.max(axis=1)
        experts_ratio += float((distinct.max(axis=1) / distinct.mean(axis=1)).mean())
    tokens = trace.count * layers
    return Exchange(
        sent=sent / tokens,
        returned=returned / tokens,
        local=1 - returned / (tokens * trace.top_k),
        busiest=busiest,
        busiest_far=busiest_far,
        experts=most,
        rows_imbalance=rows_ratio / layers,
        experts_imbalance=experts_ratio / layers,
    )


class _Moves(NamedTuple):
    """Rows of one layer, by the number of a device in a step: where they live, go and are served."""

    home: Int64[np.ndarray, "N"]
    goes_to: Int64[np.ndarray, "N K"]
    served_by: Int64[np.ndarray, "N K"]
    places: int

    def rows(self, going: Bool[np.ndarray, "N K"], coming: Bool[np.ndarray, "N K"]) -> Int64[np.ndarray, "moves"]:
        """Rows that each device sends or gets, the larger, of those that go out and come back."""
        home = np.broadcast_to(self.home[:, None], going.shape)
        sent = np.concatenate([home[going], self.served_by[coming]])
        got = np.concatenate([self.goes_to[going], home[coming]])
        return np.maximum(np.bincount(sent, minlength=self.places), np.bincount(got, minlength=self.places))


def _per_step(counts: np.ndarray, devices: int) -> np.ndarray:
    return counts.reshape(-1, devices)
