"""Checkpoints: exact round trips with no template, placement, and every kind of damage named."""

import collections
import json
import pathlib
import signal
import subprocess
import sys
import textwrap
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from jaxquant.arrays._outliers import OutlierArray
from jaxquant.arrays._qarray import QArray, dequantize_array, from_codes, quantize_array
from jaxquant.arrays._qtypes import QTYPES
from jaxquant.arrays._spec import PRESETS, PerTensor, QuantConfig, QuantSpec, Rule, TensorSpec
from jaxquant.checkpoint import load, save
from jaxquant.storage import _store
from jaxquant.storage._manifest import read_manifest


def bits(leaf):
    """The bytes of an array, so that NaN and -0.0 compare."""
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.asarray(leaf).tobytes()


def assert_same(restored, saved):
    """The same tree types, static fields, dtypes, shapes and bits."""
    assert jax.tree.structure(restored) == jax.tree.structure(saved)
    for got, want in zip(jax.tree.leaves(restored), jax.tree.leaves(saved), strict=True):
        if isinstance(want, bool | int | float):
            assert type(got) is type(want)
            assert got == want
            continue
        assert got.dtype == want.dtype
        assert got.shape == want.shape
        assert bits(got) == bits(want)


def round_trip(tmp_path, tree, **kwargs):
    save(tmp_path / "model", tree, **kwargs)
    return load(tmp_path / "model")


def random(*shape, dtype=jnp.float32):
    seed = int.from_bytes(np.random.default_rng().bytes(4), "little")
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


def test_containers_and_keys_keep_their_types(tmp_path):
    tree = {
        "dict": {1: random(2), 10: {}, 2: ()},
        "dotted.name/slash": [random(1), (None, random(3)), []],
        "frozen": nn.FrozenDict({"a": {"b": random(2, 2)}}),
        "ordered": collections.OrderedDict([("z", random(1)), ("a", random(1))]),
        "flat": {("block", 0, "kernel"): random(2), ("block", 1, "kernel"): random(2)},
        "numbers": (3, 2.5, True, float("inf"), -0.0),
        "boxed": nn.Partitioned(random(2, 3), ("data", None)),
        "logical": nn.LogicallyPartitioned(random(2, 3), ("embed", ("a", "b")), rules=(("embed", "model"),)),
    }
    restored = round_trip(tmp_path, tree)
    assert_same(restored, tree)
    assert list(restored["ordered"]) == ["z", "a"]
    assert [type(key) for key in restored["dict"]] == [int, int, int]


def test_keys_that_jax_cannot_sort_are_restored_too(tmp_path):
    restored = round_trip(tmp_path, {"0": random(1), 0: random(2), True: None})
    assert {(type(key), key) for key in restored} == {(str, "0"), (int, 0), (bool, True)}
    assert restored[0].shape == (2,)


DTYPES = (
    *("bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu", "float4_e2m1fn"),
    *("int2", "int4", "uint4", "int8", "uint16", "bool", "complex64"),
)


def test_dtypes_keep_every_bit(tmp_path):
    small = np.random.default_rng().integers(0, 2, (3, 5))
    tree = {dtype: jnp.asarray(small.astype(jnp.dtype(dtype))) for dtype in DTYPES}
    assert_same(round_trip(tmp_path, tree), tree)


def test_not_a_number_negative_zero_empty_scalar_and_wide_arrays(tmp_path):
    special = np.array([np.nan, -np.nan, -0.0, np.inf, 1e-42], np.float32)
    wide = np.array([2**40 + 1, -1], np.int64)
    tree = {"special": special, "empty": np.zeros((0, 4), np.float32), "scalar": np.float32(2), "wide": wide}
    restored = round_trip(tmp_path, tree)
    assert_same(restored, tree)
    assert isinstance(restored["wide"], np.ndarray), "JAX without x64 would narrow it"
    assert isinstance(restored["special"], jax.Array)


def test_memory_mapped_strided_and_big_endian_arrays(tmp_path):
    values = np.random.default_rng().normal(size=(6, 8)).astype(np.float32)
    values.tofile(tmp_path / "raw")
    tree = {"mapped": np.memmap(tmp_path / "raw", np.float32, "r", shape=(6, 8)), "strided": values.T[::2]}
    assert_same(round_trip(tmp_path, tree | {"big": values.astype(">f4")}), tree | {"big": values})


