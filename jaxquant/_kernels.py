"""The one door to `pallas_kernels`: what the library takes from there, by the names that it has here."""

from pallas_kernels.activation_quant import activation_quant
from pallas_kernels.attention import attention
from pallas_kernels.decode_attention import Cache, decode_attention, quantized_tokens
from pallas_kernels.decode_attention import dequantize as dequantize_cache
from pallas_kernels.decode_attention import layout as kv_layout
from pallas_kernels.grouped_matmul import grouped_matmul, interleave, separate
from pallas_kernels.grouped_matmul import supports as grouped_supports
from pallas_kernels.int4_matmul import Int4Weight
from pallas_kernels.int4_matmul import pack as pack_fragments
from pallas_kernels.int4_matmul import supports as fragments_support
from pallas_kernels.int4_matmul import unpack as unpack_fragments
from pallas_kernels.int4_matmul.core import packed_matmul
from pallas_kernels.int8_matmul import Int8Weight, int8_matmul, int8_matmul_many
from pallas_kernels.int8_matmul import pack as pack_int8
from pallas_kernels.int8_matmul import unpack as unpack_int8

__all__ = [
    "Cache",
    "Int4Weight",
    "Int8Weight",
    "activation_quant",
    "attention",
    "decode_attention",
    "dequantize_cache",
    "fragments_support",
    "grouped_matmul",
    "grouped_supports",
    "int8_matmul",
    "int8_matmul_many",
    "interleave",
    "kv_layout",
    "pack_fragments",
    "pack_int8",
    "packed_matmul",
    "quantized_tokens",
    "separate",
    "unpack_fragments",
    "unpack_int8",
]
