"""What do experts in int8 and int4 cost in quality, and what do they save over a link?

    python -m bench.quantized [--tokens 64] [--window 512] [--link 10MB/s] [--repeats 3] [--save]
    python -m bench.quantized --shape D=1024,F=512,E=64,K=8,L=4 --formats int8 int4:128 --link 200MB/s

nats: mean negative log-probability of a token of the second halves of the bundled held-out texts, in windows of
  `--window` tokens; "cost" is what a format adds to the model as released. A model of made-up weights (`--shape`) has
  none. The first halves are what "+gptq" rounds by, as `ef-convert --quantize --calibrate` does; other formats round
  to nearest.
MB a block, "of bf16": bytes of one expert with its scales, and their share of those as released.
MB/token, tokens/s: of decode steps over an emulated link, `--tokens` tokens of each of six texts (two sequences of
  random ones for `--shape`), given, not chosen, so that all formats decode the same. The same number of slots, which is
  `--fraction` of the experts. "waiting" is the share of the time that steps wait for copies.
follows: how the speed grew over how the bytes a token fell; 1 where a run is bound by the link alone.

Prints a table, then one line of JSON.
"""

import argparse
import contextlib
import math
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench import _models, _report
from checkpoints_tools import convert_to_orbax
from ef_jax.errors import InputError
from ef_jax.inline_dispatch import dispatch_inline
from ef_jax.loading import bundled_model, load
from ef_jax.runtime.language_model import LanguageModel
from ef_jax.text import Tokenizer
from ef_jax.weights import open_checkpoint
from ef_jax.weights.huggingface import HuggingFaceCheckpoint

FORMATS = ("int8", "int4", "int4+gptq")
_CALIBRATED = "+gptq"
_MADE_UP_SEQUENCES = 2
_WARM_TOKENS = 8


def main() -> int:
    """Run the bench; the exit code."""
    dispatch_inline()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", type=_models.parse_shape, help="made-up weights, e.g. D=1024,F=512,E=64,K=8,L=4")
    parser.add_argument(
        "--formats",
        nargs="+",
        default=list(FORMATS),
        metavar="FORMAT",
        help="as load's lossy_quantize, perhaps with +gptq",
    )
    parser.add_argument("--tokens", type=_report.positive, default=64, help="decoded of each text (default: 64)")
    parser.add_argument("--window", type=_report.positive, default=512, help="tokens that are scored together")
    parser.add_argument("--windows", type=_report.positive, help="scored of each text (default: all)")
    parser.add_argument("--fraction", type=float, default=0.25, help="share of the experts that have a slot")
    parser.add_argument("--link", default="10MB/s", help="as load's emulate_link")
    parser.add_argument("--repeats", type=_report.positive, default=3, help="of what is timed")
    parser.add_argument("--scratch", type=Path, help="directory for made-up weights")
    _report.add_save_option(parser, "quantized")
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        path, wanted = bundled_model(), [name for name in options.formats if name.endswith(_CALIBRATED)]
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-", dir=options.scratch)))
        if options.shape is not None:
            if wanted:
                raise InputError(f"made-up weights have no text to be rounded by: leave {wanted[0]} out of --formats")
            path = stack.enter_context(_models.synthetic_directory(options.shape, options.scratch))
        rows = [measure(path, None, options)]
        for name in options.formats:
            if name in wanted:
                converted = calibrated(path, name.removesuffix(_CALIBRATED), scratch / name)
                rows.append({**measure(converted, None, options), "format": name})
            else:
                rows.append(measure(path, name, options))
    _compare(rows)
    _print_table(rows, options)
    result = {
        "model": "small_moe (bundled)" if options.shape is None else "synthetic",
        "expert_fraction": options.fraction,
        "link": options.link,
        "tokens_a_text": options.tokens,
        "window": options.window,
        "rows": rows,
    }
    _report.finish("quantized", result, options.save)
    return 0


