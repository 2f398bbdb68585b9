import jax
import jax.numpy as jnp
import pytest

from tests.cuda import aot

pytestmark = pytest.mark.cuda_compile


def test_compiles_for_sm_90a() -> None:
    compiled = aot.compile_for_h100(lambda x: jnp.tanh(x @ x), aot.abstract((512, 512), jnp.bfloat16))
    assert aot.h100().device_kind == "NVIDIA H100 80GB HBM3"
    memory = compiled.memory_analysis()
    assert memory.argument_size_in_bytes == memory.output_size_in_bytes == 512 * 512 * 2


def test_an_expert_in_pinned_memory_counts_as_host_bytes_and_the_pool_stays_in_place() -> None:
    def insert(pool: jax.Array, block: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_index_in_dim(pool, jax.device_put(block, jax.memory.Space.Device), 1, 0)

    pool, block = aot.abstract((4, 256, 128), jnp.float32), aot.abstract((256, 128), jnp.float32, "pinned_host")
    memory = aot.compile_for_h100(insert, pool, block, donate_argnums=0).memory_analysis()
    assert memory.host_argument_size_in_bytes == 256 * 128 * 4
    assert memory.argument_size_in_bytes == memory.alias_size_in_bytes == 4 * 256 * 128 * 4
