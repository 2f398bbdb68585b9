"""Forecasts: what makes a machine better never makes them worse, and they agree with the memory plan."""

import dataclasses
import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ef_jax.errors import BudgetError
from ef_jax.forecast import MACHINES, Forecast, Machine, arithmetic_plan, forecast, prior_hit_rate
from ef_jax.forecast.work import prompt_work, step_work
from ef_jax.memory.parameters import count_parameters
from ef_jax.memory.plan import MemoryRequest
from ef_jax.schedule.link_model import LinkModel
from tests.forecast.specs import SMALL, plan_of, released, small_with
from tests.replay.traces import made_up

GPU, CPU = MACHINES["rtx4090-pcie4"], MACHINES["cpu-emulated-pcie3"]
_TO_FORECAST = ("deepseek-v2-lite", "gpt-oss-20b", "llama-4-scout", "qwen3-next-80b-a3b", "switch-base-8")
_FASTER = (
    "device_bandwidth", "device_flops", "link_bandwidth", "insert_bandwidth", "disk_bandwidth", "host_bandwidth",
    "host_flops",
)  # fmt: skip
_MISSES = ("fetch", "compute", "auto")
_SLOWER = ("link_latency", "block_seconds", "dispatch_seconds", "kernel_seconds", "miss_seconds", "row_seconds")


def _rates(result: Forecast) -> list[float]:
    speeds = (result.single, result.batched, result.prompt)
    return [rate for speed in speeds for rate in (speed.low, speed.tokens_per_second, speed.high)]


def _never_slower(better: Forecast, worse: Forecast) -> None:
    for ours, theirs in zip(_rates(better), _rates(worse), strict=True):
        assert ours >= theirs * (1 - 1e-9)


@st.composite
def machines(draw: st.DrawFn) -> Machine:
    """A known machine with every figure a hundredth to a hundred times what it is."""
    machine = draw(st.sampled_from(list(MACHINES.values())))
    factors = st.floats(-2, 2).map(lambda power: 10.0**power)
    changes = {name: value * draw(factors) for name in (*_FASTER, *_SLOWER) if (value := getattr(machine, name))}
    return dataclasses.replace(machine, **changes)


@settings(max_examples=40)
@given(
    machine=machines(),
    name=st.sampled_from([*_FASTER, *_SLOWER]),
    share=st.sampled_from([0.0, 0.2, 0.5, 0.9, 1.0]),
    batch=st.sampled_from([1, 3, 16]),
    miss=st.sampled_from(_MISSES),
)
def test_a_better_figure_is_never_slower(machine: Machine, name: str, share: float, batch: int, miss: Any) -> None:
    plan = plan_of(SMALL, share, batch=batch, platform=machine.platform)
    value = getattr(machine, name)
    if value is None:
        return
    better = dataclasses.replace(machine, **{name: value * 2 if name in _FASTER else value / 2})
    ours, theirs = forecast(SMALL, plan, better, miss=miss), forecast(SMALL, plan, machine, miss=miss)
    _never_slower(ours, theirs)
    for speed in (ours.single, ours.batched, ours.prompt):
        assert 0 < speed.low <= speed.tokens_per_second <= speed.high < math.inf
    assert ours.load_seconds <= theirs.load_seconds


@settings(max_examples=40)
@given(machine=machines(), slots=st.integers(0, 23), batch=st.sampled_from([1, 2, 9]), experts=st.sampled_from([4, 12]))
def test_more_slots_are_never_slower(machine: Machine, slots: int, batch: int, experts: int) -> None:
    spec = small_with(num_experts=experts)
    total = spec.total_experts
    fewer = min(slots, total - 1)
    plans = [plan_of(spec, count / total, batch=batch, platform=machine.platform) for count in (fewer, fewer + 1)]
    assert [plan.slots for plan in plans] == [fewer, fewer + 1]
    _never_slower(forecast(spec, plans[1], machine), forecast(spec, plans[0], machine))


