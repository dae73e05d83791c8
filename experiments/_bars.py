"""The bars that a bench is held to: ours beside a peer, row by row, and whether each is met."""

import statistics
from collections.abc import Iterable


def bar(row: str, ours: float, peer: float, least: float) -> dict:
    """One row of times: how many times as fast as a peer we are, and are to be at least.

    >>> bar("M = 1", 5.0, 7.0, 1.3)
    {'row': 'M = 1', 'ours': 5.0, 'peer': 7.0, 'ratio': 1.4, 'bar': 1.3, 'met': True}
    """
    rounded = {"row": row, "ours": round(ours, 2), "peer": round(peer, 2), "ratio": round(peer / ours, 3)}
    return rounded | {"bar": round(least, 3), "met": peer / ours >= least}


def mean_bar(row: str, bars: Iterable[dict], least: float) -> list[dict]:
    """The geometric mean of the ratios of rows, as a row of its own; none of none.

    >>> mean_bar("mean", [bar("a", 1.0, 2.0, 1.0), bar("b", 1.0, 0.5, 1.0)], 1.1)[0]["ratio"]
    1.0
    """
    ratios = [each["peer"] / each["ours"] for each in bars]
    if not ratios:
        return []
    mean = statistics.geometric_mean(ratios)
    name = f"{row}, mean of {len(ratios)}"
    return [{"row": name, "ours": None, "peer": None, "ratio": round(mean, 3), "bar": least, "met": mean >= least}]


def show(bars: list[dict]) -> None:
    """Print the rows as a table."""
    columns = ("row", "ours", "peer", "ratio", "bar", "met")
    lines = [columns, *(tuple("" if each[name] is None else str(each[name]) for name in columns) for each in bars)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    for first, *rest in lines:
        numbers = "  ".join(text.rjust(width) for text, width in zip(rest, widths[1:], strict=True))
        print(f"{first.ljust(widths[0])}  {numbers}", flush=True)
    print(f"{sum(each['met'] for each in bars)} of {len(bars)} bars met", flush=True)
