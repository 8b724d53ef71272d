"""The Triton path. Logits live in registers, one tile at a time; [N, V] never exists.

N owned tokens, D width, V vocabulary. The forward cuts the vocabulary into splits by V alone, walks each with
an online log-sum-exp in base 2 and merges the splits in one fixed tree: no atomics, no locks, nothing tuned
by N, so a row has the same bits alone and in any batch. The backward computes the logits again in chunks of
the vocabulary, stores dlogits [N, chunk] and leaves both gradient products to cuBLAS: 8NVD operations in all.
`Weighted` is the way with 6NVD, for coefficients that are known before the forward.

Descriptors are made on the host: those made on the device need an allocator that autograd's threads do not
see."""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable
from triton.tools.tensor_descriptor import TensorDescriptor

LOG2E = 1.4426950408889634
LN2 = tl.constexpr(0.6931471805599453)
NEVER = tl.constexpr(-1e20)  # logit of a column that is not there: exp2 makes it exactly 0, -inf makes NaN
INTERPRET = triton.knobs.runtime.interpret  # TRITON_INTERPRET=1 at import: the kernels run in numpy
SPLITS = 128  # of the vocabulary, at most: a decode step with one block of rows still fills the machine once
GROUP = 16  # blocks of rows that share a weight tile while it is in L2; 16 x 128 x 1536 in bf16 = 6 MB
WAVE = 2816  # 11 x 256 columns: dW then has 132 tiles at D = 1536, one for each SM of an H200
DLOGITS_BYTES = 320 << 20  # the buffer [N, chunk]: 8448 columns at N = 16k in bf16
LOGITS_BYTES = 640 << 20  # the buffer [C, V] of `Weighted`: 2048 rows at V = 152k; dW's traffic asks for many


# ---- kernels


@triton.jit
def locate(blocks, columns, GROUP: tl.constexpr):
    """Program id -> block of rows, column index. Rows run fastest within a group, so that a weight tile is
    read from memory once for all of them."""
    group = tl.program_id(0) // (GROUP * columns)
    inner = tl.program_id(0) % (GROUP * columns)
    size = min(blocks - group * GROUP, GROUP)  # the last group may be smaller
    return group * GROUP + inner % size, inner // size


