"""The dense weights on a mesh: what of each array a device has, the model that it then runs, and loading.

| array | divided along `tensor` by |
| --- | --- |
| `attn.qkv_proj` | heads: queries with their gates, keys and values each by themselves |
| `attn.q_proj`, `attn.q_up`, `attn.k_up`, `attn.v_up` (latent attention), `attn.sinks`, `attn.o_proj.weight` | heads |
| `mlp.block`, `shared.block` | width |
| `head` | vocabulary, where it is not the embedding and divides |

All else is whole on every device: embeddings, norms, routers, what makes the latents of latent attention, relative
attention, delta nets. With fewer key/value heads than devices, neighbours have the same one.

A device's slices are the arrays of a smaller model, `DenseShares.spec`, so that the modules of one device run on them.
What they compute of heads, widths and logits has the bits of one device where the platform takes narrower products in
the same order (XLA:CPU does in 16 bits, and in float32 for parts a multiple of 16 wide). Where shares meet, in what
attention and networks add to the residual stream, the order of a sum is another (`nn.shares.sum_shares` has the bound).
"""

import dataclasses
from collections.abc import Callable, Iterator

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from ef_jax.errors import InputError
from ef_jax.mesh.layout import MeshLayout
from ef_jax.nn import dense_shapes
from ef_jax.spec import AttentionSpec, LatentAttentionSpec, ModelSpec, RelativeAttentionSpec
from ef_jax.weights import Checkpoint

_DIVIDED = {
    "attn.q_proj.weight": 0,
    "attn.q_up.weight": 0,
    "attn.k_up": 0,
    "attn.v_up": 0,
    "attn.sinks": 0,
    "attn.o_proj.weight": 1,
    "mlp.block": 1,
    "shared.block": 1,
}
"""Which axis of a layer's arrays is divided, beside fused projections."""

_FAR = 4  # a proposed size is no more than so many times the one asked for


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Division:
    """How an array is divided.

    Attributes:
      axis: along which.
      runs: length of each run of it that is divided by itself, and how many devices next to one another have the same
        of it.
    """

    axis: int
    runs: tuple[tuple[int, int], ...]


class DenseShares:
    """A model whose dense part `size` devices share.

    Attributes:
      spec: the model as one of the devices has it.
      divisions: of every array of `dense_shapes`, by name; None: whole.
      shapes: of what one device has of each.
    """

    def __init__(self, spec: ModelSpec, size: int) -> None:
        """Raises `InputError` as `check_tensor` does."""
        check_tensor(spec, size)
        self.size = size
        self.spec = _of_one(spec, size)
        whole = dense_shapes(spec)
        self.divisions = {
            name: None if size == 1 else _division(spec, size, name, array.shape) for name, array in whole.items()
        }
        self.shapes = dense_shapes(self.spec)

    def part(self, name: str, array: np.ndarray, index: int) -> np.ndarray:
        """What the device at `index` of the axis has of a whole array: a copy where it is divided."""
        division = self.divisions[name]
        if division is None:
            return array
        parts, start = [], 0
        for length, copies in division.runs:
            width = length * copies // self.size
            first = start + index // copies * width
            parts.append(array[(slice(None),) * division.axis + (slice(first, first + width),)])
            start += length
        return np.concatenate(parts, axis=division.axis)

    def partition(self, name: str) -> PartitionSpec:
        """Where a global array is that has the devices' parts side by side."""
        division = self.divisions[name]
        return PartitionSpec() if division is None else PartitionSpec(*[None] * division.axis, "tensor")

    def global_shape(self, name: str) -> tuple[int, ...]:
        """Shape of that array; more than the whole one's where devices have the same heads."""
        division, shape = self.divisions[name], self.shapes[name].shape
        return tuple(n * self.size if division and axis == division.axis else n for axis, n in enumerate(shape))


def check_tensor(spec: ModelSpec, size: int) -> None:
    """Refuse a number of devices that cannot share the dense part of a model.

    Raises:
      InputError: it divides no heads or widths; the message proposes sizes that do.
    """
    if size < 1:
        raise InputError(f"tensor={size} is no number of devices: use tensor=1 or more")
    if obstacle := next(_obstacles(spec, size), None):
        sizes = [one for one in range(1, _FAR * size + 1) if not any(_obstacles(spec, one))]
        nearest = [one for one in sizes if one < size][-1:] + [one for one in sizes if one > size][:1]
        raise InputError(
            f"tensor={size} does not divide the model, which has {obstacle}: use "
            + " or ".join(f"tensor={one}" for one in nearest)
        )


