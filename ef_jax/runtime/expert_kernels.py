"""Which kernels run an engine's experts: settled once, before anything is allocated."""

from dataclasses import dataclass

import jax
import numpy as np

from ef_jax.errors import UnsupportedError
from ef_jax.spec import ModelSpec
from pallas_kernels import BACKENDS, Problem, Target, choose_backend, target_of

DECODE_TILE_ROWS = 8
PROMPT_TILE_ROWS = 32


@dataclass(frozen=True, kw_only=True)
class ExpertKernels:
    """Backends of `pallas_kernels`, by name, of decode steps and of prompts, and what they are built for."""

    decode: str
    prompt: str
    target: Target

    def take(self, spec: ModelSpec, slots: int) -> bool:
        """Whether they can read a pool of so many slots."""
        tiles = ((self.decode, DECODE_TILE_ROWS), (self.prompt, PROMPT_TILE_ROWS))
        return all(BACKENDS[name].refuses(_problem(spec, self.target, rows, slots)) is None for name, rows in tiles)

    def as_dict(self) -> dict[str, str]:
        """The names, for reports."""
        return {"decode": self.decode, "prompt": self.prompt}


def choose_kernels(spec: ModelSpec, device: jax.Device, kernel: str | None = None) -> ExpertKernels:
    """The kernels of a model on a device: the backend named `kernel`, or for each regime the first that can.

    They may refuse a pool of some sizes: see `ExpertKernels.take`.

    Raises:
      UnsupportedError: there is no such backend, or it cannot run this model here.
    """
    target = target_of(device)
    names = []
    for tile_rows in (DECODE_TILE_ROWS, PROMPT_TILE_ROWS):
        problem = _problem(spec, target, tile_rows, slots=1)
        if kernel is not None and kernel not in BACKENDS:
            raise UnsupportedError(f"kernel {kernel!r} is not one of {', '.join(BACKENDS)}")
        try:
            names.append(choose_backend(problem, kernel).name)
        except NotImplementedError as error:
            raise UnsupportedError(f"kernel {kernel!r}: {error}; name another or none") from None
    return ExpertKernels(decode=names[0], prompt=names[1], target=target)


def _problem(spec: ModelSpec, target: Target, tile_rows: int, slots: int) -> Problem:
    experts = spec.experts
    return Problem(
        rows=experts.count * tile_rows,
        groups=experts.count,
        slots=slots,
        contract=spec.hidden,
        width=experts.width,
        dtype=np.dtype(jax.numpy.dtype(spec.dtype)),
        storage=experts.quantization or "dense",
        biased=experts.bias,
        gated=experts.gated,
        activation=experts.activation,
        tile_rows=tile_rows,
        target=target,
    )
