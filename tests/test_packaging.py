"""What makes a fresh machine work: the pinned versions, the search for a Python, the third-party models."""

import importlib.metadata
import os
import pathlib
import re
import subprocess
import tomllib

import jax
import jax.numpy as jnp
import pytest
from packaging.requirements import Requirement

ROOT = pathlib.Path(__file__).parent.parent
FIND_PYTHON = ROOT / "scripts" / "find_python.sh"


def pins(path: pathlib.Path) -> dict[str, str]:
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    return {normalized(name): version for name, _, version in (line.partition("==") for line in lines)}


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def requirements() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = {name: lines for name, lines in project["optional-dependencies"].items() if name != "cuda"}
    return [Requirement(line) for lines in [project["dependencies"], *extras.values()] for line in lines]


@pytest.mark.parametrize("requirement", requirements(), ids=str)
def test_constraints_pin_a_version_that_pyproject_accepts(requirement):
    assert requirement.specifier.contains(pins(ROOT / "constraints.txt")[normalized(requirement.name)])


@pytest.mark.parametrize("name", ["constraints.txt", "tests/third_party.txt"])
def test_this_environment_has_the_pinned_versions(name):
    installed = {normalized(d.metadata["Name"]): d.version for d in importlib.metadata.distributions()}
    pinned = pins(ROOT / name)
    assert pinned
    assert {key: installed[key] for key in pinned if key in installed} == {
        key: version for key, version in pinned.items() if key in installed
    }


def find_python(path: pathlib.Path, home: pathlib.Path, **env: str) -> subprocess.CompletedProcess:
    """Run the script on a PATH that holds only `path` and what the script itself calls."""
    for tool in ("cat", "sh"):
        (path / tool).symlink_to(f"/bin/{tool}")
    env = {"PATH": str(path), "HOME": str(home), **env}
    return subprocess.run(["/bin/sh", FIND_PYTHON], env=env, capture_output=True, text=True, check=False)


def fake_python(path: pathlib.Path, *, works: bool) -> pathlib.Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\nexit {0 if works else 1}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def empty_machine(tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "home").mkdir()
    return tmp_path / "bin", tmp_path / "home"


def test_find_python_names_all_it_looked_for(empty_machine):
    found = find_python(*empty_machine)
    assert found.returncode == 1
    assert not found.stdout
    for name in ("python3.12", "python3.13", "python3.14", "python3 ", str(empty_machine[1]), "PATH"):
        assert name in found.stderr


def test_find_python_runs_what_it_finds(empty_machine):
    """An old python3 and a shim that fails are passed over for a later candidate that works."""
    path, home = empty_machine
    fake_python(path / "python3.12", works=False)
    fake_python(path / "python3", works=False)
    good = fake_python(path / "python3.13", works=True)
    assert find_python(path, home).stdout.strip() == str(good)


@pytest.mark.parametrize("root", ["PYENV_ROOT", "HOME"])
def test_find_python_looks_in_pyenv(empty_machine, root):
    path, home = empty_machine
    pyenv = home / ("elsewhere" if root == "PYENV_ROOT" else ".pyenv")
    fake_python(pyenv / "versions" / "3.12.9" / "bin" / "python", works=False)
    good = fake_python(pyenv / "versions" / "3.13.1" / "bin" / "python", works=True)
    env = {"PYENV_ROOT": str(pyenv)} if root == "PYENV_ROOT" else {}
    assert find_python(path, home, **env).stdout.strip() == str(good)


@pytest.mark.skipif(os.environ["JAX_PLATFORMS"] != "cpu", reason="the suite was asked to run elsewhere")
def test_suite_runs_on_the_cpu():
    assert jax.default_backend() == "cpu"


@pytest.mark.usefixtures("lenient_jax")
def test_gemma_runs(gemma):
    config = gemma.nn.config.TransformerConfig(
        num_embed=32,
        embed_dim=16,
        hidden_dim=32,
        num_heads=2,
        head_dim=8,
        num_kv_heads=1,
        final_logit_softcap=None,
        use_post_attn_norm=True,
        use_post_ffw_norm=True,
        attention_types=(gemma.nn.AttentionType.GLOBAL,),
    )
    model = gemma.nn.Transformer(config=config)
    tokens = jnp.ones((1, 4), jnp.int32)
    params = model.init(jax.random.key(0), tokens)
    assert model.apply(params, tokens).logits.shape == (1, 4, 32)
