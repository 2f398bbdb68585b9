"""Sweeps: one replay for each cache size, policy and link, several at a time."""

import concurrent.futures
import dataclasses
import multiprocessing
import signal
from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool

from ef_jax.errors import InputError
from ef_jax.memory.policies import POLICIES
from ef_jax.progress import Progress
from ef_jax.replay.capacity import Capacity
from ef_jax.replay.replays import BOUNDS, Outcome, Replays, SweepSettings, Task
from ef_jax.replay.result import ReplayResult, Timing
from ef_jax.replay.trace import RoutingTrace
from ef_jax.schedule.link_model import LinkModel
from ef_jax.stats import PhaseStats

_worker: Replays | None = None  # of a spawned process


def choose_policies(names: Sequence[str]) -> list[str]:
    """Policies and bounds by name, each once; `all` stands for every one of them.

    Raises:
      InputError: no such policy, or none at all.
    """
    known = (*POLICIES, *BOUNDS)
    for name in names:
        if name != "all" and name not in known:
            raise InputError(f"policy {name!r:.60} is not one of {', '.join(known)}, all")
    if not names:
        raise InputError(f"no policy: choose among {', '.join(known)}, all")
    return list(known) if "all" in names else list(dict.fromkeys(names))


def sweep(
    trace: RoutingTrace,
    capacities: Sequence[Capacity],
    policies: Sequence[str],
    settings: SweepSettings,
    *,
    jobs: int = 1,
    progress: bool | None = False,
) -> list[ReplayResult]:
    """Replay a trace with every cache size, policy and link.

    Args:
      trace: recorded routing.
      capacities: cache sizes.
      policies: names of `POLICIES` and `BOUNDS`.
      settings: what all replays have in common.
      jobs: processes. More than one are spawned, so a script that asks for them needs the usual
        `if __name__ == "__main__":`.
      progress: draw a bar on stderr; None: if that is a terminal.

    Returns:
      Rows link by link, of a link capacity by capacity, of a capacity in the order of `policies`. Neither the order
      nor, but for the time that a row took, the rows depend on `jobs`.

    Raises:
      InputError: settings that do not fit the trace, or a process that died.
    """
    replays = Replays(trace, settings)
    links = settings.links or (None,)
    keys = replays.trace.layers * replays.trace.num_experts
    tasks: dict[Task, None] = {}  # a set in order
    for link in links:
        for capacity in capacities:
            tasks |= {_task(policy, capacity, link): None for policy in policies}
            if link is not None and capacity.slots < keys:
                tasks[Task(None, capacity.slots, link)] = None
    with Progress(len(tasks), "replays", "replaying", enabled=progress) as bar:
        run = _run_here if min(jobs, len(tasks)) == 1 else _run_spawned
        done = run(replays, list(tasks), jobs, bar.update)
    rows = []
    for link in links:
        for capacity in capacities:
            outcomes = {policy: done[_task(policy, capacity, link)] for policy in policies}
            rates = {policy: _hit_rate(outcome.phase) for policy, outcome in outcomes.items()}
            stalls = done.get(Task(None, capacity.slots, link))
            for policy, outcome in outcomes.items():
                row = _row(policy, capacity, outcome, replays)
                timing = None if link is None else _timing(row, outcome.phase, link, stalls)
                rows.append(dataclasses.replace(row, timing=timing, gap_closed=_gap_closed(policy, rates)))
    return rows


def _task(policy: str, capacity: Capacity, link: LinkModel | None) -> Task:
    """The replay that a row is made of; the hits of a bound do not depend on the link."""
    return Task(policy, capacity.slots, None if policy in BOUNDS else link)


def _run_here(replays: Replays, tasks: Sequence[Task], jobs: int, on_done: Callable[[], None]) -> dict[Task, Outcome]:
    done = {}
    for task in tasks:
        done[task] = replays.run(task)
        on_done()
    return done


def _run_spawned(
    replays: Replays, tasks: Sequence[Task], jobs: int, on_done: Callable[[], None]
) -> dict[Task, Outcome]:
    """In processes of their own, which get the trace once each."""
    done = {}
    with concurrent.futures.ProcessPoolExecutor(
        min(jobs, len(tasks)),
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_begin,
        initargs=(replays.trace, replays.settings),
    ) as pool:
        futures = {pool.submit(_run_task, task): task for task in tasks}
        try:
            for future in concurrent.futures.as_completed(futures):
                done[futures[future]] = future.result()
                on_done()
        except BrokenProcessPool:
            raise InputError("a replaying process died, perhaps for want of memory: give fewer --jobs") from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    return done


def _begin(trace: RoutingTrace, settings: SweepSettings) -> None:
    """What a spawned process starts with. An interrupt ends it at once and silently; the parent process says so."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    global _worker
    _worker = Replays(trace, settings)


def _run_task(task: Task) -> Outcome:
    assert _worker is not None
    return _worker.run(task)


def _row(policy: str, capacity: Capacity, outcome: Outcome, replays: Replays) -> ReplayResult:
    trace, phase = replays.trace, outcome.phase
    return ReplayResult(
        policy=policy,
        bound=policy in BOUNDS,
        capacity=capacity,
        batch=replays.settings.batch or (1 if trace.passes is None else None),
        steps=phase.steps,
        tokens=phase.tokens,
        hits=sum(phase.hits),
        late_hits=sum(phase.late_hits),
        misses=sum(phase.misses),
        bytes=None if trace.block_bytes is None else phase.bytes_demand + phase.bytes_prefetch,
        replay_seconds=outcome.seconds,
    )


def _timing(row: ReplayResult, phase: PhaseStats, link: LinkModel, outcome: Outcome | None) -> Timing:
    stalls = None if outcome is None else outcome.stalls
    bounds = Timing(
        bandwidth=link.bandwidth,
        stall_lower_seconds=0.0 if stalls is None else stalls.lower_seconds,
        stall_clairvoyant_seconds=0.0 if stalls is None else stalls.achievable_seconds,
    )
    if row.bound:
        return bounds
    return dataclasses.replace(
        bounds,
        stall_seconds=phase.stall_seconds,
        step_seconds=phase.seconds / phase.steps,
        tokens_per_second=phase.tokens / phase.seconds if phase.seconds else None,
        link_utilisation=phase.link_busy_seconds / phase.seconds if phase.seconds else None,
        bytes_wasted=phase.bytes_wasted,
    )


def _hit_rate(phase: PhaseStats) -> float:
    accesses = sum(phase.hits) + sum(phase.late_hits) + sum(phase.misses)
    return sum(phase.hits) / accesses


def _gap_closed(policy: str, rates: dict[str, float]) -> float | None:
    """Share of the way from `lru` to `belady`; None where there is none, or where it is not known."""
    low, high = rates.get("lru"), rates.get("belady")
    return None if low is None or high is None or high <= low else (rates[policy] - low) / (high - low)
