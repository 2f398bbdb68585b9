"""ef_jax: Mixture-of-Experts language models in JAX whose experts live in host memory."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ef_jax.errors import BudgetError as BudgetError
    from ef_jax.errors import CheckpointError as CheckpointError
    from ef_jax.errors import InputError as InputError
    from ef_jax.errors import LinkError as LinkError
    from ef_jax.errors import UnsupportedError as UnsupportedError
    from ef_jax.generation import Generation as Generation
    from ef_jax.generation import Score as Score
    from ef_jax.loading import load as load
    from ef_jax.memory.plan import MemoryPlan as MemoryPlan
    from ef_jax.mesh.processes import join_processes as join_processes
    from ef_jax.replay.trace import RoutingTrace as RoutingTrace
    from ef_jax.runtime.language_model import LanguageModel as LanguageModel
    from ef_jax.sampling_options import SamplingOptions as SamplingOptions
    from ef_jax.schedule.link_model import LinkModel as LinkModel
    from ef_jax.serving.submission import Submission as Submission
    from ef_jax.spec import ModelSpec as ModelSpec
    from ef_jax.stats import Stats as Stats
    from ef_jax.timeline import Timeline as Timeline

_MODULES = {
    "BudgetError": "errors",
    "CheckpointError": "errors",
    "InputError": "errors",
    "LinkError": "errors",
    "UnsupportedError": "errors",
    "Generation": "generation",
    "Score": "generation",
    "load": "loading",
    "join_processes": "mesh.processes",
    "MemoryPlan": "memory.plan",
    "RoutingTrace": "replay.trace",
    "LanguageModel": "runtime.language_model",
    "SamplingOptions": "sampling_options",
    "LinkModel": "schedule.link_model",
    "Submission": "serving.submission",
    "Stats": "stats",
    "Timeline": "timeline",
    "ModelSpec": "spec",
}
__all__ = list(_MODULES)


if not TYPE_CHECKING:  # a type checker would take any name for one of ours

    def __getattr__(name: str) -> Any:
        """Import a public name when it is first used: `ef-jax --help` does not wait for JAX."""
        if name not in _MODULES:
            raise AttributeError(f"module 'ef_jax' has no attribute {name!r}")
        value = getattr(importlib.import_module(f"ef_jax.{_MODULES[name]}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted(__all__)
