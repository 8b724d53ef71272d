"""The Triton path: log-probs and entropies of N owned tokens. The logits [N, V] are never stored.

One token has logits z[v] = hidden . weight[v] / temperature. Three numbers describe its whole row (in nats):

    top     = max_v z[v]
    total   = sum_v exp(z[v] - top)
    moment  = sum_v exp(z[v] - top) (z[v] - top)

    logprob = z[target] - top - log(total)
    entropy = log(total) - moment / total

They can be built from pieces of the vocabulary. If a new piece raises top by r, the old sums shrink:
total becomes total exp(-r), moment becomes (moment - total r) exp(-r); then the new piece is added.

                        vocabulary V, cut into splits of a few tiles each
                    split 0              split 1                       split 118
    rows 0..127    | tile | tile | .. | | tile | tile | .. |   ...    | tile | tile |
    rows 128..255  | tile | tile | .. | | tile | tile | .. |   ...    | tile | tile |
    ...              -- one program: one block of rows, one split -->

`forward_kernel`: a program walks through its tiles, keeps three numbers for each row in registers and writes
them to [splits, N]. `combine_kernel` merges the splits: [splits, N] -> [N]. The splits depend on V alone, the
order of all sums is fixed and there are no atomics: a row has the same bits alone and in any batch.

The backward computes the logits again, a chunk of columns at a time. `dlogits_kernel` writes the gradient
[N, chunk]; cuBLAS multiplies it into dhidden and dweight. In all 8NVD operations, D being the width.

The kernels work in base 2, where exp2 is one instruction: `scale` = log2(e) / temperature multiplies the raw
dot products, and ln 2 turns bits into nats at the end. Read `LogprobEntropy` at the bottom first."""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable
from triton.tools.tensor_descriptor import TensorDescriptor

LOG2E = 1.4426950408889634
LN2 = tl.constexpr(0.6931471805599453)
MASKED = tl.constexpr(-1e20)  # logit beyond V: exp2 makes it exactly 0, where -inf would make NaN
INTERPRET = triton.knobs.runtime.interpret  # TRITON_INTERPRET=1 at import: the kernels run in numpy
SPLITS = 128  # of the vocabulary, at most: a decode step with one block of rows still fills the GPU once
GROUP = 16  # row blocks that share a weight tile while it is in L2; 16 x 128 x 1536 in bf16 = 6 MB
WAVE = 2816  # 11 x 256 columns: dweight then has 132 tiles at D = 1536, one for each SM of an H100
DLOGITS_BYTES = 320 << 20  # size of the buffer [N, chunk]: 8448 columns at N = 16k in bf16


# ---- kernels


@triton.jit
def swizzle(blocks, columns, GROUP: tl.constexpr):
    """Program id -> row block, column index. Rows run fastest within a group: the group reads each weight
    tile from memory once."""
    group = tl.program_id(0) // (GROUP * columns)
    inner = tl.program_id(0) % (GROUP * columns)
    size = min(blocks - group * GROUP, GROUP)  # the last group may be smaller
    return group * GROUP + inner % size, inner // size


@triton.jit
def tiles_of(x, rows, cols, stride, ROWS: tl.constexpr, COLS: tl.constexpr, TMA: tl.constexpr):
    """x [rows, cols] as [ROWS, COLS] tiles: loads outside give 0, stores outside are dropped. Without TMA the
    compiler turns the descriptor into pointers; `stride`, a multiple of 16, allows 16-byte accesses."""
    if TMA:
        return x  # the host made the descriptor
    else:
        return tl.make_tensor_descriptor(x, [rows, cols], [stride, 1], [ROWS, COLS])


