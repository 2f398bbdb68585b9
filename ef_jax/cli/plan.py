"""`ef-jax plan`: the memory plan of a model, from its configuration alone."""

from collections.abc import Sequence

from ef_jax import console
from ef_jax.cli import options as common
from ef_jax.errors import BudgetError
from ef_jax.memory.sizes import format_bytes

_DESCRIPTION = """Print the memory plan of a model without loading it. A directory that holds only config.json is
enough. The workspace is that of programs compiled for this machine's device; another device's differs somewhat."""


def run(words: Sequence[str]) -> None:
    """Run the command.

    Raises:
      InputError: an option, the model or the budget cannot be used.
    """
    options = _parser().parse_intermixed_args(words)
    path = common.model_path(options.model)
    import jax

    from ef_jax.loading import make_request, plan_model
    from ef_jax.memory.plan import check_host_pool
    from ef_jax.runtime.expert_kernels import choose_kernels

    spec = common.read_spec(path, options.dtype)
    device = jax.devices()[0]
    request = make_request(spec, device, **common.memory_options(options, batch=1))
    with console.status("compiling the programs to measure their workspace ...", shown=True):
        kernels = choose_kernels(spec, device, options.kernel)
        plan, _ = plan_model(spec, request, device, options.copy_mode, kernels=kernels)
    try:
        check_host_pool(spec, device.platform)
        warnings = plan.warnings
    except BudgetError as error:
        warnings = (*plan.warnings, str(error))
    moved = 0 if plan.slots == plan.experts else plan.token_cycle * plan.block_bytes
    if options.json:
        contents = {
            "model": str(path),
            "device": device.device_kind,
            "kernels": kernels.as_dict(),
            "plan": {**plan.as_dict(), "warnings": warnings},
            "step_bytes_at_most": moved,
        }
        print(console.json_line(contents))
        return
    print(plan)
    for warning in warnings[len(plan.warnings) :]:
        print(f"  warning: {warning}")
    print(f"a decode step uses at most {plan.token_cycle} experts and moves at most {format_bytes(moved)}")


def _parser() -> console.Parser:
    parser = console.Parser(prog="ef-jax plan", description=_DESCRIPTION)
    parser.add_argument("model", metavar="MODEL", nargs="?", help="checkpoint directory (default: the bundled model)")
    common.add_memory_options(parser, batch="default: 1")
    common.add_common_options(parser)
    return parser
