"""Check an installed jaxquant from outside its source tree, given as the argument, against that tree."""

import importlib.metadata
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np

import jaxquant as jq
import pallas_kernels

TREE = pathlib.Path(sys.argv[1]).resolve()


def check_files() -> None:
    """Every file that git tracks in the two packages is in the wheel, and nothing else is."""
    command = ["git", "-C", str(TREE), "ls-files", "jaxquant", "pallas_kernels"]
    tracked = set(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
    site = pathlib.Path(jq.__file__).resolve().parent.parent
    if site == TREE:
        sys.exit("jaxquant was imported from the source tree, not from the wheel")
    installed = {
        path.relative_to(site).as_posix()
        for package in ("jaxquant", "pallas_kernels")
        for path in (site / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    if tracked != installed:
        sys.exit(f"missing from the wheel: {sorted(tracked - installed)}; not tracked: {sorted(installed - tracked)}")
    for package in (jq, pallas_kernels):
        if not pathlib.Path(package.__file__).with_name("py.typed").exists():
            sys.exit(f"{package.__name__} has no py.typed")


def check_quantize() -> None:
    """One matrix goes through quantize, quantized and dequantize."""
    rng = np.random.default_rng()
    params = {"dense": {"kernel": jnp.asarray(rng.standard_normal((256, 64)), jnp.float32)}}
    x = jnp.asarray(rng.standard_normal((3, 256)), jnp.float32)
    qparams = jq.quantize(params, jq.QuantConfig.preset("w8a16"))
    y = jax.jit(jq.quantized(lambda params, x: x @ params["dense"]["kernel"]))(qparams, x)
    restored = jq.dequantize(qparams)["dense"]["kernel"]
    # A channel's codes are at most half a step from its weights, and a step is 2 absmax / 255.
    bound = jnp.max(jnp.abs(params["dense"]["kernel"]), axis=0) / 255 * 1.001
    if not bool(jnp.all(jnp.abs(restored - params["dense"]["kernel"]) <= bound)):
        sys.exit("w8a16 is off by more than half a step")
    np.testing.assert_allclose(y, x @ restored, rtol=1e-4, atol=1e-3)


def check_command() -> None:
    """The command `jaxquant` is there."""
    command = [pathlib.Path(sys.executable).with_name("jaxquant"), "--help"]
    if "convert" not in subprocess.run(command, check=True, capture_output=True, text=True).stdout:
        sys.exit("jaxquant --help does not list convert")


check_files()
check_quantize()
check_command()
print(f"jaxquant {importlib.metadata.version('jaxquant')} works from its wheel")
