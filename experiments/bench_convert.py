"""Converts a large synthetic checkpoint to w4a16 and measures memory and speed.

    python -m experiments.bench_convert [--gigabytes 20] [--random] [--out experiments/results/convert_cpu.json]

The checkpoint is a Hugging Face folder of bfloat16 kernels [8192, 28672] (the feed-forward layers of a 70B Llama, 470
MB each) in sparse files, so that it takes no disk; its zeros are read, quantized and written like any numbers, but
compress to nothing, so the speed is that of quantizing, not of a disk. `--random` fills the files, and needs the room.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import ml_dtypes
import numpy as np

from jaxquant.interop._safetensors import Pending, write_file

INPUTS, OUTPUTS = 8192, 28672
BF16 = np.dtype(ml_dtypes.bfloat16)


def make(folder, gigabytes, random):
    count = max(1, round(gigabytes * 1e9 / (INPUTS * OUTPUTS * 2)))
    layout = {f"model.layers.{i}.mlp.up_proj.weight": Pending(BF16, (OUTPUTS, INPUTS)) for i in range(count)}
    small = {"model.embed_tokens.weight": np.ones((8, INPUTS), BF16), "model.norm.weight": np.ones(INPUTS, BF16)}
    for number, (name, pending) in enumerate(layout.items()):
        file = folder / f"model-{number}.safetensors"
        extra = small if number == 0 else {}
        if random:
            values = np.random.default_rng(number).standard_normal(pending.shape, np.float32).astype(BF16)
            held = {**extra, name: values}
            write_file(file, {key: Pending(value.dtype, value.shape) for key, value in held.items()}, held.items())
        else:
            write_file(file, {key: Pending(value.dtype, value.shape) for key, value in extra.items()}, extra.items())
            _append_sparse(file, name, pending)
    files = sorted(folder.glob("*.safetensors"))
    names = {**dict.fromkeys(small, files[0].name), **{name: f"model-{i}.safetensors" for i, name in enumerate(layout)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    config = {"model_type": "llama", "num_hidden_layers": count, "tie_word_embeddings": True, "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    return count


def _append_sparse(file, name, pending):
    """Adds a tensor of zeros to a safetensors file, as a hole."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    span = [len(data), len(data) + pending.nbytes]
    header[name] = {"dtype": "BF16", "shape": list(pending.shape), "data_offsets": span}
    text = json.dumps(header).encode()
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text + data)
        stream.truncate(8 + len(text) + span[1])


def peak():
    return int(pathlib.Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024


def measure(source, target):
    """The conversion, in a process of its own: memory above what importing and compiling take."""
    import jaxquant as jq
    from jaxquant.conversion import convert

    config = jq.QuantConfig.preset("w4a16")
    jq.quantize({"kernel": np.ones((INPUTS, 256), BF16)}, config)
    jq.save(f"{target}-warm", {"w": np.ones(8, np.float32)})
    base, start = peak(), time.monotonic()
    convert(source, target, config)
    print(json.dumps({"base": base, "peak": peak() - base, "seconds": time.monotonic() - start}))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=20)
    parser.add_argument("--random", action="store_true")
    parser.add_argument("--out", type=pathlib.Path)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure(*arguments.measure)
        return
    with tempfile.TemporaryDirectory() as scratch:
        source, target = pathlib.Path(scratch, "hf"), pathlib.Path(scratch, "out")
        source.mkdir()
        count = make(source, arguments.gigabytes, arguments.random)
        command = [sys.executable, "-m", "experiments.bench_convert", "--measure", str(source), str(target)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    row = json.loads(done.stdout)
    leaf = INPUTS * OUTPUTS * 2
    row |= {"leaves": count, "leaf_bytes": leaf, "bytes": count * leaf, "random": arguments.random}
    row |= {"peak_leaves": row["peak"] / leaf, "bytes_per_second": count * leaf / row["seconds"]}
    text = json.dumps(row, indent=1)
    print(text)
    if arguments.out is not None:
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
