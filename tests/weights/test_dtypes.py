import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ef_jax.errors import InputError
from ef_jax.weights.dtypes import WEIGHT_DTYPES, check_dtype_name, has_nonfinite


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_every_16_bit_pattern_is_judged_as_numpy_does(name: str) -> None:
    patterns = np.arange(2**16, dtype=np.uint16).view(WEIGHT_DTYPES[name])
    finite = np.isfinite(patterns.astype(np.float32))
    assert not has_nonfinite(patterns[finite])
    assert all(has_nonfinite(np.append(patterns[finite][:3], bad)) for bad in patterns[~finite])


@given(st.lists(st.floats(width=32), max_size=5))
def test_float32_is_judged_as_numpy_does(values: list[float]) -> None:
    array = np.array(values, np.float32)
    assert has_nonfinite(array) == (not np.isfinite(array).all())


def test_an_unknown_dtype_name() -> None:
    with pytest.raises(InputError, match="'int8' is not one of bfloat16, float16, float32"):
        check_dtype_name("int8")
