"""Holds `ist_gptq.py` beside the authors' own `gptq.py` and `quant.py`, where `run_peers.py` runs.

    python experiments/oracles/check_ist_gptq.py CLONE    # of https://github.com/IST-DASLab/gptq

Layers of adverse shapes, with a dead channel, are rounded by both from the same inputs, and must come out equal.
"""

import copy
import itertools
import sys

import torch
from ist_gptq import GPTQ, Quantizer

SHAPES = ((96, 256), (64, 384))  # outputs, inputs
TOKENS = (3, 200)  # sequences, length


def inputs_of(columns):
    """Correlated channels of unlike size, one of which never fires."""
    inputs = torch.randn(*TOKENS, columns) @ torch.randn(columns, columns) * torch.rand(columns)
    inputs[..., 5] = 0
    return inputs


def theirs(layer, inputs, bits, sym, mse, **flags):
    import gptq
    import quant

    solver = gptq.GPTQ(layer)
    solver.quantizer = quant.Quantizer()
    solver.quantizer.configure(bits, perchannel=True, sym=sym, mse=mse)
    for sequence in inputs:
        solver.add_batch(sequence[None], layer(sequence[None]))
    solver.fasterquant(percdamp=0.01, groupsize=128, **flags)


def ours(layer, inputs, bits, sym, mse, **flags):
    solver = GPTQ(layer)
    for sequence in inputs:
        solver.add_batch(sequence[None])
    solver.fasterquant(Quantizer(bits, sym, mse), **flags)


@torch.no_grad()
def main(clone):
    sys.path.insert(0, clone)
    torch.cuda.synchronize = lambda: None  # the original waits for a GPU after each layer
    torch.manual_seed(0)
    worst, count = 0.0, 0
    for (rows, columns), bits, sym, mse, (actorder, static) in itertools.product(
        SHAPES, (4, 3), (True, False), (True, False), ((False, False), (False, True), (True, True))
    ):
        layer, inputs = torch.nn.Linear(columns, rows, bias=False), inputs_of(columns)
        pair = [copy.deepcopy(layer) for _ in range(2)]
        for run, one in zip((theirs, ours), pair, strict=True):
            run(one, inputs, bits, sym, mse, actorder=actorder, static_groups=static)
        moved = (pair[0].weight - layer.weight).abs().max()
        worst = max(worst, float((pair[0].weight - pair[1].weight).abs().max() / moved))
        count += 1
    print(f"{count} layers; greatest difference {worst:.1e} of the greatest change")


if __name__ == "__main__":
    main(*sys.argv[1:])
