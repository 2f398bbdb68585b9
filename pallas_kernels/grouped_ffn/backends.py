"""The table of backends, and which of them runs a problem."""

import functools
import logging

from pallas_kernels.grouped_ffn import mosaic_sm90, reference, triton, xla
from pallas_kernels.grouped_ffn.backend import Backend
from pallas_kernels.grouped_ffn.problem import Problem

_LOG = logging.getLogger("pallas_kernels")

# In the order in which they are tried.
BACKENDS: dict[str, Backend] = {
    backend.name: backend for backend in (mosaic_sm90.BACKEND, triton.BACKEND, xla.BACKEND, reference.BACKEND)
}


def choose_backend(problem: Problem, implementation: str | None = None) -> Backend:
    """The backend that runs `problem`: the one named, or the first of `BACKENDS` that does not refuse.

    Where a GPU's problem is left to the `xla` backend, the reasons are logged once, as a warning of the logger
    "pallas_kernels".

    Raises:
      ValueError: no backend has that name.
      NotImplementedError: the one that has cannot run this problem; the message says why.
    """
    if implementation is not None:
        if implementation not in BACKENDS:
            raise ValueError(f"implementation {implementation!r} is not one of {', '.join(BACKENDS)}")
        if reason := BACKENDS[implementation].refuses(problem):
            raise NotImplementedError(f"the {implementation} backend cannot run {problem}: {reason}")
        return BACKENDS[implementation]
    refused: dict[str, str] = {}
    for name, backend in BACKENDS.items():
        reason = backend.refuses(problem)
        if reason is None:
            if refused and problem.target.platform in ("cuda", "rocm"):
                _report_once(problem.target.device_kind, name, tuple(refused.items()))
            return backend
        refused[name] = reason
    raise NotImplementedError(f"no backend can run {problem}: {refused}")


@functools.lru_cache(maxsize=256)
def _report_once(device_kind: str, chosen: str, refused: tuple[tuple[str, str], ...]) -> None:
    reasons = "; ".join(f"{name}: {reason}" for name, reason in refused)
    _LOG.warning("grouped_ffn runs on the %s backend on %s: %s", chosen, device_kind, reasons)