def random_qarray(qtype):
    """A QArray of random codes of any format; its numbers need not make sense."""
    bits, rng = QTYPES[qtype].bits, np.random.default_rng()
    rows = 48 * bits // 8 if bits < 8 else 48
    codes = rng.integers(0, 127, (2, rows, 5)).astype(np.uint8 if bits < 8 else QTYPES[qtype].code_dtype)
    scale = jnp.asarray(rng.normal(size=(2, 4, 5)), jnp.bfloat16)
    zero_point = rng.integers(0, 9, scale.shape, np.uint8) if QTYPES[qtype].kind == "uint" else None
    leaves = (jnp.asarray(codes), scale, zero_point, None, None, None, None)
    return QArray(*leaves, qtype, (-2,), (48, 5), 48, jnp.dtype("bfloat16"), None)


def test_every_format_of_qarray(tmp_path):
    tree = {qtype: random_qarray(qtype) for qtype in QTYPES}
    assert_same(round_trip(tmp_path, tree), tree)


def test_every_field_of_a_qarray(tmp_path):
    static = QuantSpec(TensorSpec("uint8"), TensorSpec("uint8", PerTensor(), "minmax", static=True))
    q = from_codes(
        jnp.arange(24, dtype=jnp.uint8).reshape(8, 3),
        random(1, 3),
        jnp.full((1, 3), 7, jnp.uint8),
        static,
        (-2,),
        (7, 3),
        jnp.bfloat16,
        pre_scale=random(7),
        act_scale=random(),
        act_zero_point=jnp.uint8(3),
        perm=jnp.arange(7, dtype=jnp.int32)[::-1],
    )
    assert_same(round_trip(tmp_path, (q,)), (q,))
    restored = load(tmp_path / "model")[0]
    assert restored.activation == static.activation
    assert restored.dtype == jnp.bfloat16


def test_an_outlier_array(tmp_path):
    index = jnp.asarray([[3], [9]], jnp.int32)
    w = OutlierArray(random_qarray("int8"), random(2, 2, 5, dtype=jnp.bfloat16), index)
    assert_same(round_trip(tmp_path, {"w": w}), {"w": w})


