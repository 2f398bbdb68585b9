"""From a path and a budget to a running model."""

import dataclasses
import importlib.resources
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path

import jax

from ef_jax.errors import InputError
from ef_jax.lossy import LossyOptions
from ef_jax.memory.host_plan import check_available
from ef_jax.memory.host_store import HostStore, Store
from ef_jax.memory.plan import MemoryPlan, check_host_pool
from ef_jax.memory.policies import POLICIES, make_policy
from ef_jax.memory.residency import Residency
from ef_jax.mesh.exchange import choose_transport
from ef_jax.mesh.layout import no_mesh_set
from ef_jax.mesh.load import MeshRun, check_options, load_on_mesh
from ef_jax.mesh.mesh_option import MeshOption, layout_for, mesh_that_is_set
from ef_jax.mesh.overlap_option import check_overlap
from ef_jax.nn import settle_rope
from ef_jax.nn.correction import CorrectionSpec
from ef_jax.nn.routing_path import RoutingPathSpec
from ef_jax.paging import check_host_memory, check_paging, make_tier
from ef_jax.placement import Placement, load_placement
from ef_jax.planning import make_request, plan_model
from ef_jax.predict import History, Predictor, Pregate
from ef_jax.predict.fingerprint import model_fingerprint
from ef_jax.predict.paths import Paths
from ef_jax.predict.predictor_file import load_predictor, load_routing_path, read_predictor_manifest
from ef_jax.prefetching import ALL_RESIDENT, Prefetching, settle
from ef_jax.progress import Progress
from ef_jax.runtime.compute_in_place import ComputeInPlace
from ef_jax.runtime.dense import DenseWeights
from ef_jax.runtime.engine import Engine
from ef_jax.runtime.expert_kernels import choose_kernels
from ef_jax.runtime.host_experts import HostExperts
from ef_jax.runtime.language_model import LanguageModel
from ef_jax.runtime.light_misses import light_misses
from ef_jax.runtime.look_ahead import LookAhead, LookAheadSpec
from ef_jax.runtime.low_precision import FORMAT as LOW_PRECISION
from ef_jax.runtime.miss_handlers import MissHandler
from ef_jax.runtime.routing_paths import RoutingPaths
from ef_jax.schedule.async_link import AsyncLink
from ef_jax.schedule.device_link import DeviceLink, resolve_copy_mode
from ef_jax.schedule.emulated_link import EmulatedLink
from ef_jax.schedule.fill import fill
from ef_jax.schedule.link_model import LinkModel
from ef_jax.schedule.miss_costs import check_miss
from ef_jax.schedule.prefetch import check_candidates
from ef_jax.schedule.token_order import check_order
from ef_jax.schedule.waste import check_most_wasted
from ef_jax.spec import ModelSpec
from ef_jax.text import Tokenizer
from ef_jax.weights import open_checkpoint
from ef_jax.weights.block_reader import check_checksums
from ef_jax.weights.quantized import QuantizedCheckpoint

_LOG = logging.getLogger("ef_jax")


def bundled_model() -> Path:
    """Directory of the small MoE checkpoint that comes with the package."""
    return Path(str(importlib.resources.files("ef_jax") / "models" / "small_moe"))


