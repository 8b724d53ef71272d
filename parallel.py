"""The ranks of a run, through torch.distributed. One process is the case of one rank: nothing is sent then.

Counts and flags travel on the CPU, gradients where they are; every rank makes every call, in the same order.
"""
import torch
import torch.distributed as dist
from torch import Tensor, nn


def rank_and_world() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def total(x: Tensor) -> Tensor:
    """Sum over ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def largest(x: float) -> float:
    """The largest of the ranks' numbers."""
    number = torch.tensor(x)
    if dist.is_initialized():
        dist.all_reduce(number, dist.ReduceOp.MAX)
    return number.item()


def gathered(items: list) -> list:
    """The ranks' lists, chained."""
    if not dist.is_initialized():
        return items
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, items)
    return sum(everyone, [])


def means(sums: dict[str, tuple[float, float]]) -> dict[str, float | None]:
    """{name: (sum, count)} of this rank -> {name: mean over all ranks}, None where nothing was counted."""
    table = total(torch.tensor(list(sums.values()), dtype=torch.float64))
    return {name: s / n if n else None for name, (s, n) in zip(sums, table.tolist())}


def reduce_gradients(model: nn.Module, max_norm: float) -> float:
    """Sums the gradients over ranks, as they carry the global denominators, and clips. -> the norm before."""
    for p in model.parameters():
        if p.grad is None:  # nothing to say here, but the other ranks wait for this one's part of the sum
            p.grad = torch.zeros_like(p)
        total(p.grad)
    return torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm).item()
