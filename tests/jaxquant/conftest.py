"""What several modules share; one that uses `agrees_by_kernel` gives its `tolerance` and `kernel`."""

import pathlib
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq


@pytest.fixture
def activation(rng):
    """Draws a bfloat16 array of a shape."""
    return lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.bfloat16)


@pytest.fixture
def assert_close(tolerance):
    """Asserts that the norm of an error is at most `tolerance` of the norm of what was wanted."""

    def check(got, wanted):
        got, wanted = (np.asarray(a, np.float64) for a in (got, wanted))
        assert got.shape == wanted.shape
        assert np.linalg.norm(got - wanted) <= tolerance * np.linalg.norm(wanted)

    return check


@pytest.fixture
def assert_same():
    """Asserts that two trees are of one structure, and their leaves of one dtype and value."""

    def check(got, wanted):
        assert jax.tree.structure(got) == jax.tree.structure(wanted)
        for (path, leaf), expected in zip(
            jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(wanted), strict=True
        ):
            leaf, expected = np.asarray(leaf), np.asarray(expected)
            assert leaf.dtype == expected.dtype, path
            np.testing.assert_array_equal(leaf, expected, err_msg=str(path))

    return check


@pytest.fixture
def run_python():
    """Runs a script of this tree in a process of its own. Its time is limited lest it hang, not lest it be slow."""

    def run(script, *args, **env):
        command = [sys.executable, "-c", textwrap.dedent(script), *map(str, args)]
        env = {"PATH": "", "PYTHONPATH": str(pathlib.Path(__file__).parents[2]), "JAX_PLATFORMS": "cpu"} | env
        return subprocess.run(command, env=env, timeout=900, check=False, stdout=subprocess.PIPE)

    return run


@pytest.fixture
def implementations():
    """Lists what runs each product of a function, and why not a kernel."""
    return lambda fn, *args: [(row[5], row[6]) for row in jq.explain(fn, *args).rows]


@pytest.fixture
def agrees_by_kernel(kernel, assert_close, implementations):
    """Asserts that a packed weight gives what the plain one gives, by the kernel alone."""
    name, layout = kernel

    def check(fn, q, *args):
        packed = jq.pack_for(q, "h200")
        assert packed.layout == layout
        assert_close(jax.jit(jq.quantized(fn))(packed, *args), jax.jit(jq.quantized(fn))(q, *args))
        assert implementations(fn, packed, *args) == [(name, "")]

    return check
