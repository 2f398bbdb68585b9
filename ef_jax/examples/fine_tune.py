"""Fine-tunes the last layer's router and experts of a model whose experts all stay in host memory.

Every layer's experts are an `OffloadedMoE`; those of one layer are trained, with gradients and moments in host memory
too. `python -m ef_jax.examples.fine_tune` takes the bundled model and the package's own source as text.
"""

import argparse
import collections
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float32, Int32

from ef_jax.cli.options import whole_number
from ef_jax.console import Parser, json_line, run
from ef_jax.errors import InputError, UnsupportedError
from ef_jax.loading import bundled_model
from ef_jax.nn import TRAINABLE, Decoder, HostOptimizer, OffloadedMoE, cache_shapes, host_sharding, reach_of
from ef_jax.predict.training import load_optax
from ef_jax.spec import ModelSpec
from ef_jax.text import Tokenizer, require_tokenizer
from ef_jax.weights import Checkpoint, open_checkpoint


class FineTuned(nnx.Module):
    """A decoder with all of its layers' experts in host memory."""

    def __init__(self, spec: ModelSpec, *, slots: int, rngs: nnx.Rngs):
        self.spec = spec
        self.decoder = Decoder(spec, rngs=rngs)
        self.experts = nnx.List([self._layer(index, slots, rngs) for index in spec.moe_layers])

    def _layer(self, index: int, slots: int, rngs: nnx.Rngs) -> OffloadedMoE:
        spec = self.spec
        moe = OffloadedMoE(
            spec.hidden,
            spec.experts.width,
            experts=spec.experts.count,
            top_k=spec.experts.top_k,
            slots=slots,
            router=spec.router,
            activation=spec.experts.activation,
            dtype=spec.dtype,
            rngs=rngs,
        )
        router = self.decoder.layers[index].router  # one and the same, found under the decoder
        if router is not None:
            moe.router = router
        return moe

    def __call__(self, tokens: Int32[Array, "B T"]) -> Float32[Array, "B T V"]:
        """Next-token logits after every token."""
        batch, length = tokens.shape
        positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), tokens.shape)
        x = self.decoder.embed_tokens(tokens)
        experts = iter(self.experts)
        for layer, how in zip(self.decoder.layers, self.spec.layers, strict=True):
            cache = tuple(map(jnp.zeros_like, cache_shapes(self.spec, how.kind, batch, length)))
            x, _ = layer.attend(x, cache, positions, jnp.asarray(reach_of(how)))
            h = layer.ffn_input(x)
            x = layer.finish(x, h, next(experts)(h) if how.ffn == "moe" else None)
        return self.decoder.logits(x)


def load(checkpoint: Checkpoint, *, slots: int) -> FineTuned:
    """The model of a checkpoint; each layer's experts go to host memory in one piece."""
    spec = checkpoint.spec
    model = nnx.eval_shape(lambda: FineTuned(spec, slots=slots, rngs=nnx.Rngs(0)))
    dense: dict[str | int, Any] = {}
    keys: list[str | int]
    for name, array in checkpoint.dense():
        keys = [int(key) if key.isdigit() else key for key in name.split(".")]
        *folders, leaf = keys
        into = dense
        for key in folders:
            into = into.setdefault(key, {})
        into[leaf] = jnp.asarray(array)
    nnx.update(model.decoder, dense)
    for layer, moe in zip(spec.moe_layers, model.experts, strict=True):
        blocks = np.empty((spec.experts.count, *spec.block_shape), jnp.dtype(spec.dtype))
        for expert, block in enumerate(blocks):
            checkpoint.read_block(layer, expert, block)
        moe.experts.set_value(jax.device_put(blocks, host_sharding()))
    return model


def loss_of(model: FineTuned, tokens: Int32[Array, "B T"]) -> Float32[Array, ""]:
    """Mean negative log-probability of each token after the first, in nats."""
    logits = jax.nn.log_softmax(model(tokens[:, :-1]))
    return -jnp.mean(jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1))


