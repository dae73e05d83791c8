"""Weights spread over several devices give the products that one device gives."""

import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]
DEVICES = 4

PROGRAM = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
import jaxquant as jq

mesh = jax.make_mesh((4,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
rng = np.random.default_rng()
floats = {"up": rng.uniform(-1, 1, (64, 128)), "down": rng.uniform(-1, 1, (128, 64))}
q = jq.quantize(floats, jq.QuantConfig.preset("w4a16", group_size=16))
x = jnp.asarray(rng.uniform(-1, 1, (5, 64)), jnp.float32)

def mlp(p, x):
    return jnp.tanh(x @ p["up"]) @ p["down"]

def mapped(p, x):
    def local(up, down, x):
        return jax.lax.psum(mlp({"up": up, "down": down}, x), "model")
    specs = (P(None, "model"), P("model", None), P())
    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P())(p["up"], p["down"], x)

def spread(a):
    return jax.device_put(a, NamedSharding(mesh, P(*[None] * (a.ndim - 1), "model")))

want = mlp(jq.dequantize(q), x)
run, run_mapped = (jax.jit(jq.quantized(fn, on_dense="error")) for fn in (mlp, mapped))
assert jq.explain(mapped, q, x).products == 2
for got in (run(jax.tree.map(spread, q), x), run_mapped(q, x)):
    # sums of 128 terms in another order, twice: eps sqrt(128) of the largest each, times 8
    assert jnp.max(jnp.abs(got - want)) <= 8 * 2 * 2.0**-23 * 128**0.5 * jnp.max(jnp.abs(want))
print(len(jax.devices()), "devices")
"""


def test_shard_map_and_automatic_partitioning_over_virtual_devices():
    env = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES}", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=env, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{DEVICES} devices"
