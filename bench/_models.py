"""Models and prompts of the benches: checkpoints, made-up ones in a directory that goes away, engines on one store."""

import argparse
import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from bench.make_synthetic import Synthetic, write_synthetic
from ef_jax.errors import InputError
from ef_jax.loading import bundled_model
from ef_jax.memory.plan import MemoryPlan, MemoryRequest
from ef_jax.memory.policies import make_policy
from ef_jax.memory.residency import Residency
from ef_jax.planning import plan_model
from ef_jax.runtime.engine import Engine
from ef_jax.runtime.language_model import LanguageModel
from ef_jax.runtime.programs import Programs
from ef_jax.schedule.device_link import DeviceLink
from ef_jax.schedule.fill import fill

_LETTERS = {"D": "hidden", "F": "width", "E": "experts", "K": "top_k", "L": "layers", "V": "vocab"}
_LETTERS_A_TOKEN = 8


def parse_shape(text: str) -> Synthetic:
    """The shape that `D=1024,F=512,E=64,K=8,L=8` (any of D, F, E, K, L, V) describes; others keep their defaults."""
    fields: dict[str, Any] = {}
    for word in text.split(","):
        letter, _, number = word.partition("=")
        if letter not in _LETTERS or not number.isdecimal() or int(number) < 1:
            known = ", ".join(_LETTERS)
            raise argparse.ArgumentTypeError(f"{word!r} is not LETTER=NUMBER with a letter of {known}")
        fields[_LETTERS[letter]] = int(number)
    return Synthetic(**fields)


@contextlib.contextmanager
def synthetic_directory(shape: Synthetic, scratch: Path | None = None) -> Iterator[Path]:
    """A made-up checkpoint of `shape` in a directory of its own under `scratch`, removed afterwards.

    Raises:
      InputError: the disk has no room for it.
    """
    with tempfile.TemporaryDirectory(prefix="bench-", dir=scratch) as directory:
        require_disk(Path(directory), shape.nbytes)
        path = Path(directory) / "model"
        write_synthetic(path, shape)
        yield path


def require_disk(directory: Path, nbytes: int) -> None:
    """Refuse to write `nbytes` where they do not fit with 5 % to spare.

    Raises:
      InputError: they do not.
    """
    free = shutil.disk_usage(directory).free
    if free < 1.05 * nbytes:
        raise InputError(f"{directory} has {free} bytes free and {nbytes} are needed: give another --scratch directory")


def with_cache(lm: LanguageModel, fraction: float, policy: str) -> LanguageModel:
    """A model over the weights of `lm` with a cache for `fraction` of the experts; `lm` stays usable."""
    engine, plan = lm._engine, lm.plan
    request = MemoryRequest(expert_fraction=fraction, batch=plan.batch, context=plan.context, chunk=plan.chunk)
    return over(lm, *plan_model(lm.spec, request, engine.device, engine.link.mode), policy, Engine)


def over(lm: LanguageModel, plan: MemoryPlan, programs: Programs, policy: str, kind: type[Engine]) -> LanguageModel:
    """A model with an engine of its own, made as `ef_jax.load` does, over the host store and dense weights of `lm`."""
    engine, spec = lm._engine, lm.spec
    layers = len(spec.moe_layers)
    link = DeviceLink(
        spec, engine.link._store, engine.device, slots=plan.slots + plan.staging_slots, mode=engine.link.mode
    )
    residency = Residency(
        layers=layers,
        experts=spec.experts.count,
        cache_slots=plan.slots,
        staging_slots=plan.staging_slots,
        policy=make_policy(policy, layers=layers, experts=spec.experts.count, cache_slots=plan.slots),
    )
    if plan.slots == spec.total_experts:
        fill(residency, link, [range(spec.experts.count)] * len(spec.moe_layers))
    return LanguageModel(
        lm.path, spec, kind(spec, plan, programs, engine._dense, residency, link, engine.device), lm.tokenizer
    )


def prompts(lm: LanguageModel, count: int, length: int) -> list[np.ndarray]:
    """`count` prompts of `length` token ids, int32.

    From the bundled model's held-out texts, one domain after another, where `lm` is the bundled model; else uniformly
    random ids, for a model of random weights has no text.

    Raises:
      InputError: the texts do not give so many tokens.
    """
    if lm.path.resolve() != bundled_model().resolve() or lm.tokenizer is None:
        random = np.random.default_rng(0)
        return list(random.integers(0, lm.spec.vocab, (count, length), np.int32))
    texts = sorted((bundled_model() / "valid").glob("*.txt"))
    enough = _LETTERS_A_TOKEN * length * -(-count // len(texts))
    ids = [np.asarray(lm.tokenizer.encode(text.read_text()[:enough]), np.int32) for text in texts]
    chosen = []
    for index in range(count):
        first = index // len(ids) * length
        part = ids[index % len(ids)][first : first + length]
        if len(part) < length:
            raise InputError(f"the held-out texts are too short for {count} prompts of {length} tokens: ask for fewer")
        chosen.append(part)
    return chosen


def model_name(path: Path) -> str:
    """What to call the model at `path` in a report."""
    return "small_moe (bundled)" if path.resolve() == bundled_model().resolve() else path.name
