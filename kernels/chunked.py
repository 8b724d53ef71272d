"""The PyTorch path: log-probs of N owned tokens in chunks of C rows, so that [N, V] never exists. The price
is that the backward computes the logits again: 8NVD operations instead of 6NVD. Between two products a chunk
goes through the softmax in blocks of B rows, which stay in the cache. D width, V vocabulary, S segments."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_BYTES = 1 << 20  # of logits [C, V]; with smaller chunks, calls and threads' starts would show
MIN_ROWS = 128  # with fewer, reading and writing dW [V, D] once a chunk would cost as much as its product
BLOCK_BYTES = 512 << 10  # of logits [B, V] for each thread: with a copy 1 MB, half of a core's own cache


class Buffers(NamedTuple):
    """Made once, all fp32: fresh pages for every chunk would cost more than its softmax."""
    x: Tensor  # [C, D] hidden states over temperature
    z: Tensor  # [C, V] logits, later their gradient
    other: Tensor  # [B, V]


def slices(start: int, stop: int, size: int) -> list[slice]:
    return [slice(at, min(at + size, stop)) for at in range(start, stop, size)]


def chunks(rows: int, vocabulary: int) -> list[slice]:
    """Slices that cover the rows: 749 rows each at V = 350, MIN_ROWS at 152k (78 MB)."""
    return slices(0, rows, max(MIN_ROWS, CHUNK_BYTES // (4 * vocabulary)))


def prepare(hidden: Tensor, weight: Tensor) -> tuple[list[slice], Tensor, Buffers]:
    """The chunks; the weight as the model's Linear sees it, fp32 masters rounded to the type of the
    activations, in fp32 (a copy only where it is not); the buffers."""
    w = weight.to(hidden.dtype).float()  # [V, D]
    (V, D), parts = w.shape, chunks(len(hidden), len(w))
    C = parts[0].stop if parts else 0
    B = min(C, torch.get_num_threads() * max(1, BLOCK_BYTES // (4 * V)))
    return parts, w, Buffers(w.new_empty(C, D), w.new_empty(C, V), w.new_empty(B, V))


def logits(hidden: Tensor, w: Tensor, scale: Tensor, part: slice, space: Buffers) -> tuple[Tensor, Tensor]:
    """One chunk's rows x [C, D] over their temperature (cheaper here than on [C, V]) and logits z [C, V].
    In fp32: bf16 would be off by 0.1 at 30."""
    x = torch.mul(hidden[part], scale[part, None], out=space.x[:part.stop - part.start])
    return x, torch.mm(x, w.T, out=space.z[:len(x)])


def blocks(part: slice, z: Tensor, space: Buffers):
    """Yields the blocks of a chunk: their rows among all N, their logits, room for as many, [B, V] each."""
    for rows in slices(part.start, part.stop, len(space.other)):
        yield rows, z[rows.start - part.start:rows.stop - part.start], space.other[:rows.stop - rows.start]


def fold(z: Tensor, other: Tensor, peak: Tensor, total: Tensor, moment: Tensor) -> None:
    """z [B, V] -> in its place e^d with d = z - peak; for each row the peak, the sum of e^d and the sum of
    e^d d, [B, 1]."""
    torch.amax(z, -1, keepdim=True, out=peak)
    torch.exp(torch.sub(z, peak, out=other), out=z)
    torch.sum(z, -1, keepdim=True, out=total)
    torch.sum(other.mul_(z), -1, keepdim=True, out=moment)


def finish(picked: Tensor, peak: Tensor, total: Tensor, moment: Tensor) -> tuple[Tensor, Tensor]:
    """[N, 1] each -> logprob [N], never above 0, and entropy [N], never below 0."""
    log = total.log()  # >= 0: the peak itself counts e^0
    return (picked - peak - log)[:, 0], (log - moment / total)[:, 0]


def products(dz: Tensor, x: Tensor, factor: Tensor, scale: Tensor, w: Tensor, part: slice,
             dx: Tensor | None, dw: Tensor | None) -> None:
    """Gradients of one chunk: factor [C, 1] times dz [C, V] is that of the logits. dx's rows are written, dw
    collects; None: not wanted. x is lost."""
    if dw is not None:
        dw.addmm_(dz.T, x.mul_(factor))
    if dx is not None:
        torch.mul(torch.mm(dz, w, out=x), factor * scale[part, None], out=dx[part])


class LogprobEntropy(torch.autograd.Function):
    """(hidden [N, D], weight [V, D], targets [N], scale [N] = 1 / temperature) -> logprob, entropy [N]."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, scale):
        parts, w, space = prepare(hidden, weight)
        picked, peak, total, moment = (torch.empty_like(scale)[:, None] for _ in range(4))  # [N, 1]
        for part in parts:
            _, chunk = logits(hidden, w, scale, part, space)
            picked[part] = chunk.gather(1, targets[part, None])
            for rows, z, other in blocks(part, chunk, space):
                fold(z, other, peak[rows], total[rows], moment[rows])
        logprob, entropy = finish(picked, peak, total, moment)
        ctx.save_for_backward(hidden, weight, targets, scale, peak, total, entropy)
        ctx.set_materialize_grads(False)  # an output that nobody used has no gradient, and costs nothing
        return logprob, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logprob, grad_entropy):
        # d logits = g (1[target] - p) - h p (log p + entropy), p = e^d / total; g, h: gradients of logprob
        # and of entropy. A factor of the whole row, 1 / total and without h also g, waits for `products`
        hidden, weight, targets, scale, peak, total, entropy = ctx.saved_tensors
        parts, w, space = prepare(hidden, weight)
        g = torch.zeros_like(total) if grad_logprob is None else grad_logprob[:, None]  # [N, 1]
        if grad_entropy is None:
            factor, hit = -g / total, -total  # [N, 1]
        else:
            factor, hit, h = 1 / total, g * total, grad_entropy[:, None]
            shift = entropy[:, None] - total.log()  # log p + entropy = d + shift
        dx = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None  # [N, D]
        dw = torch.zeros_like(w) if ctx.needs_input_grad[1] else None  # [V, D] fp32; a frozen head: 6NVD
        for part in parts:
            x, dz = logits(hidden, w, scale, part, space)
            for rows, z, other in blocks(part, dz, space):
                z.sub_(peak[rows])  # d
                if grad_entropy is None:
                    z.exp_()
                else:
                    power = torch.exp(z, out=other)
                    z.add_(shift[rows]).mul_(-h[rows]).sub_(g[rows]).mul_(power)
            dz.scatter_add_(1, targets[part, None], hit[part])  # p - 1 in fp32, before any rounding
            products(dz, x, factor[part], scale, w, part, dx, dw)
        return dx, None if dw is None else dw.to(weight.dtype), None, None


