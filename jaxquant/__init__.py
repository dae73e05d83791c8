"""Quantization for JAX: functional transforms of parameter pytrees, and models that run on the result unmodified."""

from jaxquant._ops import dot_general as dot_general
from jaxquant._ops import ragged_dot as ragged_dot
from jaxquant._ops import take as take
from jaxquant._qarray import QArray as QArray
from jaxquant._quantize import dequantize as dequantize
from jaxquant._quantize import quantize as quantize
from jaxquant._quantized import Explanation as Explanation
from jaxquant._quantized import explain as explain
from jaxquant._quantized import quantized as quantized
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
from jaxquant.checkpoint import load as load
from jaxquant.checkpoint import save as save

__version__ = "0.1.0"
