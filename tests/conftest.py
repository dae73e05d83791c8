"""What every test shares: strict JAX, one seeded generator a test, and the third-party models."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Every warpgroup of an interpreted kernel holds a thread of XLA's pool while it waits at a barrier: as many as there
# are cores can all wait for one that has none.
os.environ.setdefault("PJRT_NPROC", "16")

import secrets
import sys
import types

import hypothesis
import jax
import numpy as np
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# The first call of each shape compiles, so a deadline an example would only measure XLA. Examples are new in CI too.
hypothesis.settings.register_profile(
    "jax",
    deadline=None,
    derandomize=False,
    print_blob=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("jax")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, default=None, help="seed of the rng fixture (default: a new one each test)")


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """A generator with a fresh seed, which a failing test shows under 'Captured stdout setup'."""
    seed = request.config.getoption("--seed")
    if seed is None:
        seed = secrets.randbits(32)
    print(f"rng: repeat with --seed {seed}")
    return np.random.default_rng(seed)


@pytest.fixture
def lenient_jax():
    """JAX's own defaults, for models by others that promote dtypes and ranks implicitly."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(scope="session")
def gemma() -> types.ModuleType:
    """The module `gemma.gm`, imported without TensorFlow (tests/third_party.txt says why)."""
    tensorflow = types.ModuleType("tensorflow")
    tensorflow.Tensor = type("Tensor", (), {})
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "tensorflow", tensorflow)
        from gemma import gm

        # gm imports lazily: these are the names that reach tensorflow.
        _ = gm.nn.Transformer, gm.nn.config.TransformerConfig, gm.nn.AttentionType
    return gm