class Model(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(16, 16, rngs=rngs) for _ in range(2)])
        self.norm = nnx.BatchNorm(16, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        for layer in self.layers:
            x = self.norm(layer(x))
        return x


def test_nnx_state_with_quantized_kernels_rngs_and_metadata(tmp_path):
    model = Model(nnx.Rngs(int(np.random.default_rng().integers(100))))
    graph, state = nnx.split(model)
    restored = round_trip(tmp_path, state)
    assert_same(restored, state)
    x = random(3, 16)
    np.testing.assert_array_equal(nnx.merge(graph, restored)(x), model(x))

    kernel = state["layers"][0]["kernel"]
    metadata = kernel.get_metadata() | {"out_sharding": PartitionSpec(None, "model"), "note": {"of": [1, "x"]}}
    quantized = quantize_array(kernel.get_value(), PRESETS["w8a16"])
    state["layers"][0]["kernel"] = nnx.Param.from_metadata(quantized, metadata)
    save(tmp_path / "quantized", state)
    restored = load(tmp_path / "quantized")
    assert_same(restored, state)
    assert restored["layers"][0]["kernel"].get_metadata() == metadata
    assert {record.path for record in read_manifest(tmp_path / "quantized").records} >= {"layers/0/kernel/qvalue"}


class Counter(nnx.Variable):
    pass


def test_variable_types_of_the_users_own_must_have_a_name(tmp_path):
    state = nnx.State({"count": Counter(jnp.zeros(2))})
    with pytest.raises(TypeError, match=r"count is a Counter.*register_variable_name"):
        save(tmp_path / "model", state)
    nnx.register_variable_name("test_checkpoint_counter", Counter)
    try:
        assert_same(round_trip(tmp_path, state), state)
    finally:
        del nnx.variablelib.VariableTypeCache["test_checkpoint_counter"]
    with pytest.raises(ValueError, match=r"count.*no variable type 'test_checkpoint_counter'"):
        load(tmp_path / "model")


def test_random_keys_keep_their_generator(tmp_path):
    keys = {"a": jax.random.split(jax.random.key(1, impl="rbg"), 3), "b": jax.random.key(2)}
    assert_same(round_trip(tmp_path, keys), keys)


def test_the_config_is_kept(tmp_path):
    config = QuantConfig.preset("w4a8", group_size=64, rules=[Rule(r"a/.*", None, -1)])
    save(tmp_path / "model", {}, config=config)
    assert read_manifest(tmp_path / "model").config == config
    assert load(tmp_path / "model") == {}


def test_several_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(_store, "SHARD_BYTES", 64)
    tree = [np.random.default_rng().normal(size=4 + n).astype(np.float32) for n in range(12)]
    assert_same(round_trip(tmp_path, tree), tree)
    assert len(read_manifest(tmp_path / "model").shards) == 12 // 2 + 3  # pairs fit up to 4 + 5 ... 7 + 8 floats


class Point(collections.namedtuple("Point", "x y")):
    pass


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"a": [{"p": Point(1, 2)}]}, r"a/0/p is a .*Point; accepted are arrays"),
        ({"a": object()}, r"a is a builtins.object; accepted"),
        ({"a": "text"}, r"a is a builtins.str"),
        ({"a": jax.ShapeDtypeStruct((2,), jnp.float32)}, r"a is a .*ShapeDtypeStruct"),
        ({"a": {2.5: jnp.ones(1)}}, r"a has a key 2.5 of type float"),
        ({"a": np.array(["x"])}, r"a is an array of dtype <U1"),
        ({"a": np.array([None])}, r"a is an array of dtype object"),
        ({"a": nn.Partitioned(jnp.ones(1), ("x",), Mesh(np.array(jax.devices()), "x"))}, r"a: .*Mesh.*set their mesh"),
    ],
)
def test_what_cannot_be_saved_is_named_and_leaves_nothing(tmp_path, tree, message):
    with pytest.raises(TypeError, match=message):
        save(tmp_path / "model", tree)
    assert list(tmp_path.iterdir()) == []


def test_overwriting_is_asked_for_and_only_of_checkpoints(tmp_path):
    save(tmp_path / "model", [random(3)])
    with pytest.raises(FileExistsError, match="overwrite=True"):
        save(tmp_path / "model", [])
    save(tmp_path / "model", new := [random(2)], overwrite=True)
    assert_same(load(tmp_path / "model"), new)
    assert len(list((tmp_path / "model").iterdir())) == 2, "the old arrays are gone"
    (tmp_path / "diary").mkdir()
    (tmp_path / "diary" / "page").write_text("dear")
    with pytest.raises(FileExistsError, match="no checkpoint"):
        save(tmp_path / "diary", [], overwrite=True)
    assert (tmp_path / "diary" / "page").read_text() == "dear"


def test_placement(tmp_path, run_python):
    script = """
        import jax, jax.numpy as jnp, sys
        from jax.sharding import Mesh, NamedSharding, PartitionSpec as P, SingleDeviceSharding
        from jaxquant.arrays._qarray import quantize_array
        from jaxquant.arrays._spec import PRESETS
        from jaxquant.checkpoint import load, save
        mesh = Mesh(jax.devices(), "x")
        columns, whole = NamedSharding(mesh, P(None, "x")), NamedSharding(mesh, P())
        tree = {"q": quantize_array(jnp.ones((256, 8)), PRESETS["w4a16"]), "n": 3}
        tree["b"] = {"f8": jnp.ones(8, "float8_e4m3fn")}
        tree["k"] = jax.device_put(jnp.arange(16.0).reshape(2, 8), columns)
        save(sys.argv[1], tree)
        got = load(sys.argv[1], sharding=lambda path, leaf: columns if len(leaf.shape) == 2 else None)
        assert got["q"].qvalue.sharding == columns and got["q"].scale.sharding == columns
        assert jax.tree.all(jax.tree.map(lambda a, b: (jnp.asarray(a) == jnp.asarray(b)).all(), got, tree))
        got = load(sys.argv[1], sharding={"q": columns, "b": None, "n": None, "k": whole})
        assert got["q"].scale.sharding == columns and got["k"].sharding == whole
        assert got["b"]["f8"].devices() == {jax.devices()[0]}
        last = SingleDeviceSharding(jax.devices()[3])
        leaves = jax.tree.leaves(load(sys.argv[1], sharding=last))
        assert all(leaf.devices() == {jax.devices()[3]} for leaf in leaves if type(leaf) is not int)
        try:
            load(sys.argv[1], sharding=NamedSharding(mesh, P("x")))
        except ValueError as error:
            assert "k [2, 8]: cannot be placed" in str(error) or "q/scale" in str(error), error
        else:
            raise SystemExit("2 rows over 4 devices?")
    """
    flags = "--xla_force_host_platform_device_count=4"
    run_python(script, tmp_path / "model", XLA_FLAGS=flags).check_returncode()


