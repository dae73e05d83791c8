"""A picture of what calibration did to each weight: `python -m experiments.report_picture report.json report.png`.

The JSON is what `jaxquant.Report.to_json()` gives. Each weight has its output error beside round-to-nearest's.
"""

from __future__ import annotations

import argparse
import json
import pathlib

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def draw(rows: list[dict], title: str) -> plt.Figure:
    """Draws the output errors of the rows that have one, in the model's order, on a logarithmic scale."""
    known = [row for row in rows if row["error"] is not None]
    if not known:
        raise ValueError("the report holds no output errors: its algorithm gathered no Hessian")
    places = range(len(known))
    figure, axes = plt.subplots(figsize=(8, 1.5 + 0.18 * len(known)), layout="constrained")
    axes.plot([row["error_rtn"] for row in known], places, "o", color="0.6", label="round-to-nearest")
    axes.plot([row["error"] for row in known], places, "o", color="C0", label=known[0]["algorithm"])
    axes.hlines(places, [row["error"] for row in known], [row["error_rtn"] for row in known], color="0.8", zorder=0)
    axes.set_yticks(places, [row["path"] for row in known], fontsize=6)
    axes.set(xscale="log", xlabel="output error over the outputs' mean square", title=title)
    axes.invert_yaxis()
    axes.legend()
    return figure


def main(argv: list[str] | None = None) -> None:
    """Reads a report and writes its picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=pathlib.Path)
    parser.add_argument("picture", type=pathlib.Path)
    args = parser.parse_args(argv)
    draw(json.loads(args.report.read_text(encoding="utf-8")), args.report.stem).savefig(args.picture, dpi=150)


if __name__ == "__main__":
    main()
