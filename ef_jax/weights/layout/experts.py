"""Where the routed experts lie, in each way that checkpoints have (`ExpertLayout`)."""

from collections.abc import Collection

from ef_jax.errors import UnsupportedError
from ef_jax.families import ExpertLayout, TensorNames
from ef_jax.spec import ModelSpec
from ef_jax.weights.layout.fp8 import fp8_pieces
from ef_jax.weights.layout.gpt_oss import gpt_oss_pieces
from ef_jax.weights.layout.pieces import TRANSPOSED, Piece, block_pieces
from ef_jax.weights.layout.switch_transformers import stack_expert_pieces


def expert_pieces(
    spec: ModelSpec, names: TensorNames, experts: ExpertLayout, layer: int, expert: int
) -> tuple[Piece, ...]:
    """The pieces that fill one expert's block."""
    count, width, hidden = spec.experts.count, spec.experts.width, spec.hidden
    size = width * hidden
    if experts == "by_stack":
        return stack_expert_pieces(spec, layer, expert)
    module = f"{names.model}.layers.{layer}.{_module(names, experts)}"
    if experts in ("per_expert", "fp8"):
        tensors = [f"{module}.experts.{expert}.{name}.weight" for name in (names.gate, names.up, names.down)]
        return (block_pieces if experts == "per_expert" else fp8_pieces)(tensors, width, hidden)
    if experts in ("interleaved", "mxfp4"):
        return gpt_oss_pieces(spec, f"{module}.experts", expert)
    gate_up, down = _tensors(module, experts)
    if experts == "transposed":
        return (
            Piece(
                tensor=gate_up,
                start=2 * expert * size,
                shape=(hidden, 2, width),
                of=(count, hidden, 2 * width),
                where=slice(0, 2),
                axes=(2, 0, 1),
            ),
            Piece(tensor=down, start=expert * size, shape=(width, hidden), of=(count, width, hidden), where=2),
        )
    both, back = (count, 2 * width, hidden), (count, hidden, width)
    return (
        Piece(tensor=gate_up, start=2 * expert * size, shape=(2, width, hidden), of=both, where=slice(0, 2)),
        Piece(tensor=down, start=expert * size, shape=(hidden, width), of=back, where=2, axes=TRANSPOSED),
    )


def stored_experts(spec: ModelSpec, names: TensorNames, present: Collection[str]) -> ExpertLayout:
    """How the experts are stored in a checkpoint that has the tensors `present`; as released if that is not clear.

    Raises:
      UnsupportedError: the spec is of a family without a layout.
    """
    if not names.experts:
        raise UnsupportedError(f"no layout of experts is known for {spec.family!r}")
    quantization = spec.experts.quantization
    if quantization == "mxfp4" or quantization == "fp8":
        return quantization
    for experts in names.experts:
        if expert_pieces(spec, names, experts, spec.moe_layers[0], 0)[0].tensor in present:
            return experts
    return names.experts[0]


def _module(names: TensorNames, experts: ExpertLayout) -> str:
    # transformers 5 renames the module when it fuses the experts.
    return names.fused_moe if experts == "fused" else names.moe


def _tensors(module: str, experts: ExpertLayout) -> tuple[str, str]:
    if experts == "stacked":
        return f"{module}.input_linear.weight", f"{module}.output_linear.weight"
    return f"{module}.experts.gate_up_proj", f"{module}.experts.down_proj"
