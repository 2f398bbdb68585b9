"""Sizes of published models, from their configs, for plans and cost models of what does not fit here.

switch_base_128: google/switch-base-128 (arXiv:2101.03961): 12 + 12 layers, experts of two matrices in every other one.
mixtral_8x7b: mistralai/Mixtral-8x7B. deepseek_v2_lite: deepseek-ai/DeepSeek-V2-Lite: latent caches (MLA), two shared
experts a layer, a dense first layer. qwen3_30b_a3b: Qwen/Qwen3-30B-A3B.
"""

import dataclasses

ITEM_BYTES = 2


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """A model of 16-bit weights; sizes are counted in values.

    Attributes:
      layers: with attention over a growing cache.
      moe_layers: L.
      experts: E.
      top_k: K.
      hidden: D.
      width: F.
      matrices: of an expert.
      attention: weights of one layer's attention, mean of all layers.
      dense_ffn: weights of all feed-forward networks that every token passes: dense layers, shared experts.
      cache: values of one position's keys and values in one layer.
      vocab: V.
      embeddings: tables of V x D.
      all_attention: layers with attention of any kind.
    """

    layers: int
    moe_layers: int
    experts: int
    top_k: int
    hidden: int
    width: int
    matrices: int = 3
    attention: int
    dense_ffn: int = 0
    cache: int
    vocab: int
    embeddings: int = 2
    all_attention: int = 0

    @property
    def block_bytes(self) -> int:
        """One expert."""
        return self.matrices * self.hidden * self.width * ITEM_BYTES

    @property
    def expert_bytes(self) -> int:
        """All experts."""
        return self.moe_layers * self.experts * self.block_bytes

    @property
    def dense_bytes(self) -> int:
        """Everything but the experts; norms and biases are left out."""
        routers = self.moe_layers * self.experts * self.hidden
        tables = self.embeddings * self.vocab * self.hidden
        attention = (self.all_attention or self.layers) * self.attention
        return (tables + attention + self.dense_ffn + routers) * ITEM_BYTES

    @property
    def layer_bytes(self) -> int:
        """What every token passes in a layer: attention, router, shared experts; mean of all layers."""
        tables = self.embeddings * self.vocab * self.hidden * ITEM_BYTES
        return (self.dense_bytes - tables) // (self.all_attention or self.layers)


SHAPES = {
    "switch_base_128": Shape(
        layers=12,
        moe_layers=12,
        experts=128,
        top_k=1,
        hidden=768,
        width=3072,
        matrices=2,
        attention=4 * 768 * 768,
        all_attention=36,  # of the encoder, of the decoder, and from the one to the other
        dense_ffn=12 * 2 * 768 * 3072,
        cache=2 * 2 * 768,  # of the decoder's own tokens, and of the encoder's
        vocab=32128,
    ),
    "mixtral_8x7b": Shape(
        layers=32,
        moe_layers=32,
        experts=8,
        top_k=2,
        hidden=4096,
        width=14336,
        attention=2 * 4096 * 4096 + 2 * 4096 * 1024,
        cache=2 * 1024,
        vocab=32000,
    ),
    "deepseek_v2_lite": Shape(
        layers=27,
        moe_layers=26,
        experts=64,
        top_k=6,
        hidden=2048,
        width=1408,
        attention=2048 * 16 * 192 + 2048 * 576 + 512 * 16 * 256 + 16 * 128 * 2048,
        dense_ffn=26 * 3 * 2048 * 2 * 1408 + 3 * 2048 * 10944,
        cache=576,
        vocab=102400,
    ),
    "qwen3_30b_a3b": Shape(
        layers=48,
        moe_layers=48,
        experts=128,
        top_k=8,
        hidden=2048,
        width=768,
        attention=2 * 2048 * 4096 + 2 * 2048 * 512,
        cache=2 * 512,
        vocab=151936,
    ),
}
