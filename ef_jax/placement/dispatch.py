"""`dispatch`: which device each sequence of a trace runs on, and when, as many side by side on each."""

import dataclasses
import heapq

import numpy as np
from jaxtyping import Float64, Int64

from ef_jax.errors import InputError
from ef_jax.placement.placement import Placement
from ef_jax.replay.trace import PassOrder, RoutingTrace

# Sequences that wait to be chosen from: a device that becomes free takes the one that suits it best.
_WAITING_PER_DEVICE = 4
# Tokens of a sequence that are known when it is sent to a device, where the trace does not say what its prompt is.
KNOWN_TOKENS = 32


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Dispatch:
    """Where and when the tokens of a trace run.

    Attributes:
      order: the rows of each step, device by device.
      homes: int64 `[N]`, the device of each of the trace's rows.
      batch: sequences side by side, on all devices together.
    """

    order: PassOrder
    homes: Int64[np.ndarray, "N"]
    batch: int


def token_affinity(trace: RoutingTrace, placement: Placement) -> dict[int, Float64[np.ndarray, "N"]]:
    """Of each token that a trace has: the rows that stay, were it on each device, a share of all its rows."""
    local = np.zeros((trace.count, placement.devices))
    for layer in range(trace.layers):
        local += placement.holds[layer][trace.experts[:, layer].astype(np.int64)].sum(axis=1)
    local /= trace.layers * trace.top_k
    tokens, index = np.unique(trace.tokens, return_inverse=True)
    sums = np.zeros((len(tokens), placement.devices))
    np.add.at(sums, index, local)
    sums /= np.bincount(index)[:, None]
    return dict(zip(tokens.tolist(), sums, strict=True))


def request_scores(
    trace: RoutingTrace, affinity: dict[int, Float64[np.ndarray, "N"]], devices: int
) -> Float64[np.ndarray, "Q N"]:
    """How well each sequence suits each device, by its first tokens alone; 0 where none of them is known."""
    scores = np.zeros((trace.sequences, devices))
    for sequence, start in enumerate(trace.offsets[:-1].tolist()):
        stop = min(start + KNOWN_TOKENS, int(trace.offsets[sequence + 1]))
        known = [affinity[token] for token in trace.tokens[start:stop].tolist() if token in affinity]
        if known:
            scores[sequence] = np.mean(known, axis=0)
    return scores


def dispatch(
    trace: RoutingTrace, devices: int, *, batch: int, scores: Float64[np.ndarray, "Q N"] | None = None
) -> Dispatch:
    """Run the sequences of a trace on devices, every token as a step of decoding, `batch` side by side.

    A place that becomes free takes the next sequence or, with `scores`, the one of the next few that suits its device
    best, compared with the other devices.

    Args:
      trace: the sequences, in the order in which they come.
      devices: N, which has to divide the batch.
      batch: sequences side by side, on all devices together.
      scores: how well each sequence suits each device.

    Raises:
      InputError: the devices do not divide the batch.
    """
    if batch < devices or batch % devices:
        raise InputError(f"batch {batch} cannot be shared by {devices} devices: give a multiple of {devices}")
    each = batch // devices
    lengths = np.diff(trace.offsets)
    waiting = list(range(trace.sequences))
    window = _WAITING_PER_DEVICE * devices if scores is not None else 1
    relative = None if scores is None else scores - scores.mean(axis=1, keepdims=True)
    # By time, then place within a device, then device: the first sequences go round all devices.
    free = [(0, place % each, place // each) for place in range(batch)]
    heapq.heapify(free)
    begins, places, homes = np.zeros((3, trace.sequences), np.int64)
    while waiting:
        time, place, device = free[0]
        near = waiting[:window]
        chosen = near[0] if relative is None else near[int(np.argmax(relative[near, device]))]
        waiting.remove(chosen)
        begins[chosen], places[chosen], homes[chosen] = time, device * each + place, device
        heapq.heapreplace(free, (time + int(lengths[chosen]), place, device))
    step = np.arange(trace.count) + np.repeat(begins - trace.offsets[:-1], lengths)
    rows = np.lexsort((np.repeat(places, lengths), step))
    bounds = np.concatenate([[0], np.cumsum(np.bincount(step))])
    order = PassOrder(rows, bounds, np.zeros(len(bounds) - 1, bool))
    return Dispatch(order=order, homes=np.repeat(homes, lengths), batch=batch)