def load(
    path: str | Path | None = None,
    *,
    device_memory: str | int | None = None,
    expert_fraction: float | None = None,
    host_memory: str | int | None = None,
    disk_checksums: str = "first",
    batch: int | None = None,
    sequences: int | None = None,
    context: int | None = None,
    chunk: int = 256,
    mesh: MeshOption | None = None,
    placement: str | Path | Placement = "contiguous",
    exchange: str | None = None,
    overlap: str = "auto",
    policy: str = "lru",
    prefetch: int | str = "auto",
    predictor: str | Path | None = None,
    routing_path: str | Path | None = None,
    candidates: str = "value",
    most_wasted: float = 1.0,
    order: str = "auto",
    miss: str = "fetch",
    dtype: str | None = None,
    kernel: str | None = None,
    copy_mode: str | None = None,
    emulate_link: str | LinkModel | None = None,
    lossy_adaptive_experts: float | None = None,
    lossy_cache_bias: float | None = None,
    lossy_skip: float | None = None,
    lossy_low_precision_miss: float | None = None,
    lossy_quantize: str | None = None,
    device: jax.Device | None = None,
    progress: bool | None = None,
    on_plan: Callable[[MemoryPlan], None] | None = None,
) -> LanguageModel:
    """Load an MoE language model with its experts in pinned host memory.

    Args:
      path: a Hugging Face directory or a converted checkpoint; None: the bundled small model.
      device_memory: device budget, for example `"8GiB"`. Everything the run puts on the device fits in it.
      expert_fraction: instead of a budget, the share of all experts that get a cache slot; 1.0 is the all-resident
        run. With neither, 90 % of a GPU's memory, or half of the experts on CPU.
      host_memory: host memory for experts, for example `"16GiB"`: those that it does not hold are read from disk when
        they are needed, or before by what `predictor` says, see `ef_jax.schedule.host_tier`. It changes no result. A
        converted checkpoint is read past the page cache; an original costs work and page cache at every read. None: all
        experts are in host memory.
      disk_checksums: when a block that is read from a converted checkpoint is compared with its checksum: "first" at
        its first read and whenever its file has changed, "always", or "never".
      batch: sequences that run together. A prompt's result does not depend on its company. None: 1, or with a mesh one
        for each device of its `data` and `expert` axes, which have to divide it.
      sequences: sequences that are held at once, each with keys and values of its own; None: `batch`. With more, the
        token scheduler forms batches of sequences that are likely to use the same experts.
      context: tokens a sequence, prompt and output; None: the model's own, 4,096 at most. It also chooses the
        factors of a longrope, once for all sequences, see `ef_jax.nn.settle_rope`.
      chunk: tokens a sequence that one prefill pass takes. An encoder takes prompts whole.
      mesh: devices to run on, for example `"expert=4"` or `"data=2,expert=4"`, a mapping, or a `jax.sharding.Mesh`.
        `expert` divides the experts, each device with slots, a link and host memory for its own; `expert` and `data`
        divide the sequences, and `data` is groups that each have all experts; `tensor` divides the dense weights, and
        the experts once more. `device_memory` and `expert_fraction` are then each device's. Results are those of one
        device with as many sequences as each of the mesh has; `tensor` adds up in another order. None: the mesh of
        `jax.set_mesh`, if one is set and has one of these axes; else one device.
      placement: which device of a group holds which expert: "contiguous", or the file of a placement that
        `ef-jax replay --mesh` has made.
      exchange: how tokens go to the devices of their experts, "ragged" or "padded"; None: the first where the platform
        has it. It changes no result.
      overlap: whether prompts run in two passes side by side, where there are more of them than one pass takes: rows of
        one are exchanged while the other's experts are computed. "on", "off", or "auto": where a gain is predicted from
        what the parts of a layer are measured to take when the model is loaded; `stats.overlap` says so. Where a
        layer's experts pass through the slots in waves, only the last of them is computed so. It changes no result,
        and takes workspace.
      policy: who leaves the cache, a name of `ef_jax.memory.policies.POLICIES`.
      prefetch: how far ahead experts are fetched that are likely to be used: "auto" lets a controller decide layer by
        layer from what it measures, a number is a fixed horizon in layers, "off" fetches what is needed when it is.
        Where copies cannot overlap with compute (on CPU, unless `copy_mode` or `emulate_link` say so), "auto" is off;
        `stats.horizon` says so.
      predictor: what says which experts are likely: "pregate" (coming layers' routers on the hidden state of now),
        "history" (what was used before), "none", or the directory of a predictor that `ef-jax train-predictor` made for
        this model. None: the pre-gate, or none where nothing is prefetched. No predictor changes a result.
      routing_path: the directory of a predictor that `ef-jax train-predictor --kind routing_path` made for this model.
        It says what a token uses in all layers as soon as the token is known, to the other predictor, which it makes
        better far ahead, to the policies that listen, and to the token scheduler. None: nothing does.
      candidates: how prefetches are chosen, a name of `ef_jax.schedule.prefetch.CANDIDATES`.
      most_wasted: share of the bytes moved that prefetches may move for nothing, where candidates are chosen by value;
        1.0 is no bound: whatever saves time is fetched.
      order: "resident_first" runs the rows of resident experts while others are on their way, "together" waits for
        all; "auto" decides by how long it would wait. It does not change a result.
      miss: what is done about a missing expert when decoding: "fetch" copies it to the device, "compute" has the host's
        processor compute it where it lies, "auto" splits each layer's misses so that copying and computing end
        together, by what both are measured to take. Beside an accelerator, results of "compute" and "auto" may differ
        from those of "fetch" by the rounding of another kernel; without one they are the same. `stats.miss` says why.
      dtype: convert the weights on load ("bfloat16", "float16", "float32"); None: as stored.
      kernel: what computes the experts, a name of `pallas_kernels.BACKENDS`; None: the first that can run this model
        on this device, see `LanguageModel.kernels`.
      copy_mode: how blocks cross the link, see `DeviceLink`; None: the default of the device.
      emulate_link: hold copies back as if the link had this bandwidth and latency: a `LinkModel`, or "25GB/s" or
        "25GB/s+10us".
      lossy_adaptive_experts: drop the experts of a token beyond this share of its router weights, above 0 to 1. This
        and the other lossy options change results; `ef_jax.lossy.LossyOptions` says more of each.
      lossy_cache_bias: choose experts that have a slot before others whose router logit is higher by less than this.
      lossy_skip: leave out missing experts whose router weight is below this, 0 to 1.
      lossy_low_precision_miss: fetch missing experts whose router weight is below this in 4 bits, 0 to 1.
      lossy_quantize: store, move and compute the blocks in fewer bits: "int8", "int4" or "int4:64".
      device: a JAX device; None: the first.
      progress: show a progress bar; None: on a terminal.
      on_plan: called with the memory plan before anything is allocated.

    Raises:
      InputError: the checkpoint, an option or the budget cannot be used; `CheckpointError`, `UnsupportedError` and
        `BudgetError` are its kinds.
    """
    lossy = LossyOptions(
        adaptive_experts=lossy_adaptive_experts,
        cache_bias=lossy_cache_bias,
        skip=lossy_skip,
        low_precision_miss=lossy_low_precision_miss,
        quantize=lossy_quantize,
    )
    mesh = mesh or mesh_that_is_set()
    with no_mesh_set(), open_checkpoint(bundled_model() if path is None else path, dtype) as stored:
        checkpoint = stored if lossy.quantize is None else QuantizedCheckpoint(stored, lossy.quantize)
        spec = checkpoint.spec
        lossy.check(spec)
        lossy = dataclasses.replace(lossy, quantize=spec.rounded_to)
        if policy not in POLICIES:
            raise InputError(f"policy {policy!r} is not one of {', '.join(POLICIES)}")
        layout = None if mesh is None else layout_for(mesh, spec)
        if layout is not None and device is not None:
            raise InputError("device and mesh were both given: give one of them")
        device = device or (jax.devices()[0] if layout is None else layout.devices[layout.local[0]])
        request = make_request(
            spec, device, device_memory=device_memory, expert_fraction=expert_fraction, host_memory=host_memory,
            batch=(1 if layout is None else layout.row_shards) if batch is None else batch, sequences=sequences,
            context=context, chunk=chunk,
        )  # fmt: skip
        checksums = check_checksums(disk_checksums)
        pages = request.host_memory is not None and request.host_memory < spec.total_experts * spec.block_bytes
        if pages:
            check_paging(lossy, quantizes=checkpoint is not stored)
        if layout is None:  # the plan says what a mesh's process holds
            check_available(min(request.host_memory or sys.maxsize, spec.total_experts * spec.block_bytes), pages=pages)
        spec = settle_rope(spec, request.context)
        mode = resolve_copy_mode(copy_mode, device)
        emulated = LinkModel.parse(emulate_link) if isinstance(emulate_link, str) else emulate_link
        overlaps = mode == "async" or emulated is not None
        settled = settle(
            spec,
            prefetch=prefetch,
            predictor=predictor,
            routing_path=routing_path,
            overlaps=overlaps,
            policy_listens=POLICIES[policy].wants_predictions,
            regroups=(request.rows or request.batch) > request.batch,
            pages=pages,
        )
        checked_order, checked_miss = check_order(order), check_miss(miss)
        check_candidates(candidates)
        check_most_wasted(most_wasted)
        kernels = choose_kernels(spec, device, kernel)
        tokenizer = Tokenizer.load(checkpoint.tokenizer_dir, spec.vocab) if checkpoint.tokenizer_dir else None
        look = _look_ahead_spec(spec, settled)
        if layout is not None:
            options = {"host_memory": host_memory, "sequences": sequences}
            options |= {"miss": None if miss == "fetch" else miss, "order": None if order == "auto" else order}
            check_options(spec, settled, lossy, **options)
            run = MeshRun(
                layout=layout,
                placement=load_placement(placement, spec, layout.owners),
                placed=placement if isinstance(placement, str) else "as given",
                transport=choose_transport(layout.devices, exchange),
                overlap=check_overlap(overlap),
                request=request,
                kernels=kernels,
                settled=settled,
                look=look,
                policy=policy,
                candidates=candidates,
                most_wasted=most_wasted,
                lossy=lossy,
                mode=mode,
                emulated=emulated,
                predictor=lambda: _predictor(spec, settled, look),
            )
            return load_on_mesh(checkpoint, spec, run, tokenizer, progress=progress, on_plan=on_plan)
        for name, value in (
            ("placement", placement != "contiguous"),
            ("exchange", exchange is not None),
            ("overlap", overlap != "auto"),
        ):
            if value:
                raise InputError(f"{name} is of several devices: give a mesh, or leave it out")
        prefetches = settled.prefetch != "off"
        paths = None if settled.routing_path is None else read_predictor_manifest(settled.routing_path, RoutingPathSpec)
        plan, programs = plan_model(
            spec,
            request,
            device,
            copy_mode,
            kernels=kernels,
            look_ahead=look,
            routing_path=None if paths is None else paths.spec,
            prefetches=prefetches,
            lossy=lossy,
        )
        check_host_pool(plan.host_bytes + plan.host_light_misses, device.platform)
        check_host_memory(plan, device)
        _LOG.info("%s", plan)
        if on_plan is not None:
            on_plan(plan)
        in_all = plan.dense + (0 if pages else plan.host_bytes) + plan.host_light_misses
        with Progress(in_all, "B", "loading", enabled=progress) as bar:
            dense = DenseWeights.load(checkpoint, device, advance=bar.update)
            tier = None
            if pages:
                again = open_checkpoint(checkpoint.path, dtype)
                tier = make_tier(spec, plan, again, device, policy=policy, checksums=checksums)
            threads = min(8, max(2, os.cpu_count() or 1))
            store: Store = tier or HostStore.load(checkpoint, device, advance=bar.update, threads=threads)
            few_bits = None
            if plan.host_light_misses:
                few_bits = HostStore.load(QuantizedCheckpoint(checkpoint, LOW_PRECISION), device, advance=bar.update)
    pool_slots = plan.slots + plan.staging_slots
    device_link: DeviceLink
    if mode == "async" and emulated is None:
        device_link = AsyncLink(spec, store, device, slots=pool_slots)
    else:
        device_link = DeviceLink(spec, store, device, slots=pool_slots, mode=mode)
    residency = Residency(
        layers=len(spec.moe_layers),
        experts=spec.experts.count,
        cache_slots=plan.slots,
        staging_slots=plan.staging_slots,
        policy=make_policy(policy, layers=len(spec.moe_layers), experts=spec.experts.count, cache_slots=plan.slots),
    )
    if plan.slots == spec.total_experts:
        fill(residency, device_link, [range(spec.experts.count)] * len(spec.moe_layers))
        settled, look, programs = ALL_RESIDENT, None, programs.without_look_ahead()
    link = device_link if emulated is None else EmulatedLink(device_link, emulated)
    handlers: list[MissHandler] = []
    if plan.slots < spec.total_experts:
        handlers += light_misses(programs, link, few_bits, device, mode=mode)
    if checked_miss != "fetch" and plan.slots < spec.total_experts:
        host = HostExperts(spec, kernels, batch=plan.batch, device=device)
        handlers.append(ComputeInPlace(host, store, link, residency, checked_miss))
    engine = Engine(
        spec,
        plan,
        programs,
        dense,
        residency,
        link,
        device,
        look_ahead=None if look is None else _look_ahead(spec, look, settled.trained, dense, plan.rows, device),
        routing_paths=_routing_paths(spec, settled.routing_path, dense, plan, device),
        predictor=_predictor(spec, settled, look),
        prefetching=settled,
        candidates=candidates,
        most_wasted=most_wasted,
        order=checked_order,
        miss_handlers=handlers,
        lossy=lossy,
        below=tier,
    )
    return LanguageModel(Path(checkpoint.path), spec, engine, tokenizer)


