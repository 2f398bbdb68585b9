"""What `bench.recall` learns from and is judged by: the bundled model's routing, recorded on the spot."""

from typing import NamedTuple

import numpy as np

import ef_jax
from ef_jax.loading import bundled_model
from ef_jax.nn import stack_routers
from ef_jax.replay.trace import RoutingTrace
from ef_jax.runtime.residual_means import logit_shifts
from ef_jax.spec import ModelSpec

DISTANCES = 6
_BATCH = 16
_PIECE_TOKENS = 256
_PROMPT_TOKENS = 24
_PROMPT_LETTERS = 200
_NO_PROMPT_EVERY = 4


class RecallData(NamedTuple):
    """Traces with pre-gate scores of `DISTANCES` layers.

    Attributes:
      spec: the model.
      sampled: text that the model made up.
      first_halves: of its held-out texts, read by the model.
      second_halves: likewise; nothing is learned from them.
      texts: name of the text of each sequence of `second_halves`.
      shifts: f32 `[L + 1, H, E]`, `logit_shifts` measured on the first halves.
    """

    spec: ModelSpec
    sampled: RoutingTrace
    first_halves: RoutingTrace
    second_halves: RoutingTrace
    texts: list[str]
    shifts: np.ndarray


def record(samples: int, seed: int) -> RecallData:
    """Record `samples` sampled sequences of 256 tokens, and the bundled model's held-out texts."""
    lm = ef_jax.load(expert_fraction=1.0, batch=_BATCH, context=_PIECE_TOKENS, prefetch="off", progress=False)
    texts = {path.stem: path.read_text() for path in sorted((bundled_model() / "valid").glob("*.txt"))}
    cuts = {name: text.index("\n", len(text) // 2) for name, text in texts.items()}
    first = [text[: cuts[name]] for name, text in texts.items()]
    second = {name: _pieces(lm, text[cuts[name] :]) for name, text in texts.items()}
    learned = [piece for text in first for piece in _pieces(lm, text)]
    return RecallData(
        spec=lm.spec,
        sampled=_sample(lm, _prompts(lm, first, samples, seed), seed),
        first_halves=_read(lm, learned),
        second_halves=_read(lm, [piece for pieces in second.values() for piece in pieces]),
        texts=[name for name, pieces in second.items() for _ in pieces],
        shifts=_shifts(learned),
    )


def _shifts(pieces: list[list[int]]) -> np.ndarray:
    # Scoring takes one text at a time, so a batch of one.
    lm = ef_jax.load(expert_fraction=1.0, context=_PIECE_TOKENS, prefetch="off", progress=False)
    stack = stack_routers(lm.spec, lm._engine.dense.layers, DISTANCES)
    return logit_shifts(lm.spec, stack, lm.residual_means(pieces), DISTANCES)


def _pieces(lm: ef_jax.LanguageModel, text: str) -> list[list[int]]:
    """Token ids of pieces of a text, each one short of the context, with the token that every prompt begins with."""
    assert lm.tokenizer is not None
    words = lm.tokenizer.encode("\n")
    begin = words[:1]
    ids = [token for line in text.splitlines(keepends=True) for token in lm.tokenizer.encode(line)[len(begin) :]]
    return [[*begin, *ids[at : at + _PIECE_TOKENS - 2]] for at in range(0, len(ids), _PIECE_TOKENS - 2)]


def _prompts(lm: ef_jax.LanguageModel, texts: list[str], count: int, seed: int) -> list[list[int]]:
    """Beginnings for samples: no text, or a few tokens of a text."""
    assert lm.tokenizer is not None
    random = np.random.default_rng(seed)
    prompts = []
    for number in range(count):
        text = texts[random.integers(len(texts))]
        at = random.integers(len(text) - _PROMPT_LETTERS)
        ids = lm.tokenizer.encode(text[at : at + _PROMPT_LETTERS])[:_PROMPT_TOKENS]
        prompts.append(list(ids[:1] if number % _NO_PROMPT_EVERY == 0 else ids))
    return prompts


def _sample(lm: ef_jax.LanguageModel, prompts: list[list[int]], seed: int) -> RoutingTrace:
    with lm.trace(pregate=DISTANCES) as recording:
        lm.generate(prompts, temperature=1.0, max_new_tokens=_PIECE_TOKENS, seed=seed)
    return recording.trace()


def _read(lm: ef_jax.LanguageModel, pieces: list[list[int]]) -> RoutingTrace:
    """The routing of texts; the one token that the model adds to each is not run."""
    with lm.trace(pregate=DISTANCES) as recording:
        lm.generate(pieces, max_new_tokens=1)
    return recording.trace()
