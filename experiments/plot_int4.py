"""Draws the int4 kernel's speed-up over bfloat16 against the batch: `python -m experiments.plot_int4`."""

import json
import pathlib

import matplotlib as mpl

RESULTS = pathlib.Path(__file__).parent / "results"
BYTES_PER_SECOND, FLOP_PER_SECOND = 4.3e12, 790e12  # what the peers' floors are reckoned with


def roof(m: int, k: int, n: int) -> float:
    """The speed-up of a kernel at its floor over a bfloat16 one at its own."""

    def floor(bits: float) -> float:
        return max((k * n * bits / 8 + 2 * m * (k + n)) / BYTES_PER_SECOND, 2 * m * k * n / FLOP_PER_SECOND)

    return floor(16) / floor(4 + 16 / 128)


def draw(rows: list[dict], path: pathlib.Path) -> None:
    """Writes a panel a layer: ours, the best W4A16 peer and the roofline."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt  # the backend must be chosen before pyplot is imported

    layers = sorted({(row["k"], row["n"]) for row in rows}, key=lambda layer: layer[0] * layer[1])
    figure, panels = plt.subplots(2, 4, figsize=(14, 6), layout="constrained", sharex=True, sharey=True)
    for axes, (k, n) in zip(panels.flat, layers, strict=False):
        held = [row for row in rows if (row["k"], row["n"]) == (k, n)]
        tokens = [2**i for i in range(13)]
        axes.plot(tokens, [roof(m, k, n) for m in tokens], "k--", lw=1, label="roofline")
        axes.plot([r["m"] for r in held], [r["cublas_bf16"] / r["ours"] for r in held], "o-", label="int4_matmul")
        peer = [r["cublas_bf16"] / r["best_w4a16"] for r in held]
        axes.plot([r["m"] for r in held], peer, "s-", ms=4, label="best W4A16 peer")
        axes.axhline(1, color="gray", lw=0.8)
        axes.axvline(47, color="gray", lw=0.8, ls=":")
        axes.set(xscale="log", title=f"K = {k}, N = {n}")
        axes.set_xticks([1, 8, 64, 512, 4096], ["1", "8", "64", "512", "4096"])
        axes.grid(alpha=0.3)
    panels[0, 0].legend(fontsize=8)
    panels[1, 3].axis("off")
    figure.supxlabel("tokens M")
    figure.supylabel("times as fast as cuBLAS bfloat16")
    figure.savefig(path, dpi=100)
    plt.close(figure)


if __name__ == "__main__":
    draw(json.loads((RESULTS / "int4_matmul_h200.json").read_text())["rows"], RESULTS / "int4_matmul_h200.png")
