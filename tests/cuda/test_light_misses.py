"""What a run that weighs its misses adds to a decode step's programs compiles for an H100."""

import jax
import numpy as np
import pytest

from ef_jax.lossy import LossyOptions
from ef_jax.runtime.expert_kernels import choose_kernels
from ef_jax.runtime.low_precision import LowPrecision
from ef_jax.runtime.programs import Programs
from tests.cuda import aot
from tests.cuda.test_engine_programs import QWEN3_LIKE, SLOTS

pytestmark = [
    pytest.mark.cuda_compile,
    pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning"),
]


def test_reports_of_weights_and_the_small_pool_compile() -> None:
    kernels = choose_kernels(QWEN3_LIKE, aot.h100())
    low = LowPrecision.of(QWEN3_LIKE, kernels, batch=2, device=aot.h100())
    assert low.kernels.decode in ("mosaic", "triton")
    assert low.slots == 2 * QWEN3_LIKE.experts.top_k
    programs = Programs(
        QWEN3_LIKE,
        batch=2,
        context=256,
        chunk=4,
        pool_slots=SLOTS,
        sharding=aot.sharding(),
        kernels=kernels,
        lossy=LossyOptions(skip=0.05, low_precision_miss=0.25),
        low_precision=low,
    )
    with aot.lowering_for_h100():
        computed = programs.low()
        _, _, (report, state), _ = programs.begin(1, 256).out_info
    assert computed.memory_analysis().temp_size_in_bytes < low.spec.block_bytes
    assert (report.dtype, report.shape) == (np.uint8, (2 * QWEN3_LIKE.experts.top_k * (2 + 4),))
    assert state is None
    assert jax.default_backend() == "cpu"
