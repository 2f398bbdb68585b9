"""`ef-jax plan`: the memory plan of a model, and its speed on a machine, from its configuration alone."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ef_jax import console
from ef_jax.cli import forecast as forecasts
from ef_jax.cli import options as common
from ef_jax.errors import BudgetError, InputError
from ef_jax.lossy import LossyOptions
from ef_jax.memory.sizes import format_bytes
from ef_jax.mesh.mesh_spec import MeshSpec, check_divides_model
from ef_jax.stats import lossy_text

if TYPE_CHECKING:
    import jax

    from ef_jax.memory.plan import MemoryPlan, MemoryRequest
    from ef_jax.runtime.expert_kernels import ExpertKernels
    from ef_jax.spec import ModelSpec

_DESCRIPTION = """Print the memory plan of a model without loading it. A directory that holds only config.json is
enough. The workspace is that of programs compiled for this machine's device; another device's differs somewhat.
With --mesh it is the plan of each device; without the mesh's devices at hand, one like them is enough for an estimate.
With --forecast also say how fast the model will be there, or on a machine that is not at hand."""


def run(words: Sequence[str]) -> None:
    """Run the command.

    Raises:
      InputError: an option, the model or the budget cannot be used.
    """
    options = _parser().parse_intermixed_args(words)
    path = common.model_path(options.model)
    machine = forecasts.chosen_machine(options)
    on_mesh = common.mesh_options(options)
    if on_mesh and machine is not None:
        raise InputError("--forecast is of one device: leave it or --mesh out (ef-jax replay --mesh is of several)")
    import jax

    from ef_jax.forecast import forecast
    from ef_jax.memory.plan import check_host_pool
    from ef_jax.planning import make_request, plan_model
    from ef_jax.replay.trace import RoutingTrace
    from ef_jax.runtime.expert_kernels import choose_kernels
    from ef_jax.weights.quantized import quantized_spec

    spec = common.read_spec(path, options.dtype)
    if options.lossy_quantize is not None:
        spec = quantized_spec(spec, options.lossy_quantize)
    lossy = LossyOptions(quantize=spec.rounded_to, low_precision_miss=options.lossy_low_precision_miss)
    lossy.check(spec)
    device = jax.devices()[0]
    trace = None if options.trace is None else RoutingTrace.load(options.trace)
    copy_mode = options.copy_mode
    if machine is None:
        sizes = common.memory_options(options, batch=1)
        request = make_request(spec, device, **sizes, mesh=on_mesh.get("mesh"))
    else:
        request = forecasts.request_for(machine, spec, device, options)
        copy_mode = copy_mode or ("in_program" if machine.platform == "cpu" else "async")
    with console.status("compiling the programs to measure their workspace ...", shown=True):
        kernels = choose_kernels(spec, device, options.kernel)
        if on_mesh:
            plan = _plan_of_each(spec, request, device, copy_mode, kernels, lossy, **on_mesh)
        else:
            plan, _ = plan_model(spec, request, device, copy_mode, kernels=kernels, lossy=lossy)
    try:
        platform = device.platform if machine is None else machine.platform
        check_host_pool(plan.host_bytes + plan.host_light_misses, platform)
        warnings = plan.warnings
    except BudgetError as error:
        warnings = (*plan.warnings, str(error))
    expected = None
    if machine is not None:
        with console.status("replaying the trace ...", shown=trace is not None):
            expected = forecast(spec, plan, machine, trace=trace, miss=options.miss)
        warnings = (*warnings, *(text for text in expected.warnings if text not in plan.warnings))
    moved = 0 if plan.slots == plan.experts else plan.token_cycle * plan.block_bytes
    if options.json:
        contents = {
            "model": str(path),
            "device": device.device_kind,
            "kernels": kernels.as_dict(),
            "plan": {**plan.as_dict(), "warnings": warnings},
            "step_bytes_at_most": moved,
            "lossy": lossy.as_dict(),
        }
        if expected is not None:
            contents["forecast"] = expected.as_dict()
        print(console.json_line(contents))
        return
    print(plan)
    if expected is not None:
        print(forecasts.forecast_table(expected))
    for warning in warnings[len(plan.warnings) :]:
        print(f"  warning: {warning}")
    if (options_on := lossy.as_dict()) is not None:
        print(f"lossy: {lossy_text(options_on)}")
    on_each = "" if plan.share is None else " on each device"
    print(f"a decode step uses at most {plan.token_cycle} experts and moves at most {format_bytes(moved)}{on_each}")


def _plan_of_each(
    spec: "ModelSpec",
    request: "MemoryRequest",
    device: "jax.Device",
    copy_mode: str | None,
    kernels: "ExpertKernels",
    lossy: LossyOptions,
    *,
    mesh: MeshSpec,
    placement: str = "contiguous",
    exchange: str | None = None,
) -> "MemoryPlan":
    """The plan of each device of a mesh, measured on it where it is there."""
    import jax

    from ef_jax.mesh.exchange import choose_transport
    from ef_jax.mesh.load import check_options
    from ef_jax.mesh.mesh_option import layout_for
    from ef_jax.mesh.planning import estimate_on_mesh, plan_on_mesh
    from ef_jax.mesh.tensor import check_tensor
    from ef_jax.placement import load_placement
    from ef_jax.prefetching import ALL_RESIDENT

    sequences = None if request.rows in (None, request.batch) else request.rows
    check_options(spec, ALL_RESIDENT, lossy, host_memory=request.host_memory, sequences=sequences)
    check_divides_model(mesh, spec)
    check_tensor(spec, mesh.tensor)
    transport = choose_transport([device], exchange)
    table = load_placement(placement, spec, mesh.owners)
    choices: dict[str, Any] = {"placed": placement, "kernels": kernels, "lossy": lossy}
    if mesh.count <= len(jax.devices()):
        return plan_on_mesh(spec, request, layout_for(mesh, spec), table, transport, copy_mode, **choices)[0]
    return estimate_on_mesh(spec, request, mesh, table, device, copy_mode, **choices)


def _parser() -> console.Parser:
    parser = console.Parser(prog="ef-jax plan", description=_DESCRIPTION)
    parser.add_argument("model", metavar="MODEL", nargs="?", help="checkpoint directory (default: the bundled model)")
    common.add_memory_options(parser, batch="default: 1, or one for each part of a mesh's sequences")
    common.add_mesh_options(parser)
    common.add_planned_lossy_options(parser)
    forecasts.add_forecast_options(parser)
    common.add_common_options(parser)
    return parser
