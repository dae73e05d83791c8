"""Orbax checkpoints that lie: a named error, or what the files really hold."""

import json
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxquant._slices
import jaxquant._sources
import jaxquant.conversion
from jaxquant import QuantConfig, load, quantize, save
from jaxquant._sources import open_source, read_leaf
from jaxquant.conversion import convert
from jaxquant.inspection import diff
from jaxquant.storage._chunks import Chunks, open_chunks

TREE = {"layer": {"kernel": np.arange(24, dtype=np.float32).reshape(4, 6)}, "list": [np.ones(2, np.float16), {}]}
LISTED = {"layer/kernel": TREE["layer"]["kernel"], "list/0": TREE["list"][0]}


def save_orbax(folder, *, use_ocdbt=True, use_zarr3=False):
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=use_ocdbt, use_zarr3=use_zarr3)
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(folder, args=ocp.args.PyTreeSave(TREE))


def read_all(folder):
    source = open_source(folder)
    return {leaf.path: read_leaf(source, number) for number, leaf in enumerate(source.leaves)}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("orbax") / "src"
    save_orbax(folder)
    read = read_all(folder)
    assert read.keys() == LISTED.keys()
    return folder


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # orbax leaves its other reads behind
@pytest.mark.parametrize("file", ["_METADATA", "manifest.ocdbt"])
@settings(max_examples=15)
@given(data=st.data())
def test_flipped_bytes_of_metadata(checkpoint, file, data):
    folder = checkpoint.with_name("altered")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(checkpoint, folder)
    content = bytearray((folder / file).read_bytes())
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=4)):
        content[place] = data.draw(st.integers(0, 255) | st.sampled_from(list(b'"{}[]:,0129ntf')))
    del content[data.draw(st.just(len(content)) | st.integers(0, len(content))) :]
    (folder / file).write_bytes(content)
    try:
        read = read_all(folder)
    except (ValueError, FileNotFoundError) as error:
        message = str(error)
    else:  # what was hit means nothing, or is the name of a parameter
        assert all(any(np.array_equal(array, held) for held in LISTED.values()) for array in read.values())
        return
    assert str(folder) in message


@pytest.mark.parametrize("broken", ['{"tree_metadata": {"a": {}}}', "{}", "[]", "[" * 100_000, "null", ""])
def test_metadata_of_another_form(checkpoint, broken):
    folder = checkpoint.with_name("broken")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(checkpoint, folder)
    (folder / "_METADATA").write_text(broken)
    with pytest.raises(ValueError, match=str(folder)):
        read_all(folder)


def test_a_claimed_shape_takes_no_memory(tmp_path):
    save_orbax(tmp_path / "src", use_ocdbt=False)
    zarray = tmp_path / "src" / "layer.kernel" / ".zarray"
    zarray.write_text(json.dumps(json.loads(zarray.read_text()) | {"shape": [2**40, 6]}))
    with pytest.raises(ValueError, match="claims arrays of 26388279066628 bytes"):
        open_source(tmp_path / "src")


@pytest.mark.parametrize("form", ["{}", "../{}"])
def test_names_cannot_lead_out_of_the_folder(tmp_path, form):
    save_orbax(tmp_path / "src", use_ocdbt=False)
    shutil.copytree(tmp_path / "src" / "layer.kernel", tmp_path / "other.kernel")
    outside = form.format("other") if ".." in form else str(tmp_path / "other")
    metadata = tmp_path / "src" / "_METADATA"
    metadata.write_text(metadata.read_text().replace('"layer"', f'"{outside}"').replace("'layer'", f"'{outside}'"))
    with pytest.raises(ValueError, match=r"would lie outside|finds no tree"):
        read_all(tmp_path / "src")


@pytest.fixture
def large(monkeypatch):
    monkeypatch.setattr(jaxquant._sources, "AHEAD_BYTES", 16)


