"""Grouped expert matmuls that read weights in place from a slot pool."""

from pallas_kernels.grouped_ffn.api import BACKENDS as BACKENDS
from pallas_kernels.grouped_ffn.api import choose_backend as choose_backend
from pallas_kernels.grouped_ffn.api import grouped_ffn as grouped_ffn
from pallas_kernels.grouped_ffn.storage import from_storage as from_storage
from pallas_kernels.grouped_ffn.storage import storage_dtype as storage_dtype
from pallas_kernels.grouped_ffn.storage import to_storage as to_storage
