"""`convert` and `export`: whole checkpoints from one form to another, one leaf in memory at a time.

A conversion writes beside its target, and keeps a journal there of the leaves that are safely on disk. Only when all
are does the target appear, in one step; a conversion that was killed goes on from its journal. One that calibrates
keeps the weights it has finished in a folder of their own instead.
"""

import contextlib
import dataclasses
import functools
import gc
import hashlib
import pathlib
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax

from jaxquant._quantize import check_fits, missing_data, quantize
from jaxquant._slices import Slicing, dequantized, plan_slices, quantize_slices
from jaxquant._sources import Source, open_source, read_leaf
from jaxquant.algorithms._transform import WeightTransform
from jaxquant.arrays._spec import QuantConfig, QuantSpec, Rule
from jaxquant.calibration._calibrate import plan_watches
from jaxquant.checkpoint import Path, write_tree
from jaxquant.interop import Module
from jaxquant.interop.huggingface_write import Format, write_folder
from jaxquant.parameters._rules import assign
from jaxquant.parameters._tree import is_quantized
from jaxquant.storage._companions import FOLDER as COMPANIONS
from jaxquant.storage._companions import copy_companions
from jaxquant.storage._journal import Journal
from jaxquant.storage._manifest import Manifest, library_version
from jaxquant.storage._mapped import mapping_of
from jaxquant.storage._nodes import decode_tree, encode_tree
from jaxquant.storage._publish import check_target, publish, staging_folder
from jaxquant.storage._store import as_numbers

MEMORY = 2  # largest leaves, above the base
READ = 2  # of a leaf that orbax or tensorstore reads: what the file holds, and the array or what that is unpacked to
TURNED = 1.1  # of a mapped leaf that is kept: it and the blocks on the way
CODES = 0.55  # of one that is quantized: eight bits for sixteen, slices
WHOLE = 4  # of one that is quantized whole: copies in float32

Progress = Callable[[int, int, str], None]


@dataclasses.dataclass(frozen=True)
class _Choice:
    """How one leaf is quantized."""

    spec: QuantSpec
    axis: tuple[int, ...]
    algorithm: WeightTransform | None

    def plan(self, weight: jax.ShapeDtypeStruct) -> Slicing | None:
        """How to cut a large weight; None for the whole, which algorithms need."""
        return None if self.algorithm is not None else plan_slices(weight, self.spec, self.axis)

    def quantize(self, path: str, weight: Any, cut: Slicing | None) -> Any:
        if cut is not None:
            return quantize_slices(path, weight, self.spec, self.axis, cut)
        rule = Rule(re.escape(path), self.spec, self.axis)
        return quantize({path: weight}, QuantConfig(rules=(rule,), algorithm=self.algorithm))[path]


def _decide(source: Source, config: QuantConfig | None) -> list[_Choice | None]:
    """For each leaf, how it is quantized, or None to keep it; what cannot be is found before the first is read."""
    known = {leaf.path: leaf.abstract for leaf in source.leaves if leaf.abstract is not None}
    if config is None:
        return [None] * len(source.leaves)
    assignments, choices = assign(known, config), {}
    for path, assignment in assignments.items():
        check_fits(path, known[path], assignment)
        if assignment.spec is not None:
            choices[path] = _Choice(assignment.spec, assignment.axis, config.algorithm)
    for path in plan_watches(assignments, known, config):
        raise missing_data(path, config, "convert(..., apply_fn=model.apply, batches=...)")
    return [choices.get(leaf.path) for leaf in source.leaves]


