"""Grouped expert matmuls that read weights in place from a slot pool."""

from pallas_kernels.grouped_ffn.activations import ACTIVATIONS as ACTIVATIONS
from pallas_kernels.grouped_ffn.activations import UNGATED_ACTIVATIONS as UNGATED_ACTIVATIONS
from pallas_kernels.grouped_ffn.api import grouped_ffn as grouped_ffn
from pallas_kernels.grouped_ffn.api import slot_grouped_matmul as slot_grouped_matmul
from pallas_kernels.grouped_ffn.backends import BACKENDS as BACKENDS
from pallas_kernels.grouped_ffn.backends import choose_backend as choose_backend
from pallas_kernels.grouped_ffn.biases import ExpertBiases as ExpertBiases
from pallas_kernels.grouped_ffn.problem import Problem as Problem
from pallas_kernels.grouped_ffn.quantized import QuantizedPool as QuantizedPool
from pallas_kernels.grouped_ffn.quantized import dequantize as dequantize
from pallas_kernels.grouped_ffn.quantized import lossy_quantize as lossy_quantize
from pallas_kernels.grouped_ffn.storage import from_storage as from_storage
from pallas_kernels.grouped_ffn.storage import storage_dtype as storage_dtype
from pallas_kernels.grouped_ffn.storage import to_storage as to_storage
from pallas_kernels.grouped_ffn.target import Target as Target
from pallas_kernels.grouped_ffn.target import default_device as default_device
from pallas_kernels.grouped_ffn.target import default_target as default_target
from pallas_kernels.grouped_ffn.target import target_of as target_of