def _look_ahead_spec(spec: ModelSpec, settled: Prefetching) -> LookAheadSpec | None:
    if settled.trained is not None:
        correction = read_predictor_manifest(settled.trained, CorrectionSpec).spec
        return LookAheadSpec(distances=correction.distances, correction=correction)
    distances = settled.distances(spec)
    return LookAheadSpec(distances=distances) if distances else None


def _look_ahead(
    spec: ModelSpec, look: LookAheadSpec, trained: Path | None, dense: DenseWeights, rows: int, device: jax.Device
) -> LookAhead:
    """The arrays of a look ahead, those of a trained predictor checked against the model."""
    correction = None
    if trained is not None:
        correction, _ = load_predictor(trained, spec, model_fingerprint(spec, dense.routers(spec)))
    return LookAhead(
        spec,
        look,
        dense,
        rows=rows,
        sharding=jax.sharding.SingleDeviceSharding(device),
        correction=correction,
    )


def _routing_paths(
    spec: ModelSpec, path: Path | None, dense: DenseWeights, plan: MemoryPlan, device: jax.Device
) -> RoutingPaths | None:
    """The routing-path predictor in a directory, checked against the model."""
    if path is None:
        return None
    trained, _ = load_routing_path(path, spec, model_fingerprint(spec, dense.routers(spec)))
    sharding = jax.sharding.SingleDeviceSharding(device)
    return RoutingPaths(trained, rows=plan.rows, batch=plan.batch, context=plan.context, sharding=sharding)


def _predictor(spec: ModelSpec, settled: Prefetching, look: LookAheadSpec | None) -> Predictor | None:
    shape = {"layers": len(spec.moe_layers), "experts": spec.experts.count}
    if settled.predictor == "history":
        return History(**shape) if settled.routing_path is None else Paths(**shape, top_k=spec.experts.top_k)
    if look is not None:
        return Pregate(**shape, top_k=spec.experts.top_k, distances=look.distances)
    return None
