"""The layers of the house: imports go down only, and nothing in the tree names the machine it was written on."""

import ast
import pathlib
import re
import subprocess
import sys
import tomllib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
LAYERS = ("pallas_kernels", "jaxquant", "experiments")
DOOR = pathlib.Path("jaxquant/_kernels.py")
# The rooms of jaxquant, each above those it may import from. Modules beside the rooms join them and may import any.
ROOMS = ("kv_cache", "arrays", "parameters", "storage", "interop", "products", "algorithms", "tracing", "calibration")

# These import names belong to distributions of other names.
IMPORT_NAMES = {"orbax-checkpoint": "orbax"}


def sources(package: str) -> list[pathlib.Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imported(path: pathlib.Path) -> set[str]:
    """The top-level packages that a file imports anywhere in it, also inside functions and relatively."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.partition(".")[0])
    return names


def dependencies() -> set[str]:
    """The import names of what pyproject.toml makes every user install."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {re.match(r"[\w-]+", requirement)[0] for requirement in project["dependencies"]}
    return {IMPORT_NAMES.get(name, name) for name in names}


def tracked_files() -> list[pathlib.Path]:
    listed = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z"], check=True, capture_output=True, text=True)
    return [ROOT / name for name in listed.stdout.split("\0") if name]


@pytest.mark.parametrize("package", LAYERS)
def test_no_layer_imports_a_higher_one(package):
    assert sources(package)
    higher = {*LAYERS[LAYERS.index(package) + 1 :], "tests"}
    upward = {path.relative_to(ROOT): found for path in sources(package) if (found := imported(path) & higher)}
    assert not upward


@pytest.mark.parametrize("room", ROOMS)
def test_no_room_of_jaxquant_imports_a_higher_one(room):
    higher = {f"jaxquant.{name}" for name in ROOMS[ROOMS.index(room) + 1 :]}
    upward = {
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in sources(f"jaxquant/{room}")
        for node in ast.parse(path.read_text()).body  # what only type checkers see, under `if`, is no import
        if isinstance(node, ast.ImportFrom) and node.module.startswith(tuple(higher))
    }
    assert sources(f"jaxquant/{room}")
    assert not upward


def test_jaxquant_meets_the_kernels_in_one_file():
    meeting = {path.relative_to(ROOT) for path in sources("jaxquant") if "pallas_kernels" in imported(path)}
    assert meeting <= {DOOR}


@pytest.mark.parametrize(
    ("package", "allowed"),
    [("pallas_kernels", {"jax", "jaxlib", "numpy"}), ("jaxquant", dependencies() | {"pallas_kernels"})],
)
def test_packages_import_only_what_they_declare(package, allowed):
    allowed = allowed | {package} | sys.stdlib_module_names
    undeclared = {path.relative_to(ROOT): found for path in sources(package) if (found := imported(path) - allowed)}
    assert not undeclared


def test_no_relative_imports():
    relative = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for package in LAYERS
        for path in sources(package)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and node.level
    ]
    assert not relative


def test_tracked_files_name_no_machine():
    # A vocabulary holds whatever its corpus held, paths included. The pattern is in pieces lest it match itself.
    pattern = re.compile(r"(?<![\w.}/-])(/(?:wo" r"rk|ro" r"ot|ho" r"me|tm" r"p|Us" r"ers)/\w|sha" r"red/\w)")
    named = []
    for path in tracked_files():
        if path.name == "tokenizer.json" or not path.is_file():
            continue
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            continue
        named += [
            f"{path.relative_to(ROOT)}:{i}: {line[:100]}" for i, line in enumerate(lines, 1) if pattern.search(line)
        ]
    assert not named
