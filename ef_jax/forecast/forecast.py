"""`forecast`: from a spec, a memory plan and a machine's figures to tokens a second."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

from ef_jax.forecast.hit_rate import HitRate, prior_hit_rate, replayed_hit_rate
from ef_jax.forecast.machine import Machine
from ef_jax.forecast.times import PassTime, prompt_time, step_time
from ef_jax.forecast.work import prompt_work, step_work
from ef_jax.memory.plan import MemoryPlan
from ef_jax.memory.sizes import format_bytes
from ef_jax.replay.trace import RoutingTrace
from ef_jax.schedule.miss_costs import Miss
from ef_jax.spec import ModelSpec

# Of the misses, what prefetching has under way before they are asked for, at worst, expected and at best. At worst the
# trial by the clock turns it off; the bundled model's pre-gate finds 72 % of a layer's experts one layer ahead and 54 %
# two ahead, a trained correction 86 % (bench/results/recall.json). With a half, and no more than fits behind a layer,
# steps take 0.78 to 1.15 of what the engine's scheduler makes of the same stalls on a virtual clock, over 18 links,
# caches and batches (part "overlap" of bench/forecast.py).
PREFETCHED = (0.0, 0.5, 0.86)
_HOST_SLACK = 10**9  # what a process takes besides its experts: Python, JAX, the tokenizer

Way = Literal[-1, 0, 1]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Speed:
    """Tokens a second of one kind of pass, all sequences together: as expected, and the band.

    Attributes:
      batch: sequences that run together.
      hit_rate: of decoding; None of a prompt.
      time: of one pass, as expected.
      link_bytes_per_token: expert bytes over the link, as expected.
      disk_bytes_per_token: expert bytes from disk, as expected.
    """

    tokens_per_second: float
    low: float
    high: float
    batch: int
    hit_rate: HitRate | None
    time: PassTime
    link_bytes_per_token: float
    disk_bytes_per_token: float

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {**dataclasses.asdict(self), "bound": self.time.bound, "pass_seconds": self.time.seconds}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Forecast:
    """What a model is expected to do on a machine.

    The band of every speed is worked out, not guessed: the machine's figures all at the bad end of their doubt, the hit
    rate at the low end of its band and nothing prefetched give `low`; all the opposites give `high`.

    Attributes:
      machine: what it runs on.
      slots: cache slots, of `experts`.
      device_bytes: what the plan puts on the device.
      host_blocks: expert blocks that the plan keeps in host memory; the others stay on disk.
      host_bytes: what the host must hold: the plan's blocks, 1 GB besides, and on a CPU the device's bytes too.
      miss: what becomes of experts that a step misses.
      single: decoding one sequence.
      batched: decoding the plan's batch.
      prompt: prompt tokens of one sequence, in passes of the plan's chunk.
      load_seconds: at least, to read the checkpoint from disk.
      positions: tokens that a sequence has behind it, half of the plan's context.
      warnings: what should be known, in words.
    """

    machine: Machine
    slots: int
    experts: int
    device_bytes: int
    host_blocks: int
    host_bytes: int
    miss: Miss
    single: Speed
    batched: Speed
    prompt: Speed
    load_seconds: float
    positions: int
    warnings: tuple[str, ...]

    @property
    def fits_device(self) -> bool:
        """Whether the plan is within the device's memory."""
        return self.device_bytes <= self.machine.device_memory

    @property
    def host_short(self) -> int:
        """Bytes of host memory that are missing; 0: it fits."""
        return max(0, self.host_bytes - self.machine.host_memory)

    @property
    def fits(self) -> bool:
        """Whether it runs there at all."""
        return self.fits_device and not self.host_short

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        contents = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        speeds = {name: contents[name].as_dict() for name in ("single", "batched", "prompt")}
        verdict = {"fits": self.fits, "fits_device": self.fits_device, "host_short": self.host_short}
        return {**contents, "machine": self.machine.as_dict(), **speeds, **verdict, "warnings": list(self.warnings)}


