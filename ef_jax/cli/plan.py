"""`ef-jax plan`: the memory plan of a model, and its speed on a machine, from its configuration alone."""

from collections.abc import Sequence

from ef_jax import console
from ef_jax.cli import forecast as forecasts
from ef_jax.cli import options as common
from ef_jax.errors import BudgetError
from ef_jax.lossy import LossyOptions
from ef_jax.memory.sizes import format_bytes
from ef_jax.stats import lossy_text

_DESCRIPTION = """Print the memory plan of a model without loading it. A directory that holds only config.json is
enough. The workspace is that of programs compiled for this machine's device; another device's differs somewhat.
With --forecast also say how fast the model will be there, or on a machine that is not at hand."""


def run(words: Sequence[str]) -> None:
    """Run the command.

    Raises:
      InputError: an option, the model or the budget cannot be used.
    """
    options = _parser().parse_intermixed_args(words)
    path = common.model_path(options.model)
    machine = forecasts.chosen_machine(options)
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
        request = make_request(spec, device, **common.memory_options(options, batch=1))
    else:
        request = forecasts.request_for(machine, spec, device, options)
        copy_mode = copy_mode or ("in_program" if machine.platform == "cpu" else "async")
    with console.status("compiling the programs to measure their workspace ...", shown=True):
        kernels = choose_kernels(spec, device, options.kernel)
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
    print(f"a decode step uses at most {plan.token_cycle} experts and moves at most {format_bytes(moved)}")


def _parser() -> console.Parser:
    parser = console.Parser(prog="ef-jax plan", description=_DESCRIPTION)
    parser.add_argument("model", metavar="MODEL", nargs="?", help="checkpoint directory (default: the bundled model)")
    common.add_memory_options(parser, batch="default: 1")
    common.add_planned_lossy_options(parser)
    forecasts.add_forecast_options(parser)
    common.add_common_options(parser)
    return parser
