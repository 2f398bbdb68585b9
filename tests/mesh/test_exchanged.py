"""What the stats say was sent between devices, against counting layer by layer."""

import jax
import numpy as np

from ef_jax.loading import bundled_model
from ef_jax.mesh.exchanged import Exchanged
from ef_jax.mesh.fleet import servers_of
from ef_jax.mesh.layout import MeshLayout
from ef_jax.mesh.sent_bytes import RowBytes, sent_bytes
from ef_jax.placement import Placement
from ef_jax.weights import open_checkpoint


def test_steps_add_up_and_those_counted_before_stay() -> None:
    with open_checkpoint(bundled_model()) as checkpoint:
        spec = checkpoint.spec
    layout = MeshLayout.of(jax.devices()[:4], data=2, expert=2)
    layers, experts, top_k, batch = len(spec.moe_layers), spec.experts.count, spec.experts.top_k, 8
    placement = Placement.contiguous(layers=layers, experts=experts, devices=2)
    counted = Exchanged(spec, layout, placement, "ragged", batch)
    random, total = np.random.default_rng(0), np.zeros(4, np.int64)
    size = RowBytes(row=spec.hidden * 2, weight=2 if spec.router.casts_back else 4)
    for step in range(3):
        for layer in range(layers):
            ids = np.stack([random.permutation(experts)[:top_k] for _ in range(batch)]).astype(np.uint16)
            ids[step] = 65535  # nobody's
            counted.hear(layer, np.concatenate([ids.reshape(-1).view(np.uint8), np.zeros(7, np.uint8)]))
            known = np.where(ids < experts, ids.astype(np.int32), -1).reshape(2, 2, -1, top_k)
            serves = servers_of(layout, placement, layer)
            total += np.concatenate([sent_bytes(one, serves, size, transport="ragged") for one in known])
    first = counted.added_to(None)
    assert first == {"transport": "ragged", "layers": 3 * layers, "bytes_sent": total.tolist()}
    assert counted.added_to(first) == first
    assert all(total > 0)