class Weighted(torch.autograd.Function):
    """(hidden, weight, targets, scale, coefficient [N]) -> sum of coefficient * logprob, and logprob [N] and
    entropy [N] without gradients. The gradients are made on the way forward, from the same logits: 6NVD
    operations."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, scale, coefficient):
        parts, w, space = prepare(hidden, weight)
        picked, peak, total, moment = (torch.empty_like(scale)[:, None] for _ in range(4))  # [N, 1]
        dx = torch.empty_like(hidden, dtype=torch.float32) if ctx.needs_input_grad[0] else None  # [N, D]
        dw = torch.zeros_like(w) if ctx.needs_input_grad[1] else None  # [V, D]
        for part in parts:
            x, dz = logits(hidden, w, scale, part, space)
            picked[part] = dz.gather(1, targets[part, None])
            for rows, z, other in blocks(part, dz, space):
                fold(z, other, peak[rows], total[rows], moment[rows])
            dz.scatter_add_(1, targets[part, None], -total[part])  # total times p - 1
            products(dz, x, -coefficient[part, None] / total[part], scale, w, part, dx, dw)
        logprob, entropy = finish(picked, peak, total, moment)
        ctx.save_for_backward(dx, dw)
        ctx.types = hidden.dtype, weight.dtype
        ctx.mark_non_differentiable(logprob, entropy)
        return (coefficient * logprob).sum(), logprob, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, *_):
        # not in place: a second backward must find them as they were
        dx, dw = (None if d is None else (d * grad).to(t) for d, t in zip(ctx.saved_tensors, ctx.types))
        return dx, dw, None, None, None


def segment_sum(values: Tensor, segment: Tensor, num_segments: int) -> Tensor:
    """values [N], segment [N] -> [S]. In the order of the rows on a CPU, so the same bits every time."""
    return values.new_zeros(num_segments).index_add(0, segment, values)
