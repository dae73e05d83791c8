"""What each choice of a recipe gains and costs, on calibration sequences held out for it.

    python -m experiments.compare_choices [--tables passes,damping,forms,...] [--model FOLDER] [--json F]

Three quarters of a model's calibration sequences calibrate, the last quarter is what the KL from the float model is
measured on: a choice made here has seen no evaluation token. `passes` are GPTQ by statistics of the float model, of the
layers quantized so far, and making up for their errors, for each preset; `damping` is how much the Hessian is damped;
`forms` are ways to run GPTQ and AWQ, with each grid and range of the weights; `ranges` are static activation ranges at
8 bits; `mixed` compares a bit width for each weight with one for all at 4.125 bits; `learned` are settings of learned
rounding. Seconds include compilation.
"""

import argparse
import dataclasses
import functools
import json
import pathlib
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

import jaxquant as jq
from experiments.accuracy import BATCH, EMBEDDED_MODEL
from experiments.evaluation import Forward
from experiments.models.decoder import Decoder, Params
from experiments.models.hf import load_hf

COMPENSATED = jq.chain(jq.compensate(strength=0.5, residual=0.5), jq.gptq())
DYNAMIC = jq.TensorSpec("int8", jq.PerToken())
METHODS = ("absmax", "moving_average", "percentile", "kl", "mse", "cosine", "admm")


@dataclasses.dataclass(frozen=True)
class Trial:
    """One choice.

    Attributes:
        table: which it belongs to.
        name: what it is called there.
        config: makes the order; given the model's function, parameters and batches, as `mixed` measures with them.
        sequential: as `jq.quantize` takes it.
    """

    table: str
    name: str
    config: Callable[[Callable, Params, list], jq.QuantConfig]
    sequential: bool | None = None


def fixed(spec: jq.QuantSpec, algorithm: jq.WeightTransform | None, rules: tuple[jq.Rule, ...] = ()) -> Callable:
    """An order that depends on no data."""
    return lambda apply_fn, params, batches: jq.QuantConfig(spec, rules, algorithm=algorithm)


def weight(qtype: str = "int4", grid: str = "signed", range_: str = "mse") -> jq.TensorSpec:
    """Groups of 128."""
    return jq.TensorSpec(qtype, jq.PerGroup(128), range=range_, grid=grid, scale_dtype="bfloat16")


def form_trials() -> Iterator[Trial]:
    """GPTQ and AWQ in each form, grid and range."""
    for grid in ("full", "signed"):
        for range_ in ("absmax", "mse"):
            spec = jq.QuantSpec(weight(grid=grid, range_=range_))
            for name, algorithm in {"rtn": None, "gptq": jq.gptq(), "awq": jq.awq()}.items():
                yield Trial("forms", f"{name} {grid} {range_}", fixed(spec, algorithm))
    spec = jq.QuantSpec(weight())
    yield Trial("forms", "gptq without rounds", fixed(spec, jq.gptq(rounds=0)))
    yield Trial("forms", "gptq sequential", fixed(spec, jq.gptq()), True)
    yield Trial("forms", "gptq compensated", fixed(spec, COMPENSATED))
    yield Trial("forms", "gptq compensated, inputs only", fixed(spec, jq.chain(jq.compensate(), jq.gptq())))
    yield Trial("forms", "awq + gptq", fixed(spec, jq.chain(jq.awq(clip=False), jq.gptq())))
    plain = jq.QuantSpec(weight(grid="full"))
    yield Trial("forms", "gptq as published", fixed(plain, jq.gptq(scales="static", rounds=0)))


PASSES: dict[str, tuple[jq.WeightTransform, bool | None]] = {
    "parallel": (jq.gptq(), False),
    "sequential": (jq.gptq(), True),
    "compensated": (COMPENSATED, None),
}


def pass_trials() -> Iterator[Trial]:
    """GPTQ from the float model's statistics, from the quantized layers', and making up for their errors."""
    for preset in ("w4a16", "w4a16-asym", "w3a16"):
        for form, (algorithm, sequential) in PASSES.items():
            spec = jq.QuantConfig.preset(preset, algorithm=algorithm).default
            yield Trial("passes", f"{preset} {form}", fixed(spec, algorithm), sequential)


