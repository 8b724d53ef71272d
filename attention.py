"""What attention needs besides the weights: the KV cache, packed rows, masks, rotary tables.

Shapes: B rows, T tokens, H heads, J key/value heads, E head width, S cache columns, U prompts of P columns.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lib.folder import Config


@dataclass
class Cache:
    """KV cache of S columns, filled from the left. All rows write the same column.

    `valid` marks the columns that belong to a row; left padding and the part of a thought that a fork drops
    do not. Positions are counted over valid columns, so a fork need not rotate its keys again."""
    k: list[Tensor]  # [B, J, S, E] of each layer
    v: list[Tensor]
    valid: Tensor  # [B, S] bool
    length: int  # columns filled so far

    def rows(self, index: Tensor, room: int | None = None) -> "Cache":
        """A new cache of the chosen rows, repeats allowed: expands a prompt to its group, forks a thought.
        room: its free columns (default: as many as here)."""
        index = index.to(self.valid.device)
        cache = Cache([*self.k], [*self.v], self.valid[index], self.length)
        cache.resize(self.valid.shape[1] if room is None else self.length + room, index)
        return cache

    def resize(self, columns: int, index: Tensor) -> None:
        """Keeps the rows of `index` and gives them `columns` columns. Goes layer by layer, so that two whole
        caches need not fit into memory."""
        n = self.length
        for tensors in (self.k, self.v):
            for i, x in enumerate(tensors):
                tensors[i] = x.new_empty(len(index), x.shape[1], columns, x.shape[3])
                tensors[i][:, :, :n] = x[index, :, :n]
        self.valid = F.pad(self.valid[:, :n], (0, columns - n))

    def keep(self, index: Tensor) -> None:
        """Keeps the rows of `index`, in place."""
        n, B = self.length, len(index)
        for tensors in (self.k, self.v):
            for i, x in enumerate(tensors):
                x[:B, :, :n] = x[index, :, :n]
                tensors[i] = x[:B]
        self.valid = self.valid[index]


@dataclass
class Packed:
    """Rows that begin with prompts. A prompt runs once for all rows that share it, and rows of similar length
    stand in one block, so that little is computed on padding. N tokens in all: prompts, then blocks."""
    prompts: Tensor  # [U, P] int64, right-padded
    length: Tensor  # [U]
    blocks: list[Tensor]  # [b, T] int64 each, right-padded: what follows the prompt
    owners: list[Tensor]  # [b] each: the prompt of each row

    @property
    def sizes(self) -> list[int]:
        return [x.numel() for x in (self.prompts, *self.blocks)]

    def layout(self, windows: set[int | None]) -> tuple[Tensor, Tensor, dict]:
        """-> tokens [1, N], positions [1, N] and, for each window, the masks of prompts and blocks."""
        column = torch.arange(self.prompts.shape[1], device=self.prompts.device)  # [P]
        position = [column.repeat(len(self.prompts))]
        masks = {w: [causal_mask(column[None] >= 0, len(column), w) if w else None] for w in windows}
        for block, owner in zip(self.blocks, self.owners):
            real = torch.cat((column < self.length[owner, None], torch.ones_like(block, dtype=torch.bool)), 1)
            position.append((real.cumsum(1)[:, -block.shape[1]:] - 1).flatten())
            for w in windows:
                masks[w].append(causal_mask(real, block.shape[1], w))
        tokens = torch.cat([x.flatten() for x in (self.prompts, *self.blocks)])
        return tokens[None], torch.cat(position)[None], masks

    def attend(self, q: Tensor, k: Tensor, v: Tensor, masks: list[Tensor | None]) -> Tensor:
        """q [1, H, N, E], k and v [1, J, N, E] -> [1, N, H * E]."""
        def parts(x: Tensor) -> list[Tensor]:  # [U, heads, P, E], then [b, heads, T, E] each
            return [y.unflatten(1, shape.shape).transpose(0, 1)
                    for y, shape in zip(x.squeeze(0).split(self.sizes, 1), (self.prompts, *self.blocks))]
        (prompt_q, *qs), (prompt_k, *ks), (prompt_v, *vs) = parts(q), parts(k), parts(v)
        outs = [attend(prompt_q, prompt_k, prompt_v, masks[0])]
        for q, k, v, owner, mask in zip(qs, ks, vs, self.owners, masks[1:]):
            k = torch.cat((prompt_k.index_select(0, owner), k), 2)  # [b, J, P + T, E]
            v = torch.cat((prompt_v.index_select(0, owner), v), 2)
            outs.append(attend(q, k, v, mask))
        return torch.cat([out.transpose(1, 2).reshape(-1, out.shape[1] * out.shape[3]) for out in outs])[None]


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """q [B, H, T, E], k and v [B, J, S, E], mask [B, 1, T, S] or None for causal -> [B, H, T, E]."""
    if mask is not None and q.is_cuda:  # or SDPA stores scores [B, H, T, S] in fp32
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    causal, grouped = mask is None and q.shape[2] > 1, q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=grouped)


def attention_dtype(x: Tensor) -> torch.dtype:
    """fp64 on the CPU. Decoding and the full forward sum attention in different orders; in fp32 that alone
    moves a log-prob by up to 2e-5, in fp64 both round to the same fp32 result."""
    return torch.float64 if x.device.type == "cpu" and x.dtype == torch.float32 else x.dtype


def causal_mask(valid: Tensor, T: int, window: int | None = None) -> Tensor:
    """valid [B, S] -> [B, 1, T, S] bool for the last T of S columns; True = attend. A padding query attends
    to itself: a softmax over nothing is NaN, which would spread through the weight gradients."""
    S = valid.shape[1]
    column = torch.arange(S, device=valid.device)
    query = column[S - T:, None]  # [T, 1]
    look = column <= query  # [T, S]
    if window is not None:  # in positions, not columns: a fork skips columns
        position = valid.cumsum(1)  # [B, S]
        look = look & (position[:, -T:, None] - position[:, None, :] < window)  # [B, T, S]
    if T == 1:  # decoding: the query's own column is valid and the last one
        return (valid[:, None, :] & look)[:, None]
    return (look & valid[:, None, :] | (column == query))[:, None]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [B, heads, T, E], halves convention; rope_tables has negated sin's first half."""
    return x * cos + x.roll(x.shape[-1] // 2, -1) * sin


def rope_frequencies(c: Config, device: torch.device) -> Tensor:
    """Radians that a position turns each pair of dimensions, [E / 2] fp32: the bits of transformers."""
    pair = torch.arange(0, c.head_dim, 2, device=device, dtype=torch.float32)
    frequency = 1.0 / c.rope_theta ** (pair / c.head_dim)  # [E / 2]
    if s := c.rope_scaling:  # Llama 3.1: long waves are stretched, medium ones are blended
        context = s["original_max_position_embeddings"]
        low, high = s["low_freq_factor"], s["high_freq_factor"]
        wave = 2 * math.pi / frequency  # in tokens; another order of operations rounds differently
        keep = (context / wave - low) / (high - low)
        blend = (1 - keep) * frequency / s["factor"] + keep * frequency
        frequency = torch.where(wave > context / low, frequency / s["factor"],
                                torch.where(wave < context / high, frequency, blend))
    return frequency


def rope_tables(c: Config, position: Tensor) -> tuple[Tensor, Tensor]:
    """cos, sin [B, 1, T, E] for position [B, T], the first half of sin negated (see rotate). In fp32: bf16
    angles are off by whole radians at position 4096."""
    angle = position[..., None].float() * rope_frequencies(c, position.device)  # [B, T, E / 2]
    cos, sin = angle[:, None].cos(), angle[:, None].sin()  # [B, 1, T, E / 2]
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)
