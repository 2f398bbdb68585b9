"""Placements from recorded routing: by load alone, or by load and by which requests use what.

"affine" is the alternation of Speculative MoE (arXiv 2503.04398): experts go where the requests are that use them,
requests go where their experts are, and again, until neither gains. Theirs starts from a cross-entropy search; here a
few starts are tried, and swaps then weigh in which experts a token uses together, and the load.
"""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Bool, Float64, Int64
from scipy.optimize import linear_sum_assignment

from ef_jax.errors import InputError
from ef_jax.placement.placement import Flows, Placement, check_divides
from ef_jax.replay.trace import RoutingTrace

PLACEMENTS = ("contiguous", "balanced", "affine")

Usage = Float64[np.ndarray, "Q L E"]
"""How often each sequence uses each expert."""

_LOAD_WEIGHT = 1.0  # of a row beyond a device's share, in rows that cross: both cost that device's time
_STARTS, _ROUNDS = 3, 8
_MOST_SWAPS = 8  # an expert


def place(name: str, trace: RoutingTrace, devices: int, *, replicas: int = 0, seed: int = 0) -> Placement:
    """A placement of the experts of a trace's model.

    Args:
      name: "contiguous": in order. "balanced": the most used first, each to the device with the least to do.
        "affine": by load and affinity.
      trace: routing to go by; sequences are its requests.
      devices: N, which has to divide the experts.
      replicas: further experts of each layer on each device: those that its requests use most of what it lacks.
      seed: of the starts and swaps of "affine".

    Raises:
      InputError: no such placement, devices that do not divide the experts, or more replicas than other experts.
    """
    if name not in PLACEMENTS:
        raise InputError(f"placement {name!r:.60} is not one of {', '.join(PLACEMENTS)}")
    check_divides(trace.num_experts, devices)
    most = trace.num_experts - trace.num_experts // devices
    if not 0 <= replicas <= most:
        raise InputError(f"{replicas} replicas: a device has 0 to {most} experts of a layer to copy from others")
    used = usage(trace)
    if name == "affine":
        holds, homes = _alternate(used, devices, np.random.default_rng(seed))
        layers = zip(holds, flows_of(used, homes, devices), _used_together(trace), strict=True)
        holds = np.stack([_swapped(*layer) for layer in layers])
    else:
        homes = np.arange(trace.sequences) % devices
        holds = _balanced(used.sum(axis=0), devices)
        if name == "contiguous":
            holds = Placement.contiguous(layers=trace.layers, experts=trace.num_experts, devices=devices).holds
    flows = flows_of(used, homes, devices)
    if replicas:
        holds = _replicated(holds, flows, replicas)
    return Placement.of(holds, flows)


def usage(trace: RoutingTrace) -> Usage:
    """How often each sequence of a trace uses each expert, `[Q, L, E]`."""
    used = np.zeros((trace.sequences, trace.layers, trace.num_experts))
    sequence = np.repeat(np.arange(trace.sequences), np.diff(trace.offsets))
    np.add.at(used, (sequence[:, None, None], np.arange(trace.layers)[:, None], trace.experts.astype(np.int64)), 1)
    return used


def _used_together(trace: RoutingTrace) -> Iterator[Float64[np.ndarray, "E E"]]:
    """Of each layer, the tokens that use two experts together; 0 for an expert and itself."""
    for layer in range(trace.layers):
        uses = np.zeros((trace.count, trace.num_experts), np.float32)
        np.put_along_axis(uses, trace.experts[:, layer].astype(np.int64), 1, axis=1)
        together = (uses.T @ uses).astype(np.float64)
        np.fill_diagonal(together, 0)
        yield together


def flows_of(used: Usage, homes: Int64[np.ndarray, "Q"], devices: int) -> Flows:
    """Rows from devices to experts, were each sequence on the device that `homes` says."""
    flows = np.zeros((*used.shape[1:], devices))
    for device in range(devices):
        flows[..., device] = used[homes == device].sum(axis=0)
    return flows