KILL_AT_EVERY_STEP = """
    import os, pathlib, shutil, sys
    import numpy as np
    from jaxquant.checkpoint import load, save

    def tree(value):
        return {"w": np.full(1000, value), "v": np.full(10, value)}

    def in_child(work):
        pid = os.fork()
        if pid == 0:
            try:
                os._exit(work())
            finally:
                os._exit(99)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def die_after(steps):
        def dying(call):
            def step(*args, **kwargs):
                nonlocal steps
                steps -= 1
                if steps < 0:
                    os._exit(9)
                return call(*args, **kwargs)
            return step
        for name in ("rename", "replace", "fsync", "mkdir", "rmdir", "unlink"):
            setattr(os, name, dying(getattr(os, name)))

    def overwrite(path, steps):
        die_after(steps)
        save(path, tree(2.0), overwrite=True)
        return 0

    def read(path):
        values = {value for leaf in load(path).values() for value in np.asarray(leaf).tolist()}
        return int(values.pop()) if len(values) == 1 else 98

    def report(path, code):
        found = read(path)
        save(path, tree(3.0), overwrite=True)
        print(code, found, len(list(path.iterdir())), read(path), flush=True)
        return 0

    old = pathlib.Path(sys.argv[1], "old")
    assert in_child(lambda: save(old, tree(1.0)) or 0) == 0
    for steps in range(0, 80, 2):
        path = pathlib.Path(sys.argv[1], str(steps))
        shutil.copytree(old, path)
        code = in_child(lambda: overwrite(path, steps))
        assert in_child(lambda: report(path, code)) == 0
        if code == 0:
            break
"""


def test_a_save_killed_at_any_step_leaves_the_old_or_the_new_checkpoint(tmp_path, run_python):
    """The process dies before its n-th change to the file system, for every second n up to the last."""
    done = run_python(KILL_AT_EVERY_STEP, tmp_path)
    done.check_returncode()
    runs = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    assert [code for code, *_ in runs] == [9] * (len(runs) - 1) + [0]
    found = [value for _, value, _, _ in runs]
    assert set(found) == {1, 2}, "a mixture or an unreadable checkpoint"
    assert sorted(found) == found
    assert {files for _, _, files, _ in runs} == {2}, "the next save clears what the killed one left"
    assert {value for *_, value in runs} == {3}


