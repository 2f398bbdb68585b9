"""The map between our arrays and Hugging Face tensors."""

from ef_jax.weights.layout.experts import stored_experts as stored_experts
from ef_jax.weights.layout.fp8 import FP8_SCALES as FP8_SCALES
from ef_jax.weights.layout.layout import Expected as Expected
from ef_jax.weights.layout.layout import Layout as Layout
from ef_jax.weights.layout.layout import family_names as family_names
from ef_jax.weights.layout.pieces import ArraySource as ArraySource
from ef_jax.weights.layout.pieces import Piece as Piece
