"""Draws the losses of the trained models over their runs: `python -m experiments.loss_curves`.

The embedded models' records are their folders' loss_curve.json; that of `--size small` is a result of its own.
"""

from __future__ import annotations

import json
import pathlib
from typing import Any

import matplotlib as mpl

from experiments.accuracy import EMBEDDED_MODEL

RESULTS = pathlib.Path(__file__).parent / "results"
RECORDS = {"tiny": EMBEDDED_MODEL / "loss_curve.json", "small": RESULTS / "train_small.json"}


def draw(records: dict[str, dict[str, Any]], path: pathlib.Path) -> None:
    """Writes one panel for each record: training and held-out loss against tokens seen a parameter."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt  # the backend must be chosen before pyplot is imported

    figure, panels = plt.subplots(1, len(records), figsize=(5 * len(records), 3.8), layout="constrained", squeeze=False)
    for axes, (name, record) in zip(panels[0], records.items(), strict=True):
        seen = record["tokens_seen"] / record["steps"] / record["parameters"]
        tokens = [point["step"] * seen for point in record["curve"]]
        for kind in ("train", "held_out"):
            axes.plot(tokens, [point[f"{kind}_loss"] for point in record["curve"]], label=kind.replace("_", "-"))
        best = min(record["curve"], key=lambda point: point["held_out_loss"])
        axes.axvline(best["step"] * seen, color="gray", lw=0.8, ls=":")
        axes.set(xlabel="tokens seen a parameter", ylabel="loss, nats a token", ylim=(0, 5))
        axes.set_title(f"{name}: {record['parameters'] / 1e6:.1f}M parameters, least {best['held_out_loss']:.3f}")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    """Draws what is committed."""
    records = {name: json.loads(path.read_text(encoding="utf-8")) for name, path in RECORDS.items()}
    draw(records, RESULTS / "loss_curves.png")


if __name__ == "__main__":
    main()
