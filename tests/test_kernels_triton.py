"""The Triton path: on CUDA where there is one, elsewhere on the CPU through Triton's interpreter.

The interpreter shows arithmetic, masks, indices and shapes. No race, no compiled rounding, no bf16 (it
multiplies the bit patterns, so the kernels get fp32 there): those claims need the tests marked `gpu`."""

import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

if DEVICE == "cpu":
    assert "triton" not in sys.modules, "imported before it could be told to interpret: who was it?"
    os.environ["TRITON_INTERPRET"] = "1"  # read while Triton and the kernels are imported
triton = pytest.importorskip("triton", reason="no Triton here")
new_numpy = numpy.lib.NumpyVersion(numpy.__version__) >= "2.4.0"
if DEVICE == "cpu" and new_numpy and triton.__version__.startswith("3.6."):
    pytest.skip("Triton 3.6 interprets no loop with numpy 2.4: install an older one", allow_module_level=True)
import kernels.segment_logprob as triton_path  # noqa: E402

os.environ.pop("TRITON_INTERPRET", None)  # other tests start processes that must compile

import test_kernels as common  # noqa: E402
from kernels import chunked, segment_logprobs, weighted_logprob  # noqa: E402

gpu = pytest.mark.skipif(DEVICE == "cpu", reason="only a GPU can show it")
VOCABULARIES = [151936, 152064, 151665]  # Qwen2.5 small and large, and one that no tile divides


def problem(*args, **kwargs):
    return common.problem(*args, **kwargs, device=DEVICE)


@pytest.fixture(autouse=True)
def small_pieces(request, monkeypatch):
    """Few splits and narrow chunks: a small vocabulary then crosses every border that a large one crosses."""
    if DEVICE == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")  # the first launch imports the rest of Triton
    if "full_size" not in request.node.name:
        monkeypatch.setattr(triton_path, "SPLITS", 3)
        monkeypatch.setattr(triton_path, "WAVE", 64 if DEVICE == "cpu" else 256)
        monkeypatch.setattr(triton_path, "DLOGITS_BYTES", 1)
        monkeypatch.setattr(triton_path, "GROUP", 2)


@pytest.mark.parametrize("T,D,V,S", [(1, 8, 1, 1), (2, 3, 5, 4), (70, 33, 515, 6), (195, 40, 130, 30)])
def test_equals_the_definition_in_float64(T, D, V, S):
    common.compare(problem(T, D, V, S, temperature="rows"), "triton")


@pytest.mark.parametrize("corner", common.CORNERS)
def test_corners(corner):
    common.compare(problem(90, 24, 301, 7, **common.CORNERS[corner]), "triton")


@pytest.mark.parametrize("target", [0, 31, 32, 63, 64, 191, 192, 511, 512, 514])
def test_the_target_is_found_at_every_border(target):
    """First and last column of half a tile, a tile, a split, and of the last tile, which is partly there."""
    case = problem(5, 16, 515, 2, target=target, masked=0.0)
    want = segment_logprobs(*case, "reference").logprob
    common.close(segment_logprobs(*case, "triton").logprob, want, 2e-5, "logprob")


@pytest.mark.parametrize("used", range(3))
def test_each_output_alone_has_the_right_gradient(used):
    case, grads = problem(40, 12, 77, 5), common.upstream(40, 5, device=DEVICE)
    common.compare(case, "triton", grads=[g if i == used else None for i, g in enumerate(grads)])


def test_all_logits_far_below_zero_and_one_far_above():
    common.far_below_zero("triton", DEVICE)


