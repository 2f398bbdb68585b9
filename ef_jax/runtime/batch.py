"""The state of one batch of sequences: keys and values, lengths, sampling."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from ef_jax.nn import cache_shape
from ef_jax.runtime.sampling import SamplingArrays, SamplingOptions, sampling_arrays
from ef_jax.spec import ModelSpec


class Batch:
    """What decoding carries from step to step, for the engine's fixed number of sequences.

    Attributes:
      k, v: one device array a decoder layer, `[B, N, C, hd]` (`cache_shape`); programs donate and replace them.
      length: int32 `[B]`, tokens of each sequence in the cache.
      active: bool `[B]`; an inactive sequence is padding: it writes nothing and routes to no expert.
      seen: bool `[B, V]` on the device, tokens of prompt and text so far.
      step: int32 `[B]`, tokens generated so far.
      last: `[B, D]` on the device, the residual row after each prompt's last token.
      tokens: int32 `[B, 1]` on the device, each sequence's last token.
      inputs: int32 `[B]`, the same on the host.
      sampling: the sampling options, on the device.
    """

    def __init__(self, spec: ModelSpec, *, batch: int, context: int, device: jax.Device) -> None:
        self.sharding = jax.sharding.SingleDeviceSharding(device)
        self._vocab = spec.vocab
        self.last = jnp.zeros((batch, spec.hidden), jnp.dtype(spec.dtype), device=self.sharding)
        cache = cache_shape(spec, batch, context)
        zeros = jax.jit(lambda: jnp.zeros(cache.shape, cache.dtype), out_shardings=self.sharding)
        self.k = [zeros() for _ in spec.layers]
        self.v = [zeros() for _ in spec.layers]
        self.length = np.zeros(batch, np.int32)
        self.active = np.zeros(batch, bool)
        self.step = np.zeros(batch, np.int32)
        self.inputs = np.zeros(batch, np.int32)
        self.tokens = jax.device_put(self.inputs[:, None], self.sharding)
        self.begin([], sampling_arrays(SamplingOptions(), batch))

    def begin(self, prompts: Sequence[np.ndarray], sampling: SamplingArrays) -> None:
        """Set lengths, seen tokens and options for new `prompts`; what the caches hold is overwritten as they run."""
        count = len(prompts)
        self.length[:] = 0
        self.length[:count] = [len(prompt) for prompt in prompts]
        self.active[:] = False
        self.active[:count] = True
        self.step[:] = 0
        seen = np.zeros((len(self.length), self._vocab), bool)
        for sequence, prompt in enumerate(prompts):
            seen[sequence, prompt] = True
        self.seen = jax.device_put(seen, self.sharding)
        self.sampling = jax.device_put(sampling, self.sharding)
