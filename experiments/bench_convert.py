"""Converts a large synthetic checkpoint and measures memory and speed; fails above two leaves of peak memory.

    python -m experiments.bench_convert [--gigabytes 20] [--recipe w4a16|none|fp8-block|...]
        [--source huggingface|orbax|jaxquant] [--sparse] [--out results.json]

The checkpoint is a Hugging Face folder (or one of orbax or ours, made in memory: a few GB) of bfloat16 kernels
[8192, 28672] (the feed-forward layers of a 70B Llama, 470 MB each) of random numbers. Before the conversion the files
are put out of the page cache, after it everything is flushed to the disk, inside the time that is measured; beside it
stand the speeds of the same disk at plain reading and writing. `--recipe none` converts without quantizing. `--sparse`
makes files of zeros that take no disk.
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
BLOCK = 1 << 23  # bytes


def make(folder, gigabytes, sparse):
    count = max(1, round(gigabytes * 1e9 / (INPUTS * OUTPUTS * 2)))
    layout = {f"model.layers.{i}.mlp.up_proj.weight": Pending(BF16, (OUTPUTS, INPUTS)) for i in range(count)}
    small = {"model.embed_tokens.weight": np.ones((8, INPUTS), BF16), "model.norm.weight": np.ones(INPUTS, BF16)}
    values = None if sparse else np.random.default_rng(0).standard_normal((OUTPUTS, INPUTS), np.float32).astype(BF16)
    for number, (name, pending) in enumerate(layout.items()):
        file = folder / f"model-{number}.safetensors"
        extra = small if number == 0 else {}
        if values is not None:
            held = {**extra, name: np.roll(values, number, axis=0)}
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


def make_tree(folder, gigabytes, source):
    """A checkpoint of orbax, compressed as is its custom, or of ours."""
    import orbax.checkpoint as ocp

    import jaxquant as jq

    count = max(1, round(gigabytes * 1e9 / (INPUTS * OUTPUTS * 2)))
    values = np.random.default_rng(0).standard_normal((INPUTS, OUTPUTS), np.float32).astype(BF16)
    tree = {f"layers_{number}": {"kernel": np.roll(values, number, axis=0)} for number in range(count)}
    if source == "jaxquant":
        jq.save(folder, tree)
    else:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(folder, tree)
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


def put_out_of_cache(folder):
    os.sync()
    for file in filter(pathlib.Path.is_file, folder.rglob("*")):
        with file.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def disk_speeds(source, target):
    """Bytes a second of reading the checkpoint's largest file, cold, and of writing it, flushed: by plain blocks."""
    file = max(filter(pathlib.Path.is_file, source.rglob("*")), key=lambda file: file.stat().st_size)
    block = bytearray(BLOCK)
    put_out_of_cache(source)
    start = time.monotonic()
    with file.open("rb", buffering=0) as stream:
        while stream.readinto(block):
            pass
    read, start = time.monotonic() - start, time.monotonic()
    with target.open("wb", buffering=0) as stream:
        for _ in range(file.stat().st_size // BLOCK):
            stream.write(block)
        os.fsync(stream.fileno())
    written = time.monotonic() - start
    target.unlink()
    return {"disk_read": file.stat().st_size / read, "disk_write": file.stat().st_size / written}


def make_config(recipe):
    """A preset, or what no preset is: blocks, kernels that contract their last axis, ranges that need the whole."""
    import jaxquant as jq

    others = {
        "fp8-block": ("float8_e4m3fn", jq.PerBlock((128, 128)), "absmax", None),
        "w4a16-last": ("int4", jq.PerGroup(128), "absmax", -1),
        "w8a16-tensor-last": ("int8", jq.PerTensor(), "absmax", (-2, -1)),
        "w8a16-tensor-mse": ("int8", jq.PerTensor(), "mse", None),
    }
    if recipe == "none":
        return None
    if recipe not in others:
        return jq.QuantConfig.preset(recipe)
    qtype, granularity, find, axis = others[recipe]
    spec = jq.QuantSpec(jq.TensorSpec(qtype, granularity, range=find))
    return jq.QuantConfig(rules=(jq.Rule(".*kernel", spec, axis),))


def measure(source, target, recipe):
    """The conversion, in a process of its own: memory above what importing and compiling take."""
    import jaxquant as jq
    from jaxquant.conversion import convert

    config = make_config(recipe)
    jq.save(f"{target}-small", {"kernel": np.ones((INPUTS, 512), BF16)})
    convert(f"{target}-small", f"{target}-warm", config)  # slices of the same shape
    put_out_of_cache(pathlib.Path(source))
    base, start, cpu = peak(), time.monotonic(), time.process_time()
    convert(source, target, config)
    os.sync()
    seconds, cpu_seconds = time.monotonic() - start, time.process_time() - cpu
    print(json.dumps({"base": base, "peak": peak() - base, "seconds": seconds, "cpu_seconds": cpu_seconds}))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=20)
    parser.add_argument("--recipe", default="w4a16")
    parser.add_argument("--source", choices=("huggingface", "orbax", "jaxquant"), default="huggingface")
    parser.add_argument("--sparse", action="store_true")
    parser.add_argument("--out", type=pathlib.Path)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure(*arguments.measure, arguments.recipe)
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        source, target = pathlib.Path(scratch, "source"), pathlib.Path(scratch, "out")
        if arguments.source == "huggingface":
            source.mkdir()
            count = make(source, arguments.gigabytes, arguments.sparse)
        else:
            count = make_tree(source, arguments.gigabytes, arguments.source)
        disk = disk_speeds(source, target)
        command = [sys.executable, "-m", "experiments.bench_convert", "--recipe", arguments.recipe]
        command += ["--measure", str(source), str(target)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=os.environ | {"JAX_PLATFORMS": "cpu"})
        written = sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
    row = json.loads(done.stdout)
    leaf = INPUTS * OUTPUTS * 2
    row |= {
        "recipe": arguments.recipe,
        "source": arguments.source,
        "sparse": arguments.sparse,
        "cores": len(os.sched_getaffinity(0)),
    }
    row |= {"leaves": count, "leaf_bytes": leaf, "bytes": count * leaf, "written": written, **disk}
    row |= {"peak_leaves": row["peak"] / leaf, "bytes_per_second": count * leaf / row["seconds"]}
    text = json.dumps(row, indent=1)
    print(text)
    if arguments.out is not None:
        arguments.out.write_text(text + "\n")
    if row["peak_leaves"] > 2:
        print(f"peak memory of {row['peak_leaves']:.2f} leaves above the base; two are the limit", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
