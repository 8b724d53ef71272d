"""Log-probs of packed tokens and sums over segments, without storing [T, V]: one function, three paths."""

import math
from types import ModuleType

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
    weight       [V, D] the head, tied or not; another dtype is cast to hidden's, as in the model's Linear;
                 its gradient is accumulated in fp32 and returned in the weight's own dtype
    targets      [T] int: ids in 0..V-1 on owned rows, anything elsewhere
    segment      [T] int: 0..S-1, unique in the whole pack; -1: not owned, the row costs nothing
    num_segments S; None: the largest id + 1 (on CUDA this waits for the device once more)
    temperature  > 0: a number, or [T] (anything on unowned rows); divides the logits, gets no gradient
    backend      "auto": Triton on CUDA from compute capability 8.0 on (A100 and later), else chunked PyTorch;
                 or "reference", "chunked", "triton"

    Returns SegmentLogprobs(logprob [T], entropy [T], segment_logprob [S]), fp32, in nats, 0 where not owned,
    each differentiable once. Raises ValueError that names the argument, its shape and what was expected.
    """
    check_shapes(hidden, weight, targets, segment, num_segments, temperature, backend)
    rows, y, ids, scale, num_segments = owned_rows(weight, targets, segment, num_segments, temperature)
    if backend == "reference":
        return reference.segment_logprobs(hidden, weight, targets, segment, num_segments, temperature)
    path = select_path(backend, hidden)
    owned = hidden if len(rows) == len(hidden) else hidden.index_select(0, rows)  # [N, D]
    with torch.cuda.device_of(hidden):  # Triton launches on the current device
        logprob, entropy = path.LogprobEntropy.apply(owned, weight, y, scale)  # [N], [N]
        sums = path.segment_sum(logprob, ids, num_segments)  # [S]
    zeros = logprob.new_zeros(len(hidden))  # [T]
    return SegmentLogprobs(zeros.index_copy(0, rows, logprob), zeros.index_copy(0, rows, entropy), sums)


def select_path(backend: str, hidden: Tensor) -> ModuleType:
    """The module that computes. Imports Triton on first use only, so that CPU machines do not need it."""
    capability = torch.cuda.get_device_capability(hidden.device) if hidden.is_cuda else (0, 0)
    if backend == "chunked" or backend == "auto" and capability < (8, 0):
        return chunked
    from . import segment_logprob
    if not segment_logprob.INTERPRET and capability < (8, 0):
        found = "compute capability {}.{}".format(*capability) if hidden.is_cuda else hidden.device
        raise bad("backend", backend, f"hidden on CUDA from compute capability 8.0 on, not on {found}; or "
                                      "TRITON_INTERPRET=1")
    return segment_logprob


def bad(name: str, value, expected: str) -> ValueError:
    if isinstance(value, Tensor):
        return ValueError(f"{name} {list(value.shape)} {value.dtype} on {value.device}: expected {expected}")
    return ValueError(f"{name} {value!r}: expected {expected}")


def check_shapes(hidden, weight, targets, segment, num_segments, temperature, backend) -> None:
    """Checks everything that does not depend on the numbers."""
    for name, value, dims in (("hidden", hidden, "[T, D]"), ("weight", weight, "[V, D]"),
                              ("targets", targets, "[T]"), ("segment", segment, "[T]")):
        rank, dtypes = (2, FLOATS) if "D" in dims else (1, INTEGERS)
        if not isinstance(value, Tensor) or value.dim() != rank or value.dtype not in dtypes:
            raise bad(name, value, f"{dims} of {', '.join(map(str, dtypes))}")
        if value.device != hidden.device:
            raise bad(name, value, f"{dims} on {hidden.device}, the device of hidden")
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
        if not (temperature.is_floating_point() and temperature.device == hidden.device
                and temperature.shape == (T,)):
            raise bad("temperature", temperature, f"a number, or floats [{T}] on {hidden.device}")
    elif not (isinstance(temperature, (int, float)) and 0 < temperature < math.inf):
        raise bad("temperature", temperature, "a finite number > 0, or one for each row")
    if backend not in BACKENDS:
        raise bad("backend", backend, f"one of {', '.join(BACKENDS)}")


def owned_rows(weight, targets, segment, num_segments, temperature):
    """Indices of the owned rows, their targets, segment ids and 1 / temperature, all [N]; and S. Checks the
    numbers. On CUDA it waits for the device twice: for N, and for all checks at once."""
    V = len(weight)
    rows = (segment >= 0).nonzero()[:, 0]  # [N] ascending, so a fully owned pack is read in order
    y, ids = targets[rows].long(), segment[rows].long()  # [N], [N]
    if num_segments is None:
        num_segments = int(ids.max()) + 1 if len(ids) else 0
    if isinstance(temperature, Tensor):
        divisor = temperature.detach()[rows].float()  # [N]
    else:  # a tensor from here on: a Python float would reach the kernels as fp64
        divisor = torch.full_like(y, temperature, dtype=torch.float32)  # [N]
    checks = (("segment", segment, segment < -1, "-1 (not owned) or a segment id >= 0"),
              ("segment", segment, ids >= num_segments, f"ids below num_segments = {num_segments}"),
              ("targets", targets, (y < 0) | (y >= V), f"ids in 0..{V - 1} on owned rows"),
              ("temperature", temperature, ~((divisor > 0) & divisor.isfinite()),
               "finite floats > 0 on owned rows"))
    failed = torch.stack([wrong.any() for _, _, wrong, _ in checks]).tolist()
    for (name, value, wrong, expected), fails in zip(checks, failed):
        if fails:
            at = int(wrong.nonzero()[0])
            at = at if len(wrong) == len(segment) else int(rows[at])  # `wrong` is [T] or [N]
            raise bad(name, value, f"{expected}, not {value[at].item()} in row {at}")
    return rows, y, ids, divisor.reciprocal(), num_segments