def _balanced(load: Float64[np.ndarray, "L E"], devices: int) -> Bool[np.ndarray, "L E N"]:
    """The most used first, each to the device with the least to do that has room."""
    layers, experts = load.shape
    holds = np.zeros((layers, experts, devices), bool)
    for layer in range(layers):
        room, done = np.full(devices, experts // devices), np.zeros(devices)
        for expert in np.argsort(-load[layer], kind="stable").tolist():
            device = int(np.argmin(np.where(room > 0, done, np.inf)))
            holds[layer, expert, device] = True
            room[device] -= 1
            done[device] += load[layer, expert]
    return holds


def _alternate(
    used: Usage, devices: int, random: np.random.Generator
) -> tuple[Bool[np.ndarray, "L E N"], Int64[np.ndarray, "Q"]]:
    """Experts and requests on devices: of some starts, the one with the most rows that stay."""
    best: tuple[float, Bool[np.ndarray, "L E N"], Int64[np.ndarray, Q]] | None = None
    for _ in range(_STARTS):
        homes = random.permutation(len(used)) % devices
        last = -np.inf
        for _ in range(_ROUNDS):
            flows = flows_of(used, homes, devices)
            holds = np.stack([_nearest(layer) for layer in flows])
            stay = float(flows[holds].sum())
            if best is None or stay > best[0]:
                best = stay, holds, homes
            if stay <= last:
                break
            last = stay
            homes = _home_requests(np.einsum("qle,len->qn", used, holds))
    assert best is not None
    return best[1], best[2]


def _nearest(flows: Float64[np.ndarray, "E N"]) -> Bool[np.ndarray, "E N"]:
    """One layer: as many experts on each device, with the most rows that stay."""
    experts, devices = flows.shape
    room = experts // devices
    _, column = linear_sum_assignment(-np.repeat(flows, room, axis=1))
    return np.asarray((column // room)[:, None] == np.arange(devices))


def _swapped(
    holds: Bool[np.ndarray, "E N"], flows: Float64[np.ndarray, "E N"], together: Float64[np.ndarray, "E E"]
) -> Bool[np.ndarray, "E N"]:
    """One layer, after the swaps of two experts that save the most, one after another, until none saves anything.

    A row that stays is neither sent nor returned, two of a token that go to one device are sent once, and a device's
    rows beyond the mean count as their square over the mean.
    """
    experts, devices = flows.shape
    home, index = holds.argmax(axis=1), np.arange(experts)
    rows = flows.sum(axis=1)
    mean = max(rows.sum() / devices, 1.0)
    apart = (1 - 1 / devices) * together  # pairs on the token's own device are counted as rows that stay
    moved = rows[:, None] - rows
    for _ in range(_MOST_SWAPS * experts):
        worth = 2 * flows + apart @ (home[:, None] == np.arange(devices))
        of_move = worth[:, home] - worth[index, home][:, None]  # what expert i gains where expert j is
        load = np.bincount(home, rows, devices)[home]
        uneven = 2 * moved * (moved - load[:, None] + load) / mean
        saved = of_move + of_move.T - 2 * apart - _LOAD_WEIGHT * uneven
        saved[home[:, None] == home] = 0
        one, other = np.unravel_index(np.argmax(saved), saved.shape)
        if saved[one, other] <= 1e-9 * mean:
            break
        home[[one, other]] = home[[other, one]]
    return np.asarray(home[:, None] == np.arange(devices))


def _home_requests(local: Float64[np.ndarray, "Q N"]) -> Int64[np.ndarray, "Q"]:
    """The device of each request, as many on each, with the most rows that stay."""
    requests, devices = local.shape
    room = -(-requests // devices)
    _, column = linear_sum_assignment(-np.repeat(local, room, axis=1))
    return np.asarray(column // room)


def _replicated(holds: Bool[np.ndarray, "L E N"], flows: Flows, replicas: int) -> Bool[np.ndarray, "L E N"]:
    """With copies on each device of the experts that its own tokens use most of those it lacks."""
    wanted = np.where(holds, -1.0, flows)
    chosen = np.argsort(-wanted, axis=1, kind="stable")[:, :replicas]
    copied = holds.copy()
    np.put_along_axis(copied, chosen, True, axis=1)
    return copied
