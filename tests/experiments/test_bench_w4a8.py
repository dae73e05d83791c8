import jax.numpy as jnp
import pytest

from experiments import _int4, bench_low_bit, bench_w4a8
from pallas_kernels.int4_matmul import Config, default_config, int4_matmul, supports
from pallas_kernels.low_bit_matmul import low_bit_matmul


def test_the_kernel_takes_what_is_verified():
    for item in bench_w4a8.verify_items():
        k, n, groups = item["k"], -(-item["n"] // 64) * 64, item["k"] // item["group"]
        config = (
            Config(**item["config"]) if "config" in item else default_config(item["m"], k, n, groups, item["dtype"])
        )
        assert supports(k, n, groups, item["dtype"], config=config) is None, item


def test_a_sweep_interleaves_problems():
    items = bench_w4a8.sweep_items(["llama3-8b/o"], [16, 1024], list(bench_w4a8.FORMS))
    assert len({(item["m"], item["form"]) for item in items[:6]}) == 6
    assert all(
        supports(4096, 4096, 32, "int8", config=Config(**i["config"])) is None for i in items if "g128" in i["form"]
    )


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_the_check_of_codes_finds_a_wrong_scale(dtype):
    data = _int4.problem(3, 5, 256, 128, 64, dtype=dtype, bias=True)
    operands = (data["x"], *data["weights"][0])
    out = int4_matmul(*operands, bias=data["bias"], x_scale=data["x_scale"])
    error = lambda out: float(_int4.relative_error(out, *operands, data["bias"], data["x_scale"]))  # noqa: E731
    assert error(out) <= _int4.TOLERANCE["bfloat16"]
    assert error(out * 1.05) > _int4.TOLERANCE["bfloat16"]


@pytest.mark.parametrize("qtype", list(bench_low_bit.GROUPS))
def test_the_check_of_other_formats_finds_a_wrong_code(qtype):
    data = _int4.problem(4, 3, 256, 128, bench_low_bit.GROUPS[qtype] or 256, qtype=qtype)
    qweight, scale, zero = data["weights"][0]
    error = lambda out: float(_int4.relative_error(out, data["x"], qweight, scale, zero, None, qtype=qtype))  # noqa: E731
    assert error(low_bit_matmul(data["x"], qweight, scale, qtype=qtype)) <= _int4.TOLERANCE["bfloat16"]
    wrong = low_bit_matmul(data["x"], qweight ^ jnp.int32(0x01010101), scale, qtype=qtype)
    assert error(wrong) > _int4.TOLERANCE["bfloat16"]


def test_the_summary_counts_the_quantization(capsys):
    timed = {"shape": "llama3-8b/o", "m": 16, "form": "int8-g128"}
    bench_w4a8.summary([timed | {"kernel_us": 8.0, "total_us": 10.0, "w4a16_us": 9.0}, timed | {"mm_us": 20.0}])
    line = capsys.readouterr().out
    assert "(2.00x)" in line
    assert f"({8 / 9:.2f} of it)" in line
