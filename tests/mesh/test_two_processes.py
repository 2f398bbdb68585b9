"""The command line on two processes of four devices each: the results of one device, printed once."""

import json

import ef_jax
from tests.mesh.loopback import run_processes

_PROMPTS = [[5, 6], [100, 9]]
_RUN = ["-m", "ef_jax", "generate", "--mesh=expert=8", "--distributed", "--expert-fraction=0.5", "--batch=8"]
_RUN += ["--chunk=2"]


def test_results_are_those_of_one_device() -> None:
    words = [f"--token-ids={','.join(map(str, prompt))}" for prompt in _PROMPTS]
    first, second = run_processes(
        [*_RUN, *words, "--context=16", "--max-new-tokens=6", "--json"], devices=4, seconds=400
    )
    assert (first.code, first.err) == (second.code, second.err) == (0, "")
    assert second.out == ""
    assert len(first.out.splitlines()) == 1

    one = ef_jax.load(expert_fraction=0.25, context=16, chunk=2, progress=False)
    expected = one.generate(_PROMPTS, max_new_tokens=6)
    result = json.loads(first.out)
    assert result["tokens"] == [generation.tokens for generation in expected]
    assert result["logprobs"] == [generation.logprobs for generation in expected]

    plan, devices = result["plan"], result["stats"]["devices"]
    assert plan["slots"] < plan["experts"]
    assert plan["host_bytes"] * 2 == one.plan.host_bytes  # each process holds its own devices' experts
    assert plan["share"]["local_devices"] == len(devices) == 4
    moved = [device["bytes_moved"] for device in devices]
    assert all(moved)
    assert sum(moved) == result["stats"]["bytes_demand"]


def test_processes_that_were_given_different_things_say_so_and_end() -> None:
    other = {1: [*_RUN, "--context=32", "bye"]}
    outcomes = run_processes([*_RUN, "--context=64", "hi"], different=other)
    for process, outcome in enumerate(outcomes):
        assert (outcome.code, outcome.out) == (2, "")
        (line,) = outcome.err.splitlines()
        assert line.startswith("ef-jax: error: the processes disagree: --context differs between processes 0 and 1; ")
        assert line.endswith(f"process {process} has {(64, 32)[process]}")
