"""Which model something belongs to, whatever its file format and dtype."""

import hashlib
from collections.abc import Iterable

import ml_dtypes
import numpy as np

from ef_jax.spec import ModelSpec


def model_fingerprint(spec: ModelSpec, arrays: Iterable[tuple[str, np.ndarray]]) -> str:
    """A digest of the sizes and the routers' weights of a model, 32 hexadecimal digits.

    The weights count in bfloat16, so that a model loaded in another dtype is still the same.

    Args:
      spec: the model.
      arrays: names (`layers.0.router.weight`) and arrays of the dense weights, in any order; others are left alone.
    """
    wanted = [f"layers.{layer}.router.weight" for layer in spec.moe_layers]
    found = {name: array for name, array in arrays if name in set(wanted)}
    sizes = (len(wanted), spec.experts.count, spec.experts.top_k, spec.hidden, spec.vocab)
    digest = hashlib.blake2b(repr(sizes).encode(), digest_size=16)
    for name in wanted:
        digest.update(np.ascontiguousarray(np.asarray(found[name]).astype(ml_dtypes.bfloat16)).view(np.uint8))
    return digest.hexdigest()