def test_a_first_save_killed_from_outside_leaves_nothing_or_everything(tmp_path):
    script = """
        import sys, numpy as np
        from jaxquant.checkpoint import save
        print("ready", flush=True)
        save(sys.argv[1], [np.full(4_000_000, 3.0) for _ in range(8)])
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "model")]
    root = str(pathlib.Path(__file__).parents[2])
    env = {"PATH": "", "PYTHONPATH": root, "JAX_PLATFORMS": "cpu"}
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        time.sleep(np.random.default_rng().uniform(0.02, 0.3))
        process.send_signal(signal.SIGKILL)
    if (tmp_path / "model").exists():
        assert all((np.asarray(leaf) == 3.0).all() for leaf in load(tmp_path / "model"))
    else:
        with pytest.raises(FileNotFoundError, match="no such checkpoint"):
            load(tmp_path / "model")


@pytest.fixture
def saved(tmp_path):
    save(tmp_path / "model", {"w": quantize_array(random(256, 8), PRESETS["w4a16"]), "b": random(8)})
    return tmp_path / "model"


def data_files(saved):
    return [file for file in saved.rglob("*") if file.is_file() and file.name != "manifest.json"]


def test_truncated_altered_and_missing_files(saved):
    for file in data_files(saved):
        content = file.read_bytes()
        if not content:
            continue
        file.write_bytes(content[:-1])
        with pytest.raises(ValueError, match=r"truncated or altered.*bytes"):
            load(saved)
        place = np.random.default_rng().integers(len(content))
        file.write_bytes(content[:place] + bytes([content[place] ^ 16]) + content[place + 1 :])
        with pytest.raises(ValueError, match=r"truncated or altered.*checksum"):
            load(saved)
        file.unlink()
        with pytest.raises(ValueError, match=r"truncated or altered.*missing"):
            load(saved)
        file.write_bytes(content)
    load(saved)


def test_a_manifest_cut_short_anywhere(saved):
    manifest = saved / "manifest.json"
    content = manifest.read_bytes()
    for cut in [0, 1, len(content) - 1, *np.random.default_rng().integers(2, len(content), 20)]:
        manifest.write_bytes(content[:cut])
        with pytest.raises(ValueError, match=r"no readable JSON"):
            load(saved)


def edit(saved, change):
    manifest = saved / "manifest.json"
    content = json.loads(manifest.read_text())
    change(content)
    manifest.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(format="other"), "written by another program"),
        (lambda m: m.update(format_version=2, library_version="9.9"), r"format version 2 by jaxquant 9.9.*upgrade"),
        (lambda m: m.update(colour="red"), r"unknown fields \['colour'\]"),
        (lambda m: m.pop("arrays"), "malformed.*arrays"),
        (lambda m: m["tree"]["dict"][0][1]["QArray"][1].update(flavour=1), r"w.*no field flavour.*another version"),
        (lambda m: m["tree"]["dict"][0][1]["QArray"][1].update(qtype="int3"), r"int3.*needs codes"),
        (lambda m: m["tree"]["dict"][0][1]["QArray"][1].update(qtype="int99"), r"int99"),
        (lambda m: m["tree"]["dict"][0][1].update(more=1), r"w.*one key"),
        (lambda m: m.update(tree={"pickle": "gASV"}), r"unknown kind 'pickle'"),
        (lambda m: m.update(tree={"array": 99}), r"malformed 'array'"),
        (lambda m: m["arrays"][0].update(shape=[-1]), "no array has the shape"),
        (lambda m: m["arrays"][0].update(shape=[10**15]), "the manifest says"),
        (lambda m: m["arrays"][0].update(dtype="O"), "no array has the dtype 'O'"),
        (lambda m: m["arrays"][0].update(shard=None), "contradict"),
        (lambda m: m["arrays"][0].update(shard="arrays-00"), "lists no shard 'arrays-00'"),
        (lambda m: m["shards"].update({"../../etc": m["shards"].popitem()[1]}), "lists no shard"),
        (lambda m: next(iter(m["shards"].values())).update({"../../../secret": [1, 1]}), "lies outside"),
        (lambda m: next(iter(m["shards"].values())).update({"/etc/passwd": [1, 1]}), "lies outside"),
    ],
)
def test_foreign_newer_and_forged_manifests(saved, change, message):
    edit(saved, change)
    with pytest.raises(ValueError, match=message):
        load(saved)


def test_a_manifest_nested_without_end(saved):
    (saved / "manifest.json").write_text("[" * 1_000_000)
    with pytest.raises(ValueError, match="no readable JSON"):
        load(saved)


def test_folders_that_are_no_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such checkpoint"):
        load(tmp_path / "absent")
    (tmp_path / "other").mkdir()
    with pytest.raises(ValueError, match=r"no manifest.json.*no jaxquant checkpoint"):
        load(tmp_path / "other")


def test_a_restored_tree_computes_the_same(tmp_path):
    """The use of it all: products through a restored QArray equal those before, bit for bit."""
    q = quantize_array(random(128, 16), PRESETS["w4a16-asym"])
    restored = round_trip(tmp_path, {"w": q})["w"]
    assert isinstance(restored, QArray)
    x = random(3, 128)
    product = jax.jit(lambda x, q: x @ dequantize_array(q))
    np.testing.assert_array_equal(product(x, restored), product(x, q))
