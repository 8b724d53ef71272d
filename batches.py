"""Rollouts and demonstrations as batches of the learner: little padding, and each prompt once.

Shapes: B rollouts, T tokens of a row, M targets of a micro-batch, N of them owned by a player, U prompts.
"""
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from attention import Packed
from rollout import Rollouts


def pad(rows: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Encoded demonstrations as tokens [b, T] and segment [b, T], right-padded; b may be 0."""
    if not rows:
        return torch.zeros(0, 2, dtype=torch.long), torch.zeros(0, 2, dtype=torch.long)
    tokens, segment = zip(*rows)
    return pad_sequence(tokens, batch_first=True), pad_sequence(segment, batch_first=True, padding_value=-1)


def micro_batches(length: Tensor, budget: int) -> list[list[int]]:
    """Rows sorted by length [B] and split into batches of at most `budget` padded tokens, or of one row."""
    batches = []
    for b in length.argsort(stable=True).tolist():
        if not batches or (len(batches[-1]) + 1) * int(length[b]) > budget:
            batches.append([])
        batches[-1].append(b)
    return batches


def pack(rollouts: Rollouts, budget: int) -> list[list[list[int]]]:
    """Rows sorted by length, in blocks whose longest row is at most a fifth longer than the shortest, in
    batches of at most `budget` tokens, or of one row. A batch's distinct prompts and its padding count."""
    prefix, blocks, batches = max(rollouts.start.tolist(), default=0), [], []
    length, prompt = (rollouts.length - rollouts.start + 1).tolist(), rollouts.prompt.tolist()
    for b in sorted(range(len(length)), key=length.__getitem__):
        if (not blocks or length[b] > 1.2 * length[blocks[-1][0]]
                or (len(blocks[-1]) + 1) * (length[b] + prefix) > budget):
            blocks.append([])
        blocks[-1].append(b)
    for block in blocks:
        batch = batches.pop() if batches else []
        prompts = len({prompt[b] for b in sum(batch, block)})
        tokens = sum(len(x) * length[x[-1]] for x in [*batch, block]) + prompts * prefix
        batches += [[*batch, block]] if tokens <= budget or not batch else [batch, [block]]
    return batches


class MicroBatch(NamedTuple):
    packed: Packed  # the rows without their last token
    target: Tensor  # [M] next tokens
    owned: Tensor  # [M] bool: which targets a player owns
    logprob: Tensor  # [N], when sampled
    advantage: Tensor  # [N]
    is_thought: Tensor  # [N] bool
    is_answer: Tensor  # [N] bool


def micro_batch(rollouts: Rollouts, advantage: Tensor, blocks: list[list[int]], device) -> MicroBatch:
    """The chosen rows of the batch, in blocks of similar length. A row starts at its prompt's last
    token, which predicts the first sampled one; the tokens before it are shared."""
    cut, length, rows = rollouts.start - 1, rollouts.length, sum(blocks, [])
    columns = [cut[block, None] + torch.arange(int((length - cut)[block].max())) for block in blocks]
    inside = torch.cat([(column < length[block, None])[:, 1:].flatten()
                        for block, column in zip(blocks, columns)])  # [M]

    def take(x: Tensor) -> list[Tensor]:  # [b, T] of each block
        return [x[block].gather(1, column.clamp(max=x.shape[1] - 1))
                for block, column in zip(blocks, columns)]

    def targets(x: Tensor) -> Tensor:  # [M]
        return torch.cat([y[:, 1:].flatten() for y in take(x)])
    prompt, owner = rollouts.prompt[rows].unique(return_inverse=True)  # [U], [rows]
    first = torch.tensor(rows)[torch.zeros_like(prompt).scatter_(0, owner, torch.arange(len(rows)))]  # [U]
    packed = Packed(rollouts.tokens[first, :int(cut[first].max())].to(device), cut[first].to(device),
                    [block[:, :-1].to(device) for block in take(rollouts.tokens)],
                    list(owner.to(device).split([len(block) for block in blocks])))
    owned = inside & (targets(rollouts.segment) >= 0)
    values = (targets(x)[owned].to(device) for x in (rollouts.logprob, advantage, *rollouts.owners))
    return MicroBatch(packed, targets(rollouts.tokens).to(device), owned.to(device), *values)
