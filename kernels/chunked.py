"""The PyTorch path: log-probs of N owned tokens in chunks of C rows, so that [N, V] never exists. The price
is that the backward computes the logits again: 8NVD operations instead of 6NVD. D width, V vocabulary, S
segments."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_BYTES = 4 << 20  # one [C, V] fp32 buffer near a core's cache; a smaller one starts threads too often
MIN_ROWS = 128  # with fewer, reading and writing dW [V, D] once a chunk would cost as much as its product


def chunks(rows: int, vocabulary: int) -> list[slice]:
    """Slices that cover the rows: one or a few for a small vocabulary, MIN_ROWS each at 152k (78 MB)."""
    size = max(MIN_ROWS, CHUNK_BYTES // (4 * vocabulary))
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def buffers(parts: list[slice], vocabulary: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Two [C, V] fp32 buffers, made once: fresh pages for every chunk would cost more than its softmax."""
    shape = (parts[0].stop if parts else 0, vocabulary)  # C, V
    return like.new_empty(shape, dtype=torch.float32), like.new_empty(shape, dtype=torch.float32)


def log_softmax(x: Tensor, w: Tensor, logprobs: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probs and probs, each [C, V], of the scaled rows x [C, D], written into the two buffers."""
    logits = torch.mm(x, w.T, out=probs[:len(x)])  # [C, V] in fp32: bf16 would be off by 0.1 at 30
    logprobs = torch.log_softmax(logits, -1, out=logprobs[:len(x)])
    return logprobs, torch.exp(logprobs, out=logits)  # the logits are not needed again: their place is reused


def operands(hidden: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Rows divided by their temperature (cheaper here than on [N, V]) and the weight as the model's Linear
    sees it: fp32 masters rounded to the type of the activations. Both fp32; a copy of the weight only where
    it is not."""
    return hidden.float() * scale[:, None], weight.to(hidden.dtype).float()  # [N, D], [V, D]


def products(dz: Tensor, part: slice, x: Tensor, w: Tensor, dx: Tensor | None, dw: Tensor | None) -> None:
    """Gradients of one chunk from dz [C, V]: its rows of dx are written, dw collects. None: not wanted."""
    if dx is not None:
        torch.mm(dz, w, out=dx[part])
    if dw is not None:
        dw.addmm_(dz.T, x[part])


class LogprobEntropy(torch.autograd.Function):
    """(hidden [N, D], weight [V, D], targets [N], scale [N] = 1 / temperature) -> logprob, entropy [N]."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, scale):
        x, w = operands(hidden, weight, scale)
        logprob, entropy = torch.empty_like(scale), torch.empty_like(scale)  # [N]
        parts = chunks(len(x), len(w))
        space = buffers(parts, len(w), x)
        for part in parts:
            logprobs, probs = log_softmax(x[part], w, *space)  # [C, V]
            logprob[part] = logprobs.gather(1, targets[part, None])[:, 0]
            entropy[part] = -probs.mul_(logprobs).sum(-1)
        ctx.save_for_backward(hidden, weight, targets, scale, entropy)
        ctx.set_materialize_grads(False)  # an output that nobody used has no gradient, and costs nothing
        return logprob, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logprob, grad_entropy):
        hidden, weight, targets, scale, entropy = ctx.saved_tensors
        x, w = operands(hidden, weight, scale)
        g = torch.zeros_like(scale) if grad_logprob is None else grad_logprob  # [N]
        dx = torch.empty_like(x) if ctx.needs_input_grad[0] else None  # [N, D]
        dw = torch.zeros_like(w) if ctx.needs_input_grad[1] else None  # [V, D] fp32; a frozen head: 6NVD
        parts = chunks(len(x), len(w))
        space = buffers(parts, len(w), x)
        for part in parts:
            logprobs, dz = log_softmax(x[part], w, *space)  # [C, V] dz holds the probabilities p so far
            # d logits = g (1[target] - p) - h p (log p + entropy); g, h: gradients of logprob and of entropy
            if grad_entropy is None:
                dz.mul_(-g[part, None])
            else:
                h = grad_entropy[part, None]  # [C, 1]
                dz.mul_(logprobs.add_(entropy[part, None]).mul_(-h).sub_(g[part, None]))
            dz.scatter_add_(1, targets[part, None], g[part, None])  # p - 1 in fp32, before any rounding
            products(dz, part, x, w, dx, dw)
        return (None if dx is None else dx.mul_(scale[:, None]).to(hidden.dtype),
                None if dw is None else dw.to(weight.dtype), None, None)


class Weighted(torch.autograd.Function):
    """(hidden, weight, targets, scale, coefficient [N]) -> sum of coefficient * logprob, and logprob [N] and
    entropy [N] without gradients. The gradients are made on the way forward, from the same logits: 6NVD
    operations."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, scale, coefficient):
        x, w = operands(hidden, weight, scale)
        logprob, entropy = torch.empty_like(scale), torch.empty_like(scale)  # [N]
        dx = torch.empty_like(x) if ctx.needs_input_grad[0] else None  # [N, D]
        dw = torch.zeros_like(w) if ctx.needs_input_grad[1] else None  # [V, D]
        parts = chunks(len(x), len(w))
        space = buffers(parts, len(w), x)
        for part in parts:
            logprobs, dz = log_softmax(x[part], w, *space)  # [C, V]
            target, g = targets[part, None], coefficient[part, None]  # [C, 1]
            logprob[part] = logprobs.gather(1, target)[:, 0]
            entropy[part] = -logprobs.mul_(dz).sum(-1)
            products(dz.mul_(-g).scatter_add_(1, target, g), part, x, w, dx, dw)
        ctx.save_for_backward(None if dx is None else dx.mul_(scale[:, None]), dw)
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
