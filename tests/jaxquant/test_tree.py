"""Parameter paths: the same words for every kind of tree."""

import dataclasses

import flax.core
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxquant.arrays._qarray import quantize_array
from jaxquant.arrays._spec import PRESETS
from jaxquant.parameters._tree import is_quantized, key_name, map_named, named_leaves, nearest_paths, path_name


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Pair:
    left: object
    right: object


def paths(tree) -> list[str]:
    return [path for path, _ in named_leaves(tree)]


def test_dicts_lists_tuples_and_dataclasses_have_one_spelling():
    tree = {"7": 6, "blocks": [{"kernel": 1}, (2, 3)], "pair": Pair(4, {"b": 5})}
    assert paths(tree) == ["7", "blocks/0/kernel", "blocks/1/0", "blocks/1/1", "pair/left", "pair/right/b"]
    assert paths({7: {0: 1}}) == ["7/0"]
    assert paths(flax.core.freeze({"a": {"b": 1}})) == ["a/b"]
    assert paths((1, None, 2)) == ["0", "2"]
    assert paths(3) == [""]


def test_dots_in_names_are_kept():
    assert paths({"model.layers.0.q_proj": {"kernel": 1}}) == ["model.layers.0.q_proj/kernel"]


def test_an_nnx_state_reads_like_its_module():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.List([nnx.Linear(4, 4, rngs=rngs) for _ in range(2)])
            self.norm = nnx.LayerNorm(4, rngs=rngs)

    expected = ["layers/0/bias", "layers/0/kernel", "layers/1/bias", "layers/1/kernel", "norm/bias", "norm/scale"]
    state = nnx.state(Model(nnx.Rngs(0)), nnx.Param)
    assert paths(state) == expected
    assert paths(nnx.to_pure_dict(state)) == expected


def test_a_partition_box_adds_nothing_to_the_path():
    dense = nn.Dense(4, kernel_init=nn.with_partitioning(nn.initializers.ones, ("in", "out")))
    params = jax.eval_shape(dense.init, jax.random.key(0), jnp.ones((1, 4)))
    assert paths(params) == ["params/bias", "params/kernel"]


def test_a_parameter_called_value_keeps_its_name():
    assert paths({"attention": {"value": {"kernel": 1}}, "value": 2}) == ["attention/value/kernel", "value"]


def test_a_key_of_another_kind_is_spelled_as_it_prints():
    class Key:
        def __str__(self):
            return "odd"

    assert key_name(Key()) == "odd"
    assert path_name((Key(), jax.tree_util.DictKey("kernel"))) == "odd/kernel"


def test_a_quantized_weight_is_one_leaf():
    q = quantize_array(jnp.ones((128, 8)), PRESETS["w4a16"])
    tree = {"dense": {"bias": np.zeros(8), "kernel": q}}
    assert paths(tree) == ["dense/bias", "dense/kernel"]
    assert [is_quantized(leaf) for _, leaf in named_leaves(tree)] == [False, True]
    doubled = map_named(lambda path, leaf: leaf if is_quantized(leaf) else path, tree)
    assert doubled == {"dense": {"bias": "dense/bias", "kernel": q}}


def test_nearest_paths_are_ordered_and_counted():
    tree = [f"block_{i}/attention/query/kernel" for i in range(20)] + ["embed/embedding"]
    assert nearest_paths("block_3/attention/query/kernl", tree, 1) == ["block_3/attention/query/kernel"]
    assert len(nearest_paths("block", tree)) == 5
    assert nearest_paths("embedding", tree, 1) == ["embed/embedding"]
    assert nearest_paths("anything", [], 3) == []


@pytest.mark.parametrize("kind", [dict, flax.core.freeze])
def test_mapping_keeps_the_type_of_the_tree(kind):
    tree = kind({"a": {"b": 1}})
    assert type(map_named(lambda path, leaf: leaf, tree)) is type(tree)
