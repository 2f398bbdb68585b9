"""ef_jax: Mixture-of-Experts language models in JAX whose experts live in host memory."""

from ef_jax.errors import BudgetError as BudgetError
from ef_jax.errors import CheckpointError as CheckpointError
from ef_jax.errors import InputError as InputError
from ef_jax.errors import UnsupportedError as UnsupportedError
from ef_jax.loading import load as load
from ef_jax.memory.plan import MemoryPlan as MemoryPlan
from ef_jax.runtime.generation import Generation as Generation
from ef_jax.runtime.generation import Score as Score
from ef_jax.runtime.language_model import LanguageModel as LanguageModel
from ef_jax.runtime.sampling import SamplingOptions as SamplingOptions
from ef_jax.runtime.stats import Stats as Stats
from ef_jax.spec import ModelSpec as ModelSpec