@settings(max_examples=40)
@given(budget=st.integers(10**6, 10**9), memory=st.integers(10**6, 10**9), host=st.integers(10**6, 4 * 10**9))
def test_what_fits_agrees_with_the_plan(budget: int, memory: int, host: int) -> None:
    machine = dataclasses.replace(GPU, device_memory=memory, host_memory=host)
    request = MemoryRequest(device_memory=budget, context=64, chunk=32)
    try:
        plan = arithmetic_plan(SMALL, request, machine.platform)
    except BudgetError as error:
        assert budget < int(str(error).split("at least ")[1].split()[0])
        return
    result = forecast(SMALL, plan, machine)
    assert result.fits_device == (plan.total <= memory)
    assert result.fits_device or budget > memory
    assert result.host_short == max(0, plan.host_bytes + 10**9 - host)
    assert result.fits == (result.fits_device and not result.host_short)
    said = [text for text in result.warnings if "short" in text]
    assert len(said) == (not result.fits_device) + bool(result.host_short)


def test_a_step_by_hand() -> None:
    """One sequence on a machine of round figures, nothing cached, nothing overlapping."""
    machine = dataclasses.replace(
        CPU, device_bandwidth=1e6, device_flops=1e15, link_bandwidth=1e5, insert_bandwidth=None, link_latency=0.5,
        block_seconds=0.25, dispatch_seconds=2.0, kernel_seconds=1.0, miss_seconds=4.0, row_seconds=0.0,
    )  # fmt: skip
    plan = plan_of(SMALL, 0.0, platform="cpu")
    layers, top_k, block = len(SMALL.layers), SMALL.experts.top_k, SMALL.block_bytes
    assert SMALL.moe_layers == tuple(range(layers))
    work = step_work(SMALL, batch=1, positions=32)
    time = forecast(SMALL, plan, machine).single.time
    assert time.link_bytes == pytest.approx(layers * top_k * block)
    assert time.link == pytest.approx(layers * (top_k * (block / 1e5 + 0.25) + 0.5))
    assert time.memory == pytest.approx(sum(layer.read_bytes for layer in work) / 1e6)
    assert time.dispatch == pytest.approx((layers + 1) * (2.0 + 1.0) + layers * 4.0)
    assert time.compute == 0
    assert time.bound == max(("link", time.link), ("device memory", time.memory), ("dispatch", time.dispatch),
                             key=lambda part: part[1])[0]  # fmt: skip


def test_what_the_plan_does_not_hold_comes_from_disk() -> None:
    """The misses of the experts that are not in host memory are read, and waited for on a CPU; with more memory, or a
    faster disk, nothing is slower."""
    spec = released("qwen3-30b-a3b")
    plan = plan_of(spec, 0.1, platform="cpu", host_memory=12 * 10**9)
    assert plan.host is not None
    assert 0 < plan.host.places < plan.experts
    result = forecast(spec, plan, CPU)
    assert result.host_blocks == plan.host.places
    assert not result.host_short
    absent = len(spec.moe_layers) * spec.experts.top_k * (1 - prior_hit_rate(spec, plan.host.places, 1).expected)
    time = result.single.time
    assert time.disk_bytes == pytest.approx(absent * plan.block_bytes)
    assert time.disk == pytest.approx(time.disk_bytes / CPU.disk_bandwidth)
    assert time.bound == "disk"
    whole = forecast(spec, plan_of(spec, 0.1, platform="cpu"), CPU)
    assert whole.host_short > 0
    assert whole.single.time.disk_bytes == 0
    assert time.link == pytest.approx(whole.single.time.link)
    more = forecast(spec, plan_of(spec, 0.1, platform="cpu", host_memory=40 * 10**9), CPU)
    _never_slower(more, result)
    _never_slower(whole, more)
    _never_slower(forecast(spec, plan, dataclasses.replace(CPU, disk_bandwidth=1e10)), result)


