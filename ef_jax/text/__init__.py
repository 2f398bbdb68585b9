"""Text on both sides of the model: tokenizers, streamed decoding and stop strings."""

from ef_jax.text.stop_matcher import StopMatcher as StopMatcher
from ef_jax.text.stream_decoder import StreamDecoder as StreamDecoder
from ef_jax.text.tokenizer import Tokenizer as Tokenizer
from ef_jax.text.tokenizer import require_tokenizer as require_tokenizer
