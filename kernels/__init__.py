"""Log-probs of packed tokens and their sums over segments; [T, V] never exists. One entry, three paths."""

import math

import torch
from torch import Tensor

from . import chunked, reference
from .reference import SegmentLogprobs

BACKENDS = ("auto", "reference", "chunked", "triton")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
INTEGERS = (torch.int64, torch.int32)


def segment_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, segment: Tensor,
                     num_segments: int | None = None, temperature: float | Tensor = 1.0,
                     backend: str = "auto") -> SegmentLogprobs:
    """Log-prob of every owned target, entropy at every owned position, sum of log-probs of every segment.

    hidden       [T, D] fp32, bf16 or fp16: row t predicts targets[t]
    weight       [V, D] the head, tied or not; another dtype is cast to hidden's, as the model's Linear does,
                 and its gradient is accumulated in fp32 and comes back in the weight's own dtype
    targets      [T] int: ids in 0..V-1 on owned rows, anything elsewhere
    segment      [T] int: 0..S-1, unique in the whole pack; -1: nobody owns the token, the row costs nothing
    num_segments S; None: the largest id + 1 (on CUDA that is one more wait for the device)
    temperature  > 0: a number, or [T] (anything on unowned rows); divides the logits, gets no gradient
    backend      "auto": Triton on CUDA, chunked PyTorch elsewhere; or "reference", "chunked", "triton"

    Returns SegmentLogprobs(logprob [T], entropy [T], segment_logprob [S]), fp32, in nats, 0 where not owned,
    each differentiable once. Bad input: one ValueError with the argument, its shape and what was expected.
    """
    check_shapes(hidden, weight, targets, segment, num_segments, temperature, backend)
    rows, y, ids, scale, num_segments = owned_rows(weight, targets, segment, num_segments, temperature)
    if backend == "reference":
        return reference.segment_logprobs(hidden, weight, targets, segment, num_segments, temperature)
    path = chosen(backend, hidden)
    with torch.cuda.device_of(hidden):  # Triton launches on the current device, whichever that is
        logprob, entropy = path.LogprobEntropy.apply(gathered(hidden, rows), weight, y, scale)  # [N], [N]
        return scattered(logprob, entropy, path.segment_sum(logprob, ids, num_segments), rows, len(hidden))


def weighted_logprob(hidden: Tensor, weight: Tensor, targets: Tensor, segment: Tensor, coefficient: Tensor,
                     num_segments: int | None = None, temperature: float | Tensor = 1.0,
                     backend: str = "auto") -> tuple[Tensor, SegmentLogprobs]:
    """The sum over owned tokens of coefficient * logprob, for coefficients known before the forward (a
    strictly on-policy update: advantage / denominator). It makes the gradients on the way forward, so 6NVD
    operations, not 8.

    coefficient [T] floats, anything on unowned rows; it gets no gradient. The rest: see segment_logprobs.
    Returns (sum [] fp32, differentiable once; SegmentLogprobs without gradients). On the Triton path these
    log-probs come from logits rounded to hidden's type: log them, but form no ratio with them. The two
    gradients wait for the backward in fp32. Bad input: one ValueError, as in segment_logprobs.
    """
    check_shapes(hidden, weight, targets, segment, num_segments, temperature, backend)
    rows, y, ids, scale, num_segments = owned_rows(weight, targets, segment, num_segments, temperature)
    if not per_row(coefficient, hidden):
        raise bad("coefficient", coefficient, f"floats [{len(hidden)}] on {hidden.device}, one for each row")
    c = coefficient.detach()[rows].float()  # [N]
    if backend == "reference":
        out = reference.segment_logprobs(hidden, weight, targets, segment, num_segments, temperature)
        return (out.logprob[rows] * c).sum(), SegmentLogprobs(*(part.detach() for part in out))
    if not torch.is_grad_enabled():  # nobody will ask for the gradients, so they are not made
        hidden, weight = hidden.detach(), weight.detach()
    path = chosen(backend, hidden)
    with torch.cuda.device_of(hidden):
        total, logprob, entropy = path.Weighted.apply(gathered(hidden, rows), weight, y, scale, c)
        sums = path.segment_sum(logprob, ids, num_segments)
    return total, scattered(logprob, entropy, sums, rows, len(hidden))


def gathered(hidden: Tensor, rows: Tensor) -> Tensor:
    """[T, D] -> [N, D]: one copy of the owned rows, and none where all are owned."""
    return hidden if len(rows) == len(hidden) else hidden.index_select(0, rows)


def scattered(logprob: Tensor, entropy: Tensor, sums: Tensor, rows: Tensor, T: int) -> SegmentLogprobs:
    """[N] -> [T], zeros where nobody owns the token."""
    zeros = logprob.new_zeros(T)
    return SegmentLogprobs(zeros.index_copy(0, rows, logprob), zeros.index_copy(0, rows, entropy), sums)


