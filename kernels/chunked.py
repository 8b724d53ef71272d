"""The PyTorch path: log-probs of N owned tokens in chunks of C rows. The logits [N, V] are never stored, so
the backward computes them again: 8NVD operations instead of 6NVD. Within a chunk, the softmax runs in blocks
of B rows that stay in the cache. D width, V vocabulary, S segments."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_BYTES = 1 << 20  # of logits [C, V]; smaller chunks would pay more for calls and thread starts
MIN_ROWS = 128  # with fewer, reading and writing dweight [V, D] once a chunk costs as much as its product
BLOCK_BYTES = 512 << 10  # of logits [B, V] for each thread; with their copy 1 MB, half of a core's L2 cache


class Buffers(NamedTuple):
    """Allocated once, all fp32: fresh memory for every chunk would cost more than its softmax."""
    x: Tensor  # [C, D] hidden states over temperature
    z: Tensor  # [C, V] logits, later their gradient
    scratch: Tensor  # [B, V]


def slices(start: int, stop: int, size: int) -> list[slice]:
    return [slice(at, min(at + size, stop)) for at in range(start, stop, size)]


def chunks(rows: int, vocabulary: int) -> list[slice]:
    """Slices that cover the rows: 856 rows each at V = 306, MIN_ROWS at V = 152k (78 MB)."""
    return slices(0, rows, max(MIN_ROWS, CHUNK_BYTES // (4 * vocabulary)))


def prepare(hidden: Tensor, weight: Tensor) -> tuple[list[slice], Tensor, Buffers]:
    """The chunks, the weight, the buffers. The weight is rounded to the type of the activations, as in the
    model's Linear, and then held in fp32: a copy only if its own type differs."""
    w = weight.to(hidden.dtype).float()  # [V, D]
    (V, D), parts = w.shape, chunks(len(hidden), len(w))
    C = parts[0].stop if parts else 0
    B = min(C, torch.get_num_threads() * max(1, BLOCK_BYTES // (4 * V)))
    return parts, w, Buffers(w.new_empty(C, D), w.new_empty(C, V), w.new_empty(B, V))


def logits(hidden: Tensor, w: Tensor, scale: Tensor, part: slice, space: Buffers) -> tuple[Tensor, Tensor]:
    """One chunk: x [C, D], its rows over their temperature (cheaper than dividing [C, V]), and logits [C, V].
    In fp32: bf16 logits near 30 would be off by 0.1."""
    x = torch.mul(hidden[part], scale[part, None], out=space.x[:part.stop - part.start])
    return x, torch.mm(x, w.T, out=space.z[:len(x)])


def blocks(part: slice, z: Tensor, space: Buffers) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """The blocks of a chunk: their rows among all N, their logits [B, V], as much scratch."""
    for rows in slices(part.start, part.stop, len(space.scratch)):
        yield rows, z[rows.start - part.start:rows.stop - part.start], space.scratch[:rows.stop - rows.start]


class LogprobEntropy(torch.autograd.Function):
    """(hidden [N, D], weight [V, D], targets [N], scale [N] = 1 / temperature) -> logprob, entropy [N]."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, scale):
        parts, w, space = prepare(hidden, weight)
        # [N, 1]; top: the largest logit; with d = logit - top: total, the sum of e^d; moment, that of e^d d
        target_logit, top, total, moment = (torch.empty_like(scale)[:, None] for _ in range(4))
        for part in parts:
            _, chunk = logits(hidden, w, scale, part, space)
            target_logit[part] = chunk.gather(1, targets[part, None])
            for rows, z, scratch in blocks(part, chunk, space):
                torch.amax(z, -1, keepdim=True, out=top[rows])
                torch.exp(torch.sub(z, top[rows], out=scratch), out=z)
                torch.sum(z, -1, keepdim=True, out=total[rows])
                torch.sum(scratch.mul_(z), -1, keepdim=True, out=moment[rows])
        log = total.log()  # >= 0: the largest logit counts e^0
        logprob, entropy = (target_logit - top - log)[:, 0], (log - moment / total)[:, 0]  # <= 0, >= 0
        ctx.save_for_backward(hidden, weight, targets, scale, top, total, entropy)
        ctx.set_materialize_grads(False)  # an unused output has no gradient and costs nothing
        return logprob, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logprob, grad_entropy):
        # gradient of the logits = g (1[target] - p) - h p (log p + entropy), where p = e^d / total and g, h
        # are the gradients of logprob and entropy. `factor` applies what is constant in a row: 1 / total, and
        # also g if there is no h
        hidden, weight, targets, scale, top, total, entropy = ctx.saved_tensors
        parts, w, space = prepare(hidden, weight)
        g = torch.zeros_like(total) if grad_logprob is None else grad_logprob[:, None]  # [N, 1]
        if grad_entropy is None:
            factor, at_target = -g / total, -total  # [N, 1]
        else:
            factor, at_target, h = 1 / total, g * total, grad_entropy[:, None]
            shift = entropy[:, None] - total.log()  # log p + entropy = d + shift
        dx = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None  # [N, D]
        dw = torch.zeros_like(w) if ctx.needs_input_grad[1] else None  # [V, D] fp32; a frozen head saves 2NVD
        for part in parts:
            x, dz = logits(hidden, w, scale, part, space)
            for rows, z, scratch in blocks(part, dz, space):
                z.sub_(top[rows])  # d
                if grad_entropy is None:
                    z.exp_()
                else:
                    power = torch.exp(z, out=scratch)
                    z.add_(shift[rows]).mul_(-h[rows]).sub_(g[rows]).mul_(power)
            dz.scatter_add_(1, targets[part, None], at_target[part])  # p - 1 in fp32, before any rounding
            if dw is not None:
                dw.addmm_(dz.T, x.mul_(factor[part]))
            if dx is not None:  # x is not needed any more
                torch.mul(torch.mm(dz, w, out=x), factor[part] * scale[part, None], out=dx[part])
        return dx, None if dw is None else dw.to(weight.dtype), None, None


def segment_sum(values: Tensor, segment: Tensor, num_segments: int) -> Tensor:
    """values [N], segment [N] -> [S]. On a CPU in the order of the rows, so the same bits every time."""
    return values.new_zeros(num_segments).index_add(0, segment, values)
