"""GPTQ as its authors' reference code computes it, rewritten in short for Llama-family blocks (PyTorch).

After IST-DASLab/gptq (Apache License 2.0; `gptq.py`, `quant.py`, `llama.py`), by Elias Frantar and others: names, order
of operations and constants are theirs (`check_ist_gptq.py` holds both side by side). `ist_gptq` follows its `llama.py`:
block after block, inputs from the quantized blocks before it, all linear layers of a block at once unless
`true_sequential`, damping 0.01, blocks of 128 columns.
"""

import copy
import math

import torch

BLOCK = 128
DAMPING = 0.01
NORM, STEPS, SHRINK = 2.4, 100, 0.8  # of the search for ranges
STAGES = (("k_proj", "v_proj", "q_proj"), ("o_proj",), ("up_proj", "gate_proj"), ("down_proj",))


class Quantizer:
    """Scale and zero point of each row of a matrix."""

    def __init__(self, bits, sym, mse):
        self.maxq, self.sym, self.mse = 2**bits - 1, sym, mse

    def find_params(self, x):
        zeros = torch.zeros(x.shape[0])
        xmin, xmax = torch.minimum(x.min(1)[0], zeros), torch.maximum(x.max(1)[0], zeros)
        if self.sym:
            xmax = torch.maximum(xmin.abs(), xmax)
            xmin = torch.where(xmin < 0, -xmax, xmin)
        empty = (xmin == 0) & (xmax == 0)
        xmin[empty], xmax[empty] = -1, 1
        self.scale, self.zero = self._params(xmin, xmax)
        if not self.mse:
            return
        best = torch.full_like(xmax, math.inf)
        for step in range(int(SHRINK * STEPS)):
            part = 1 - step / STEPS
            scale, zero = self._params(part * xmin, part * xmax)
            rounded = self._quantize(x, scale[:, None], zero[:, None])
            error = (rounded - x).abs_().pow_(NORM).sum(1)
            better = error < best
            best[better], self.scale[better], self.zero[better] = error[better], scale[better], zero[better]

    def _params(self, xmin, xmax):
        scale = (xmax - xmin) / self.maxq
        return scale, torch.full_like(scale, (self.maxq + 1) / 2) if self.sym else torch.round(-xmin / scale)

    def _quantize(self, x, scale, zero):
        return scale * (torch.clamp(torch.round(x / scale) + zero, 0, self.maxq) - zero)

    def quantize(self, column):
        return self._quantize(column, self.scale, self.zero)


class GPTQ:
    """One linear layer: gathers its Hessian, then rounds its weight."""

    def __init__(self, layer):
        self.layer, self.nsamples = layer, 0
        self.H = torch.zeros(layer.in_features, layer.in_features)

    def add_batch(self, inputs):
        count = inputs.shape[0]
        self.H *= self.nsamples / (self.nsamples + count)
        self.nsamples += count
        x = math.sqrt(2 / self.nsamples) * inputs.reshape(-1, inputs.shape[-1]).float()
        self.H += x.T @ x

    def fasterquant(self, quantizer, groupsize=128, actorder=False, static_groups=False, damping=DAMPING):
        W, H = self.layer.weight.data.clone().float(), self.H
        columns = W.shape[1]
        dead = torch.diag(H) == 0
        H[dead, dead] = 1
        W[:, dead] = 0
        groups = []
        if static_groups:
            for start in range(0, columns, groupsize):
                groups.append(copy.deepcopy(quantizer))
                groups[-1].find_params(W[:, start : start + groupsize])
        perm = torch.argsort(torch.diag(H), descending=True) if actorder else torch.arange(columns)
        W, H = W[:, perm], H[perm][:, perm]
        H += damping * torch.mean(torch.diag(H)) * torch.eye(columns)
        Hinv = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)
        Q = torch.zeros_like(W)
        for i1 in range(0, columns, BLOCK):
            i2 = min(i1 + BLOCK, columns)
            W1, Err1, Hinv1 = W[:, i1:i2].clone(), torch.zeros(len(W), i2 - i1), Hinv[i1:i2, i1:i2]
            for i in range(i2 - i1):
                if static_groups:
                    quantizer = groups[perm[i1 + i] // groupsize]
                elif (i1 + i) % groupsize == 0:
                    quantizer.find_params(W[:, i1 + i : i1 + i + groupsize])
                q = quantizer.quantize(W1[:, i])
                Q[:, i1 + i] = q
                Err1[:, i] = (W1[:, i] - q) / Hinv1[i, i]
                W1[:, i:] -= Err1[:, i, None] @ Hinv1[i, None, i:]
            W[:, i2:] -= Err1 @ Hinv[i1:i2, i2:]
        self.layer.weight.data = Q[:, torch.argsort(perm)]


@torch.no_grad()
def ist_gptq(model, calibration, *, bits, sym, mse=False, true_sequential=False, **flags):
    """Rounds a Llama-family model's block weights in place; `calibration` is int64 [sequences, T]."""
    layers, entries = model.model.layers, []
    catcher = layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: entries.append((args[0], kwargs)), with_kwargs=True
    )
    for tokens in calibration:
        model(tokens[None], use_cache=False)
    catcher.remove()
    inputs = [hidden for hidden, _ in entries]
    for layer in layers:

        def run(inputs, layer=layer):
            return [layer(hidden, **kwargs) for hidden, (_, kwargs) in zip(inputs, entries, strict=True)]

        linears = {name.rsplit(".", 1)[-1]: m for name, m in layer.named_modules() if isinstance(m, torch.nn.Linear)}
        for names in STAGES if true_sequential else (linears,):
            solvers = [GPTQ(linears[name]) for name in names]
            hooks = [
                solver.layer.register_forward_hook(lambda module, args, out, solver=solver: solver.add_batch(args[0]))
                for solver in solvers
            ]
            run(inputs)
            for hook in hooks:
                hook.remove()
            for solver in solvers:
                solver.fasterquant(Quantizer(bits, sym, mse), **flags)
        inputs = run(inputs)
