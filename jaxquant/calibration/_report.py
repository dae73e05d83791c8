"""`Report`: what became of each calibrated weight, as a table and as JSON."""

import dataclasses
import json
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class WeightReport:
    """One weight, or the sum over the matrices of a stack.

    Attributes:
        path: the parameter.
        algorithm: what rounded it.
        sqnr: signal to quantization noise of the weight itself, dB.
        error: mean squared error of an output over the mean square of the outputs, on calibration inputs; None where
            no Hessian was gathered. The mean over a stack.
        error_rtn: the same of round-to-nearest.
        tokens: inputs seen, the fewest in a stack.
        damping: the largest damping that a factorization needed, as a part of the Hessian's mean diagonal, or None.
        dead: channels that never fired, or None.
        seconds: that its quantization took, compilation included.
        extra: other scalars the algorithm reports, means over a stack.
        note: what a user should know, else empty.
        tokens_of_each: inputs seen by each matrix of a stack (an expert, a layer), in order; else empty.
    """

    path: str
    algorithm: str
    sqnr: float
    error: float | None
    error_rtn: float | None
    tokens: int
    damping: float | None
    dead: int | None
    seconds: float
    extra: Mapping[str, float] = dataclasses.field(default_factory=dict)
    note: str = ""
    tokens_of_each: tuple[int, ...] = ()


LISTED = 16  # experts whose tokens a line of the table lists
COLUMNS = ("parameter", "algorithm", "SQNR dB", "error", "of RTN's", "damping", "dead", "tokens", "seconds", "note")


class Report:
    """Collects a `WeightReport` for each weight; hand it to `quantize(..., report=report)` and print it.

    Attributes:
        rows: in the order the weights were finished.

    >>> report = Report()
    >>> report(WeightReport("kernel", "gptq", 20.0, 0.01, 0.02, 64, 0.01, 0, 0.5))
    >>> print(report)
    parameter  algorithm  SQNR dB  error     of RTN's  damping  dead  tokens  seconds  note
    kernel     gptq       20.0     1.00e-02  0.50      0.01     0     64      0.50
    """

    def __init__(self) -> None:
        """Starts empty."""
        self.rows: list[WeightReport] = []

    def __call__(self, row: WeightReport) -> None:
        """Adds a row."""
        self.rows.append(row)

    def to_json(self) -> str:
        """The rows as a JSON list of objects, one field an attribute."""
        return json.dumps([dataclasses.asdict(row) for row in self.rows], indent=1)

    def __str__(self) -> str:
        """The table."""
        lines = [COLUMNS, *map(_cells, self.rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
        )


def _cells(row: WeightReport) -> tuple[str, ...]:
    gain = "" if row.error is None or not row.error_rtn else f"{row.error / row.error_rtn:.2f}"
    error = "" if row.error is None else f"{row.error:.2e}"
    damping = "" if row.damping is None else f"{row.damping:.3g}"
    dead = "" if row.dead is None else str(row.dead)
    each = row.tokens_of_each
    tokens = str(row.tokens) if not each or len(set(each)) == 1 else _listed(each)
    return (
        row.path, row.algorithm, f"{row.sqnr:.1f}", error, gain, damping, dead, tokens, f"{row.seconds:.2f}", row.note,
    )  # fmt: skip


def _listed(counts: Sequence[int]) -> str:
    """Tokens of each expert, or of the least and most hit where there are many."""
    return " ".join(map(str, counts)) if len(counts) <= LISTED else f"{min(counts)}..{max(counts)} of {len(counts)}"


def make_row(
    path: str, algorithm: str, ratio: float, report: Mapping[str, jax.Array], seconds: float, note: str = ""
) -> WeightReport:
    """Sums the arrays that a weight's quantization reported up to one row.

    Args:
        path: the parameter.
        algorithm: the transform's name.
        ratio: squared norm of the weight over that of its rounding error.
        report: arrays of the stack's shape.
        seconds: spent.
        note: what to add.

    Returns:
        The row.
    """
    numbers = {name: np.asarray(value, np.float64) for name, value in report.items()}

    def take(name: str, reduction: Any) -> float | None:
        value = numbers.pop(name, None)
        return None if value is None else float(reduction(value))

    each = tuple(int(count) for count in numbers.get("tokens", np.zeros(())).reshape(-1))
    dead, tokens = take("dead", np.sum), take("tokens", np.min)
    return WeightReport(
        path=path,
        algorithm=algorithm,
        sqnr=_decibels(ratio),
        error=take("error", np.mean),
        error_rtn=take("error_rtn", np.mean),
        tokens=int(tokens or 0),
        damping=take("damping", np.max),
        dead=None if dead is None else int(dead),
        seconds=seconds,
        extra={name: float(value.mean()) for name, value in numbers.items()},
        note=note,
        tokens_of_each=each if len(each) > 1 else (),
    )


def retrained_row(row: WeightReport, ratio: float, errors: Mapping[str, float], seconds: float) -> WeightReport:
    """A weight's row once its block was trained: the error of its own output is no longer what it was.

    Args:
        row: as it was rounded.
        ratio: squared norm of the weight over that of its rounding error.
        errors: what training reports.
        seconds: spent on it.

    Returns:
        The new row.
    """
    return dataclasses.replace(
        row,
        sqnr=_decibels(ratio),
        error=None,
        error_rtn=None,
        seconds=row.seconds + seconds,
        extra={**row.extra, **errors},
    )


def _decibels(ratio: float) -> float:
    return 10 * math.log10(max(ratio, sys.float_info.min))


@jax.jit
def signal_to_noise(w: jax.Array, rounded: jax.Array) -> jax.Array:
    """Squared norm of a weight over that of its rounding error; huge where there is none."""
    wide = w.astype(jnp.float32)
    noise = jnp.sum(jnp.square(wide - rounded.astype(jnp.float32)))
    return jnp.sum(jnp.square(wide)) / jnp.maximum(noise, jnp.finfo(jnp.float32).tiny)


def show_progress(row: WeightReport, done: int, total: int, stream: TextIO | None = None) -> None:
    """Rewrites one line on a terminal; silent elsewhere.

    Args:
        row: the weight just finished.
        done: how many are.
        total: of how many.
        stream: standard error by default.
    """
    out: TextIO = sys.stderr if stream is None else stream
    if not out.isatty():
        return
    error = "" if row.error is None else f", error {row.error:.1e} (RTN {row.error_rtn:.1e})"
    end = "\n" if done == total else ""
    out.write(f"\r\x1b[K[{done}/{total}] {row.path}: {row.seconds:.2f} s{error}{end}")
    out.flush()