def chosen(backend: str, hidden: Tensor):
    """The module that computes. Triton is imported on first use: a machine without it never needs it."""
    if backend == "chunked" or backend == "auto" and not hidden.is_cuda:
        return chunked
    from . import segment_logprob
    if not hidden.is_cuda and not segment_logprob.INTERPRET:
        raise bad("backend", backend, f"hidden on CUDA, not on {hidden.device}, or TRITON_INTERPRET=1")
    return segment_logprob


def per_row(value, hidden: Tensor) -> bool:
    return (isinstance(value, Tensor) and value.is_floating_point() and value.device == hidden.device
            and value.shape == hidden.shape[:1])


def bad(name: str, value, expected: str) -> ValueError:
    if isinstance(value, Tensor):
        return ValueError(f"{name} {list(value.shape)} {value.dtype} on {value.device}: expected {expected}")
    return ValueError(f"{name} {value!r}: expected {expected}")


def check_shapes(hidden, weight, targets, segment, num_segments, temperature, backend) -> None:
    """Everything that can be told without looking at the numbers."""
    for name, value, dims in (("hidden", hidden, "[T, D]"), ("weight", weight, "[V, D]"),
                              ("targets", targets, "[T]"), ("segment", segment, "[T]")):
        rank, dtypes = (2, FLOATS) if "D" in dims else (1, INTEGERS)
        if not isinstance(value, Tensor) or value.dim() != rank or value.dtype not in dtypes:
            raise bad(name, value, f"{dims} of {', '.join(map(str, dtypes))}")
        if value.device != hidden.device:
            raise bad(name, value, f"{dims} on {hidden.device}, where hidden is")
        if rank == 2 and value.stride(1) != 1 and value.shape[1] > 1:  # TMA and BLAS read rows, not columns
            raise bad(name, value, f"{dims} with a contiguous last dimension, not strides {value.stride()}")
    (T, D), V = hidden.shape, weight.shape[0]
    if V < 1 or weight.shape[1] != D:
        raise bad("weight", weight, f"[V, {D}] with V > 0 to fit hidden {list(hidden.shape)}")
    for name, value in (("targets", targets), ("segment", segment)):
        if len(value) != T:
            raise bad(name, value, f"[{T}] to fit hidden {list(hidden.shape)}")
    if num_segments is not None and not (type(num_segments) is int and num_segments >= 0):
        raise bad("num_segments", num_segments, "a whole number >= 0, or None")
    if isinstance(temperature, Tensor):
        if not per_row(temperature, hidden):
            raise bad("temperature", temperature, f"a number, or floats [{T}] on {hidden.device}")
    elif not (isinstance(temperature, (int, float)) and 0 < temperature < math.inf):
        raise bad("temperature", temperature, "a finite number > 0, or one for each row")
    if backend not in BACKENDS:
        raise bad("backend", backend, f"one of {', '.join(BACKENDS)}")


def owned_rows(weight, targets, segment, num_segments, temperature):
    """Indices of the owned rows, their targets, segment ids and 1 / temperature, all [N]; and S. Checks the
    numbers: on CUDA it waits for the device twice (N, then all verdicts at once), and the second time the
    queue is empty."""
    rows = (segment >= 0).nonzero()[:, 0]  # [N] ascending, so a pack without gaps is read in order
    y, ids = targets[rows].long(), segment[rows].long()  # [N], [N]
    if num_segments is None:
        num_segments = int(ids.max()) + 1 if len(ids) else 0
    if isinstance(temperature, Tensor):
        heat = temperature.detach()[rows].float()  # [N]
    else:  # a tensor from here on: a Python float would reach the kernels as fp64
        heat = torch.full_like(y, temperature, dtype=torch.float32)  # [N]
    rules = (("segment", segment, segment < -1, "-1 (not owned) or a segment id >= 0"),
             ("segment", segment, ids >= num_segments, f"ids below num_segments = {num_segments}"),
             ("targets", targets, (y < 0) | (y >= len(weight)), f"ids in 0..{len(weight) - 1} on owned rows"),
             ("temperature", temperature, ~((heat > 0) & heat.isfinite()), "finite floats > 0 on owned rows"))
    verdicts = torch.stack([wrong.any() for _, _, wrong, _ in rules]).tolist()
    for (name, value, wrong, expected), refused in zip(rules, verdicts):
        if refused:  # the first offender, so that the caller can find it
            at = int(wrong.nonzero()[0])
            at = at if len(wrong) == len(segment) else int(rows[at])
            raise bad(name, value, f"{expected}, not {value[at].item()} in row {at}")
    return rows, y, ids, heat.reciprocal(), num_segments
