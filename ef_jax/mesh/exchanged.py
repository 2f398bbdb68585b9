"""What decode steps have sent between devices, for the stats."""

from typing import Any

import numpy as np

from ef_jax.mesh.exchange import Transport
from ef_jax.mesh.fleet import servers_of
from ef_jax.mesh.layout import MeshLayout
from ef_jax.mesh.sent_bytes import RowBytes, sent_bytes
from ef_jax.placement import Placement
from ef_jax.spec import ModelSpec

_MOST_KEPT = 4096  # layers of steps whose routes wait to be counted


class Exchanged:
    """Keeps the routes of decode steps and counts, when it is asked, what they made each device send.

    Args:
      spec: the model.
      layout: the devices.
      placement: of the experts.
      transport: how rows move.
      batch: sequences of a step, on all devices.
    """

    def __init__(
        self, spec: ModelSpec, layout: MeshLayout, placement: Placement, transport: Transport, batch: int
    ) -> None:
        self._layout, self._transport = layout, transport
        self._experts, self._shape = spec.experts.count, (layout.data, layout.expert, -1, spec.experts.top_k)
        self._serves = [servers_of(layout, placement, layer) for layer in range(len(spec.moe_layers))]
        weight = spec.itemsize if spec.router.casts_back else 4
        self._size = RowBytes(row=spec.hidden * spec.itemsize, weight=weight)
        self._id_bytes = 2 * batch * spec.experts.top_k
        self._kept: list[tuple[int, np.ndarray]] = []
        self._layers, self._bytes = 0, np.zeros(layout.count, np.int64)

    def hear(self, layer: int, report: Any) -> None:
        """A layer of a step left this report (`look_ahead.report_ids` at its front)."""
        self._kept.append((layer, np.asarray(report)[: self._id_bytes]))
        if len(self._kept) == _MOST_KEPT:
            self._count()

    def added_to(self, before: dict[str, Any] | None) -> dict[str, Any]:
        """What `before` had, and what has been sent since this was asked last. Plain JSON types: the transport, layers
        of steps, and the bytes that each device has sent in them."""
        self._count()
        layers, sent = self._layers, self._bytes.copy()
        if before is not None:
            layers, sent = layers + before["layers"], sent + np.array(before["bytes_sent"], np.int64)
        self._layers, self._bytes[:] = 0, 0
        return {"transport": self._transport, "layers": layers, "bytes_sent": sent.tolist()}

    def _count(self) -> None:
        options: dict[str, Any] = {"tensor": self._layout.tensor, "transport": self._transport}
        for layer, raw in self._kept:
            ids = raw.view(np.uint16).astype(np.int32).reshape(self._shape)
            ids[ids >= self._experts] = -1
            sent = [sent_bytes(of_group, self._serves[layer], self._size, **options) for of_group in ids]
            self._bytes += np.concatenate(sent)
        self._layers += len(self._kept)
        self._kept.clear()
