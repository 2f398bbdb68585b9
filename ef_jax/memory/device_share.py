"""What one device of several has of a model: the terms of its memory plan."""

import dataclasses

from ef_jax.spec import ModelSpec


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DeviceShare:
    """One device's share, with the experts of the device that has the most.

    Attributes:
      mesh: the mesh, as the option is written.
      placement: how experts were placed, in words.
      devices: of the mesh.
      local_devices: of them, those of this process.
      row_shards: parts that sequences are divided into.
      sources: of these, the parts whose tokens may need this device's experts.
      held: expert blocks of all layers.
      most_in_layer: expert blocks of one layer.
      host_blocks: expert blocks that this process's devices hold together.
      whole: what every device along `tensor` has whole though it could be divided, in words.
      estimated: the workspace is not that of the mesh's own programs, which need its devices.
    """

    mesh: str
    placement: str
    devices: int
    local_devices: int
    row_shards: int
    sources: int
    held: int
    most_in_layer: int
    host_blocks: int
    whole: tuple[str, ...] = ()
    estimated: bool = False

    def rows(self, count: int) -> int:
        """Of so many sequences in all, those on this device."""
        return count // self.row_shards

    def experts_a_step(self, spec: ModelSpec, batch: int) -> int:
        """The most experts that one layer of a decode step of `batch` sequences in all can ask of this device."""
        return min(self.most_in_layer, self.rows(batch) * self.sources * spec.experts.top_k)
