"""Part "recorded" of `bench.forecast`: against the runs that bench/results has, by arithmetic alone."""

import dataclasses
import json
from typing import Any

from bench import _forecast_rows, _report
from bench.make_synthetic import Synthetic
from ef_jax.forecast import MACHINES, Machine, Speed, arithmetic_plan, forecast
from ef_jax.loading import bundled_model
from ef_jax.memory.plan import MemoryRequest
from ef_jax.schedule.link_model import LinkModel
from ef_jax.spec import ModelSpec
from ef_jax.weights.model_config import read_model_config

_MACHINE = MACHINES["cpu-emulated-pcie3"]
_CALIBRATES = ("all resident", "lru 12.5 %", "lru 50 %", "8 layers, all resident", "all resident, batched")
_SINGLE = Synthetic(hidden=1024, width=512, experts=64, top_k=8, layers=8, vocab=4096)


def run() -> dict[str, Any]:
    """Rows and their summary."""
    spec, _ = read_model_config(bundled_model())
    rows = [*_offload(spec), *_order(spec), *_wall(spec), *_throughput(spec), *_large()]
    for row in rows:
        row["calibrates"] = row["run"] in _CALIBRATES
    _forecast_rows.show(rows)
    found = _forecast_rows.summary([row for row in rows if not row["calibrates"]])
    _forecast_rows.say("recorded runs that do not calibrate", found)
    return {"machine": _MACHINE.as_dict(), "runs": rows, **found}


def _offload(spec: ModelSpec) -> list[dict[str, Any]]:
    """The bundled model over the CPU's own link, and a larger one that needs none."""
    rows = []
    for row in _result("offload")["rows"]:
        if row["mode"] in ("lru", "all resident"):
            share = row["expert_fraction"]
            name = row["mode"] if share == 1 else f"lru {100 * share:g} %"
            rows.append(_row(name, row["tokens_per_second"]["median"], spec, _own_link(), share))
    single = _result("overhead")["single"]["ms_per_token"]["engine"]["median"]
    rows.append(_row("8 layers, all resident", 1e3 / single, _SINGLE.spec, _own_link(), 1.0))
    return rows


def _order(spec: ModelSpec) -> list[dict[str, Any]]:
    found = _result("horizon_timed")["order"]
    return [
        _row(
            f"{cell['bandwidth'] / 1e9:g} GB/s",
            1e3 * cell["batch"] / cell["step_ms"]["auto"],
            spec,
            _MACHINE.with_link(LinkModel(bandwidth=cell["bandwidth"])),
            found["expert_fraction"],
            batch=cell["batch"],
        )
        for cell in found["cells"]
    ]


def _wall(spec: ModelSpec) -> list[dict[str, Any]]:
    found = _result("horizon_wall")["wall"]
    rows = []
    for row in found["rows"]:
        if row["mode"] == "off":
            link = LinkModel(bandwidth=row["ratio"] * found["balanced_bandwidth"], latency=found["latency"])
            name = f"{link.bandwidth / 1e9:.2f} GB/s, {100 * row['residency']:g} %"
            rows.append(_row(name, 1e3 / row["ms_per_token"], spec, _MACHINE.with_link(link), row["residency"]))
    return rows


def _throughput(spec: ModelSpec) -> list[dict[str, Any]]:
    """Batches as wide as the mean step was; the bench served whole requests, so prompts' share is taken out."""
    found = _result("throughput_engine")["engine"]
    slow = _MACHINE.with_link(LinkModel(bandwidth=found["bandwidth"]))
    rows = []
    for name, share in (("on demand, one by one", 0.0), ("on demand, batched", 0.0), ("all resident, batched", 1.0)):
        arm = {key: value["median"] for key, value in found["arms"][name].items()}
        rate = arm["tokens_per_second"] / (1 - arm["prefill_share"])
        batch = round(arm["width"])
        rows.append(_row(name, rate * batch / arm["width"], spec, slow, share, batch=batch))
    return rows


def _large() -> list[dict[str, Any]]:
    found = _result("large")
    shape = found["checkpoint"]
    spec = Synthetic(**{field.name: shape[field.name] for field in dataclasses.fields(Synthetic)}).spec
    rows = []
    for name in ("original", "converted"):
        stage = found["stages"][name]
        share = stage["slots"] / stage["experts"]
        rows.append(_row(f"6 GB in 1 GB, {name}", stage["tokens_per_second"]["median"], spec, _own_link(), share))
    return rows


def _own_link() -> Machine:
    """The CPU without an emulated link: crossing is entering."""
    insert = _MACHINE.insert_bandwidth
    assert insert is not None
    return dataclasses.replace(_MACHINE, link_bandwidth=insert, insert_bandwidth=None)


def _row(
    name: str, measured: float, spec: ModelSpec, machine: Machine, share: float, *, batch: int = 1
) -> dict[str, Any]:
    request = MemoryRequest(expert_fraction=share, batch=batch, context=192, chunk=64)
    speed: Speed = forecast(spec, arithmetic_plan(spec, request, "cpu"), machine).batched
    return _forecast_rows.row(name, measured, speed)


def _result(name: str) -> dict[str, Any]:
    contents: dict[str, Any] = json.loads(_report.result_path(name).read_text())
    return contents