@triton.jit
def scores(hidden, weight, row, column, D, ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr,
           PRECISION: tl.constexpr):
    """hidden @ weight.T of one tile in fp32, as its left and right half [ROWS, COLS / 2]: whole, the epilogue
    would spill registers. Beyond N, V and D the descriptors deliver zeros."""
    tile = tl.zeros((ROWS, COLS), tl.float32)
    for d in range(0, D, DEPTH):
        tile = tl.dot(hidden.load([row, d]), weight.load([column, d]).T, tile, input_precision=PRECISION)
    return tl.split(tl.permute(tl.reshape(tile, (ROWS, 2, COLS // 2)), (0, 2, 1)))


@triton.jit
def padded(tile, column, V):
    """Columns that are not there may not enter a sum: the zeros of the descriptor can dwarf all the rest."""
    return tl.where((column + tl.arange(0, tile.shape[1]) < V)[None, :], tile, NEVER)


@triton.jit
def online(tile, scale, top, total, moment):
    """Folds half a tile of logits z into each row's running top, sum of 2^d and sum of 2^d d, with d = (z -
    top) scale. The difference comes first: it is exact at the top, so a confident row keeps its digits, in
    the entropy too, where no large numbers cancel."""
    new = tl.maximum(top, tl.max(tile, 1))
    below = (tile - new[:, None]) * scale[:, None]
    power = tl.exp2(below)
    drop = (top - new) * scale
    keep = tl.exp2(drop)
    moment = (moment + total * drop) * keep + tl.sum(power * below, 1)
    return new, total * keep + tl.sum(power, 1), moment


@triton.jit
def pick(tile, place):
    """The target's logit out of the accumulator that also enters the sum: a dot product of its own would
    round differently and make log-probs above 0."""
    return tl.sum(tl.where(tl.arange(0, tile.shape[1])[None, :] == place[:, None], tile, 0.0), 1)


@triton.jit
def merge(top, total, moment, scale):
    """Partial sums along axis 0 -> largest logit, log2 of the sum above it, entropy in nats; the axis stays,
    with length 1."""
    peak = tl.max(top, 0, keep_dims=True)
    drop = (top - peak) * scale
    keep = tl.exp2(drop)  # 0 for a part that saw no column
    sums = tl.sum(total * keep, 0, keep_dims=True)  # >= 1: the peak itself counts 2^0
    mean = tl.sum((moment + total * drop) * keep, 0, keep_dims=True) / sums
    return peak, tl.log2(sums), (tl.log2(sums) - mean) * LN2


@triton.jit(do_not_specialize=["N"])  # one compilation, so one way of rounding, whatever N is
def forward_kernel(hidden, weight, targets, scales, tops, totals, moments, picked, N, V, D,
                   TILES: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
                   DEPTH: tl.constexpr, PRECISION: tl.constexpr):
    """One block of rows against one split of TILES tiles: partial sums into [splits, N], and the target's
    logit from the one program that meets it."""
    block, split = locate(tl.cdiv(N, ROWS), tl.cdiv(tl.cdiv(V, COLS), TILES), GROUP)
    row = block * ROWS
    rows = row + tl.arange(0, ROWS)
    target = tl.load(targets + rows, rows < N, other=-1).to(tl.int32)
    scale = tl.load(scales + rows, rows < N, other=0.0)
    top = tl.full((ROWS,), NEVER, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    moment = tl.zeros((ROWS,), tl.float32)
    begin = split * TILES * COLS
    for column in range(begin, min(begin + TILES * COLS, V), COLS):
        left, right = scores(hidden, weight, row, column, D, ROWS, COLS, DEPTH, PRECISION)
        place = target - column
        here = (place >= 0) & (place < COLS)
        # before the sums, or both halves would have to survive them. Four tiles in five hold no target at all
        if tl.max(here.to(tl.int32), 0) > 0:
            tl.store(picked + rows, pick(left, place) + pick(right, place - COLS // 2), here)
        if column + COLS > V:  # the last tile only: a comparison for each element is a tenth of the epilogue
            left = padded(left, column, V)
            right = padded(right, column + COLS // 2, V)
        top, total, moment = online(left, scale, top, total, moment)
        top, total, moment = online(right, scale, top, total, moment)
    slot = split.to(tl.int64) * N + rows
    tl.store(tops + slot, top, rows < N)
    tl.store(totals + slot, total, rows < N)
    tl.store(moments + slot, moment, rows < N)


@triton.jit(do_not_specialize=["N"])
def combine_kernel(tops, totals, moments, picked, scales, peaks, logs, logprobs, entropies, N, splits,
                   PAD: tl.constexpr, ROWS: tl.constexpr):
    """Merges the splits, [PAD, ROWS] at a time, in a tree whose shape depends on V alone."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[None, :]
    index = tl.arange(0, PAD)[:, None]
    slot = index.to(tl.int64) * N + tl.minimum(rows, N - 1)  # past the end: the last row again, not log2(0)
    scale = tl.load(scales + rows, rows < N, other=1.0)
    peak, log, entropy = merge(tl.load(tops + slot, index < splits, other=NEVER),
                               tl.load(totals + slot, index < splits, other=0.0),
                               tl.load(moments + slot, index < splits, other=0.0), scale)
    logprob = ((tl.load(picked + rows, rows < N, other=0.0) - peak) * scale - log) * LN2
    tl.store(peaks + rows, peak, rows < N)
    tl.store(logs + rows, log, rows < N)
    tl.store(logprobs + rows, logprob, rows < N)  # never above 0: the peak is one of the same accumulators
    tl.store(entropies + rows, entropy, rows < N)


@triton.jit
def segment_sum_kernel(values, order, offsets, sums, BLOCK: tl.constexpr):
    """One segment. Lanes count from the segment's own start, so its sum has the same bits wherever it is
    packed; counted from the start of the pack, they would not."""
    start = tl.load(offsets + tl.program_id(0))
    stop = tl.load(offsets + tl.program_id(0) + 1)
    lanes = tl.zeros((BLOCK,), tl.float32)
    for at in range(start, stop, BLOCK):
        index = at + tl.arange(0, BLOCK)
        rows = tl.load(order + index, index < stop, other=0)
        lanes += tl.load(values + rows, index < stop, other=0.0)
    tl.store(sums + tl.program_id(0), tl.sum(lanes, 0))


@triton.jit
def slope(tile, column, target, scale, peak, log, g, base, h, ENTROPY: tl.constexpr):
    """g (1[target] - p) - h p (log p + entropy), with base = g + h entropy and h for log2. In fp32 until the
    difference is formed: rounded before, a confident target would lose all its digits."""
    columns = column + tl.arange(0, tile.shape[1])
    bits = (tile - peak[:, None]) * scale[:, None] - log[:, None]  # log2 p
    pull = base[:, None]
    if ENTROPY:
        pull += h[:, None] * bits
    return tl.where(columns[None, :] == target[:, None], g[:, None], 0.0) - tl.exp2(bits) * pull


@triton.jit(do_not_specialize=["N", "start", "width"])
def dlogits_kernel(hidden, weight, out, targets, scales, peaks, logs, gs, hs, entropies, N, D, start, width,
                   ENTROPY: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
                   DEPTH: tl.constexpr, PRECISION: tl.constexpr):
    """One tile of the columns start .. start + width: its logits again, then their gradient into out."""
    block, tile = locate(tl.cdiv(N, ROWS), tl.cdiv(width, COLS), GROUP)
    row = block * ROWS
    column = tile * COLS  # counted from `start`, as in `out`
    left, right = scores(hidden, weight, row, start + column, D, ROWS, COLS, DEPTH, PRECISION)
    rows = row + tl.arange(0, ROWS)
    target = tl.load(targets + rows, rows < N, other=-1).to(tl.int32) - start
    scale = tl.load(scales + rows, rows < N, other=0.0)
    peak = tl.load(peaks + rows, rows < N, other=0.0)
    log = tl.load(logs + rows, rows < N, other=0.0)
    g = tl.load(gs + rows, rows < N, other=0.0)
    base = g
    h = g
    if ENTROPY:  # where nobody asks for the entropy's gradient, an element costs one operation less
        h = tl.load(hs + rows, rows < N, other=0.0)
        base += h * tl.load(entropies + rows, rows < N, other=0.0)
        h *= LN2
    left = slope(left, column, target, scale, peak, log, g, base, h, ENTROPY)
    out.store([row, column], left.to(out.dtype))  # what lies beyond N and width the descriptor drops
    right = slope(right, column + COLS // 2, target, scale, peak, log, g, base, h, ENTROPY)
    out.store([row, column + COLS // 2], right.to(out.dtype))


@triton.jit
def weighted_kernel(logits, stride, targets, scales, coefficients, logprobs, entropies, V,
                    BLOCK: tl.constexpr):
    """One row of logits, turned into its gradient in place. Every lane keeps sums of its own, merged at the
    end: a reduction over the row for each block would cost more than the block."""
    row = tl.program_id(0) + tl.arange(0, 1)  # [1], the shape that `merge` returns
    line = logits + tl.program_id(0).to(tl.int64) * stride
    scale = tl.load(scales + row)
    target = tl.load(targets + row)
    score = tl.load(line + target).to(tl.float32)  # now, since the second loop overwrites it
    top = tl.full((BLOCK,), NEVER, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    moment = tl.zeros((BLOCK,), tl.float32)
    for column in range(0, V, BLOCK):
        columns = column + tl.arange(0, BLOCK)
        z = tl.load(line + columns, columns < V, other=NEVER).to(tl.float32)
        new = tl.maximum(top, z)
        below = (z - new) * scale
        power = tl.exp2(below)
        drop = (top - new) * scale
        keep = tl.exp2(drop)
        moment = (moment + total * drop) * keep + power * below
        total = total * keep + power
        top = new
    peak, log, entropy = merge(top, total, moment, scale)
    tl.store(logprobs + row, ((score - peak) * scale - log) * LN2)
    tl.store(entropies + row, entropy)
    g = tl.load(coefficients + row)
    for column in range(0, V, BLOCK):  # the row comes from L2 this time: 300 KB in bf16
        columns = column + tl.arange(0, BLOCK)
        z = tl.load(line + columns, columns < V, other=0.0).to(tl.float32)
        down = (tl.where(columns == target, 1.0, 0.0) - tl.exp2((z - peak) * scale - log)) * g
        tl.store(line + columns, down.to(logits.dtype.element_ty), columns < V)


# ---- launches


def layout(dtype: torch.dtype, device: torch.device) -> tuple[dict, dict]:
    """Tile sizes and launch options. They fix every rounding of the forward, so they may depend on the type
    and on the machine, never on N. tests/test_kernels_aot.py compiles each and looks for spills."""
    if INTERPRET:
        rows, cols, depth, warps, stages = 64, 64, 32, 4, 1  # small tiles waste less on small tests
    elif dtype == torch.float32:
        rows, cols, depth, warps, stages = 128, 128, 32, 8, 2  # 65 to 82 KB, by Triton version
    elif torch.cuda.get_device_properties(device).shared_memory_per_block_optin >= 227 << 10:  # Hopper and up
        rows, cols, depth, warps, stages = 128, 256, 64, 8, 4  # 197 KB of shared memory, one program an SM
    else:
        rows, cols, depth, warps, stages = 128, 128, 64, 8, 3  # 98 KB: fits every card since Ampere
    precision = "tf32x3" if dtype == torch.float32 else "tf32"  # three tf32 products make one fp32
    return (dict(ROWS=rows, COLS=cols, DEPTH=depth, PRECISION=precision, GROUP=GROUP),
            dict(num_warps=warps, num_stages=stages, enable_fp_fusion=True))  # from Triton 3.10 on it is off


def aligned(x: Tensor) -> Tensor:
    """x, or a copy with longer rows: TMA wants a base and rows that are multiples of 16 bytes."""
    spare = -x.shape[1] % (16 // x.element_size())
    if spare:
        return F.pad(x, (0, spare))
    if x.data_ptr() % 16 or x.stride(0) * x.element_size() % 16:
        return x.clone(memory_format=torch.contiguous_format)
    return x


def window(x: Tensor, rows: int, cols: int) -> TensorDescriptor:
    return TensorDescriptor(x, list(x.shape), [x.stride(0), 1], [rows, cols])


def forward(hidden: Tensor, weight: Tensor, targets: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
    """hidden [N, D] and weight [V, D], aligned and of one type, targets [N], scale [N] = log2(e) /
    temperature -> logprob, entropy, largest logit, log2 of the sum above it, [N] each. N > 0."""
    tile, options = layout(hidden.dtype, hidden.device)
    (N, D), V = hidden.shape, len(weight)
    tiles = triton.cdiv(V, tile["COLS"])
    per_split = triton.cdiv(tiles, SPLITS)  # 5 at V = 152k
    splits = triton.cdiv(tiles, per_split)  # 119 at V = 152k
    # apart, not as rows of one tensor: their alignment would change with N, and with it the compilation
    tops, totals, moments = (scale.new_empty(splits, N) for _ in range(3))  # 23 MB at N = 16k, V = 152k
    picked, logprob, entropy, peak, log = (torch.empty_like(scale) for _ in range(5))  # [N]
    forward_kernel[triton.cdiv(N, tile["ROWS"]) * splits,](
        window(hidden, tile["ROWS"], tile["DEPTH"]), window(weight, tile["COLS"], tile["DEPTH"]), targets,
        scale, tops, totals, moments, picked, N, V, D, per_split, **tile, **options)
    combine_kernel[triton.cdiv(N, 16),](
        tops, totals, moments, picked, scale, peak, log, logprob, entropy, N, splits,
        triton.next_power_of_2(splits), 16, enable_fp_fusion=True)
    return logprob, entropy, peak, log


def dlogits(space: Tensor, start: int, hidden: Tensor, weight: Tensor, rows: tuple[Tensor, ...],
            grad_entropy: Tensor | None) -> Tensor:
    """space [N, chunk]; rows: targets, scale, largest logit, log2 of the sum, gradient of logprob, entropy,
    [N] each; the gradients already divided by the temperature -> d loss / d (hidden @ weight.T) [N, width]
    for the columns from start."""
    tile, options = layout(hidden.dtype, hidden.device)
    targets, scale, peak, log, g, entropy = rows
    (N, D), width = hidden.shape, min(space.shape[1], len(weight) - start)
    out = space[:, :width]  # [N, width]
    dlogits_kernel[triton.cdiv(N, tile["ROWS"]) * triton.cdiv(width, tile["COLS"]),](
        window(hidden, tile["ROWS"], tile["DEPTH"]), window(weight, tile["COLS"], tile["DEPTH"]),
        window(out, tile["ROWS"], tile["COLS"] // 2), targets, scale, peak, log, g,
        g if grad_entropy is None else grad_entropy, entropy, N, D, start, width, grad_entropy is not None,
        **tile, **options)
    return out


def operands(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the type of the hidden states, as the model's Linear casts its fp32 masters. The interpreter
    gets fp32: it multiplies the bit patterns of bf16, and a CPU has no 16-bit product that delivers fp32."""
    weight = weight.to(hidden.dtype)
    return (hidden.float(), weight.float()) if INTERPRET else (hidden, weight)


def product(out: Tensor, a: Tensor, b: Tensor, beta: int) -> None:
    """out = beta * out + a @ b: summed in fp32, rounded once to out's type."""
    torch.addmm(out, a, b, beta=beta, out=out, **({} if out.dtype == a.dtype else {"out_dtype": out.dtype}))


def chunk_width(rows: int, vocabulary: int, size: int) -> int:
    """Columns of dlogits at a time: whole waves that fit DLOGITS_BYTES. At least two, since dH [N, D] in fp32
    is read and written once a chunk: with one wave that is a quarter of its product's time."""
    return min(vocabulary, max(2, DLOGITS_BYTES // max(1, rows * size * WAVE)) * WAVE)


# ---- autograd


class LogprobEntropy(torch.autograd.Function):
    """(hidden [N, D], weight [V, D], targets [N], scale [N] = 1 / temperature) -> logprob, entropy [N]."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, scale):
        ctx.set_materialize_grads(False)  # an output that nobody used has no gradient, and costs nothing
        logprob, entropy, peak, log = (torch.zeros_like(scale) for _ in range(4))  # [N]
        if len(hidden):  # there is no grid and no descriptor over nothing
            h, w = operands(hidden, weight)
            logprob, entropy, peak, log = forward(aligned(h), aligned(w), targets, scale * LOG2E)
        ctx.save_for_backward(hidden, weight, targets, scale, entropy, peak, log)  # cast weight: made again
        return logprob, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logprob, grad_entropy):
        hidden, weight, targets, scale, entropy, peak, log = ctx.saved_tensors
        h, w = operands(hidden, weight)
        tiles = aligned(h), aligned(w)
        g = torch.zeros_like(scale) if grad_logprob is None else grad_logprob * scale  # [N]
        g_entropy = None if grad_entropy is None else grad_entropy * scale  # [N]
        rows = targets, scale * LOG2E, peak, log, g, entropy
        # [N, D] in fp32, chunks add up in it; a slice of dw is written once, so it has the weight's own type
        dh = torch.zeros_like(h, dtype=torch.float32) if ctx.needs_input_grad[0] else None
        kind = weight.dtype if weight.dtype == h.dtype else torch.float32
        dw = torch.zeros_like(w, dtype=kind) if ctx.needs_input_grad[1] else None  # [V, D]
        width = chunk_width(len(h), len(w), h.element_size())
        space = h.new_empty(len(h), triton.cdiv(width, 64) * 64)[:, :width]  # [N, chunk], rows of 16 bytes
        for start in range(0, len(w), width) if len(h) else ():
            dz = dlogits(space, start, *tiles, rows, g_entropy)  # [N, width]
            part = slice(start, start + width)
            if dh is not None:
                product(dh, dz, w[part], beta=1)  # in ascending order, so the same bits every time
            if dw is not None:
                product(dw[part], dz.T, h, beta=0)
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
        return grad[ctx.saved_tensors[0]], None, None  # a gather: nothing is added, no order matters


segment_sum = SegmentSum.apply  # (values [N], segment [N], S) -> [S]


class Weighted(torch.autograd.Function):
    """(hidden, weight, targets, scale, coefficient [N]) -> sum of coefficient * logprob, and without
    gradients logprob [N] and entropy [N]. One pass of 6NVD operations over chunks of C rows: logits, their
    gradient in place, both products. The logits are rounded to hidden's type on their way through memory."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, scale, coefficient):
        h, w = operands(hidden, weight)
        V = len(w)
        logprob, entropy = torch.empty_like(scale), torch.empty_like(scale)  # [N]
        dh = torch.empty_like(h) if ctx.needs_input_grad[0] else None  # [N, D]
        dw = torch.zeros_like(w, dtype=torch.float32) if ctx.needs_input_grad[1] else None  # [V, D]
        size = max(128, LOGITS_BYTES // (V * h.element_size()) // 128 * 128)  # C
        space = h.new_empty(min(size, len(h)), triton.cdiv(V, 8) * 8)  # [C, V], rows of 16 bytes for cuBLAS
        for start in range(0, len(h), size):
            part = slice(start, min(start + size, len(h)))
            z = space[:part.stop - start, :V]  # [C, V]
            torch.mm(h[part], w.T, out=z)
            weighted_kernel[len(z),](
                z, z.stride(0), targets[part], scale[part] * LOG2E, coefficient[part] * scale[part],
                logprob[part], entropy[part], V, BLOCK=4096, num_warps=8, enable_fp_fusion=True)
            if dh is not None:
                product(dh[part], z, w, beta=0)
            if dw is not None:
                product(dw, z.T, h[part], beta=1)
        ctx.save_for_backward(dh, dw)
        ctx.types = hidden.dtype, weight.dtype
        ctx.mark_non_differentiable(logprob, entropy)
        return (coefficient * logprob).sum(), logprob, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, *_):
        # not in place: a second backward must find them as they were
        dh, dw = (None if d is None else (d * grad).to(t) for d, t in zip(ctx.saved_tensors, ctx.types))
        return dh, dw, None, None, None
