"""What the benches of products have in common: their options, and the run of their items by workers."""

import argparse
import secrets
from collections.abc import Sequence

from experiments import _bars, _workers
from pallas_kernels.int4_matmul.cases import SHAPES


def parser(
    description: str, *, shapes: Sequence[str], tokens: Sequence[int], seconds: float
) -> argparse.ArgumentParser:
    """The options of every bench, with a bench's own defaults."""
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--shapes", nargs="*", default=list(shapes), choices=SHAPES)
    options.add_argument("--m", nargs="*", type=int, default=list(tokens), help="tokens, most wanted first")
    options.add_argument("--seconds", type=float, default=seconds, help="what is not done by then is left out")
    options.add_argument("--workers", type=int, default=10)
    options.add_argument("--json", help="where to write the results")
    options.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return options


def answers(module: str, items: list[dict], *, workers: int, seconds: float, **limits) -> list[dict]:
    """Give every item a seed, run them, and say how many were done and how many failed."""
    seeded = [item | {"seed": secrets.randbelow(2**31)} for item in items]
    results = _workers.run(module, seeded, workers=workers, seconds=seconds, **limits)
    checked = [r for r in results if "ok" in r or "error" in r]
    failed = sum(not r.get("ok") for r in checked)
    print(f"{len(results)} of {len(items)} items; {failed} of {len(checked)} checks failed", flush=True)
    return results


def finish(path: str | None, bars: list[dict], **results) -> None:
    """Print the closing table and write everything down."""
    if bars:
        _bars.show(bars)
    if path:
        from experiments._clock import write_results

        write_results(path, bars=bars, **results)


def show(result: dict, *, where: Sequence[str], hidden: Sequence[str] = ()) -> None:
    """One line a result: what it is of, then its numbers."""
    failed = "error" in result or result.get("ok") is False
    place = " ".join(str(result[name]) for name in where if result.get(name) is not None)
    unseen = {*where, *hidden, "seed", "ok", "deterministic"}
    rest = {name: value for name, value in result.items() if name not in unseen}
    text = " ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in rest.items())
    print(("FAILED " if failed else "") + place, text, flush=True)
