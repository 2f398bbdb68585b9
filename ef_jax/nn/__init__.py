"""Flax NNX modules of the decoder and the pure functions under them. The routed experts live outside."""

from ef_jax.nn.attention import FULL_WINDOW as FULL_WINDOW
from ef_jax.nn.attention import QUERY_BLOCK as QUERY_BLOCK
from ef_jax.nn.attention import attend as attend
from ef_jax.nn.attention import cache_shape as cache_shape
from ef_jax.nn.attention import write_cache as write_cache
from ef_jax.nn.decoder import Decoder as Decoder
from ef_jax.nn.decoder import DecoderLayer as DecoderLayer
from ef_jax.nn.decoder import TokenEnds as TokenEnds
from ef_jax.nn.definition import dense_shapes as dense_shapes
from ef_jax.nn.definition import finish_paths as finish_paths
from ef_jax.nn.definition import layer_definition as layer_definition
from ef_jax.nn.definition import merge_finish as merge_finish
from ef_jax.nn.definition import merge_layer as merge_layer
from ef_jax.nn.definition import merge_top as merge_top
from ef_jax.nn.definition import top_definition as top_definition
from ef_jax.nn.ffn import ffn as ffn
from ef_jax.nn.linear import linear as linear
from ef_jax.nn.linear import matmul_f32 as matmul_f32
from ef_jax.nn.norm import rms_norm as rms_norm
from ef_jax.nn.rope import apply_rope as apply_rope
from ef_jax.nn.rope import rope_frequencies as rope_frequencies
from ef_jax.nn.rope import rope_tables as rope_tables
from ef_jax.nn.router import route as route
from ef_jax.nn.router import router_logits as router_logits
