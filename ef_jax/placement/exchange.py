"""`exchange`: what a placement sends between devices, and how evenly it shares the work, counted over a trace."""

import dataclasses

import numpy as np
from jaxtyping import Int64

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
      experts: distinct experts in use on the device that uses most, int64 `[P, L]`.
      rows_imbalance: rows that the busiest device of a layer computes in a step, over the mean of all devices.
      experts_imbalance: distinct experts that a layer of a step uses on the device that uses most, over the mean: what
        bounds decoding, which reads weights.
    """

    sent: float
    returned: float
    local: float
    busiest: Int64[np.ndarray, "P L"]
    experts: Int64[np.ndarray, "P L"]
    rows_imbalance: float
    experts_imbalance: float

    def as_dict(self) -> dict[str, float]:
        """Plain JSON types; means of the arrays."""
        fields = (field.name for field in dataclasses.fields(self))
        return {name: float(np.mean(getattr(self, name))) for name in fields}


def exchange(trace: RoutingTrace, placement: Placement, run: Dispatch) -> Exchange:
    """What the steps of `run` exchange under a placement."""
    devices, layers = placement.devices, trace.layers
    rows, bounds, _ = run.order
    step_of = np.empty(trace.count, np.int64)
    step_of[rows] = np.repeat(np.arange(len(bounds) - 1), np.diff(bounds))
    steps = len(bounds) - 1
    sent = returned = 0
    rows_ratio = experts_ratio = 0.0
    busiest, most = np.zeros((2, steps, layers), np.int64)
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
        out = np.bincount(step_of * devices + run.homes, goes.sum(axis=1), steps * devices)
        back = np.bincount(step_of * devices + run.homes, remote.sum(axis=1), steps * devices)
        places = np.broadcast_to(step_of[:, None], ordered.shape)
        arrives = np.bincount((places * devices + ordered)[goes], minlength=steps * devices)
        gives = np.bincount((places * devices + server)[remote], minlength=steps * devices)
        busiest[:, layer] = _per_step(np.maximum(out + gives, arrives + back), devices).max(axis=1)
        work = _per_step(np.bincount((places * devices + server).ravel(), minlength=steps * devices), devices)
        rows_ratio += float((work.max(axis=1) / work.mean(axis=1)).mean())
        keys = np.unique((places * devices + server) * trace.num_experts + experts)
        distinct = _per_step(np.bincount(keys // trace.num_experts, minlength=steps * devices), devices)
        most[:, layer] = distinct.max(axis=1)
        experts_ratio += float((distinct.max(axis=1) / distinct.mean(axis=1)).mean())
    tokens = trace.count * layers
    return Exchange(
        sent=sent / tokens,
        returned=returned / tokens,
        local=1 - returned / (tokens * trace.top_k),
        busiest=busiest,
        experts=most,
        rows_imbalance=rows_ratio / layers,
        experts_imbalance=experts_ratio / layers,
    )


def _per_step(counts: np.ndarray, devices: int) -> np.ndarray:
    return counts.reshape(-1, devices)
