"""The command of the attention benches: rows of a case, a mode and a configuration, run in workers and printed."""

import argparse
import pathlib
from collections.abc import Callable

from experiments import _workers
from experiments._clock import write_results


def command_line(description: str | None, *, seconds: float, workers: int) -> argparse.ArgumentParser:
    """The flags that every attention bench has, with its own defaults."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=pathlib.Path, help="write every row here")
    parser.add_argument("--time-limit", type=float, default=seconds, help="seconds for everything")
    parser.add_argument("--workers", type=int, default=workers, help="processes that compile at the same time")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser


def run(module: str, arguments: argparse.Namespace, items: list[dict], line: Callable[[dict], str]) -> int:
    """Runs the rows of a bench: prints each as it comes and all of them sorted, and writes them where asked.

    Args:
        module: the bench, whose `--worker` flag serves its rows.
        arguments: of its command line.
        items: the rows to run, most wanted first.
        line: writes a row as text.

    Returns:
        The exit status: 0 if every row is right.
    """
    rows = _workers.run(
        module,
        items,
        workers=arguments.workers,
        seconds=arguments.time_limit,
        on_result=lambda row: print(line(row), flush=True),
    )
    if arguments.json:
        write_results(arguments.json, rows=rows)
    print(f"\n{len(rows)} rows, {sum(not row.get('ok') for row in rows)} not ok")
    for row in sorted(rows, key=lambda row: (row["case"], row["mode"])):
        print(line(row))
    return 0 if all(row.get("ok") for row in rows) else 1
