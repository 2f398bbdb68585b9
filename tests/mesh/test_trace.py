"""What is recorded on a mesh is what one device records of the same prompts."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ef_jax
from ef_jax.replay.trace import RoutingTrace
from ef_jax.replay.trace_file import load_trace
from tests.mesh.loopback import run_processes
from tests.weights.synthetic import CONFIGS, random_tensors, write_checkpoint

# Some need several chunks, and two wait for a place: a device has two.
LENGTHS = [3, 35, 1, 9, 18] * 2
PROMPTS = [list(range(20 * n, 20 * n + length)) for n, length in enumerate(LENGTHS, 1)]
SIZES: dict[str, Any] = {"context": 64, "chunk": 16, "progress": False}


def record(lm: Any, prompts: list[list[int]], **settings: Any) -> tuple[RoutingTrace, list[Any]]:
    lm.stats.reset()
    with lm.trace(**settings) as recording:
        results = lm.generate(prompts, max_new_tokens=6, ignore_eos=True)
    return recording.trace(), results


def assert_same(ours: RoutingTrace, theirs: RoutingTrace, *names: str) -> None:
    for name in ("experts", "tokens", "offsets", "phases", *names):
        np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name), err_msg=name)


@pytest.fixture(scope="module")
def one() -> Any:
    return ef_jax.load(expert_fraction=0.25, batch=2, **SIZES)  # as each device of the mesh has it


@pytest.fixture(scope="module")
def lm() -> Any:
    return ef_jax.load(mesh="data=2,expert=2", expert_fraction=0.5, batch=8, **SIZES)


def test_traces_are_those_of_one_device(lm: Any, one: Any) -> None:
    (ours, results), (theirs, alone) = (record(model, PROMPTS, weights=True) for model in (lm, one))
    assert ours.sequences == len(PROMPTS)
    assert_same(ours, theirs, "weights")
    assert (ours.fingerprint, ours.block_bytes) == (theirs.fingerprint, theirs.block_bytes)
    assert [(a.tokens, a.logprobs) for a in results] == [(b.tokens, b.logprobs) for b in alone]


def test_passes_are_those_that_the_devices_ran(lm: Any) -> None:
    steps = list(record(lm, PROMPTS)[0].steps())
    assert lm.stats.prefill.steps == sum(step.prompt for step in steps)
    assert lm.stats.decode.steps == sum(not step.prompt for step in steps)
    assert max(len(step.rows) for step in steps if not step.prompt) == 8


def test_teacher_forced_passes(lm: Any, one: Any) -> None:
    traces = []
    for model in (lm, one):
        with model.trace() as recording:
            model.logits(PROMPTS[1])
            model.score(PROMPTS[3:5])
        traces.append(recording.trace())
    assert_same(*traces)


def test_pregate_scores(lm: Any, one: Any) -> None:
    ours, theirs = (record(model, PROMPTS[:3], pregate=2)[0].pregate for model in (lm, one))
    assert ours is not None
    assert theirs is not None
    np.testing.assert_allclose(ours, theirs, atol=1e-2, rtol=1e-2)


def test_residual_means(lm: Any, one: Any) -> None:
    ours, theirs = (model.residual_means(PROMPTS[:2]) for model in (lm, one))
    np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=1e-5)


def test_two_processes_write_one_trace(tmp_path: Path) -> None:
    config = CONFIGS["qwen2_moe"]  # two layers of 4 experts
    model = write_checkpoint(tmp_path / "tiny", config, random_tensors(config))
    (model / "tokenizer.json").unlink()
    prompts = [[1, 2, 3, 4, 5], [9, 8], [7]]
    words = ["-m", "ef_jax", "trace", str(model), *(f"--token-ids={','.join(map(str, ids))}" for ids in prompts)]
    words += ["--mesh", "expert=4", "--distributed", "--expert-fraction=0.5", "--context=16", "--chunk=4", "--weights"]
    words += ["--batch=4", "--max-new-tokens=4", "--ignore-eos", "--output", str(tmp_path / "trace.npz")]
    outcomes = run_processes(words, devices=2, seconds=300)
    assert [(one.code, one.err) for one in outcomes] == [(0, "")] * 2
    assert [one.out.count("\n") for one in outcomes] == [1, 0]

    one = ef_jax.load(model, expert_fraction=0.5, context=16, chunk=4, progress=False)
    with one.trace(weights=True) as recording:
        one.generate(prompts, max_new_tokens=4, ignore_eos=True)
    assert_same(load_trace(tmp_path / "trace.npz"), recording.trace(), "weights")