def undivided(spec: ModelSpec, size: int) -> tuple[str, ...]:
    """What every one of `size` devices has and computes whole, in words, beside embeddings, norms and routers."""
    if size == 1:
        return ()
    words = []
    attention = spec.attention
    if isinstance(attention, LatentAttentionSpec):
        words.append("the latents of attention, which are its cache")
    elif isinstance(attention, RelativeAttentionSpec):
        words.append("relative attention")
    elif attention.kv_heads < size:
        words.append(f"key/value heads ({attention.kv_heads} for {size} devices)")
    if any(layer.mixer == "delta_net" for layer in spec.layers):
        words.append("delta nets")
    if spec.tie_embeddings:
        words.append("the head (it is the embedding)")
    elif spec.vocab % size:
        words.append(f"the head (a vocabulary of {spec.vocab})")
    return tuple(words)


def place_dense(
    checkpoint: Checkpoint, layout: MeshLayout, *, advance: Callable[[int], None] = lambda nbytes: None
) -> dict[str, jax.Array]:
    """The dense arrays of a checkpoint as global arrays, by name, each device's part as `DenseShares` says.

    Every array is read once, only parts are copied to devices, and only this process's devices are written to;
    `advance` hears the bytes of each array as it is read.

    Raises:
      CheckpointError: an array cannot be read.
      InputError: the mesh does not divide the model.
    """
    shares = DenseShares(checkpoint.spec, layout.tensor)
    arrays = {}
    for name, array in checkpoint.dense():
        indices = [number % layout.tensor for number in layout.local]
        parts = {index: shares.part(name, array, index) for index in set(indices)}
        on_devices = [
            jax.device_put(parts[index], layout.devices[number])
            for number, index in zip(layout.local, indices, strict=True)
        ]
        sharding = NamedSharding(layout.mesh, shares.partition(name))
        arrays[name] = jax.block_until_ready(
            jax.make_array_from_single_device_arrays(shares.global_shape(name), sharding, on_devices)
        )
        advance(array.nbytes)
    return arrays


def _obstacles(spec: ModelSpec, size: int) -> Iterator[str]:
    """What so many devices cannot share."""
    attention = spec.attention
    if not isinstance(attention, RelativeAttentionSpec) and attention.heads % size:
        yield f"{attention.heads} heads"
    if isinstance(attention, AttentionSpec):
        kv_heads = attention.kv_heads
        if kv_heads % size and size % kv_heads:
            yield f"{kv_heads} key/value heads"
        if attention.qk_norm == "full" and size > kv_heads:
            yield f"a norm over all of {kv_heads} key/value heads"
    if spec.dense_width and any(layer.ffn == "dense" for layer in spec.layers) and spec.dense_width % size:
        yield f"dense layers of width {spec.dense_width}"
    if spec.shared is not None and spec.shared.width % size:
        yield f"a shared expert of width {spec.shared.width}"


def _of_one(spec: ModelSpec, size: int) -> ModelSpec:
    attention, shared = spec.attention, spec.shared
    if isinstance(attention, AttentionSpec):
        kv_heads = max(1, attention.kv_heads // size)
        attention = dataclasses.replace(attention, heads=attention.heads // size, kv_heads=kv_heads)
    elif isinstance(attention, LatentAttentionSpec):
        attention = dataclasses.replace(attention, heads=attention.heads // size)
    return dataclasses.replace(
        spec,
        attention=attention,
        dense_width=spec.dense_width and spec.dense_width // size,
        shared=shared and dataclasses.replace(shared, width=shared.width // size),
        tensor_shares=size,
    )


def _division(spec: ModelSpec, size: int, name: str, shape: tuple[int, ...]) -> Division | None:
    top, _, path = name.partition(".")
    if top == "head" and spec.vocab % size == 0:
        return Division(axis=0, runs=((spec.vocab, 1),))
    if top != "layers":
        return None
    number, _, path = path.partition(".")
    attention, layer = spec.attention, spec.layers[int(number)]
    if path.startswith("attn.") and (layer.mixer == "delta_net" or isinstance(attention, RelativeAttentionSpec)):
        return None
    if path in ("attn.qkv_proj.weight", "attn.qkv_proj.bias") and isinstance(attention, AttentionSpec):
        keys = (attention.kv_heads * attention.head_dim, max(1, size // attention.kv_heads))
        return Division(axis=0, runs=((attention.query_width, 1), keys, keys))
    axis = _DIVIDED.get(path)
    return None if axis is None else Division(axis=axis, runs=((shape[axis], 1),))
