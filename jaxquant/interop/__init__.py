"""Checkpoints of other libraries, read and written bit for bit.

`load_huggingface` reads a folder that is float, GPTQ, AWQ, compressed-tensors or bitsandbytes; `save_huggingface`
writes all of these but the last. `names` holds the tables that map modules to parameters. `from_qwix` and `to_qwix`
convert one array.
"""

from jaxquant.interop._module import Module
from jaxquant.interop.huggingface import Folder, load_huggingface, plan_huggingface
from jaxquant.interop.huggingface_write import FORMATS, save_huggingface
from jaxquant.interop.names import TABLES, read_table
from jaxquant.interop.qwix import from_qwix, to_qwix
from jaxquant.storage._leaf import Leaf

__all__ = [
    "FORMATS",
    "TABLES",
    "Folder",
    "Leaf",
    "Module",
    "from_qwix",
    "load_huggingface",
    "plan_huggingface",
    "read_table",
    "save_huggingface",
    "to_qwix",
]