def damping_trials() -> Iterator[Trial]:
    """GPTQ and its compensated form with more and more of a diagonal added to the Hessian."""
    for preset in ("w4a16", "w4a16-asym", "w3a16"):
        for damping in (0.01, 0.05, 0.2, 0.5, 1.0):
            gptq = jq.gptq(damping=damping)
            algorithm = jq.chain(jq.compensate(strength=0.5, residual=0.5), gptq)
            spec = jq.QuantConfig.preset(preset, algorithm=gptq).default
            yield Trial("damping", f"{preset} parallel, {damping}", fixed(spec, gptq))
            yield Trial("damping", f"{preset} compensated, {damping}", fixed(spec, algorithm))


def range_trials() -> Iterator[Trial]:
    """Static activation ranges against dynamic ones, weights of 8 bits per channel."""

    def spec(activation: jq.TensorSpec) -> jq.QuantSpec:
        return jq.QuantSpec(jq.TensorSpec("int8"), activation)

    static = jq.TensorSpec("int8", jq.PerTensor(), static=True)
    yield Trial("ranges", "dynamic per token", fixed(spec(DYNAMIC), None))
    yield Trial("ranges", "dynamic per tensor", fixed(spec(jq.TensorSpec("int8", jq.PerTensor())), None))
    for method in METHODS:
        tensor = dataclasses.replace(static, range=method)
        yield Trial("ranges", f"per tensor {method}", fixed(spec(tensor), None))
        if method != "moving_average":
            channel = dataclasses.replace(tensor, granularity=jq.PerChannel())
            yield Trial("ranges", f"per channel {method}", fixed(spec(channel), None))
    rule = (jq.Rule(".*down_proj/kernel", spec(DYNAMIC)),)
    yield Trial("ranges", "per tensor absmax, down dynamic", fixed(spec(static), None, rule))
    channel = dataclasses.replace(static, granularity=jq.PerChannel())
    yield Trial("ranges", "per channel absmax, down dynamic", fixed(spec(channel), None, rule))
    yield Trial("ranges", "smoothquant, per tensor absmax", fixed(spec(static), jq.smoothquant()))
    yield Trial("ranges", "smoothquant, dynamic per token", fixed(spec(DYNAMIC), jq.smoothquant()))


def mixed_trials() -> Iterator[Trial]:
    """4.125 bits a weight, scales counted, spent evenly or by sensitivity."""
    choices = tuple(jq.QuantSpec(weight(qtype, range_="absmax")) for qtype in ("int2", "int3", "int4", "int8"))

    def allocated(algorithm: jq.WeightTransform | None) -> Callable:
        def config(apply_fn: Callable, params: Params, batches: list) -> jq.QuantConfig:
            found = jq.allocate_bits(apply_fn, params, batches[:1], 4.125, choices, jq.logit_divergence)
            searched = "absmax" if algorithm is None else "mse"
            rules = [dataclasses.replace(rule, spec=searching(rule.spec, searched)) for rule in found.rules]
            return dataclasses.replace(found, rules=tuple(rules), algorithm=algorithm)

        return config

    for name, algorithm in {"rtn": None, "gptq": jq.gptq(), "gptq compensated": COMPENSATED}.items():
        even = jq.QuantSpec(weight(range_="absmax" if algorithm is None else "mse"))
        yield Trial("mixed", f"{name}, 4 bits each", fixed(even, algorithm))
        yield Trial("mixed", f"{name}, allocated", allocated(algorithm))


def searching(spec: jq.QuantSpec | None, range_: str) -> jq.QuantSpec | None:
    """A spec with another range method of its weight."""
    return spec and dataclasses.replace(spec, weight=dataclasses.replace(spec.weight, range=range_))


