"""Bytes that the exchange of one layer makes each device send, counted on the host from the routes.

Bytes count where they leave for another device of the group; what a device keeps is free. A collective of n devices
sends what it must: a gather n - 1 times the device's own part, an exchange of blocks all of them but its own.
"""

import dataclasses

import numpy as np
from jaxtyping import Int32, Int64

from ef_jax.mesh.exchange import Transport


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowBytes:
    """What a token takes: its row and its output for one expert, and for one of its K experts the id and the weight."""

    row: int
    id: int = 4
    weight: int


def sent_bytes(
    ids: Int32[np.ndarray, "X *tokens K"],
    serves: Int32[np.ndarray, "X E"],
    size: RowBytes,
    *,
    tensor: int = 1,
    transport: Transport,
) -> Int64[np.ndarray, " owners"]:
    """Bytes that each device of a group sends in `send` and `collect` of one layer, by owner number.

    Args:
      ids: of the tokens of each index of the `expert` axis; -1: none.
      serves: as `send` takes it.
      size: of the model's rows.
      tensor: size of that axis.
      transport: how rows move.
    """
    ids = ids.reshape(len(ids), -1, ids.shape[-1])
    sources, count, k = ids.shape
    others = sources - 1
    of_all = np.full((sources, tensor), (tensor - 1) * count * k * size.row)  # outputs shared along `tensor`
    if transport == "padded":
        of_all += others * count * (size.row + k * (size.id + size.weight) + k * size.row)
        return of_all.reshape(-1)
    if others:
        of_all += others * count * k * (size.id + size.weight + size.id)  # routes; those of outputs have no weights
    there, back = _rows(ids, serves, tensor)
    return (of_all + (there + back) * size.row).reshape(-1)


def _rows(ids: np.ndarray, serves: np.ndarray, tensor: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows that each device, by its index along `expert` and `tensor`, sends as a source and as a server."""
    sources = len(ids)
    server = np.take_along_axis(serves, np.maximum(ids, 0).reshape(sources, -1), axis=1).reshape(ids.shape)
    # A source has the same tokens at every index along `tensor`, and sends those of its column's servers.
    away = (ids >= 0) & (server // tensor != np.arange(sources)[:, None, None])
    answered = np.bincount(server[away], minlength=sources * tensor).reshape(sources, tensor)
    asked = np.sort(np.where(away, server, -1), axis=-1)
    once = asked >= 0
    once[..., 1:] &= asked[..., 1:] != asked[..., :-1]
    source = np.broadcast_to(np.arange(sources)[:, None, None], ids.shape)
    sent = np.zeros((sources, tensor), np.int64)
    np.add.at(sent, (source[once], asked[once] % tensor), 1)
    return sent, answered
