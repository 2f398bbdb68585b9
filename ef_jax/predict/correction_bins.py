"""What a correction would have predicted in a recorded run, for replays."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8

from ef_jax.nn.correction import Correction
from ef_jax.nn.correction_parallel import correct_tokens
from ef_jax.predict.log_odds import BINS, to_bins
from ef_jax.predict.training_data import Examples
from ef_jax.replay.trace import RoutingTrace

_ROWS = 512


def correction_bins(correction: Correction, trace: RoutingTrace) -> UInt8[np.ndarray, "N L D E"]:
    """Bins of every token by source and distance 0 to H, as the engine's programs report them of a batch of one.

    Distance 0 of source s is what layer s - 1 chose, and zeros at source 0. Targets past the last layer are zeros.

    Raises:
      InputError: the trace has no pre-gate scores.
    """
    spec, examples = correction.spec, Examples([trace])
    run = jax.jit(functools.partial(correct_tokens, spec))
    bins = np.zeros((trace.count, spec.layers, spec.distances + 1, spec.experts), np.uint8)
    common, sources = correction.common, correction.sources
    for first in range(0, trace.count, _ROWS):
        rows = np.arange(first, min(first + _ROWS, trace.count))
        odds = run(common, sources, examples.inputs(rows, spec))
        bins[rows, :, 1:] = np.asarray(to_bins(odds, jnp))
    for distance in range(1, spec.distances + 1):
        bins[:, max(spec.layers - distance + 1, 0) :, distance] = 0
    own = bins[:, 1:, 0]
    np.put_along_axis(own, trace.experts[:, :-1].astype(np.intp), BINS - 1, axis=2)
    return bins
