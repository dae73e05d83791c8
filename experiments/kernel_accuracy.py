"""What the Hopper kernels cost the embedded model beside XLA's programs: `python -m experiments.kernel_accuracy`.

The same codes twice, after SmoothQuant: as they are, which XLA multiplies, and packed for the kernels. Both models read
held-out sequences; KL(float || quantized) of each is taken at every token, float being the model in float32.

The bound on the difference of their means. Integer sums are exact and every product is verified by `bench_int8` and
`bench_w4a8` to within its last rounding, so the two differ by roundings only; but a rounding that moves an activation
across a tie moves its code by a whole step. After a few layers the two models are two draws of the same quantization
noise: the difference of their KL has the mean 0, and its mean over n sequences stays within four of its own standard
errors but once in 15,000 times. A kernel that loses anything raises every sequence's KL and leaves that interval.
"""

import argparse
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np

import jaxquant as jq
from experiments._clock import write_results
from experiments.evaluation import token_measures
from experiments.models import Decoder, load_hf

MODEL = pathlib.Path(__file__).parent / "models" / "tiny_python"
PRESETS = ("w8a8", "fp8", "w4a8")
BATCH = 8
KERNEL = 'custom_call_target="mosaic_gpu_v2"'


def main() -> int:
    """Compares every preset, prints the rows and says by the exit status whether all lie within the bound."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="*", default=list(PRESETS), choices=PRESETS)
    parser.add_argument("--dtypes", nargs="*", default=["bfloat16", "float32"], choices=["bfloat16", "float32"])
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--json", type=pathlib.Path, help="write the rows here")
    options = parser.parse_args()
    config, params = load_hf(MODEL)
    params = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    tokens, calibration = (np.load(MODEL / f"{name}.npy").astype(np.int32) for name in ("evaluation", "calibration"))
    rows = []
    for preset in options.presets:
        qparams = smoothed(Decoder(config), params, preset, calibration[:32])
        for dtype in options.dtypes:
            row = compare(Decoder(config, dtype=jnp.dtype(dtype)), params, qparams, tokens[: options.sequences])
            rows.append({"preset": preset, "dtype": dtype} | row)
            print(rows[-1], flush=True)
    if options.json:
        write_results(options.json, rows=rows)
    return not all(row["ok"] for row in rows)


def smoothed(model: Decoder, params, preset: str, calibration: np.ndarray):
    """The model's parameters by a preset, SmoothQuant first."""
    batches = [jnp.asarray(calibration[i : i + BATCH, :-1]) for i in range(0, len(calibration), BATCH)]
    config = jq.QuantConfig.preset(preset, algorithm=jq.smoothquant())
    return jq.quantize(params, config, apply_fn=model.forward, batches=batches)


def compare(model: Decoder, params, qparams, tokens: np.ndarray) -> dict:
    """The KL of both forms of a model, the bound on their difference, and the KL from one form to the other.

    Args:
        model: in the dtype that it is to run in.
        params: float parameters.
        qparams: quantized ones, not packed.
        tokens: integer [sequences, T + 1].

    Returns:
        Means over all tokens, nats; `launches` of kernels in the compiled program, 0 on a device that has none.
    """
    forward = jq.quantized(model.forward, on_dense="error")
    exact = model.clone(dtype=jnp.float32).forward

    def step(params, plain, packed, batch):
        inputs, targets = batch[:, :-1], batch[:, 1:]
        with_highest = jax.default_matmul_precision("highest")(exact)
        reference, by_xla = with_highest(params, inputs), forward(plain, inputs)
        by_kernel = forward(packed, inputs)
        pairs = ((reference, by_xla), (reference, by_kernel), (by_xla, by_kernel))
        as_float = lambda pair: (logits.astype(jnp.float32) for logits in pair)  # noqa: E731
        return [jnp.mean(token_measures(*as_float(pair), targets)[1], axis=1) for pair in pairs]

    operands = jax.device_put((params, qparams, jq.pack_for(qparams, "h200")))
    run = jax.jit(step).lower(*operands, jnp.asarray(tokens[:BATCH])).compile()
    batches = [jnp.asarray(tokens[i : i + BATCH]) for i in range(0, len(tokens) // BATCH * BATCH, BATCH)]
    xla, kernel, between = np.concatenate([np.asarray(run(*operands, batch), np.float64) for batch in batches], axis=1)
    means = {"kl_xla": xla.mean(), "kl_kernel": kernel.mean(), "kl_between": between.mean()}
    row = {name: float(value) for name, value in means.items()} | verdict(xla, kernel)
    return row | {"launches": (run.as_text() or "").count(KERNEL)}


def verdict(xla: np.ndarray, kernel: np.ndarray) -> dict:
    """The bound on the difference of two means over the same sequences, and whether it holds."""
    difference = kernel - xla
    bound = 4 * np.std(difference, ddof=1) / np.sqrt(len(difference))
    return {"bound": float(bound), "ok": bool(abs(difference.mean()) <= bound)}


if __name__ == "__main__":
    sys.exit(main())
