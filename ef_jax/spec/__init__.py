"""What a model is: frozen, hashable specs that every other part is built from.

A `ModelSpec` is made from a checkpoint's `config.json` by `ef_jax.families`; nothing after that reads the
config again. Shape letters are the design's: L layers, E experts a layer, K experts a token, D hidden size,
F expert width, V vocabulary.
"""

from ef_jax.spec.block_format import BlockFormat as BlockFormat
from ef_jax.spec.block_format import BlockPart as BlockPart
from ef_jax.spec.experts import Activation as Activation
from ef_jax.spec.experts import ExpertSpec as ExpertSpec
from ef_jax.spec.experts import SharedExpertSpec as SharedExpertSpec
from ef_jax.spec.mixers import AttentionSpec as AttentionSpec
from ef_jax.spec.mixers import DeltaNetSpec as DeltaNetSpec
from ef_jax.spec.mixers import LatentAttentionSpec as LatentAttentionSpec
from ef_jax.spec.mixers import RelativeAttentionSpec as RelativeAttentionSpec
from ef_jax.spec.model import LayerSpec as LayerSpec
from ef_jax.spec.model import ModelSpec as ModelSpec
from ef_jax.spec.rope import RopeSpec as RopeSpec
from ef_jax.spec.router import RouterGroups as RouterGroups
from ef_jax.spec.router import RouterNormalize as RouterNormalize
from ef_jax.spec.router import RouterSpec as RouterSpec