@pytest.mark.parametrize(
    ("use_ocdbt", "use_zarr3"), [(True, False), (False, False), (True, True)], ids=["ocdbt", "folders", "zarr3"]
)
def test_large_arrays_are_read_by_slices(tmp_path, large, use_ocdbt, use_zarr3):
    save_orbax(tmp_path / "a folder, 100%", use_ocdbt=use_ocdbt, use_zarr3=use_zarr3)
    source = open_source(tmp_path / "a folder, 100%")
    number = [leaf.path for leaf in source.leaves].index("layer/kernel")
    opened = read_leaf(source, number, opened=True)
    assert isinstance(opened, Chunks)
    assert opened.shape == (4, 6)
    for place in [(..., slice(0, 2)), (..., slice(2, 6)), 3]:
        np.testing.assert_array_equal(opened[place], TREE["layer"]["kernel"][place])
        assert opened[place].dtype == np.float32
    assert isinstance(read_leaf(source, 1 - number, opened=True), np.ndarray)  # of four bytes


def test_a_sliced_array_that_is_not_what_the_metadata_say(tmp_path, large):
    save_orbax(tmp_path / "src", use_ocdbt=False)
    opened = open_chunks(tmp_path / "src", "layer.kernel", (4, 6), np.dtype(np.float32))
    (tmp_path / "src" / "layer.kernel" / "0.0").write_bytes(b"not compressed")
    with pytest.raises(ValueError, match=r"src: 'layer.kernel': tensorstore cannot read it"):
        opened[..., :2]
    with pytest.raises(
        ValueError, match=r"'layer.kernel' is float32\[4, 6\] in its files, float32\[4, 7\] in the meta"
    ):
        open_chunks(tmp_path / "src", "layer.kernel", (4, 7), np.dtype(np.float32))
    for name in ["layer.bias", "../src/layer.kernel"]:
        with pytest.raises(ValueError, match=f"tensorstore cannot open '{name}'"):
            open_chunks(tmp_path / "src", name, (4, 6), np.dtype(np.float32))


@pytest.mark.parametrize("kind", ["orbax", "ours"])
def test_a_large_weight_is_quantized_without_being_whole_in_memory(tmp_path, large, monkeypatch, rng, kind):
    tree = {"layer": {"kernel": rng.normal(size=(256, 24)).astype(np.float32)}}
    if kind == "ours":
        save(tmp_path / "src", tree)
    else:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / "src", tree)
    monkeypatch.setattr(jaxquant._slices, "SLICE_BYTES", 256 * 4 * 7)  # four slices
    monkeypatch.setattr(jaxquant._sources._Ahead, "take", lambda *_: pytest.fail("read whole"))
    config = QuantConfig.preset("w4a16")
    convert(tmp_path / "src", tmp_path / "out", config)
    got, want = (jax.tree.leaves(params) for params in (load(tmp_path / "out"), quantize(tree, config)))
    for left, right in zip(got, want, strict=True):
        np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize("kind", ["orbax", "ours"])
def test_large_arrays_that_are_kept_are_not_whole_in_memory(tmp_path, large, monkeypatch, rng, kind):
    """Nor are codes; what is stored as bytes (float8) has its dtype again."""
    tree = {"kernel": rng.normal(size=(33, 5)).astype(np.float32), "vector": np.arange(77, dtype=np.int16)}
    if kind == "ours":
        tree |= quantize({"codes": rng.normal(size=(64, 24)).astype(np.float32)}, QuantConfig.preset("fp8"))
        save(tmp_path / "src", tree)
    else:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / "src", tree)
    monkeypatch.setattr(jaxquant._sources._Ahead, "take", lambda *_: pytest.fail("read whole"))
    convert(tmp_path / "src", tmp_path / "out")
    for left, right in zip(jax.tree.leaves(load(tmp_path / "out")), jax.tree.leaves(tree), strict=True):
        assert left.dtype == right.dtype
        np.testing.assert_array_equal(left, right)
    assert all(row.sqnr == np.inf for row in diff(tmp_path / "src", tmp_path / "out"))


def test_leaves_that_are_no_arrays_are_named(tmp_path):
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        checkpointer.save(tmp_path / "src", args=ocp.args.PyTreeSave({"w": np.ones(3), "name": "model"}))
    with pytest.raises(ValueError, match=r"src: 'name' is no array but StringMetadata"):
        open_source(tmp_path / "src")