@triton.jit
def logits_tile(hidden, weight, row, column, D, ROWS: tl.constexpr, COLS: tl.constexpr,
                DEPTH: tl.constexpr, PRECISION: tl.constexpr):
    """hidden @ weight.T of one tile in fp32, as its left and right half [ROWS, COLS / 2]. Processed whole, a
    128 x 256 tile spills 208 bytes a thread on sm_100 (Triton 3.9.0); in halves, 24."""
    tile = tl.zeros((ROWS, COLS), tl.float32)
    for d in range(0, D, DEPTH):
        tile = tl.dot(hidden.load([row, d]), weight.load([column, d]).T, tile, input_precision=PRECISION)
    return tl.split(tl.permute(tl.reshape(tile, (ROWS, 2, COLS // 2)), (0, 2, 1)))


@triton.jit
def mask_columns(tile, column, V):
    """Sets the logits of columns beyond V: left at 0, they could outweigh all real ones."""
    return tl.where((column + tl.arange(0, tile.shape[1]) < V)[None, :], tile, MASKED)


@triton.jit
def online_update(tile, scale, top, total, moment):
    """Adds half a tile to each row's top, total and moment. Subtracting top before scaling is exact for the
    largest logit, so confident rows keep their digits."""
    new = tl.maximum(top, tl.max(tile, 1))
    below = (tile - new[:, None]) * scale[:, None]
    power = tl.exp2(below)
    drop = (top - new) * scale
    keep = tl.exp2(drop)
    moment = (moment + total * drop) * keep + tl.sum(power * below, 1)
    return new, total * keep + tl.sum(power, 1), moment


@triton.jit
def target_logit(tile, place):
    """The target's logit, from the accumulator that enters the sum: a separate dot product would round
    differently and give log-probs above 0."""
    return tl.sum(tl.where(tl.arange(0, tile.shape[1])[None, :] == place[:, None], tile, 0.0), 1)


@triton.jit(do_not_specialize=["N"])  # one compilation, so the same rounding, for every N
def forward_kernel(hidden, weight, hidden_stride, weight_stride, targets, scales, tops, totals, moments,
                   target_logits, N, V, D, TILES: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
                   COLS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr):
    """One block of rows against one split of TILES tiles: partial sums into [splits, N]. The one program that
    meets a row's target also writes its logit."""
    block, split = swizzle(tl.cdiv(N, ROWS), tl.cdiv(tl.cdiv(V, COLS), TILES), GROUP)
    hidden = tiles_of(hidden, N, D, hidden_stride, ROWS, DEPTH, TMA)
    weight = tiles_of(weight, V, D, weight_stride, COLS, DEPTH, TMA)
    row = block * ROWS
    rows = row + tl.arange(0, ROWS)
    target = tl.load(targets + rows, rows < N, other=-1).to(tl.int32)
    scale = tl.load(scales + rows, rows < N, other=0.0)
    top = tl.full((ROWS,), MASKED, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    moment = tl.zeros((ROWS,), tl.float32)
    begin = split * TILES * COLS
    for column in range(begin, min(begin + TILES * COLS, V), COLS):
        left, right = logits_tile(hidden, weight, row, column, D, ROWS, COLS, DEPTH, PRECISION)
        place = target - column
        here = (place >= 0) & (place < COLS)
        # before the sums: later, both halves would have to stay in registers. Most tiles hold no target
        if tl.max(here.to(tl.int32), 0) > 0:
            logit = target_logit(left, place) + target_logit(right, place - COLS // 2)
            tl.store(target_logits + rows, logit, here)
        if column + COLS > V:  # the last tile only: comparing costs a tenth of the work after the product
            left = mask_columns(left, column, V)
            right = mask_columns(right, column + COLS // 2, V)
        top, total, moment = online_update(left, scale, top, total, moment)
        top, total, moment = online_update(right, scale, top, total, moment)
    slot = split.to(tl.int64) * N + rows
    tl.store(tops + slot, top, rows < N)
    tl.store(totals + slot, total, rows < N)
    tl.store(moments + slot, moment, rows < N)


@triton.jit(do_not_specialize=["N"])
def combine_kernel(tops, totals, moments, target_logits, scales, peaks, logs, logprobs, entropies, N, splits,
                   PAD: tl.constexpr, ROWS: tl.constexpr):
    """Merges the splits, [PAD, ROWS] at a time, in a tree whose shape depends on V alone."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[None, :]
    index = tl.arange(0, PAD)[:, None]
    slot = index.to(tl.int64) * N + tl.minimum(rows, N - 1)  # beyond N: the last row again, to avoid log2(0)
    scale = tl.load(scales + rows, rows < N, other=1.0)
    top = tl.load(tops + slot, index < splits, other=MASKED)
    total = tl.load(totals + slot, index < splits, other=0.0)
    moment = tl.load(moments + slot, index < splits, other=0.0)
    peak = tl.max(top, 0, keep_dims=True)  # [1, ROWS]
    drop = (top - peak) * scale
    keep = tl.exp2(drop)
    sums = tl.sum(total * keep, 0, keep_dims=True)  # >= 1: the largest logit counts 2^0
    mean = tl.sum((moment + total * drop) * keep, 0, keep_dims=True) / sums
    log = tl.log2(sums)
    logprob = ((tl.load(target_logits + rows, rows < N, other=0.0) - peak) * scale - log) * LN2
    tl.store(peaks + rows, peak, rows < N)
    tl.store(logs + rows, log, rows < N)
    tl.store(logprobs + rows, logprob, rows < N)  # never above 0: the peak comes from the same accumulators
    tl.store(entropies + rows, (log - mean) * LN2, rows < N)


@triton.jit
def segment_sum_kernel(values, order, offsets, sums, BLOCK: tl.constexpr):
    """One segment. Lanes count from the start of the segment, not of the pack: its sum then has the same bits
    wherever it is packed."""
    start = tl.load(offsets + tl.program_id(0))
    stop = tl.load(offsets + tl.program_id(0) + 1)
    lanes = tl.zeros((BLOCK,), tl.float32)
    for at in range(start, stop, BLOCK):
        index = at + tl.arange(0, BLOCK)
        rows = tl.load(order + index, index < stop, other=0)
        lanes += tl.load(values + rows, index < stop, other=0.0)
    tl.store(sums + tl.program_id(0), tl.sum(lanes, 0))


@triton.jit
def logits_gradient(tile, column, target, scale, peak, log, g, base, h, ENTROPY: tl.constexpr):
    """g (1[target] - p) - h p (log p + entropy), with base = g + h entropy and h scaled for log2 p. The
    difference is formed in fp32: rounded before, a confident target would lose all its digits."""
    columns = column + tl.arange(0, tile.shape[1])
    bits = (tile - peak[:, None]) * scale[:, None] - log[:, None]  # log2 p
    pull = base[:, None]
    if ENTROPY:
        pull += h[:, None] * bits
    return tl.where(columns[None, :] == target[:, None], g[:, None], 0.0) - tl.exp2(bits) * pull


@triton.jit(do_not_specialize=["N", "start"])
def dlogits_kernel(hidden, weight, out, hidden_stride, weight_stride, out_stride, targets, scales, peaks,
                   logs, gs, hs, entropies, N, V, D, start, width, ENTROPY: tl.constexpr, GROUP: tl.constexpr,
                   ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
                   TMA: tl.constexpr):
    """One tile of the columns start .. start + width: its logits again, then their gradient into out."""
    block, tile = swizzle(tl.cdiv(N, ROWS), tl.cdiv(width, COLS), GROUP)
    hidden = tiles_of(hidden, N, D, hidden_stride, ROWS, DEPTH, TMA)
    weight = tiles_of(weight, V, D, weight_stride, COLS, DEPTH, TMA)
    out = tiles_of(out, N, width, out_stride, ROWS, COLS // 2, TMA)
    row = block * ROWS
    column = tile * COLS  # relative to `start`, as in `out`
    left, right = logits_tile(hidden, weight, row, start + column, D, ROWS, COLS, DEPTH, PRECISION)
    rows = row + tl.arange(0, ROWS)
    target = tl.load(targets + rows, rows < N, other=-1).to(tl.int32) - start
    scale = tl.load(scales + rows, rows < N, other=0.0)
    peak = tl.load(peaks + rows, rows < N, other=0.0)
    log = tl.load(logs + rows, rows < N, other=0.0)
    g = tl.load(gs + rows, rows < N, other=0.0)
    base = g
    h = g
    if ENTROPY:  # without a gradient of the entropy an element costs one operation less
        h = tl.load(hs + rows, rows < N, other=0.0)
        base += h * tl.load(entropies + rows, rows < N, other=0.0)
        h *= LN2
    left = logits_gradient(left, column, target, scale, peak, log, g, base, h, ENTROPY)
    out.store([row, column], left.to(out.dtype))
    right = logits_gradient(right, column + COLS // 2, target, scale, peak, log, g, base, h, ENTROPY)
    out.store([row, column + COLS // 2], right.to(out.dtype))


# ---- launches


def has_tma(device: torch.device) -> bool:
    """Hopper and later copy tiles by hardware (TMA), from descriptors made on the host: made on the device,
    they need an allocator that autograd's threads do not see. Older GPUs take plain pointers."""
    return INTERPRET or torch.cuda.get_device_capability(device) >= (9, 0)


def layout(dtype: torch.dtype, device: torch.device) -> tuple[dict, dict]:
    """Tile sizes and launch options. They decide the rounding of the forward, so they depend on the type and
    the GPU, never on N. tests/test_kernels_aot.py compiles each and looks for spills."""
    fp32 = dtype == torch.float32
    if INTERPRET:
        rows, cols, depth, warps, stages = 64, 64, 32, 4, 1  # small tiles waste less on small tests
    elif torch.cuda.get_device_properties(device).shared_memory_per_block_optin >= 227 << 10:  # H100, B200
        rows, cols, depth, warps, stages = (128, 64, 32, 8, 3) if fp32 else (128, 256, 64, 8, 4)
    else:  # 48 KB of shared memory fit every GPU; larger or deeper tiles spill
        rows, cols, depth, warps, stages = (64, 64, 32, 8, 3) if fp32 else (128, 128, 32, 8, 4)
    precision = "tf32x3" if fp32 else "tf32"  # three tf32 products make one fp32
    return (dict(ROWS=rows, COLS=cols, DEPTH=depth, PRECISION=precision, TMA=has_tma(device), GROUP=GROUP),
            dict(num_warps=warps, num_stages=stages, enable_fp_fusion=True))  # Triton 3.10 turns it off


def aligned(x: Tensor) -> Tensor:
    """x, or a copy with longer rows: base at a multiple of 16 bytes, rows of a multiple of 16 elements. TMA
    needs 16 bytes; the pointer path loads 16 bytes at once only if Triton sees a divisor of 16."""
    if x.shape[1] % 16:
        return F.pad(x, (0, -x.shape[1] % 16))
    if x.data_ptr() % 16 or x.stride(0) % 16:
        return x.clone(memory_format=torch.contiguous_format)
    return x


def kernel_argument(x: Tensor, rows: int, cols: int) -> TensorDescriptor | Tensor:
    """What `tiles_of` takes for tiles of [rows, cols]."""
    return TensorDescriptor(x, list(x.shape), [x.stride(0), 1], [rows, cols]) if has_tma(x.device) else x


def forward(hidden: Tensor, weight: Tensor, targets: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
    """hidden [N, D] and weight [V, D], aligned and of one type, targets [N], scale [N] = log2(e) /
    temperature -> logprob, entropy (nats), largest raw logit, log2 of the sum above it, [N] each. N > 0."""
    tile, options = layout(hidden.dtype, hidden.device)
    rows, cols, depth = tile["ROWS"], tile["COLS"], tile["DEPTH"]
    (N, D), V = hidden.shape, len(weight)
    tiles = triton.cdiv(V, cols)
    per_split = triton.cdiv(tiles, SPLITS)  # 5 at V = 152k
    splits = triton.cdiv(tiles, per_split)  # 119 at V = 152k
    # three tensors, not rows of one: rows would be aligned by N, and Triton compiles by alignment
    tops, totals, moments = (scale.new_empty(splits, N) for _ in range(3))  # 23 MB at N = 16k, V = 152k
    target_logits, logprob, entropy, peak, log = (torch.empty_like(scale) for _ in range(5))  # [N]
    forward_kernel[triton.cdiv(N, rows) * splits,](
        kernel_argument(hidden, rows, depth), kernel_argument(weight, cols, depth), hidden.stride(0),
        weight.stride(0), targets, scale, tops, totals, moments, target_logits, N, V, D, per_split,
        **tile, **options)
    combine_kernel[triton.cdiv(N, 16),](
        tops, totals, moments, target_logits, scale, peak, log, logprob, entropy, N, splits,
        triton.next_power_of_2(splits), 16, enable_fp_fusion=True)
    return logprob, entropy, peak, log


def dlogits(space: Tensor, start: int, hidden: Tensor, weight: Tensor, per_row: tuple[Tensor, ...],
            grad_entropy: Tensor | None) -> Tensor:
    """Gradient of the raw logits hidden @ weight.T for the columns from start: space [N, chunk] -> its part
    [N, width]. per_row: targets, scale, largest logit, log2 of the sum, gradient of logprob, entropy, [N]
    each. Both gradients are already divided by the temperature."""
    tile, options = layout(hidden.dtype, hidden.device)
    rows, cols, depth = tile["ROWS"], tile["COLS"], tile["DEPTH"]
    targets, scale, peak, log, g, entropy = per_row
    (N, D), width = hidden.shape, min(space.shape[1], len(weight) - start)
    out = space[:, :width]  # [N, width]
    dlogits_kernel[triton.cdiv(N, rows) * triton.cdiv(width, cols),](
        kernel_argument(hidden, rows, depth), kernel_argument(weight, cols, depth),
        kernel_argument(out, rows, cols // 2), hidden.stride(0), weight.stride(0), out.stride(0), targets,
        scale, peak, log, g, g if grad_entropy is None else grad_entropy, entropy, N, len(weight), D, start,
        width, grad_entropy is not None, **tile, **options)
    return out


def cast_operands(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the type of the hidden states, as the model's Linear casts its fp32 masters. The interpreter
    gets fp32: it multiplies the bit patterns of bf16, and no CPU product of 16-bit numbers returns fp32."""
    weight = weight.to(hidden.dtype)
    return (hidden.float(), weight.float()) if INTERPRET else (hidden, weight)


def matmul_into(out: Tensor, a: Tensor, b: Tensor, beta: int) -> None:
    """out = beta * out + a @ b: summed in fp32, rounded once to out's type."""
    torch.addmm(out, a, b, beta=beta, out=out, **({} if out.dtype == a.dtype else {"out_dtype": out.dtype}))


# ---- autograd


class LogprobEntropy(torch.autograd.Function):
    """(hidden [N, D], weight [V, D], targets [N], scale [N] = 1 / temperature) -> logprob, entropy [N]."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, scale):
        ctx.set_materialize_grads(False)  # an unused output has no gradient and costs nothing
        logprob, entropy, peak, log = (torch.zeros_like(scale) for _ in range(4))  # [N]
        if len(hidden):  # an empty grid and an empty descriptor are errors
            h, w = cast_operands(hidden, weight)
            logprob, entropy, peak, log = forward(aligned(h), aligned(w), targets, scale * LOG2E)
        ctx.save_for_backward(hidden, weight, targets, scale, entropy, peak, log)  # without the cast weight
        return logprob, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logprob, grad_entropy):
        hidden, weight, targets, scale, entropy, peak, log = ctx.saved_tensors
        h, w = cast_operands(hidden, weight)
        tiled = aligned(h), aligned(w)
        g = torch.zeros_like(scale) if grad_logprob is None else grad_logprob * scale  # [N]
        g_entropy = None if grad_entropy is None else grad_entropy * scale  # [N]
        per_row = targets, scale * LOG2E, peak, log, g, entropy
        # dh [N, D] in fp32, since chunks add up in it; each slice of dw is written once, in its final type
        dh = torch.zeros_like(h, dtype=torch.float32) if ctx.needs_input_grad[0] else None
        dtype = weight.dtype if weight.dtype == h.dtype else torch.float32
        dw = torch.zeros_like(w, dtype=dtype) if ctx.needs_input_grad[1] else None  # [V, D]
        # whole waves that fit DLOGITS_BYTES, but at least two: each chunk reads and writes dh in fp32, with
        # one wave a quarter of its product's time
        waves = max(2, DLOGITS_BYTES // max(1, len(h) * h.element_size() * WAVE))
        width = min(len(w), waves * WAVE)
        space = h.new_empty(len(h), triton.cdiv(width, 64) * 64)[:, :width]  # [N, chunk], aligned
        for start in range(0, len(w), width) if len(h) else ():
            dz = dlogits(space, start, *tiled, per_row, g_entropy)  # [N, width]
            part = slice(start, start + width)
            if dh is not None:
                matmul_into(dh, dz, w[part], beta=1)  # in ascending order, so the same bits every time
            if dw is not None:
                matmul_into(dw[part], dz.T, h, beta=0)
        return (None if dh is None else dh.to(hidden.dtype),
                None if dw is None else dw.to(weight.dtype), None, None)


class SegmentSum(torch.autograd.Function):
    """(values [N], segment [N], S) -> [S]: one program for each segment, no atomics."""

    @staticmethod
    def forward(ctx, values, segment, num_segments):
        ctx.save_for_backward(segment)
        order = segment.argsort(stable=True)  # [N] the rows of segment 0, then those of segment 1, ...
        borders = torch.arange(num_segments + 1, device=segment.device)
        offsets = torch.searchsorted(segment[order], borders)  # [S + 1] where each segment starts in `order`
        sums = values.new_empty(num_segments)
        if num_segments:
            segment_sum_kernel[num_segments,](values, order, offsets, sums, BLOCK=128)
        return sums

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return grad[ctx.saved_tensors[0]], None, None  # a gather adds nothing, so no order matters


segment_sum = SegmentSum.apply  # (values [N], segment [N], S) -> [S]