def test_misses_shared_by_link_and_cpu_by_hand() -> None:
    """A link and a CPU of the same speed share the misses evenly; one that is much slower gets hardly any."""
    block = SMALL.block_bytes
    machine = dataclasses.replace(
        CPU, link_bandwidth=1e6, host_bandwidth=1e6, host_flops=1e18, link_latency=0.0, block_seconds=0.0,
        insert_bandwidth=None,
    )  # fmt: skip
    plan = plan_of(SMALL, 0.0, platform="cpu")
    misses = len(SMALL.moe_layers) * SMALL.experts.top_k
    fetch, compute, auto = (
        forecast(SMALL, plan, machine, miss=miss).single.time for miss in ("fetch", "compute", "auto")
    )
    assert (fetch.link, fetch.host) == (pytest.approx(misses * block / 1e6), 0)
    assert (compute.host, compute.link, compute.link_bytes) == (pytest.approx(misses * block / 1e6), 0, 0)
    assert auto.link + auto.host == pytest.approx(fetch.link / 2)
    assert auto.link_bytes == pytest.approx(fetch.link_bytes / 2)
    slow = forecast(SMALL, plan, dataclasses.replace(machine, host_bandwidth=1e3), miss="auto").single.time
    assert slow.link_bytes == pytest.approx(fetch.link_bytes, rel=0.01)


@settings(max_examples=40)
@given(machine=machines(), share=st.sampled_from([0.0, 0.2, 0.9]), batch=st.sampled_from([1, 16]))
def test_auto_is_never_slower_than_fetching(machine: Machine, share: float, batch: int) -> None:
    plan = plan_of(SMALL, share, batch=batch, platform=machine.platform)
    _never_slower(forecast(SMALL, plan, machine, miss="auto"), forecast(SMALL, plan, machine))


def test_a_gpu_hides_what_was_predicted() -> None:
    """With slow layers half of the copies vanish behind them; with fast ones what fits."""
    plan = plan_of(SMALL, 0.25)
    slow = dataclasses.replace(GPU, kernel_seconds=10.0)
    alone = dataclasses.replace(slow, platform="cpu")
    crossing = forecast(SMALL, plan, alone).single.time.link
    assert forecast(SMALL, plan, slow).single.time.link == pytest.approx(crossing / 2)
    fast = dataclasses.replace(GPU, link_bandwidth=1e3)
    layers = len(SMALL.moe_layers)
    hidden = forecast(SMALL, plan, dataclasses.replace(fast, platform="cpu")).single.time.link
    hidden -= forecast(SMALL, plan, fast).single.time.link
    assert 0 < hidden < layers * 1e-3


def test_weights_read_by_one_token_are_the_active_ones() -> None:
    spec = released("qwen3-30b-a3b")
    read = sum(layer.read_bytes for layer in step_work(spec, batch=1, positions=1))
    active, embedding = count_parameters(spec).active, spec.vocab * spec.hidden
    assert read == pytest.approx(2 * (active - embedding), rel=0.001)
    prompt = prompt_work(spec, tokens=256, positions=0)
    assert sum(layer.operations for layer in prompt) == pytest.approx(512 * (active - 2 * embedding), rel=0.01)


def test_a_trace_replaces_the_prior() -> None:
    spec = small_with(num_experts=4, num_experts_per_tok=2, num_hidden_layers=2)
    plan = plan_of(spec, 0.5, batch=2)
    result = forecast(spec, plan, GPU, trace=made_up(layers=2, experts=4, top_k=2))
    for speed in (result.single, result.batched):
        assert speed.hit_rate is not None
        assert "recorded tokens" in speed.hit_rate.source
    assert result.prompt.hit_rate is None


@pytest.mark.parametrize("name", _TO_FORECAST)
def test_released_models_on_every_machine(name: str) -> None:
    spec = released(name)
    for machine in MACHINES.values():
        plan = plan_of(spec, 0.25, batch=2, platform=machine.platform, context=512)
        result = forecast(spec, plan, machine)
        contents = json.loads(json.dumps(result.as_dict(), allow_nan=False))
        assert contents["machine"]["name"] == machine.name
        assert contents["single"]["low"] > 0
        assert contents["fits"] == (contents["fits_device"] and not contents["host_short"])
        assert contents["single"]["time"]["link_bytes"] > 0


def test_an_emulated_link_slows_a_cpu() -> None:
    plan = plan_of(SMALL, 0.25, platform="cpu")
    rates = [
        forecast(SMALL, plan, CPU.with_link(LinkModel(bandwidth=rate))).single.tokens_per_second
        for rate in (1e6, 1e7, 1e12)
    ]
    assert rates == sorted(rates)
    assert forecast(SMALL, plan, CPU.with_link(LinkModel(bandwidth=1e6))).single.time.bound == "link"
