"""A cache of quantized keys and values for decoding: one pytree, fixed or in pages, appended to under jit and scan."""

from jaxquant.kv_cache._cache import KVCache
from jaxquant.kv_cache._formats import FORMATS

__all__ = ["FORMATS", "KVCache"]
