"""Eight H100s compute one pass's experts while another's rows are exchanged: the schedule that XLA makes of it."""

import re

import jax
import pytest

from ef_jax.mesh.exchange import Transport
from ef_jax.mesh.layout import MeshLayout
from ef_jax.mesh.overlap_option import Overlap
from ef_jax.mesh.programs import MeshPrograms
from ef_jax.mesh.tensor import DenseShares
from ef_jax.runtime.expert_kernels import choose_kernels
from tests.cuda import aot
from tests.cuda.test_engine_programs import QWEN3_LIKE

pytestmark = [
    pytest.mark.cuda_compile,
    pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning"),
]

SPEC = QWEN3_LIKE
BATCH, CONTEXT, WIDTH, SLOTS = 80, 128, 16, 64  # of each device; a pass takes 64 prompts
OPERATION = re.compile(r"^ +(?:ROOT )?%[\w.-]+ = .*? ([a-z][a-z0-9-]*)\(")


def compiled(transport: Transport) -> jax.stages.Compiled:
    layout = MeshLayout.of(list(aot.h100s()), expert=8)
    kernels = choose_kernels(SPEC, layout.devices[0])
    assert kernels.prompt == "mosaic"
    programs = MeshPrograms(
        DenseShares(SPEC, 1),
        layout=layout,
        transport=transport,
        overlap=Overlap(passes=2, reason="asked for"),
        batch=BATCH,
        context=CONTEXT,
        chunk=WIDTH,
        pool_slots=SLOTS,
        kernels=kernels,
    )
    assert programs.passes(WIDTH) == 2
    (program,) = programs.besides(WIDTH, CONTEXT)
    assert isinstance(program, jax.stages.Compiled)
    return program


def schedule(program: jax.stages.Compiled) -> list[str]:
    """The collectives that move rows, and the experts' kernels, in the order in which they are started."""
    text = program.as_text()
    assert text is not None
    assert "is_scheduled=true" in text.splitlines()[0]
    found = []
    for line in text[text.index("\nENTRY") :].splitlines():
        operation = OPERATION.match(line)
        if operation is None:
            continue
        if "all-to-all" in operation[1] or ("all-gather" in operation[1] and f",{SPEC.hidden + 24}]" in line):
            found.append(operation[1])
        elif operation[1] == "custom-call" and "mosaic_gpu" in line:
            found.append("kernel")
    return found


@pytest.mark.parametrize("transport", ["padded", "ragged"])
def test_experts_are_computed_while_rows_move(transport: Transport) -> None:
    """Half of a wave beside either exchange, each half by two kernels."""
    with aot.lowering_for_h100():
        program = compiled(transport)
    there, back = ("all-gather", "all-to-all") if transport == "padded" else ("ragged-all-to-all",) * 2
    assert schedule(program) == [
        *(f"{back}-start", "kernel", "kernel", f"{back}-done"),
        *(f"{there}-start", "kernel", "kernel", f"{there}-done"),
    ]