@pytest.mark.parametrize("dtype,tolerance", [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_half_precision(dtype, tolerance):
    common.compare(problem(60, 16, 130, 4, dtype=dtype, scale=8.0), "triton", 2e-5, grad_tolerance=tolerance)


def test_fp32_master_weight():
    case = problem(60, 16, 130, 4)
    weight = case[1].requires_grad_()
    for hidden in (case[0].bfloat16(), case[0].half()):
        outs = [segment_logprobs(hidden, weight, *case[2:], backend) for backend in ("triton", "chunked")]
        grads = [torch.autograd.grad(out.entropy.sum(), weight)[0] for out in outs]
        assert grads[0].dtype == torch.float32
        common.close(*grads, 1e-5 if DEVICE == "cpu" else 2e-2, "dweight")


def test_kernels_take_and_make_fp16():
    """What `operands` spares the interpreter: 16-bit tiles in, 16-bit gradients out."""
    case = problem(70, 24, 200, 4, masked=0.0)
    hidden, weight, targets = case[0].half(), case[1].half(), case[2]
    scale = torch.full((70,), triton_path.LOG2E, device=DEVICE)
    logprob, entropy, peak, log = triton_path.forward(hidden, weight, targets, scale)
    space = hidden.new_empty(70, 128)  # [N, chunk]
    rows = targets, scale, peak, log, torch.ones_like(scale), entropy
    parts = [triton_path.dlogits(space, start, hidden, weight, rows, None).clone() for start in (0, 128)]
    dz = torch.cat(parts, 1)  # [N, V]
    logits = (hidden.double() @ weight.double().T).requires_grad_()  # [N, V]
    want = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    common.close(logprob, want, 1e-5, "logprob")
    assert dz.dtype == torch.float16 and dz.shape == logits.shape
    common.close(dz, torch.autograd.grad(want.sum(), logits)[0], 1e-3, "dlogits")


def test_poisoned_buffers_change_nothing(monkeypatch):
    """Whatever is allocated and not written shows as NaN: a missed row, split, column or segment."""
    made = []

    def poisoned(make):
        def make_and_poison(x, *size, **kwargs):
            made.append(make(x, *size, **kwargs))
            return made[-1].fill_(float("nan")) if x.is_floating_point() else made[-1]

        return make_and_poison

    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
    common.compare(problem(70, 20, 333, 6, temperature="rows"), "triton")
    common.weighted(problem(70, 20, 333, 6), "triton")
    assert len(made) > 20


@pytest.mark.parametrize("D,width,start", [(33, 44, 4), (32, 44, 5), (32, 44, 4), (32, 42, 4)])
def test_widths_bases_and_strides_that_tma_cannot_take(D, width, start, monkeypatch):
    """Rows of no multiple of 16 bytes, a base at none, a distance between rows that is none."""
    case, seen = problem(20, D, 70, 3, masked=0.0), []

    def check(x, rows, cols):  # what TensorDescriptor asserts, in every version of Triton
        seen.append(x)
        assert x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0
        return window(x, rows, cols)

    window = triton_path.window
    monkeypatch.setattr(triton_path, "window", check)
    for i, rows in ((0, 20), (1, 70)):
        wide = torch.zeros(rows, width, device=DEVICE)
        wide[:, start:start + D] = case[i]
        case[i] = wide[:, start:start + D]
    common.compare(case, "triton")
    common.compare([case[0][3:4], case[1], *(x[3:4] for x in case[2:4]), *case[4:]], "triton")
    assert seen


def test_nothing_owned_gives_zeros_that_still_have_a_gradient():
    case = problem(6, 4, 9, 3, masked=1.0)
    hidden, weight = case[0].requires_grad_(), case[1].requires_grad_()
    out = segment_logprobs(hidden, weight, *case[2:], "triton")
    more = weighted_logprob(hidden, weight, *case[2:4], case[0][:, 0], *case[4:], "triton")[0]
    (sum(o.sum() for o in out) + more).backward()
    assert [o.shape for o in out] == [(6,), (6,), (3,)] and not any(o.any() for o in out)
    assert not hidden.grad.any() and not weight.grad.any() and weight.grad.shape == weight.shape
    case[3], case[4] = case[3], 0
    assert segment_logprobs(*case, "triton").segment_logprob.shape == (0,)


def test_a_row_alone_has_the_bits_it_has_in_any_batch_at_any_place():
    hidden, weight, targets, *_ = problem(150, 40, 515, 1, masked=0.0)

    def bits(rows):
        segment = torch.zeros_like(targets[rows])
        return segment_logprobs(hidden[rows], weight, targets[rows], segment, 1, 0.7, "triton")

    whole = bits(slice(None))
    for rows in ([0], [149], [64], [149, 3, 70], list(range(63, 130)), list(range(149, -1, -1))):
        part = bits(rows)
        assert torch.equal(part.logprob, whole.logprob[rows])
        assert torch.equal(part.entropy, whole.entropy[rows])


def test_a_segment_has_the_same_sum_wherever_it_is_packed():
    values = torch.rand(400, device=DEVICE) - 0.5  # [N]
    alone = triton_path.segment_sum(values, torch.zeros(400, dtype=torch.long, device=DEVICE), 1)
    for before, other in ((1, 0), (77, 0), (129, 2)):
        noise = torch.randn(before, device=DEVICE)
        segment = torch.cat((torch.full((before,), other), torch.ones(400))).long().to(DEVICE)
        sums = triton_path.segment_sum(torch.cat((noise, values)), segment, 3)
        assert torch.equal(sums[1:2], alone)
        mixed = torch.randperm(400 + before).argsort()  # its rows spread over the pack, in their own order
        place = torch.cat((mixed[400:], mixed[:400].sort()[0])).to(DEVICE)
        spread, ids = torch.empty_like(torch.cat((noise, values))), torch.empty_like(segment)
        spread[place], ids[place] = torch.cat((noise, values)), segment
        assert torch.equal(triton_path.segment_sum(spread, ids, 3)[1:2], alone)


def test_segment_sums_over_unsorted_empty_and_long_segments():
    values, segment = torch.randn(700, device=DEVICE), torch.randint(5, (700,), device=DEVICE) * 2
    want = torch.zeros(11, dtype=torch.float64, device=DEVICE).index_add(0, segment, values.double())
    common.close(triton_path.segment_sum(values, segment, 11), want, 1e-5, "sums")


def test_the_same_bits_twice_and_after_a_second_backward():
    case, grads = problem(100, 32, 300, 9), common.upstream(100, 9, device=DEVICE)
    first, second = (sum(common.run(case, "triton", grads), []) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    hidden, weight = case[0].requires_grad_(), case[1].requires_grad_()
    total = sum(out.sum() for out in segment_logprobs(hidden, weight, *case[2:], "triton"))
    once, again = (torch.autograd.grad(total, (hidden, weight), retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, again))


def test_weighted_logprob_over_several_chunks(monkeypatch):
    monkeypatch.setattr(triton_path, "LOGITS_BYTES", 1)  # 128 rows at a time
    common.weighted(problem(200, 12, 133, 5, temperature="rows"), "triton")
    common.weighted(problem(20, 12, 133, 5, dtype=torch.bfloat16), "triton")


def test_weighted_logprob_over_several_blocks_of_a_row():
    common.weighted(problem(6, 8, 9001, 2, target=-1, scale=4.0), "triton")


def test_the_shape_of_the_work_depends_on_the_vocabulary_alone(monkeypatch):
    """The same splits for one row and for many: 119 of 5 tiles at Qwen's size on Hopper."""
    monkeypatch.setattr(triton_path, "SPLITS", 128)
    seen = []

    class Spy:
        def __getitem__(self, grid):
            return lambda *args, **options: seen.append((grid, args[11:12], options))

    monkeypatch.setattr(triton_path, "forward_kernel", Spy())
    monkeypatch.setattr(triton_path, "combine_kernel", Spy())
    tile = dict(ROWS=128, COLS=256, DEPTH=64)
    monkeypatch.setattr(triton_path, "layout", lambda dtype, device: (tile, {}))
    for N, blocks in ((1, 1), (128, 1), (1000, 8)):
        for V in VOCABULARIES:
            seen.clear()
            triton_path.forward(torch.zeros(N, 8), torch.zeros(V, 8), torch.zeros(N).long(), torch.ones(N))
            assert seen[0] == ((blocks * 119,), (5,), tile)


def test_auto_is_triton_on_cuda_and_chunked_elsewhere(monkeypatch):
    case = problem(6, 4, 9, 3)
    want, used = {"cpu": chunked, "cuda": triton_path}[DEVICE], []
    apply = want.LogprobEntropy.apply
    monkeypatch.setattr(want.LogprobEntropy, "apply", lambda *args: used.append(1) or apply(*args))
    segment_logprobs(*case)
    assert used


def test_triton_on_a_cpu_without_the_interpreter_is_refused(monkeypatch):
    monkeypatch.setattr(triton_path, "INTERPRET", False)
    with pytest.raises(ValueError, match="backend 'triton': expected hidden on CUDA, not on cpu"):
        segment_logprobs(*common.problem(6, 4, 9, 3), "triton")


def test_importing_and_using_the_chunked_path_needs_no_triton():
    code = ("import sys; sys.modules['triton'] = None; import torch, kernels; zeros = torch.zeros(2).long(); "
            "kernels.segment_logprobs(torch.ones(2, 3), torch.ones(4, 3), zeros, zeros)")
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


# ---- what only a GPU can show


@gpu
@pytest.mark.parametrize("V", VOCABULARIES)
@pytest.mark.parametrize("case", [dict(), dict(scale=40.0), dict(temperature="rows"), dict(masked=0.6)])
def test_full_size_against_float64(V, case):
    common.compare(problem(300, 256, V, 5, dtype=torch.bfloat16, **case), "triton", 1e-4, grad_tolerance=2e-2)


@gpu
@pytest.mark.parametrize("V", VOCABULARIES)
def test_full_size_all_logits_far_below_zero(V):
    """The columns that fill up the last tile would dwarf the real ones, had they a logit of 0."""
    case = problem(300, 256, V, 5, dtype=torch.bfloat16)
    case[0][:, 0], case[1][:, 0] = 1.0, -50.0
    common.compare(case, "triton", 1e-4, grad_tolerance=2e-2)


@gpu
def test_full_size_twenty_runs_have_the_same_bits():
    case = problem(3000, 1536, VOCABULARIES[0], 40, dtype=torch.bfloat16)
    grads = common.upstream(3000, 40, device=DEVICE)
    first = sum(common.run(case, "triton", grads), [])
    for _ in range(19):
        assert all(torch.equal(a, b) for a, b in zip(first, sum(common.run(case, "triton", grads), [])))


@gpu
def test_full_size_row_alone_equals_row_in_batch():
    hidden, weight, targets, *_ = problem(1000, 1536, VOCABULARIES[0], 1, masked=0.0, dtype=torch.bfloat16)
    zeros = torch.zeros_like(targets)
    whole = segment_logprobs(hidden, weight, targets, zeros).logprob
    for rows in ([0], [999], [500, 3], list(range(100, 356)), list(range(999, -1, -1))):
        alone = segment_logprobs(hidden[rows], weight, targets[rows], zeros[rows]).logprob
        assert torch.equal(alone, whole[rows])
