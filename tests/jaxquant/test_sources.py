"""Orbax checkpoints that lie: a named error, or what the files really hold."""

import json
import shutil

import numpy as np
import orbax.checkpoint as ocp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxquant._sources import open_source, read_leaf

TREE = {"layer": {"kernel": np.arange(24, dtype=np.float32).reshape(4, 6)}, "list": [np.ones(2, np.float16), {}]}
LISTED = {"layer/kernel": TREE["layer"]["kernel"], "list/0": TREE["list"][0]}


def save_orbax(folder, *, use_ocdbt=True):
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=use_ocdbt)) as checkpointer:
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