def learned_trials() -> Iterator[Trial]:
    """Learned rounding by start, steps, rate, the part of earlier errors made up for, and the size of blocks."""
    spec, layer, model = jq.QuantSpec(weight()), 2, 1000  # cuts
    yield Trial("learned", "compensated", fixed(spec, COMPENSATED))
    starts = {"compensated": COMPENSATED, "gptq": jq.gptq(), "rtn": jq.rtn()}
    for start, steps, rate, strength, cuts in (
        ("compensated", 200, 1e-3, 0.5, layer), ("compensated", 500, 1e-3, 0.5, model),
        ("rtn", 200, 5e-3, 1.0, layer), ("compensated", 1000, 1e-3, 0.5, layer), ("rtn", 500, 2e-3, 0.5, model),
        ("rtn", 1000, 2e-3, 0.5, layer), ("compensated", 200, 5e-3, 0.5, layer), ("compensated", 200, 1e-3, 1.0, layer),
    ):  # fmt: skip
        learned = jq.learned_rounding(steps=steps, learning_rate=rate, strength=strength, cuts=cuts)
        what = "model" if cuts == model else f"layers, strength {strength}"
        name = f"{start} + {steps} steps of {rate:g}, {what}"
        yield Trial("learned", name, fixed(spec, jq.chain(starts[start], learned)))


@functools.partial(jax.jit, static_argnums=(0, 1))
def divergence(reference: Forward, forward: Forward, params: Params, qparams: Params, inputs: jax.Array) -> jax.Array:
    """KL of each sequence's next-token distributions, the mean over its tokens."""
    log_p, log_q = (jax.nn.log_softmax(f(p, inputs)) for f, p in ((reference, params), (forward, qparams)))
    return jnp.mean(jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1), axis=-1)


def divergences(
    reference: Forward, forward: Forward, params: Params, qparams: Params, tokens: np.ndarray
) -> np.ndarray:
    """The same for many sequences."""
    inputs = tokens[:, :-1].astype(np.int32)
    parts = [jnp.asarray(inputs[start : start + BATCH]) for start in range(0, len(inputs), BATCH)]
    return np.concatenate([divergence(reference, forward, params, qparams, part) for part in parts])


TABLES = {
    "passes": pass_trials,
    "damping": damping_trials,
    "forms": form_trials,
    "ranges": range_trials,
    "mixed": mixed_trials,
    "learned": learned_trials,
}


def measure(
    trial: Trial, model: Decoder, reference: Forward, params: Params, tokens: np.ndarray, held_out: np.ndarray
) -> dict:
    """One row: KL on held-out sequences, bits, seconds."""
    inputs = tokens[:, :-1].astype(np.int32)
    batches = [jnp.asarray(inputs[start : start + BATCH]) for start in range(0, len(inputs), BATCH)]
    start = time.perf_counter()
    config = trial.config(model.forward, params, batches)
    options = {"apply_fn": model.forward, "batches": batches, "sequential": trial.sequential}
    qparams = jax.block_until_ready(jq.quantize(params, config, **options))
    seconds = time.perf_counter() - start
    forward = model.forward
    evaluated = jq.dequantize(qparams)  # the same function, compiled once for all trials
    specs = [config.default, *(rule.spec for rule in config.rules)]
    if any(spec and spec.activation for spec in specs):
        forward, evaluated = jq.quantized(forward, on_dense="error"), qparams
    kl = divergences(reference, forward, params, evaluated, held_out)
    return {
        "table": trial.table,
        "name": trial.name,
        "kl": float(kl.mean()),
        "kl_error": float(kl.std(ddof=1) / np.sqrt(len(kl))),
        "bits": jq.summary(qparams).bits_per_weight,
        "seconds": seconds,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", default=",".join(TABLES))
    parser.add_argument("--model", type=pathlib.Path, default=EMBEDDED_MODEL)
    parser.add_argument("--sequences", type=int, help="calibrate with so many at most")
    parser.add_argument("--json", type=pathlib.Path, help="where to write the rows")
    args = parser.parse_args()
    config, params = load_hf(args.model)
    model, params = Decoder(config), jax.device_put(params)
    reference = model.clone(dtype=jnp.float32).forward
    tokens = np.load(args.model / "calibration.npy", allow_pickle=False)
    split = 3 * len(tokens) // 4
    rows = []
    for table in args.tables.split(","):
        for trial in TABLES[table]():
            rows.append(measure(trial, model, reference, params, tokens[:split][: args.sequences], tokens[split:]))
            row = rows[-1]
            print(
                f"{table:8} {trial.name:44} KL {row['kl']:.5f}  {row['bits']:.3f} bits  {row['seconds']:6.1f} s",
                flush=True,
            )
            if args.json:
                args.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
