"""Weight dtypes: their names, their safetensors codes, and a fast look for NaN and infinity."""

from typing import Any, Literal, cast

import ml_dtypes
import numpy as np

from ef_jax.errors import InputError

DtypeName = Literal["bfloat16", "float16", "float32"]

WEIGHT_DTYPES: dict[str, np.dtype[Any]] = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
}
CODE_OF_NAME = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
_CODE_OF_BITS = {"uint8": "U8", "float8_e4m3fn": "F8_E4M3"}
DTYPE_OF_CODE: dict[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    **{CODE_OF_NAME[name]: dtype for name, dtype in WEIGHT_DTYPES.items()},
}
"""The float dtypes that a weight may be stored in."""

STORED_DTYPES: dict[str, np.dtype[Any]] = DTYPE_OF_CODE | {
    "U8": np.dtype(np.uint8),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
}
"""The same with those that quantized weights and their scales are stored in."""

BITS_OF_CODE = {
    **dict.fromkeys(("BOOL", "I8", "U8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
}
"""Every dtype code that a safetensors header may hold, and its bits a value."""

_E8M0_NAN = 255
# From which magnitude on the bits mean NaN or infinity.
_NONFINITE = {"bfloat16": 0x7F80, "float16": 0x7C00, "float32": 0x7F800000, "float8_e4m3fn": 0x7F}


def check_dtype_name(name: str) -> DtypeName:
    """The name itself, if it is a dtype that weights can be held in.

    Raises:
      InputError: it is not.
    """
    if name not in WEIGHT_DTYPES:
        raise InputError(f"dtype {name!r} is not one of {', '.join(WEIGHT_DTYPES)}")
    return cast(DtypeName, name)


def holds_exactly(name: str, code: str, *, widens: bool) -> bool:
    """Whether a weight stored as `code` is the same in dtype `name`: it has that dtype, or a narrower one of floats
    where it may be widened."""
    if name in _CODE_OF_BITS:
        return code == _CODE_OF_BITS[name]
    return code == CODE_OF_NAME[name] or (widens and name == "float32" and code in ("BF16", "F16", "F8_E8M0"))


def as_bits(array: np.ndarray) -> np.ndarray:
    """The same memory as unsigned integers: numpy moves these several times faster than bfloat16."""
    return array.view(np.dtype(f"u{array.dtype.itemsize}"))


def as_bytes(array: np.ndarray) -> np.ndarray:
    """The memory of a C-contiguous array as uint8 `[nbytes]`."""
    return array.reshape(-1).view(np.uint8)


def has_nonfinite(array: np.ndarray) -> bool:
    """Whether an array of one of `WEIGHT_DTYPES`, of FP8 weights in float8_e4m3fn or of scales in float8_e8m0fnu holds
    NaN or an infinity; integers never do.

    Two integer maxima and no temporary: about 15 GB/s, against under 2 GB/s for `np.isfinite`. Read as signed
    integers, positive NaN and infinity are the largest values there are; read as unsigned ones, the negative are.
    """
    if array.size == 0 or array.dtype.kind in "iu":
        return False
    if array.dtype == ml_dtypes.float8_e8m0fnu:
        return int(as_bits(array).max()) == _E8M0_NAN
    least = _NONFINITE[array.dtype.name]
    bits = as_bits(array)
    sign = 1 << (8 * array.dtype.itemsize - 1)
    return int(bits.max()) >= least | sign or int(bits.view(f"i{array.dtype.itemsize}").max()) >= least
