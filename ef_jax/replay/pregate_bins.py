"""What an engine would have heard of its pre-gate in the steps of a trace."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8

from ef_jax.errors import InputError
from ef_jax.predict.log_odds import NOMINAL, log_odds, to_bins, union
from ef_jax.replay.trace import RoutingTrace

_LOG_ODDS = (np.log(NOMINAL) - np.log1p(-NOMINAL)).astype(np.float32)


class PregateBins:
    """Bins for the steps of a trace, from its pre-gate scores or from others.

    A trace has no scores of distance 0: row 0 of what they give is all zeros.

    Args:
      trace: recorded routing.
      bins: uint8 `[N, L, H+1, E]`: `bins[n, s, d]` is what source s says of layer `s - 1 + d` for row n alone, as
        `log_odds.to_bins` gives it. None: the trace's scores.

    Attributes:
      distances: H.

    Raises:
      InputError: the trace has no pre-gate scores, or `bins` are not of its shape.
    """

    def __init__(self, trace: RoutingTrace, bins: np.ndarray | None = None) -> None:
        given = trace.pregate if bins is None else bins
        if given is None:
            raise InputError(
                "the trace has no pre-gate scores: record one with ef-jax trace --pregate, or choose another predictor"
            )
        if bins is not None:
            shape = (trace.count, trace.layers, bins.shape[2] if bins.ndim == 4 else 2, trace.num_experts)
            if bins.dtype != np.uint8 or bins.shape != shape or shape[2] < 2:
                raise InputError(
                    f"bins are {bins.dtype} of shape {bins.shape}, and the trace needs uint8 of shape {shape}"
                )
        self._given, self._binned, self._top_k = given, bins is not None, trace.top_k
        self.distances = given.shape[2] - self._binned

    def of_step(self, rows: Sequence[int]) -> UInt8[np.ndarray, "L distances E"]:
        """What sources 0 to L - 1 say in a step that runs these rows of the trace side by side."""
        given = self._given[rows]
        if self._binned:
            if len(rows) == 1:
                return given[0]
            own, alone = given[:, :, 0].max(axis=0), _LOG_ODDS[given[:, :, 1:]]
        else:
            alone = log_odds(given.astype(np.float32), self._top_k, np)
            own = np.zeros(given.shape[1::2], np.uint8)
        ahead = to_bins(union(alone, np.ones(len(rows), bool), np), np)
        return np.concatenate([own[:, None], ahead], axis=1)
