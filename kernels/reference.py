"""The definition: every other path must equal it. T tokens, N owned tokens, D width, V vocabulary, S
segments."""

from typing import NamedTuple

import torch
from torch import Tensor


class SegmentLogprobs(NamedTuple):
    logprob: Tensor  # [T] log-probability of the target in nats, 0 where no segment owns the token
    entropy: Tensor  # [T] entropy of the next-token distribution in nats, 0 where no segment owns the token
    segment_logprob: Tensor  # [S] sum of logprob over the tokens of each segment


def segment_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, segment: Tensor, num_segments: int,
                     temperature: float | Tensor) -> SegmentLogprobs:
    """hidden [T, D], weight [V, D], targets [T], segment [T] (-1: not owned), temperature a number or [T].
    For tests and for reading: it stores [N, V] several times and checks nothing. Computes in fp32, or in fp64
    for fp64 inputs."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)  # 16-bit logits would ruin importance ratios
    rows = (segment >= 0).nonzero()[:, 0]  # [N] unowned rows are never read, so they may hold anything
    temperature = torch.as_tensor(temperature, dtype=dtype, device=hidden.device).expand(len(hidden))  # [T]
    logits = hidden[rows].to(dtype) @ weight.to(hidden.dtype).to(dtype).T / temperature[rows, None]  # [N, V]
    logprobs = logits.log_softmax(-1)  # [N, V]
    logprob = logprobs.gather(1, targets[rows, None].long())[:, 0]  # [N]
    entropy = -(logprobs.exp() * logprobs).sum(-1)  # [N]
    tokens, segments = logprob.new_zeros(len(hidden)), logprob.new_zeros(num_segments)  # [T], [S]
    return SegmentLogprobs(tokens.index_copy(0, rows, logprob), tokens.index_copy(0, rows, entropy),
                           segments.index_add(0, segment[rows], logprob))
