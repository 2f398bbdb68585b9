"""How well are the experts of coming layers predicted, and what does the learned correction gain and cost?

    python -m bench.recall [--samples 512] [--only quality ablation forest cost] [--plot recall.png] [--save]

Recall: of the K experts that a token uses in a layer, the share that is among the K most likely by a predictor, 1 to 6
layers ahead, mean over the layers aimed at; distance 1 from the embedding is layer 0.

quality: on the second halves of the bundled model's held-out texts (six domains, which the model was not trained on).
  "previous token" is what the token before used in the layer aimed at; "history" `ef_jax.predict.History`, going along
  with the texts; "pre-gate" the routers ahead on the residual stream of now; "with shift" the same with the mean way
  from layer to layer added, measured on the first halves; "corrected" the correction of `ef-jax train-predictor`. It
  is trained on the first halves and on text sampled from the model itself at temperature 1, a quarter of it from no
  prompt and the rest from 24 tokens of the first halves. No token of the second halves is learned from.
ablation: shorter trainings without an input of the correction each, and "scores alone" without all but the scores.
  "own scores only": each distance sees its own pre-gate scores and not those of the others.
forest: the paper's way, scikit-learn's RandomForestRegressor, one a source, trained on part of the same tokens, beside
  the correction on the same part of the held-out tokens, and what both take for one token and layer. Left out where
  scikit-learn is not installed.
cost: microseconds that `advance` and `correct` add to a layer's program with one sequence, over an empty program of the
  same arguments (medians), and the bytes of a source's leaves as a share of what a layer reads from the device's
  memory: K experts of width 768 and attention of 32 heads (48 layers x 128 experts, top-8, hidden 2048, bfloat16).

Prints tables, then one line of JSON.
"""

import argparse
import functools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from bench import _forest, _report
from bench._recall_data import DISTANCES, RecallData, record
from ef_jax.inline_dispatch import dispatch_inline
from ef_jax.nn.correction import Correction, CorrectionSpec, advance, correct
from ef_jax.nn.correction_parallel import TokenInputs, correct_tokens, targets
from ef_jax.predict import History
from ef_jax.predict.training import Training, TrainingOptions, recall_at_k, train
from ef_jax.predict.training_data import Examples, aimed

TARGET_GAIN = 10.0
"""Points of recall that the correction is to gain from distance 3 on."""

TARGET_SHARE = 0.01
_ROWS = 512
_LARGE = CorrectionSpec(layers=48, experts=128, top_k=8, distances=6, vocab=151_936)
_HIDDEN, _EXPERT_WIDTH, _HEADS, _KV_HEADS, _HEAD_DIM = 2048, 768, 32, 4, 128
_CALLS = 300
_WITHOUT = {
    "own scores only": ("scores",),
    "no token id": ("token",),
    "no past layers": ("past",),
    "no earlier tokens": ("history", "previous"),
    "scores alone": ("token", "past", "history", "previous"),
}


