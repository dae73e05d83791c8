"""The command `jaxquant`: convert, inspect, diff and export checkpoints."""

import argparse
import dataclasses
import importlib
import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from jaxquant.algorithms._transform import WeightTransform
from jaxquant.algorithms.awq import awq
from jaxquant.algorithms.gptq import gptq
from jaxquant.algorithms.smoothquant import smoothquant
from jaxquant.arrays._spec import PRESETS, QuantConfig, Rule
from jaxquant.conversion import convert, export
from jaxquant.inspection import diff, inspect
from jaxquant.interop import FORMATS, Module, read_table
from jaxquant.storage._json import read_json
from jaxquant.storage._values import encode_value

ALGORITHMS: dict[str, Callable[[], WeightTransform]] = {"gptq": gptq, "awq": awq, "smoothquant": smoothquant}
BATCH = 4  # sequences


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: its arguments; None takes the process's.

    Returns:
        The exit status: 0, 1 where `diff` finds parameters that cannot be compared, 2 for an error, which is printed,
        130 where the user interrupts.
    """
    arguments = _parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except BrokenPipeError:  # the reader of our output has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("\njaxquant: interrupted; a conversion goes on when the same command is given again", file=sys.stderr)
        return 130
    except (OSError, ValueError, TypeError, NotImplementedError, ImportError) as error:
        message = str(error).replace("overwrite=True", "--overwrite").replace("modules=", "--names")
        print(f"jaxquant: {message}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("jaxquant", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("convert", help="orbax or Hugging Face to our checkpoint, quantized or as it is")
    command.add_argument("src", help="a jaxquant or orbax checkpoint, or a Hugging Face folder, float or quantized")
    command.add_argument("dst", help="the new checkpoint; a conversion that was interrupted goes on")
    command.add_argument("--recipe", choices=PRESETS, metavar="NAME", help=f"quantize: {', '.join(PRESETS)}")
    command.add_argument("--rules", type=pathlib.Path, metavar="FILE", help='JSON: {"pattern": recipe or null, ...}')
    command.add_argument("--calibrate", type=pathlib.Path, metavar="TOKENS.npy", help="integers [sequences, tokens]")
    command.add_argument("--model", metavar="MODULE:FUNCTION", help="FUNCTION(config) returns apply_fn(params, tokens)")
    command.add_argument("--algorithm", choices=ALGORITHMS, default="gptq", help="how to use the calibration tokens")
    command.add_argument("--overwrite", action="store_true", help="replace the checkpoint at DST")
    command.set_defaults(run=_convert)
    command = commands.add_parser("inspect", help="a table of what a checkpoint holds")
    command.add_argument("path")
    command.add_argument("--json", action="store_true", help="print JSON")
    command.set_defaults(run=_inspect)
    command = commands.add_parser("diff", help="how far the parameters of B are from A's, in dB")
    command.add_argument("a")
    command.add_argument("b")
    command.add_argument("--json", action="store_true", help="print JSON, a parameter a line")
    command.set_defaults(run=_diff)
    command = commands.add_parser("export", help="a checkpoint to a Hugging Face folder")
    command.add_argument("path")
    command.add_argument("dst")
    command.add_argument("--format", required=True, choices=FORMATS)
    command.add_argument("--config", type=pathlib.Path, metavar="FILE", help="the model's config.json, if not known")
    command.set_defaults(run=_export)
    for command in commands.choices.values():
        names = 'JSON: {"base": model_type, "modules": [{"hf", "path", "kind"}, ...]}'
        command.add_argument("--names", type=pathlib.Path, metavar="FILE", help=names)
    return parser


def _convert(arguments: argparse.Namespace) -> int:
    if (arguments.calibrate is None) != (arguments.model is None):
        raise ValueError("--calibrate and --model go together")
    given: dict[str, Any] = {"overwrite": arguments.overwrite, "modules": _table(arguments)}
    algorithm = None
    if arguments.calibrate is not None:
        algorithm = ALGORITHMS[arguments.algorithm]()
        given["apply_fn"] = _load_model(arguments.model, arguments.src)
        given["batches"] = _batches(arguments.calibrate)
    config = _config(arguments.recipe, arguments.rules, algorithm)
    if config is None and algorithm is not None:
        raise ValueError("--calibrate needs --recipe or --rules")
    convert(arguments.src, arguments.dst, config, progress=_progress_bar(), **given)
    print(f"{arguments.dst}: {inspect(arguments.dst).totals}")
    return 0


def _table(arguments: argparse.Namespace) -> tuple[Module, ...] | None:
    return None if arguments.names is None else read_table(arguments.names)


def _load_model(name: str, src: str) -> Callable[..., Any]:
    """Calls FUNCTION with the config.json beside the weights, or None where there is none."""
    module, _, function = name.partition(":")
    config = pathlib.Path(src, "config.json")
    if "" not in sys.path:  # a console script does not look into the current folder, `python -m` does
        sys.path.insert(0, "")
    make = getattr(importlib.import_module(module), function, None)
    if make is None:
        raise ValueError(f"--model {name}: {module} has no {function!r}; MODULE:FUNCTION is needed")
    return make(read_json(config) if config.is_file() else None)


def _batches(file: pathlib.Path) -> Iterator[np.ndarray]:
    tokens = np.load(file, mmap_mode="r", allow_pickle=False)
    if tokens.ndim != 2 or tokens.dtype.kind not in "iu" or not tokens.size:
        raise ValueError(f"{file}: {tokens.dtype}{list(tokens.shape)}; integers [sequences, tokens] are needed")
    for start in range(0, len(tokens), BATCH):
        yield np.asarray(tokens[start : start + BATCH], np.int32)


def _config(
    recipe: str | None, rules: pathlib.Path | None, algorithm: WeightTransform | None = None
) -> QuantConfig | None:
    listed = []
    for pattern, name in {} if rules is None else read_json(rules).items():
        if name is not None and not (isinstance(name, str) and name in PRESETS):
            raise ValueError(f"{rules}: {pattern!r} asks for {name!r}; accepted: null, {', '.join(PRESETS)}")
        listed.append(Rule(pattern, None if name is None else PRESETS[name]))
    if recipe is None:
        if rules is not None and all(rule.spec is None for rule in listed):
            raise ValueError(
                f"{rules}: no rule quantizes anything; give --recipe too, or leave --rules out to keep all"
            )
        return QuantConfig(rules=tuple(listed), algorithm=algorithm) if listed else None
    return QuantConfig.preset(recipe, rules=listed, algorithm=algorithm)


def _inspect(arguments: argparse.Namespace) -> int:
    found = inspect(arguments.path, modules=_table(arguments))
    if arguments.json:
        fields = {"kind": found.kind, "leaves": [dataclasses.asdict(leaf) for leaf in found.leaves]}
        about = {name: encode_value(value, name) if name == "config" else value for name, value in found.about.items()}
        print(json.dumps(fields | {"about": about}, indent=1))
    else:
        print(found)
    return 0


def _diff(arguments: argparse.Namespace) -> int:
    compared = True
    for row in diff(arguments.a, arguments.b, modules=_table(arguments)):
        compared &= not row.note
        if arguments.json:
            numbers = {name: value if math.isfinite(value) else str(value) for name, value in _numbers(row).items()}
            print(json.dumps({"path": row.path, **numbers, "note": row.note}))
        else:
            print(f"{row.sqnr:8.2f} dB  {row.max_error:9.3e}  {row.path}  {row.note}".rstrip())
    return 0 if compared else 1


def _numbers(row: Any) -> dict[str, float]:
    return {"sqnr": row.sqnr, "max_error": row.max_error}


def _export(arguments: argparse.Namespace) -> int:
    config = None if arguments.config is None else read_json(arguments.config)
    options: dict[str, Any] = {"format": arguments.format, "huggingface": config, "modules": _table(arguments)}
    export(arguments.path, arguments.dst, **options, progress=_progress_bar())
    return 0


def _progress_bar() -> Callable[[int, int, str], None]:
    """A line on a terminal's stderr: bytes done, speed, the parameter at hand; nothing where it is no terminal."""
    first: list[tuple[float, int]] = []  # when it began, and what was done before

    def show(done: int, total: int, path: str) -> None:
        if not sys.stderr.isatty():
            return
        if not first:
            first.append((time.monotonic(), done))
        began, before = first[0]
        part = done / max(total, 1)
        speed = (done - before) / max(time.monotonic() - began, 1e-9)
        bar = "#" * round(30 * part)
        end = "\n" if done >= total else ""
        line = f"{bar:<30} {part:6.1%}  {done / 1e9:.2f} of {total / 1e9:.2f} GB  {speed / 1e6:.0f} MB/s  {path}"
        print(f"\r\x1b[K{line[:150]}", end=end, file=sys.stderr, flush=True)

    return show


if __name__ == "__main__":
    sys.exit(main())