def fine_tune(
    model: FineTuned, train: np.ndarray, held_out: np.ndarray, *, steps: int, rate: float
) -> dict[str, float]:
    """Trains the last layer's router and experts by Adam on batches `[steps, B, T]`; held-out loss before and after."""
    optax = load_optax()
    last = model.spec.moe_layers[-1]
    if last != len(model.spec.layers) - 1:
        raise UnsupportedError(f"the last MoE layer is {last}: gradients do not go through the layers after it")
    places = (("experts", len(model.experts) - 1), ("decoder", "layers", last, "router"))
    trained = nnx.All(TRAINABLE, lambda path, _: any(tuple(path[: len(place)]) == place for place in places))
    optimizer = HostOptimizer(model, optax.adam(rate), wrt=trained)

    def step(model: FineTuned, optimizer: HostOptimizer, tokens: Int32[Array, "B T"]) -> None:
        optimizer.update(model, nnx.grad(loss_of, argnums=nnx.DiffState(0, trained))(model, tokens))

    evaluate = nnx.jit(loss_of)
    in_place = nnx.jit(step, donate_argnums=(0, 1))
    before = float(evaluate(model, jnp.asarray(held_out)))
    for tokens in train[:steps]:
        in_place(model, optimizer, jnp.asarray(tokens))
    return {"before": before, "after": float(evaluate(model, jnp.asarray(held_out)))}


def batches(tokens: np.ndarray, *, steps: int, batch: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Batches `[steps, B, T + 1]` to train on, drawn with a fixed seed, and one of the text's end, held out."""
    width = length + 1
    held = batch * width
    if len(tokens) < 2 * held:
        raise InputError(f"the text has {len(tokens)} tokens: give at least {2 * held}, or fewer or shorter sequences")
    starts = np.random.default_rng(0).integers(0, len(tokens) - held - width, (steps, batch, 1))
    return tokens[starts + np.arange(width)], tokens[-held:].reshape(batch, width)


def bytes_by_kind() -> dict[str, int]:
    """Bytes of all arrays that are alive, by kind of memory."""
    kinds: collections.Counter[str] = collections.Counter()
    for array in jax.live_arrays():
        kinds[array.sharding.memory_kind or "device"] += array.nbytes
    return dict(kinds)


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = Parser(prog="python -m ef_jax.examples.fine_tune", description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", type=Path, default=None, help="checkpoint (default: the bundled model)")
    parser.add_argument("--text", type=Path, nargs="+", help="UTF-8 files (default: this package's source)")
    parser.add_argument("--steps", type=whole_number(1), default=100)
    parser.add_argument("--batch", type=whole_number(1), default=4)
    parser.add_argument("--length", type=whole_number(1), default=64, help="tokens a sequence")
    parser.add_argument("--slots", type=whole_number(2), default=4, help="expert blocks on the device")
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate of Adam")
    parser.add_argument("--json", action="store_true")
    options = argparse.Namespace(debug=True)

    def body() -> None:
        parser.parse_args(arguments, options)
        checkpoint = open_checkpoint(options.model or bundled_model(), "float32")
        folder = checkpoint.tokenizer_dir
        tokenizer = require_tokenizer(Tokenizer.load(folder, checkpoint.spec.vocab) if folder else None)
        files = options.text or sorted((Path(__file__).parent.parent / "nn").glob("*.py"))
        tokens = np.array(tokenizer.encode("\n".join(path.read_text("utf-8") for path in files)), np.int32)
        train, held_out = batches(tokens, steps=options.steps, batch=options.batch, length=options.length)
        model = load(checkpoint, slots=options.slots)
        loss = fine_tune(model, train, held_out, steps=options.steps, rate=options.rate)
        kinds = bytes_by_kind()
        if options.json:
            print(json_line({"steps": options.steps, "loss": loss, "bytes": kinds}))
            return
        print(f"{options.steps} steps: held-out loss {loss['before']:.4f} before, {loss['after']:.4f} after")
        print(", ".join(f"{kind} {size / 1e6:.1f} MB" for kind, size in sorted(kinds.items())))

    return run(parser.prog, body, debug=False)


if __name__ == "__main__":
    sys.exit(main())