def convert(
    src: Path,
    dst: Path,
    config: QuantConfig | None = None,
    *,
    modules: tuple[Module, ...] | None = None,
    apply_fn: Callable[..., Any] | None = None,
    batches: Iterable[Any] | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> None:
    """Converts a checkpoint to ours, quantizing as it goes; wholly or not at all, and resumable.

    With a model to calibrate by, its parameters are memory-mapped together instead, and what goes on when it was killed
    is the pass over the model: weights that were finished are taken as they are.

    Args:
        src: a jaxquant checkpoint, an orbax checkpoint, or a Hugging Face folder, float or quantized.
        dst: the new checkpoint's folder.
        config: how to quantize float weights; None keeps everything as it is. What is quantized already stays so, and
            where all of it is, so does the config kept for the record.
        modules: for a Hugging Face folder, see `jaxquant.interop.plan_huggingface`.
        apply_fn: the float model to calibrate by, see `jaxquant.quantize`; for algorithms that need data.
        batches: its calibration inputs.
        overwrite: replaces the checkpoint at `dst`.
        progress: called with (bytes done, bytes in all, path) after each leaf, and once at the start, without a path,
            with what an interrupted conversion has done.

    Raises:
        FileNotFoundError: `src` does not exist.
        FileExistsError: `dst` exists.
        ValueError: `src` is malformed, a rule matches nothing, or a weight cannot be quantized, or not without
            calibration; the message names it.
    """
    target = pathlib.Path(dst).absolute()
    check_target(target, overwrite)
    if (apply_fn is None) != (batches is None) or (apply_fn is not None and config is None):
        raise ValueError("convert: to calibrate, apply_fn, batches and config go together; one of them is missing")
    source = open_source(src, modules=modules)
    if config is not None and apply_fn is not None and batches is not None:
        _convert_calibrated(source, target, config, apply_fn, list(batches))
        return
    choices = _decide(source, config)
    key = f"{source.fingerprint} {config!r} {library_version()}"
    with contextlib.closing(Journal(staging_folder(target), key)) as journal:
        _convert_leaves(source, choices, journal, progress)
        journal.commit()
    tree = _fill(source.tree, journal.nodes)
    writer = journal.writer
    config = config if any(choices) else source.config  # what was quantized before is not by this one
    algorithm = source.manifest.algorithm if source.manifest else None
    manifest = Manifest(tree, tuple(writer.records), tuple(writer.shards), config, algorithm, "", source.huggingface)
    journal.remove()
    copy_companions(source.companions, writer.folder / COMPANIONS)
    publish(writer.folder, target, manifest)
    shutil.rmtree(writer.folder, ignore_errors=True)


def _convert_calibrated(
    source: Source, target: pathlib.Path, config: QuantConfig, apply_fn: Callable[..., Any], batches: list[Any]
) -> None:
    """Quantizes the whole tree by the model's own inputs; weights finished before for the same are taken over."""
    finished = target.with_name(f".{target.name}.calibrated")
    key = hashlib.sha256(f"{source.fingerprint} {config!r} {library_version()}".encode())
    for array, impl in map(as_numbers, jax.tree.leaves(batches)):
        key.update(f"{impl}{array.dtype}{array.shape}".encode() + array.tobytes())
    run = finished / key.hexdigest()[:16]
    for other in set(finished.glob("*")) - {run}:
        shutil.rmtree(other)
    params = decode_tree(_fill(source.tree, _Numbers()), functools.partial(read_leaf, source))
    qparams = quantize(params, config, apply_fn=apply_fn, batches=batches, resume=run)
    write_tree(target, qparams, config, source.huggingface, source.companions)
    shutil.rmtree(finished, ignore_errors=True)


def _convert_leaves(source: Source, choices: list[_Choice | None], journal: Journal, progress: Progress | None) -> None:
    """Converts the leaves that the journal does not have."""
    left = [number for number in range(len(source.leaves)) if number not in journal.nodes]
    largest = max((leaf.nbytes for leaf in source.leaves), default=0)
    for number in _reported(source, left, progress):
        _convert_leaf(source, number, choices[number], journal, MEMORY * largest)


def _convert_leaf(source: Source, number: int, choice: _Choice | None, journal: Journal, memory: int) -> None:
    leaf = source.leaves[number]
    cut = None if choice is None else choice.plan(leaf.abstract)
    if source.kind != "huggingface":
        journal.make_room(READ * leaf.nbytes, memory)
    gc.collect(1)  # what was read and written before: orbax's futures hold it in cycles, JAX until it next tidies up
    value = read_leaf(source, number, opened=choice is None or cut is not None)
    mapped = mapping_of(value) is not None
    made = (TURNED if mapped else 0) if choice is None else WHOLE if cut is None else CODES
    journal.make_room((made + (not mapped)) * leaf.nbytes, memory)
    if choice is not None:
        value = choice.quantize(leaf.path, value, cut)
    journal.add(number, encode_tree(value, journal.writer.put, leaf.path))


def _reported(source: Source, numbers: Sequence[int], progress: Progress | None) -> Iterator[int]:
    """The numbers of leaves to work on, with progress reported before the first and after each."""
    done = source.nbytes - sum(source.leaves[number].nbytes for number in numbers)
    show = progress or (lambda done, total, path: None)
    show(done, source.nbytes, "")
    for number in numbers:
        yield number
        done += source.leaves[number].nbytes
        show(done, source.nbytes, source.leaves[number].path)


class _Numbers:
    """The node of every leaf: an array of the leaf's number."""

    def __getitem__(self, number: int) -> Any:
        return {"array": number}


def _fill(tree: Any, nodes: "dict[int, Any] | _Numbers") -> Any:
    """Puts the leaves' nodes into the skeleton of a source's tree."""
    if isinstance(tree, dict):
        return nodes[tree["leaf"]] if "leaf" in tree else {kind: _fill(body, nodes) for kind, body in tree.items()}
    return [_fill(child, nodes) for child in tree] if isinstance(tree, list) else tree


def export(
    src: Path,
    dst: Path,
    *,
    format: Format,
    huggingface: dict[str, Any] | None = None,
    modules: tuple[Module, ...] | None = None,
    progress: Progress | None = None,
) -> None:
    """Writes a checkpoint as a Hugging Face folder, quantized weights bit for bit, with the tokenizer it came with.

    In the format `"float"`, quantized weights are written as the float weights that they stand for.

    Args:
        src: what `convert` reads.
        dst: the new folder.
        format: `"float"`, `"gptq"`, `"gptq_v2"`, `"awq"` or `"compressed-tensors"`.
        huggingface: the model's config.json; None takes the one that the checkpoint was converted from.
        modules: how the modules are called there; None takes the table of the config's `model_type`.
        progress: see `convert`.

    Raises:
        FileNotFoundError: `src` does not exist.
        FileExistsError: `dst` exists and is not empty.
        ValueError: a parameter that the format cannot hold or the table does not name, or no config.json is known.
    """
    source, target = open_source(src, modules=modules), pathlib.Path(dst).absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target}: exists; name a new folder")
    config = huggingface or source.huggingface
    if config is None:
        raise ValueError(f"export: {src} does not know the config.json of its model; give one (--config)")
    leaves = _read_all(source, progress)
    if format == "float":  # one leaf at a time, in a file beside the target until it is written
        leaves = ((path, dequantized(leaf, target.parent) if is_quantized(leaf) else leaf) for path, leaf in leaves)
    write_folder(target, leaves, config, format=format, modules=modules, companions=source.companions)


def _read_all(source: Source, progress: Progress | None) -> Iterator[tuple[str, Any]]:
    for number in _reported(source, range(len(source.leaves)), progress):
        yield source.leaves[number].path, read_leaf(source, number)
