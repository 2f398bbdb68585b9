"""Where gpt-oss's experts lie: rows of gate and up in turn, biases, and weights in floats or in MXFP4."""

from ef_jax.spec import ModelSpec
from ef_jax.weights.layout.pieces import TRANSPOSED, Piece

_GROUP, _BYTES = 32, 16  # a scale's weights, and the bytes that they take
_PAIRS = (1, 0, 2)  # rows of gate and up in turn


def gpt_oss_pieces(spec: ModelSpec, module: str, expert: int) -> tuple[Piece, ...]:
    """The pieces that fill one expert's block, from tensors of all experts of a layer in `module`."""
    count, width, hidden = spec.experts.count, spec.experts.width, spec.hidden
    biases = (
        Piece(
            tensor=f"{module}.gate_up_proj_bias",
            start=2 * expert * width,
            shape=(width, 2),
            of=(count, 2 * width),
            axes=TRANSPOSED,
            parts=("gate_bias", "up_bias"),
        ),
        Piece(
            tensor=f"{module}.down_proj_bias",
            start=expert * hidden,
            shape=(hidden,),
            of=(count, hidden),
            parts=("down_bias",),
        ),
    )
    pieces = _float_pieces if spec.experts.quantization is None else _mxfp4_pieces
    return (*pieces(count, width, hidden, module, expert), *biases)


def _float_pieces(count: int, width: int, hidden: int, module: str, expert: int) -> tuple[Piece, ...]:
    size = width * hidden
    return (
        Piece(
            tensor=f"{module}.gate_up_proj",
            start=2 * expert * size,
            shape=(hidden, width, 2),
            of=(count, hidden, 2 * width),
            where=slice(0, 2),
            axes=(2, 1, 0),
            parts=("weights",),
        ),
        Piece(
            tensor=f"{module}.down_proj",
            start=expert * size,
            shape=(width, hidden),
            of=(count, width, hidden),
            where=2,
            parts=("weights",),
        ),
    )


def _mxfp4_pieces(count: int, width: int, hidden: int, module: str, expert: int) -> tuple[Piece, ...]:
    groups, size = hidden // _GROUP, width * hidden
    return (
        Piece(
            tensor=f"{module}.gate_up_proj_blocks",
            start=expert * size,
            shape=(width, 2, hidden // 2),
            of=(count, 2 * width, groups, _BYTES),
            where=slice(0, 2),
            axes=_PAIRS,
            parts=("values",),
            dtype="uint8",
            codes="rows",
        ),
        Piece(
            tensor=f"{module}.gate_up_proj_scales",
            start=2 * expert * size // _GROUP,
            shape=(width, 2, groups),
            of=(count, 2 * width, groups),
            axes=_PAIRS,
            parts=("gate_up_scales",),
            dtype="uint8",
        ),
        Piece(
            tensor=f"{module}.down_proj_blocks",
            start=expert * size // 2,
            shape=(hidden, width // 2),
            of=(count, hidden, width // _GROUP, _BYTES),
            where=2,
            parts=("values",),
            dtype="uint8",
            codes="columns",
        ),
        Piece(
            tensor=f"{module}.down_proj_scales",
            start=expert * size // _GROUP,
            shape=(hidden, width // _GROUP),
            of=(count, hidden, width // _GROUP),
            axes=TRANSPOSED,
            parts=("down_scales",),
            dtype="uint8",
        ),
    )
