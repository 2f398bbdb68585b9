"""What the engine's layers take besides bytes and products, found by running the bundled model."""

import dataclasses
from typing import Any

import numpy as np

from ef_jax.forecast.work import step_work
from ef_jax.loading import load
from ef_jax.memory.policies import make_policy
from ef_jax.memory.residency import Residency
from ef_jax.runtime.engine import Engine
from ef_jax.runtime.language_model import LanguageModel
from ef_jax.sampling_options import SamplingOptions
from ef_jax.schedule.device_link import DeviceLink

_BATCH = 8
_PROMPT_TOKENS = 16
_CONTEXT = 64


@dataclasses.dataclass
class _Run:
    """Decoding with the bundled model: the least seconds of a step so far, and misses of a step."""

    lm: LanguageModel
    seconds: float = float("inf")
    misses: float = 0.0

    def repeat(self, tokens: int) -> None:
        lm = self.lm
        batch = lm.plan.batch
        prompts = list(np.random.default_rng(0).integers(2, lm.spec.vocab, (batch, _PROMPT_TOKENS), np.int32))
        lm.stats.reset()
        lm.generate(prompts, SamplingOptions(max_new_tokens=tokens + 1, temperature=0.8, ignore_eos=True))
        phase = lm.stats.decode
        self.seconds = min(self.seconds, phase.seconds / phase.steps)
        self.misses = sum(phase.misses) / phase.steps


def measure_engine(
    *, device_bandwidth: float, device_flops: float, link_bandwidth: float, tokens: int = 40, repeats: int = 6
) -> dict[str, Any]:
    """Fixed times of a layer, by runs of the bundled model with all, half and an eighth of its experts cached.

    `layer_seconds` is what a layer takes all-resident beyond what its bytes and products do; `row_seconds` what each
    further sequence adds. What the runs with fewer slots take longer is `miss_seconds` a layer and `block_seconds` a
    miss, beyond the bytes over the link: two runs, two unknowns. Runs take turns, and of each the fastest counts.
    """
    single = _load(1)
    runs = {
        "resident": _Run(single),
        "batch 8": _Run(_load(_BATCH)),
        "half": _Run(_with_fewer_slots(single, 0.5)),
        "eighth": _Run(_with_fewer_slots(single, 0.125)),
    }
    for run in runs.values():
        run.repeat(tokens)  # compiles
        run.seconds = float("inf")
    for _ in range(repeats):
        for run in runs.values():
            run.repeat(tokens)

    spec, positions = single.spec, _PROMPT_TOKENS + tokens // 2

    def roofline(batch: int) -> float:
        work = step_work(spec, batch=batch, positions=positions)
        return sum(max(layer.read_bytes / device_bandwidth, layer.operations / device_flops) for layer in work)

    resident, fewer = runs["resident"], (runs["half"], runs["eighth"])
    layers = len(spec.step_layers) + 1  # and the head
    fixed = max(0.0, resident.seconds - roofline(1)) / layers
    row = max(0.0, runs["batch 8"].seconds - roofline(_BATCH) - layers * fixed) / (layers * (_BATCH - 1))
    crossing = spec.block_bytes / link_bandwidth
    longer = [max(0.0, run.seconds - resident.seconds - run.misses * crossing) for run in fewer]
    miss, block = _solve(len(spec.step_moe_layers), [run.misses for run in fewer], longer)
    return {
        "layer_seconds": fixed,
        "row_seconds": row,
        "miss_seconds": miss,
        "block_seconds": block,
        "step_seconds": {name: run.seconds for name, run in runs.items()},
    }


def _load(batch: int) -> LanguageModel:
    return load(expert_fraction=1.0, batch=batch, context=_CONTEXT, chunk=_PROMPT_TOKENS, progress=False)


def _with_fewer_slots(lm: LanguageModel, fraction: float) -> LanguageModel:
    """A model on the weights and programs of `lm`, which is all-resident: its slots become staging."""
    engine, spec = lm._engine, lm.spec
    assert isinstance(engine, Engine)  # of one device
    slots = int(fraction * lm.plan.experts)
    plan = dataclasses.replace(lm.plan, slots=slots, staging_slots=lm.plan.experts - slots)
    shape = {"layers": len(spec.moe_layers), "experts": spec.experts.count}
    residency = Residency(
        **shape,
        cache_slots=slots,
        staging_slots=plan.staging_slots,
        policy=make_policy("lru", **shape, cache_slots=slots),
    )
    theirs = engine.link
    assert isinstance(theirs, DeviceLink)  # nothing is emulated here
    link = DeviceLink(spec, theirs._store, engine.device, slots=plan.experts, mode=theirs.mode)
    ours = Engine(spec, plan, engine.programs, engine.dense, residency, link, engine.device)
    return LanguageModel(lm.path, spec, ours, lm.tokenizer)


def _solve(moe: int, misses: list[float], longer: list[float]) -> tuple[float, float]:
    """The seconds a layer and a miss, neither negative, that come closest to `longer`."""
    a = np.array([[moe, count] for count in misses])
    layer, block = np.linalg.lstsq(a, np.array(longer), rcond=None)[0]
    if layer < 0:
        return 0.0, max(0.0, float(np.dot(misses, longer) / np.dot(misses, misses)))
    if block < 0:
        return sum(longer) / (len(longer) * moe), 0.0
    return float(layer), float(block)
