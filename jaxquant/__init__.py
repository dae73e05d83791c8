"""Quantization for JAX: functional transforms of parameter pytrees, and models that run on the result unmodified."""

from jaxquant._calibrate import Calibration as Calibration
from jaxquant._calibrate import calibrate as calibrate
from jaxquant._lazy import LazyArray as LazyArray
from jaxquant._ops import attention as attention
from jaxquant._ops import dot_general as dot_general
from jaxquant._ops import ragged_dot as ragged_dot
from jaxquant._ops import take as take
from jaxquant._outliers import OutlierArray as OutlierArray
from jaxquant._pack_for import pack_for as pack_for
from jaxquant._qarray import QArray as QArray
from jaxquant._quantize import dequantize as dequantize
from jaxquant._quantize import quantize as quantize
from jaxquant._quantized import Explanation as Explanation
from jaxquant._quantized import einsum as einsum
from jaxquant._quantized import explain as explain
from jaxquant._quantized import quantized as quantized
from jaxquant._report import Report as Report
from jaxquant._report import WeightReport as WeightReport
from jaxquant._spec import PerBlock as PerBlock
from jaxquant._spec import PerChannel as PerChannel
from jaxquant._spec import PerGroup as PerGroup
from jaxquant._spec import PerTensor as PerTensor
from jaxquant._spec import PerToken as PerToken
from jaxquant._spec import QuantConfig as QuantConfig
from jaxquant._spec import QuantSpec as QuantSpec
from jaxquant._spec import Rule as Rule
from jaxquant._spec import TensorSpec as TensorSpec
from jaxquant._summary import Summary as Summary
from jaxquant._summary import summary as summary
from jaxquant.algorithms._transform import WeightTransform as WeightTransform
from jaxquant.algorithms._transform import chain as chain
from jaxquant.algorithms.awq import awq as awq
from jaxquant.algorithms.compensation import compensate as compensate
from jaxquant.algorithms.gptq import gptq as gptq
from jaxquant.algorithms.learned_rounding import learned_rounding as learned_rounding
from jaxquant.algorithms.llm_int8 import llm_int8 as llm_int8
from jaxquant.algorithms.llm_int8 import salient as salient
from jaxquant.algorithms.rtn import rtn as rtn
from jaxquant.algorithms.smoothquant import smoothquant as smoothquant
from jaxquant.checkpoint import load as load
from jaxquant.checkpoint import save as save
from jaxquant.kv_cache import KVCache as KVCache

__version__ = "0.1.0"