class Bench:
    """The recorded data, and the correction that the parts share, trained once."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.data: RecallData = record(options.samples, options.seed)
        trace = self.data.second_halves
        self.spec = CorrectionSpec(
            layers=trace.layers,
            experts=trace.num_experts,
            top_k=trace.top_k,
            distances=DISTANCES,
            vocab=self.data.spec.vocab,
            width=options.width,
        )
        self.learned = Examples([self.data.sampled, self.data.first_halves])
        self.held = Examples([trace])

    @functools.cached_property
    def trained(self) -> tuple[Correction, Training]:
        """The correction that all parts but the ablation are about."""
        return self.train(self.options.epochs)

    def train(self, epochs: float, without: tuple[str, ...] = ()) -> tuple[Correction, Training]:
        """A correction that lacks some inputs, and how its training went."""
        options = TrainingOptions(epochs=epochs, seed=self.options.seed, without=without)
        return train(self.spec, self.learned, options)

    def recall(self, scores: Callable[[TokenInputs], Any], rows: np.ndarray | None = None) -> np.ndarray:
        """Recall `[rows, L, H]` of what gives scores `[M, L, H, E]`, on held-out tokens (all where None)."""
        spec = self.spec

        @jax.jit
        def measure(inputs: TokenInputs) -> jax.Array:
            used = targets(inputs.experts, spec.experts, spec.distances)
            return recall_at_k(scores(inputs), used, spec.top_k)

        rows = np.arange(self.held.count) if rows is None else rows
        parts = [rows[first : first + _ROWS] for first in range(0, len(rows), _ROWS)]
        return np.concatenate([np.asarray(measure(self.held.inputs(part, spec))) for part in parts])

    def corrected(self, correction: Correction) -> Callable[[TokenInputs], Any]:
        """Scores by a correction."""
        common, sources = correction.common, correction.sources
        return lambda inputs: correct_tokens(self.spec, common, sources, inputs)

    def by_distance(self, recall: np.ndarray) -> list[float]:
        """Mean in % over tokens and the layers aimed at, of recall `[M, L, H]`."""
        counts = aimed(self.spec.layers, DISTANCES)
        means = recall.mean(axis=0)
        return [_report.rounded(float(100 * means[counts[:, d], d].mean())) for d in range(DISTANCES)]


def main() -> int:
    """Run the bench; the exit code."""
    dispatch_inline()
    parts = {"quality": quality, "ablation": ablation, "forest": forest, "cost": cost}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=tuple(parts), default=list(parts), metavar="PART")
    parser.add_argument("--samples", type=_report.positive, default=512, help="sequences of 256 tokens to sample")
    parser.add_argument("--epochs", type=float, default=4.0, help="of training")
    parser.add_argument("--ablation-epochs", type=float, default=1.0, help="of each training of part ablation")
    parser.add_argument("--width", type=_report.positive, default=64, help="of the correction")
    parser.add_argument("--forest-tokens", type=_report.positive, default=4096, help="that the forest is trained on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw recall by distance and layer")
    _report.add_save_option(parser, "recall")
    options = parser.parse_args()
    bench = Bench(options)
    data = bench.data
    result: dict[str, Any] = {
        "tokens": {
            "sampled": data.sampled.count,
            "first_halves": data.first_halves.count,
            "second_halves": data.second_halves.count,
        },
        "width": options.width,
        "epochs": options.epochs,
        "ablation_epochs": options.ablation_epochs,
        "targets": {"gain_from_distance_3": TARGET_GAIN, "share_of_layer_bytes": TARGET_SHARE},
    }
    for name in options.only:
        result[name] = parts[name](bench)
        print()
    if options.plot and "quality" in result:
        from bench._recall_plot import draw

        draw(result["quality"], options.plot)
    _report.finish("recall", result, options.save, packages=("optax", "scikit-learn"))
    return 0


def quality(bench: Bench) -> dict[str, Any]:
    """Recall of every predictor by distance, and by source."""
    correction, training = bench.trained
    layers, distances = bench.spec.layers, bench.spec.distances
    shifts = jnp.asarray(bench.data.shifts[:layers])[None]

    def previous(inputs: TokenInputs) -> jax.Array:
        padded = jnp.pad(inputs.counts[:, 0], ((0, 0), (0, distances - 1), (0, 0)))
        return jnp.stack([padded[:, source : source + distances] for source in range(layers)], axis=1)

    recalls = {
        "previous token": bench.recall(previous),
        "history": _history(bench),
        "pre-gate": bench.recall(lambda inputs: inputs.choice),
        "pre-gate with shift": bench.recall(lambda inputs: inputs.choice + shifts),
        "corrected": bench.recall(bench.corrected(correction)),
    }
    means = {name: bench.by_distance(recall) for name, recall in recalls.items()}
    gains = [
        _report.rounded(after - before) for after, before in zip(means["corrected"], means["pre-gate"], strict=True)
    ]
    head = ["recall %, layers ahead", *map(str, range(1, distances + 1))]
    print(
        _report.table(head, [*([name, *values] for name, values in means.items()), ["gain of the correction", *gains]])
    )
    print()
    rows = [[f"source {source}", *_shown(recalls["corrected"][:, source])] for source in range(layers)]
    print(_report.table(["corrected, by source", *map(str, range(1, distances + 1))], rows))
    print()
    lengths = np.diff(bench.data.second_halves.offsets)
    of_token = np.repeat(bench.data.texts, lengths)
    texts = {
        text: {name: bench.by_distance(recalls[name][of_token == text]) for name in ("pre-gate", "corrected")}
        for text in dict.fromkeys(bench.data.texts)
    }
    rows = [[f"{text}, {name}", *values] for text, both in texts.items() for name, values in both.items()]
    print(_report.table(["by text", *map(str, range(1, distances + 1))], rows))
    print(f"trained in {training.steps} steps, {training.seconds:.0f} s")
    return {
        "recall": means,
        "gain": gains,
        "gain_reached": min(gains[2:]) >= TARGET_GAIN,
        "by_source": {name: [_shown(recall[:, s]) for s in range(layers)] for name, recall in recalls.items()},
        "by_text": texts,
        "training_steps": training.steps,
        "training_seconds": _report.rounded(training.seconds),
        "cross_entropy_held_out_of_training": _report.rounded(training.loss),
    }


def ablation(bench: Bench) -> dict[str, Any]:
    """Recall of corrections that lack an input."""
    means = {}
    for name, without in {"all inputs": (), **_WITHOUT}.items():
        correction, _ = bench.train(bench.options.ablation_epochs, without)
        means[name] = bench.by_distance(bench.recall(bench.corrected(correction)))
    head = ["recall %, layers ahead", *map(str, range(1, DISTANCES + 1))]
    print(_report.table(head, [[name, *values] for name, values in means.items()]))
    return {"recall": means}


def forest(bench: Bench) -> dict[str, Any] | None:
    """The paper's predictor beside the correction."""
    if not _forest.installed():
        print("forest: scikit-learn is not installed, so it is left out")
        return None
    random = np.random.default_rng(bench.options.seed)
    count = min(bench.options.forest_tokens, bench.learned.count)
    rows = np.sort(random.choice(bench.learned.count, count, replace=False))
    asked = np.arange(0, bench.held.count, max(1, bench.held.count // 2048))
    inputs = bench.held.inputs(asked, bench.spec)
    found = _forest.forest(bench.spec, bench.learned.inputs(rows, bench.spec), inputs)
    used = np.asarray(targets(jnp.asarray(inputs.experts), bench.spec.experts, DISTANCES))
    recalls = {
        "pre-gate": bench.recall(lambda inputs: inputs.choice, asked),
        "forest": np.asarray(recall_at_k(jnp.asarray(found.probabilities), jnp.asarray(used), bench.spec.top_k)),
        "corrected": bench.recall(bench.corrected(bench.trained[0]), asked),
    }
    means = {name: bench.by_distance(recall) for name, recall in recalls.items()}
    head = [f"recall %, {len(asked)} tokens", *map(str, range(1, DISTANCES + 1))]
    print(_report.table(head, [[name, *values] for name, values in means.items()]))
    correction_us = _added_us(bench.spec, bench.trained[0], jnp.float32)
    us = _report.spread(found.us_per_layer)
    print(f"{_forest.TREES} trees a source on {count} tokens: trained in {found.seconds:.0f} s")
    print(
        f"a layer of one token: forest {us['median']:.0f} us on the CPU, correction {correction_us['added_us']:.0f} us"
    )
    return {
        "recall": means,
        "trees": _forest.TREES,
        "tokens": count,
        "training_seconds": _report.rounded(found.seconds),
        "us_per_layer": us,
        "correction_us_per_layer": correction_us,
    }


def cost(bench: Bench) -> list[dict[str, Any]]:
    """Time and bytes of the correction, for the bundled model and for a large one."""
    attention = 2 * _HIDDEN * _HEAD_DIM * (_HEADS + _KV_HEADS)
    layer_bytes = 2 * (_LARGE.top_k * 3 * _EXPERT_WIDTH * _HIDDEN + attention)
    rows = []
    for name, spec in (("bundled", bench.spec), ("48 x 128, top-8", _LARGE)):
        correction = Correction(spec, rngs=nnx.Rngs(0))
        for dtype in (jnp.float32, jnp.bfloat16):
            read = sum(leaf[0].size for leaf in correction.sources) * jnp.dtype(dtype).itemsize + 8 * spec.state_width
            rows.append(
                {
                    "sizes": name,
                    "dtype": jnp.dtype(dtype).name,
                    "bytes_a_layer": int(read),
                    "share_of_layer_bytes": _report.rounded(read / layer_bytes) if spec is _LARGE else None,
                    **_added_us(spec, correction, dtype),
                }
            )
    head = ["correction, one sequence", "dtype", "kB a layer", "% of a layer's", "us a call", "us empty", "us added"]
    print(
        _report.table(
            head,
            [
                [
                    row["sizes"],
                    row["dtype"],
                    row["bytes_a_layer"] / 1e3,
                    row["share_of_layer_bytes"] and 100 * row["share_of_layer_bytes"],
                    row["call_us"],
                    row["empty_us"],
                    row["added_us"],
                ]
                for row in rows
            ],
        )
    )
    print(f"devices: {', '.join(_report.devices())}")
    return rows


def _history(bench: Bench) -> np.ndarray:
    """Recall `[N, L, H]` of `History`, which goes along with the held-out texts."""
    trace, spec = bench.data.second_halves, bench.spec
    history = History(layers=spec.layers, experts=spec.experts)
    recall = np.zeros((trace.count, spec.layers, spec.distances), np.float32)
    for row, (token, route) in enumerate(zip(trace.tokens.tolist(), trace.experts.tolist(), strict=True)):
        history.on_step([token])
        for source in range(spec.layers):
            ahead = history.ahead(source - 1, min(spec.distances, spec.layers - source))
            best = np.argpartition(-ahead, spec.top_k - 1, axis=1)[:, : spec.top_k].tolist()
            for distance, chosen in enumerate(best):
                recall[row, source, distance] = len(set(chosen) & set(route[source + distance])) / spec.top_k
            history.on_route(source, [route[source]])
    return recall


def _added_us(spec: CorrectionSpec, correction: Correction, dtype: Any) -> dict[str, float]:
    """Medians over calls, in turns: the correction's part of a layer's program, an empty one, and the difference."""
    common = correction.common
    leaves = jax.tree.map(lambda leaf: leaf[0].astype(dtype), correction.sources)
    ids = jnp.arange(spec.top_k, dtype=jnp.int32)[None]
    choice = jax.random.normal(jax.random.key(0), (1, spec.distances, spec.experts))
    layer = jnp.int32(0)

    def layer_part(common, leaves, state, layer, ids, choice):  # type: ignore[no-untyped-def]
        state = advance(spec, common, state, layer, ids)
        return state, correct(spec, leaves, choice, state)

    programs = {
        "call_us": jax.jit(layer_part, donate_argnums=2),
        "empty_us": jax.jit(lambda common, leaves, state, layer, ids, choice: (state, choice), donate_argnums=2),
    }
    states = {name: jnp.zeros((1, spec.state_width)) for name in programs}
    times: dict[str, list[float]] = {name: [] for name in programs}
    for call in range(_CALLS + 1):
        for name, program in programs.items():
            began = time.perf_counter()
            states[name], out = program(common, leaves, states[name], layer, ids, choice)
            jax.block_until_ready((states[name], out))
            if call:
                times[name].append(1e6 * (time.perf_counter() - began))
    medians = {name: _report.rounded(float(np.median(values))) for name, values in times.items()}
    return medians | {"added_us": _report.rounded(medians["call_us"] - medians["empty_us"])}


def _shown(recall: np.ndarray) -> list[float | None]:
    """Recall `[M, H]` of one source by distance in %, None where nothing is aimed at."""
    return [_report.rounded(float(100 * value)) if value else None for value in recall.mean(axis=0)]


if __name__ == "__main__":
    sys.exit(_report.run("recall", main))
