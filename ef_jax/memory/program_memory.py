"""What a compiled program takes of device memory besides its arguments."""

from typing import Any

import jax


def program_memory(compiled: jax.stages.Compiled) -> Any:
    """The executable's own `memory_analysis()`: `temp_size_in_bytes` and the sizes of arguments and outputs.

    Raises:
      RuntimeError: the backend does not say.
    """
    analysis = compiled.memory_analysis()
    if analysis is None:
        raise RuntimeError("this backend does not say how much memory a program takes, so no plan can be made")
    return analysis
