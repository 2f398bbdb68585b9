"""What `bench.scale` predicts of prompts cut into micro-batches, from stated figures and rows counted in the replay."""

import dataclasses
from typing import Any

from bench._report import rounded
from ef_jax.forecast.machine import Machine
from ef_jax.mesh.overlap import LayerCosts, LinearCost, Split, choose_split
from ef_jax.schedule.link_model import LinkModel

TOKENS = (4, 512, 4096)
"""Of a device: a step of decoding, and two prompts."""
# Of DeepSeek-V2-Lite: attention's projections and the shared experts, those of a layer.
DENSE_WEIGHTS = 2048 * (16 * 192 + 576) + 512 * 16 * 256 + 2048 * 2048 + 3 * 2048 * 2 * 1408


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Figures:
    """What the devices are, as `ef_jax.replay.partitioned.PartitionedSettings` has it, and how fast they multiply."""

    machine: Machine
    network: LinkModel
    far_network: LinkModel
    node: int
    layer_seconds: float
    block_bytes: int
    row_bytes: int
    layers: int
    num_experts: int
    top_k: int


def predict(row: dict[str, Any], figures: Figures) -> list[dict[str, Any]]:
    """A dict for each of `TOKENS`, of the devices of one row of the replay."""
    costs = layer_costs(row, figures)
    return [_dict(row, choose_split(costs, tokens, layers=figures.layers)) for tokens in TOKENS]


def layer_costs(row: dict[str, Any], figures: Figures) -> LayerCosts:
    """Costs of one device. Work is even: every device computes and exchanges what the mean one does.

    A micro-batch reads every block of its layer, from slots or, where it has none, over the link. Products take
    2 operations a weight; attention's own products of positions are left out.
    """
    machine, group = figures.machine, row["group"]
    blocks = figures.num_experts / group
    copied = blocks * (1 - row["share"])
    read = (
        blocks * figures.block_bytes / machine.device_bandwidth + copied * figures.block_bytes / machine.link_bandwidth
    )
    expert_weights = figures.block_bytes / 2  # of 16 bits
    return LayerCosts(
        attend=LinearCost(fixed=figures.layer_seconds, per_row=2 * DENSE_WEIGHTS / machine.device_flops),
        send=_exchange(row["sent"], group, figures),
        experts=LinearCost(fixed=read, per_row=2 * figures.top_k * expert_weights / machine.device_flops),
        collect=_exchange(row["returned"], group, figures),
    )


def _exchange(rows: float, group: int, figures: Figures) -> LinearCost:
    """Of one way: near and far rows side by side, as many to every other device."""
    size = rows * figures.row_bytes
    near = LinearCost(fixed=figures.network.latency, per_row=size / figures.network.bandwidth)
    if group <= figures.node:
        return near
    far = size * (group - figures.node) / (group - 1) / figures.far_network.bandwidth
    return LinearCost(fixed=figures.far_network.latency, per_row=max(near.per_row, far))


def _dict(row: dict[str, Any], split: Split) -> dict[str, Any]:
    return {
        "slots": row["slots"],
        "group": row["group"],
        "tokens": split.rows,
        "micro_batches": split.micro_batches,
        "whole_ms": rounded(1e3 * split.seconds[1]),
        "cut_ms": rounded(1e3 * split.seconds[split.micro_batches]),
        "two_ms": rounded(1e3 * split.seconds[2]),
        "gain": rounded(split.gain),
    }