def measure(path: Path, quantization: str | None, options: argparse.Namespace) -> dict[str, Any]:
    """Quality of a format, and bytes and speed over the link."""
    common: dict[str, Any] = {"lossy_quantize": quantization, "progress": False}
    row: dict[str, Any] = {"format": quantization}
    if options.shape is None:
        window = options.window
        lm = load(path, expert_fraction=1.0, context=window, chunk=window, **common)
        row |= quality(lm, window, options.windows)
        print(f"{path.name} {lm.spec.block_dtype}: {row['nats']:.4f} nats", file=sys.stderr)
    lm = load(
        path,
        expert_fraction=options.fraction,
        context=options.tokens,
        chunk=options.tokens,
        prefetch="off",
        emulate_link=options.link,
        **common,
    )
    if lm.tokenizer is None:
        texts = _models.prompts(lm, _MADE_UP_SEQUENCES, options.tokens)
    else:
        texts = [_windows(lm.tokenizer.encode(text), options.tokens)[0] for text in _texts()]
    lm.score(texts[0][:_WARM_TOKENS], by_steps=True)
    speeds = []
    for _ in range(options.repeats):
        lm.stats.reset()
        lm.score(texts, by_steps=True)
        speeds.append(lm.stats.tokens_per_second)
    phase = lm.stats.decode
    return row | {
        "block_dtype": lm.spec.block_dtype,
        "block_bytes": lm.spec.block_bytes,
        "slots": lm.plan.slots,
        "experts": lm.plan.experts,
        "bytes_per_token": _report.rounded((phase.bytes_demand + phase.bytes_prefetch) / phase.tokens),
        "tokens_per_second": _report.spread(speeds),
        "waiting": _report.rounded(phase.stall_seconds / phase.seconds),
    }


def calibrated(path: Path, quantization: str, destination: Path) -> Path:
    """A conversion of a model whose experts are rounded by the first halves of the held-out texts."""
    with open_checkpoint(path) as source:
        if not isinstance(source, HuggingFaceCheckpoint) or source.tokenizer_dir is None:
            raise InputError(f"{path} is not a Hugging Face checkpoint with a tokenizer")
        text = "".join(text[: len(text) // 2] for text in _texts())
        ids = Tokenizer.load(source.tokenizer_dir, source.spec.vocab).encode(text)
        convert_to_orbax(source, destination, show_progress=False, quantize=quantization, calibrate=ids)
    return destination


def quality(lm: LanguageModel, window: int, windows: int | None) -> dict[str, Any]:
    """Mean nats a token of the held-out texts, and how many tokens those were."""
    assert lm.tokenizer is not None
    total, tokens = 0.0, 0
    for text in _texts():
        for part in _windows(lm.tokenizer.encode(text[len(text) // 2 :]), window)[:windows]:
            score = lm.score([part])[0]
            total, tokens = total - score.logprob, tokens + score.tokens
    return {"nats": _report.rounded(total / tokens), "perplexity": math.exp(total / tokens), "tokens_scored": tokens}


def _texts() -> list[str]:
    return [path.read_text() for path in sorted((bundled_model() / "valid").glob("*.txt"))]


def _windows(ids: Sequence[int], size: int) -> list[np.ndarray]:
    """The ids in runs of `size`; what is left is a run too if it has anything to predict."""
    starts = range(0, len(ids), size)
    return [np.asarray(ids[start : start + size], np.int32) for start in starts if len(ids) - start > 1]


def _compare(rows: list[dict[str, Any]]) -> None:
    """What each row has of the first, the model as released."""
    first = rows[0]
    for row in rows:
        row["block_share"] = _report.rounded(row["block_bytes"] / first["block_bytes"])
        row["bytes_share"] = _report.rounded(row["bytes_per_token"] / first["bytes_per_token"])
        speedup = row["tokens_per_second"]["median"] / first["tokens_per_second"]["median"]
        row["speedup"] = _report.rounded(speedup)
        row["follows"] = _report.rounded(speedup * row["bytes_share"])
        if "nats" in row:
            row["cost_nats"] = _report.rounded(row["nats"] - first["nats"])


def _print_table(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    print(f"{rows[0]['slots']} of {rows[0]['experts']} experts have a slot, link {options.link}")
    head = ["experts in", "nats", "cost", "MB a block", "of bf16", "MB/token", "share", "tokens/s", "times"]
    print(_report.table([*head, "follows", "waiting %"], [_cells(row) for row in rows]))


def _cells(row: dict[str, Any]) -> tuple[Any, ...]:
    return (
        row["block_dtype"] + (_CALIBRATED if (row["format"] or "").endswith(_CALIBRATED) else ""),
        f"{row['nats']:.4f}" if "nats" in row else None,
        f"{row['cost_nats']:+.4f}" if "nats" in row else None,
        f"{row['block_bytes'] / 1e6:.4f}",
        f"{row['block_share']:.4f}",
        f"{row['bytes_per_token'] / 1e6:.4f}",
        f"{row['bytes_share']:.4f}",
        f"{row['tokens_per_second']['median']:.2f}",
        f"{row['speedup']:.2f}",
        f"{row['follows']:.3f}",
        f"{100 * row['waiting']:.0f}",
    )


if __name__ == "__main__":
    sys.exit(_report.run("quantized", main))
