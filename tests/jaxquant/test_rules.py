"""Which parameter is quantized: precedence, the words of refusals, and defaults on trees of real models."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxquant.arrays._qarray import quantize_array
from jaxquant.arrays._spec import PRESETS, QuantConfig, Rule
from jaxquant.parameters._rules import assign, conventional_axis

W8, W4 = PRESETS["w8a16"], PRESETS["w4a16"]
MATRIX = jax.ShapeDtypeStruct((256, 64), jnp.float32)


def tree_of(**shapes: tuple[int, ...]) -> dict:
    """A flat tree of abstract float32 parameters; `__` in a name stands for "/"."""
    return {name.replace("__", "/"): jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}


def quantized_axes(tree, config: QuantConfig | None = None) -> dict[str, tuple[int, ...]]:
    """Paths of the parameters that are quantized, with their contracting axes; each one left has a reason."""
    assignments = assign(tree, config or QuantConfig(W8))
    assert all(chosen.reason for chosen in assignments.values())
    assert all(chosen.axis == () for chosen in assignments.values() if chosen.spec is None)
    return {path: chosen.axis for path, chosen in assignments.items() if chosen.spec is not None}


def test_the_first_rule_that_matches_wins():
    rules = (Rule(r".*/up/.*", None), Rule(r"mlp/.*", W4), Rule(r".*", W8))
    config = QuantConfig(None, rules)
    got = assign({"mlp": {"up": {"w": MATRIX}, "down": {"w": MATRIX}}, "head": {"w": MATRIX}}, config)
    assert {path: chosen.spec for path, chosen in got.items()} == {"mlp/up/w": None, "mlp/down/w": W4, "head/w": W8}
    assert got["mlp/up/w"].reason == "rule '.*/up/.*' leaves it"
    assert got["head/w"].reason == "rule '.*'"


def test_rules_overrule_the_default_skips():
    tree = {"lm_head": {"kernel": MATRIX}, "norm": {"kernel": MATRIX}}
    assert quantized_axes(tree) == {}
    assert quantized_axes(tree, QuantConfig(W8, (Rule("lm_head/kernel", W4),))) == {"lm_head/kernel": (-2,)}


def test_axes_come_from_the_rule_then_the_trace_then_the_convention():
    tree, config = (
        {"a": {"w": MATRIX}, "b": {"w": MATRIX}, "c": {"w": MATRIX}},
        QuantConfig(W8, (Rule("a/w", W8, axis=-1),)),
    )
    got = assign(tree, config, {"a/w": (-2,), "b/w": (-1,)})
    assert {path: chosen.axis for path, chosen in got.items()} == {"a/w": (-1,), "b/w": (-1,), "c/w": (-2,)}


def test_a_rule_that_matches_nothing_names_the_nearest_paths():
    tree = {"block_0": {"query": {"kernel": MATRIX}}, "norm": {"scale": MATRIX}}
    with pytest.raises(
        ValueError, match=r"rule 'block_0/query' matches no parameter; the nearest paths are: block_0/query/kernel, "
    ):
        assign(tree, QuantConfig(W8, (Rule("block_0/query", None),)))


@pytest.mark.parametrize("empty", [{}, [], None, {"a": {}}])
def test_an_empty_tree_is_an_error(empty):
    with pytest.raises(ValueError, match="the parameter tree has no leaves; pass the parameters themselves"):
        assign(empty, QuantConfig(W8))


@pytest.mark.parametrize(
    ("leaf", "axis", "error", "message"),
    [
        (jnp.zeros((8, 8), jnp.int32), None, ValueError, "leaf of dtype int32; floating dtypes are accepted"),
        (np.zeros((8, 8), jax.dtypes.float0), None, ValueError, r"leaf of dtype .*; floating dtypes are accepted"),
        (jax.random.key(0), None, ValueError, r"leaf of dtype key<fry>; floating dtypes are accepted"),
        (jnp.float32(1), None, ValueError, "a scalar; arrays of one dimension or more"),
        (
            jnp.zeros((8, 8)),
            -3,
            ValueError,
            r"along axis \(-3,\), which shape \(8, 8\) does not have; give axes from -2 to -1",
        ),
        (1.0, None, TypeError, "arrays are accepted, got float"),
        ("relu", None, TypeError, "arrays are accepted, got str"),
    ],
)
def test_a_leaf_that_a_rule_cannot_quantize_is_named(leaf, axis, error, message):
    with pytest.raises(error, match=f"layer/odd: .*{message}") as caught:
        assign({"layer": {"odd": leaf}}, QuantConfig(rules=(Rule("layer/odd", W8, axis=axis),)))
    assert "Rule(" in str(caught.value) or "give axes" in str(caught.value)
    left = assign({"layer": {"odd": leaf}}, QuantConfig(rules=(Rule("layer/odd", None), Rule(".*", W8))))
    assert left["layer/odd"].spec is None


def test_a_vector_can_be_quantized_by_rule():
    got = assign({"decay": jnp.zeros(256)}, QuantConfig(rules=(Rule("decay", W8),)))
    assert got["decay"].axis == (-1,)


def test_what_is_no_matrix_is_left_with_a_reason():
    tree = {
        "vector": jnp.zeros(8),
        "scalar": jnp.float32(0),
        "ids": jnp.zeros((8, 8), jnp.int32),
        "float0": np.zeros((8, 8), jax.dtypes.float0),
        "cls": jnp.zeros((1, 1, 64)),
        "key": jax.random.key(0),
        "done": quantize_array(jnp.ones((128, 8)), W4),
    }
    reasons = {path: chosen.reason for path, chosen in assign(tree, QuantConfig(W8)).items()}
    assert quantized_axes(tree) == {}
    assert reasons["vector"] == "a vector stays in float"
    assert reasons["scalar"] == "a scalar stays in float"
    assert reasons["ids"] == "dtype int32 is not floating"
    assert reasons["cls"] == "sums over 1 elements only: scales would outweigh codes"
    assert reasons["done"] == "already quantized"
    assert "is not floating" in reasons["float0"]
    assert "is not floating" in reasons["key"]


def test_without_a_default_only_rules_quantize():
    assert quantized_axes({"a": MATRIX, "b": MATRIX}, QuantConfig(None, (Rule("a", W8),))) == {"a": (-2,)}
    assert assign({"a": MATRIX}, QuantConfig(None))["a"].reason == "no rule speaks of it"


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        x += nn.MultiHeadDotProductAttention(4, name="attention")(nn.LayerNorm()(x))
        return nn.Dense(64, name="down")(nn.Dense(256, name="up")(nn.RMSNorm()(x))), None


class LinenModel(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        x, _ = Block()(nn.Embed(32, 64)(tokens), None)
        x, _ = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)()(x, None)
        x = nn.Conv(64, (3,))(nn.BatchNorm(use_running_average=True)(x))
        x = nn.Conv(64, (3, 3), name="patches")(x[..., None, :])
        return nn.Dense(32, name="lm_head")(nn.LayerNorm()(x))


def test_a_linen_model_with_attention_scan_and_convolutions():
    variables = jax.eval_shape(LinenModel().init, jax.random.key(0), jnp.zeros((1, 8), jnp.int32))
    block = {f"attention/{name}/kernel": (-3,) for name in ("query", "key", "value")}
    block |= {"attention/out/kernel": (-3, -2), "up/kernel": (-2,), "down/kernel": (-2,)}
    expected = {f"params/{name}/{path}": axis for name in ("Block_0", "ScanBlock_0") for path, axis in block.items()}
    expected |= {"params/Conv_0/kernel": (-3, -2), "params/patches/kernel": (-4, -3, -2)}
    assert quantized_axes(variables) == expected


class NnxModel(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(32, 64, rngs=rngs)
        self.attn = nnx.MultiHeadAttention(4, 64, decode=False, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(64, 64, rngs=rngs) for _ in range(2)])
        self.adapter = nnx.LoRA(64, 4, 64, rngs=rngs)
        self.norm, self.dropout = nnx.BatchNorm(64, rngs=rngs), nnx.Dropout(0.1, rngs=rngs)
        self.conv1 = nnx.Conv(3, 8, (3, 3), rngs=rngs)


def test_an_nnx_state_with_rngs_statistics_and_adapters():
    state = nnx.eval_shape(lambda: nnx.state(NnxModel(nnx.Rngs(0))))
    expected = {f"attn/{name}/kernel": (-3,) for name in ("query", "key", "value")}
    expected |= {"attn/out/kernel": (-3, -2), "layers/0/kernel": (-2,), "layers/1/kernel": (-2,)}
    assert quantized_axes(state) == expected | {"conv1/kernel": (-4, -3, -2)}


@pytest.mark.parametrize(
    ("shapes", "expected"),
    [
        (  # gemma's own names
            {
                "embedder__input_embedding": (256, 64),
                "layer_0__pre_attention_norm__scale": (64,),
                "layer_0__attn___query_norm__scale": (16,),
                "layer_0__attn__q_einsum__w": (4, 64, 16),
                "layer_0__attn__kv_einsum__w": (2, 1, 64, 16),
                "layer_0__attn__attn_vec_einsum__w": (4, 16, 64),
                "layer_0__mlp__gating_einsum": (2, 256, 64),
                "layer_0__mlp__linear": (256, 64),
                "final_norm__scale": (64,),
            },
            {"attn/q_einsum/w", "attn/kv_einsum/w", "attn/attn_vec_einsum/w", "mlp/gating_einsum", "mlp/linear"},
        ),
        (  # Hugging Face's Llama and Mixtral
            {
                "model__embed_tokens__embedding": (256, 64),
                "layer_0__self_attn__q_proj__kernel": (64, 64),
                "layer_0__mlp__gate_proj__kernel": (64, 256),
                "layer_0__block_sparse_moe__gate__kernel": (64, 8),
                "layer_0__block_sparse_moe__experts__w1": (8, 64, 256),
                "layer_0__input_layernorm__weight": (64,),
                "model__norm__weight": (64,),
                "lm_head__kernel": (64, 256),
            },
            {"self_attn/q_proj/kernel", "mlp/gate_proj/kernel", "block_sparse_moe/experts/w1"},
        ),
        (  # GPT-2, BERT and ViT
            {
                "transformer__wte__embedding": (256, 64),
                "transformer__wpe__embedding": (32, 64),
                "layer_0__c_attn__kernel": (64, 192),
                "transformer__ln_f__scale": (64,),
                "encoder__pos_embedding": (1, 32, 64),
                "encoder__posembed_input__table": (1, 32, 64),
                "embeddings__LayerNorm__stacked": (3, 64),
                "cls": (1, 1, 64),
                "head__kernel": (64, 10),
            },
            {"c_attn/kernel"},
        ),
        (  # stacks of norms and biases, a router, adapters
            {
                "layers__RMSNorm_0__scale": (12, 64),
                "layers__Dense_0__bias": (12, 64),
                "layers__MoERouter_0__kernel": (12, 64, 8),
                "layer_0__lora_a": (12, 64, 8),
                "layer_0__experts__kernel": (12, 8, 64, 256),
                "layer_0__experts__gate": (8, 64, 256),
                "layer_0__shared_expert_gate__kernel": (64, 1),
            },
            {"experts/kernel", "experts/gate"},
        ),
    ],
)
def test_default_skips_know_the_names_of_real_models(shapes, expected):
    assert set(quantized_axes(tree_of(**shapes))) == {f"layer_0/{path}" for path in expected}


ATTENTION = {"attn/query/kernel": (64, 4, 16), "attn/out/kernel": (4, 16, 64)}
STACKED = {"attn/query/kernel": (3, 64, 4, 16), "attn/out/kernel": (3, 4, 16, 64)}
FLAT_STACK = {"attn/query/kernel": (3, 64, 32), "attn/out/kernel": (3, 32, 64)}


@pytest.mark.parametrize(
    ("path", "shapes", "expected"),
    [
        ("dense/kernel", {"dense/kernel": (64, 32)}, (-2,)),
        ("kernel", {"kernel": (64, 32)}, (-2,)),
        ("kernel", {"kernel": (64,)}, (-1,)),
        ("layers/dense/kernel", {"layers/dense/kernel": (12, 64, 32)}, (-2,)),
        ("layers/experts/kernel", {"layers/experts/kernel": (12, 8, 64, 32)}, (-2,)),
        ("qkv/kernel", {"qkv/kernel": (64, 3, 4, 16)}, (-2,)),
        ("linear/w", {"linear/w": (64, 32)}, (-2,)),
        ("linear/weight", {"linear/weight": (32, 64)}, (-1,)),
        ("embed/embedding", {"embed/embedding": (256, 64)}, (-1,)),
        ("attn/query/kernel", ATTENTION, (-3,)),
        ("attn/out/kernel", ATTENTION, (-3, -2)),
        ("attn/query/kernel", STACKED, (-3,)),
        ("attn/out/kernel", STACKED, (-3, -2)),
        ("attn/query/kernel", FLAT_STACK, (-2,)),
        ("attn/out/kernel", FLAT_STACK, (-2,)),
        ("out/kernel", {"out/kernel": (3, 64, 32)}, (-2,)),
        ("out/kernel", {path.removeprefix("attn/"): shape for path, shape in ATTENTION.items()}, (-3, -2)),
        ("Conv_0/kernel", {"Conv_0/kernel": (3, 64, 32)}, (-3, -2)),
        ("Conv_0/kernel", {"Conv_0/kernel": (3, 5, 64, 32)}, (-4, -3, -2)),
        ("depthwise_conv/kernel", {"depthwise_conv/kernel": (3, 3, 3, 64, 32)}, (-5, -4, -3, -2)),
        ("patches/kernel", {"patches/kernel": (16, 16, 3, 64)}, (-4, -3, -2)),
        ("experts/kernel", {"experts/kernel": (32, 32, 64, 64)}, (-2,)),
    ],
)
def test_conventions(path, shapes, expected):
    assert conventional_axis(path, shapes[path], shapes) == expected