def forecast(
    spec: ModelSpec,
    plan: MemoryPlan,
    machine: Machine,
    *,
    trace: RoutingTrace | None = None,
    miss: Miss = "fetch",
) -> Forecast:
    """What a model is expected to do on a machine under a memory plan.

    Args:
      spec: the model.
      plan: its memory plan, which gives slots, batch, context and chunk.
      machine: the figures to go by.
      trace: recorded routing of this model, replayed for the hit rate instead of going by the cache's size.
      miss: whether experts that a step misses are fetched, computed by the host's CPU, or both, see `step_time`.

    Raises:
      InputError: the trace is of another model.
    """
    positions = plan.context // 2
    host_blocks = plan.experts if plan.host is None else plan.host.places
    decode = _decoding(spec, plan, machine, positions, trace, host_blocks, miss)
    cached = plan.slots / plan.experts
    tokens = plan.chunk

    def prompt(way: Way) -> PassTime:
        return prompt_time(
            prompt_work(spec, tokens=tokens, positions=0 if spec.encodes else positions),
            machine.leaning(way),
            block_bytes=plan.block_bytes,
            cached=cached,
            resident=plan.slots == plan.experts,
            staging_slots=plan.staging_slots,
            on_host=host_blocks / plan.experts,
        )

    host_bytes = plan.host_bytes + _HOST_SLACK + (plan.total if machine.platform == "cpu" else 0)
    single = decode(1)
    result = Forecast(
        machine=machine,
        slots=plan.slots,
        experts=plan.experts,
        device_bytes=plan.total,
        host_blocks=host_blocks,
        host_bytes=host_bytes,
        miss=miss,
        single=single,
        batched=single if plan.batch == 1 else decode(plan.batch),
        prompt=_speed(prompt, tokens=tokens, batch=1, hit_rate=None),
        load_seconds=(plan.dense + host_blocks * plan.block_bytes) / machine.disk_bandwidth,
        positions=positions,
        warnings=(),
    )
    return dataclasses.replace(result, warnings=_warnings(result, plan))


def _decoding(
    spec: ModelSpec,
    plan: MemoryPlan,
    machine: Machine,
    positions: int,
    trace: RoutingTrace | None,
    host_blocks: int,
    miss: Miss,
) -> Callable[[int], Speed]:
    # Slots that only an encoder's experts could fill are of no use to a step.
    experts = len(spec.step_moe_layers) * spec.experts.count
    slots = min(plan.slots, experts)

    def decode(batch: int) -> Speed:
        def rate_with(blocks: int) -> HitRate:
            blocks = min(blocks, experts)
            if trace is None:
                return prior_hit_rate(spec, blocks, batch)
            return replayed_hit_rate(spec, trace, blocks, batch)

        # What the device has leaves the host first, so that at best the two hold different blocks.
        rate, on_host, together = rate_with(slots), rate_with(host_blocks), rate_with(slots + host_blocks)
        work = step_work(spec, batch=batch, positions=positions)
        hits = (rate.low, rate.expected, rate.high)
        host_hits = (on_host.low, on_host.expected, together.high)

        def step(way: Way) -> PassTime:
            return step_time(
                work,
                machine.leaning(way),
                batch=batch,
                block_bytes=plan.block_bytes,
                hit_rate=hits[1 + way],
                resident=slots == experts,
                prefetched=PREFETCHED[1 + way],
                host_hit_rate=host_hits[1 + way],
                miss=miss,
            )

        return _speed(step, tokens=batch, batch=batch, hit_rate=rate)

    return decode


def _speed(time: Callable[[Way], PassTime], *, tokens: int, batch: int, hit_rate: HitRate | None) -> Speed:
    expected = time(0)
    return Speed(
        tokens_per_second=tokens / expected.seconds,
        low=tokens / time(-1).seconds,
        high=tokens / time(1).seconds,
        batch=batch,
        hit_rate=hit_rate,
        time=expected,
        link_bytes_per_token=expected.link_bytes / tokens,
        disk_bytes_per_token=expected.disk_bytes / tokens,
    )


def _warnings(result: Forecast, plan: MemoryPlan) -> tuple[str, ...]:
    machine, found = result.machine, list(plan.warnings)
    if not result.fits_device:
        found.append(
            f"the plan needs {format_bytes(result.device_bytes)} on the device and {machine.name} has "
            f"{format_bytes(machine.device_memory)}: {format_bytes(result.device_bytes - machine.device_memory)} short"
        )
    if result.host_short:
        found.append(
            f"the experts need {format_bytes(result.host_bytes)} of host memory and {machine.name} has "
            f"{format_bytes(machine.host_memory)}: {format_bytes(result.host_short)} short; with less host_memory more "
            "of them stay on disk"
        )
    return tuple(found)
