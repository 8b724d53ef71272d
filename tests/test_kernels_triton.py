"""The Triton path: on CUDA if there is a GPU, else on the CPU in Triton's interpreter.

The interpreter checks arithmetic, masks, indices and shapes. It shows no race, no compiled rounding and no
bf16 (it multiplies the bit patterns, so the kernels get fp32): the tests marked `gpu` check those."""

import os
import subprocess
import sys
from collections import defaultdict
from types import SimpleNamespace

import numpy
import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

if DEVICE == "cpu":
    assert "triton" not in sys.modules, "Triton was imported before this file could set TRITON_INTERPRET"
    os.environ["TRITON_INTERPRET"] = "1"  # read while Triton and the kernels are imported
triton = pytest.importorskip("triton", reason="no Triton here")
new_numpy = numpy.lib.NumpyVersion(numpy.__version__) >= "2.4.0"
if DEVICE == "cpu" and new_numpy and triton.__version__.startswith("3.6."):
    pytest.skip("Triton 3.6 cannot interpret loops with numpy 2.4 or later", allow_module_level=True)
import kernels.segment_logprob as triton_path  # noqa: E402

os.environ.pop("TRITON_INTERPRET", None)  # other tests start processes that must compile

import test_kernels as common  # noqa: E402
from helpers import ROOT  # noqa: E402

import kernels  # noqa: E402
from kernels import chunked, segment_logprobs  # noqa: E402

gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
VOCABULARIES = [151936, 152064, 151665]  # Qwen2.5 small and large, and one that is no multiple of a tile


def problem(*args, **kwargs):
    return common.problem(*args, **kwargs, device=DEVICE)


@pytest.fixture(autouse=True)
def small_pieces(request, monkeypatch):
    """Few splits and narrow chunks: a small vocabulary then has every kind of border."""
    if DEVICE == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")  # the first launch imports the rest of Triton
    if "full_size" not in request.node.name:
        monkeypatch.setattr(triton_path, "SPLITS", 3)
        monkeypatch.setattr(triton_path, "WAVE", 64 if DEVICE == "cpu" else 256)
        monkeypatch.setattr(triton_path, "DLOGITS_BYTES", 1)
        monkeypatch.setattr(triton_path, "GROUP", 2)


@pytest.fixture(params=["tma", "pointers"])
def loads(request, monkeypatch):
    """Descriptors from the host, as on Hopper and later, and plain pointers, as before."""
    if DEVICE == "cpu":
        monkeypatch.setattr(triton_path, "has_tma", lambda device: request.param == "tma")
    elif request.param != ("tma" if triton_path.has_tma(DEVICE) else "pointers"):
        pytest.skip(f"this GPU does not use {request.param}")


@pytest.mark.parametrize("T,D,V,S", [(1, 8, 1, 1), (2, 3, 5, 4), (70, 33, 515, 6), (195, 40, 130, 30)])
def test_equals_the_definition_in_float64(T, D, V, S, loads):
    common.compare(problem(T, D, V, S, temperature="rows"), "triton")


@pytest.mark.parametrize("corner", common.CORNERS)
def test_corners(corner):
    common.compare(problem(90, 24, 301, 7, **common.CORNERS[corner]), "triton")


@pytest.mark.parametrize("target", [0, 31, 32, 63, 64, 191, 192, 511, 512, 514])
def test_the_target_is_found_at_every_border(target):
    """First and last column of half a tile, a tile, a split and the last tile, which V does not fill."""
    case = problem(5, 16, 515, 2, target=target, masked=0.0)
    want = segment_logprobs(*case, "reference").logprob
    common.close(segment_logprobs(*case, "triton").logprob, want, 2e-5, "logprob")


@pytest.mark.parametrize("used", range(3))
def test_each_output_alone_has_the_right_gradient(used):
    case, grads = problem(40, 12, 77, 5), common.upstream(40, 5, device=DEVICE)
    common.compare(case, "triton", grads=[g if i == used else None for i, g in enumerate(grads)])


def test_all_logits_far_below_zero_and_one_far_above(loads):
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


def test_kernels_take_and_make_fp16(loads):
    """16-bit tiles in, 16-bit gradients out: `cast_operands` keeps them from the interpreter elsewhere."""
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


def test_every_buffer_is_written_before_it_is_read(monkeypatch, loads):
    """Fresh buffers are filled with NaN: a missed row, split, column or segment shows in the result."""
    made = []

    def poisoned(make):
        def make_and_poison(x, *size, **kwargs):
            made.append(make(x, *size, **kwargs))
            return made[-1].fill_(float("nan")) if x.is_floating_point() else made[-1]

        return make_and_poison

    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
    common.compare(problem(70, 20, 333, 6, temperature="rows"), "triton")
    assert len(made) > 10


@pytest.mark.parametrize("D,width,start", [(33, 44, 4), (32, 48, 5), (32, 52, 4), (32, 48, 4)])
def test_rows_that_are_not_aligned_are_copied(D, width, start, monkeypatch, loads):
    """Rows of no multiple of 16 elements, a base that is not aligned, an odd distance between rows."""
    case, seen = problem(20, D, 70, 3, masked=0.0), []

    def check(x, rows, cols):
        seen.append(x)
        assert x.data_ptr() % 16 == 0 and x.stride(0) % 16 == 0
        return kernel_argument(x, rows, cols)

    kernel_argument = triton_path.kernel_argument
    monkeypatch.setattr(triton_path, "kernel_argument", check)
    for i, rows in ((0, 20), (1, 70)):
        wide = torch.zeros(rows, width, device=DEVICE)
        wide[:, start:start + D] = case[i]
        case[i] = wide[:, start:start + D]
    common.compare(case, "triton")
    common.compare([case[0][3:4], case[1], *(x[3:4] for x in case[2:4]), *case[4:]], "triton")
    assert seen


def test_without_owned_rows_all_outputs_and_gradients_are_zero():
    common.without_owned_rows("triton", DEVICE)


def same_bits_in_any_batch(case, *batches):
    """Of some rows of the case, and of all in reverse."""
    hidden, weight, targets, *_ = case

    def bits(rows):
        segment = torch.zeros_like(targets[rows])
        return segment_logprobs(hidden[rows], weight, targets[rows], segment, 1, 0.7, "triton")

    whole = bits(slice(None))
    for rows in (*batches, list(range(len(hidden)))[::-1]):
        part = bits(rows)
        assert torch.equal(part.logprob, whole.logprob[rows])
        assert torch.equal(part.entropy, whole.entropy[rows])


def test_a_row_has_the_same_bits_alone_and_anywhere_in_any_batch(loads):
    case = problem(150, 40, 515, 1, masked=0.0)
    same_bits_in_any_batch(case, [0], [149], [64], [149, 3, 70], list(range(63, 130)))


def test_a_segment_has_the_same_sum_wherever_it_is_packed():
    values = torch.rand(400, device=DEVICE) - 0.5  # [N]
    alone = triton_path.segment_sum(values, torch.zeros(400, dtype=torch.long, device=DEVICE), 1)
    for before, other in ((1, 0), (77, 0), (129, 2)):
        noise = torch.randn(before, device=DEVICE)
        segment = torch.cat((torch.full((before,), other), torch.ones(400))).long().to(DEVICE)
        sums = triton_path.segment_sum(torch.cat((noise, values)), segment, 3)
        assert torch.equal(sums[1:2], alone)
        mixed = torch.randperm(400 + before).argsort()  # spreads its rows over the pack, in order
        place = torch.cat((mixed[400:], mixed[:400].sort()[0])).to(DEVICE)
        spread, ids = torch.empty_like(torch.cat((noise, values))), torch.empty_like(segment)
        spread[place], ids[place] = torch.cat((noise, values)), segment
        assert torch.equal(triton_path.segment_sum(spread, ids, 3)[1:2], alone)


def test_segment_sums_over_unsorted_empty_and_long_segments():
    values, segment = torch.randn(700, device=DEVICE), torch.randint(5, (700,), device=DEVICE) * 2
    want = torch.zeros(11, dtype=torch.float64, device=DEVICE).index_add(0, segment, values.double())
    common.close(triton_path.segment_sum(values, segment, 11), want, 1e-5, "sums")


def test_the_same_bits_twice_and_after_a_second_backward():
    common.same_bits_twice("triton", DEVICE)


def test_fp32_sums_of_16_bit_products_have_the_arguments_that_torch_takes():
    """No CPU kernel takes out_dtype, so only shapes, types and names are checked."""
    a, b = (torch.zeros(size, dtype=torch.bfloat16, device="meta") for size in ((4, 8), (8, 5)))
    for dtype in (torch.float32, torch.bfloat16):
        triton_path.matmul_into(torch.zeros(4, 5, dtype=dtype, device="meta"), a, b, beta=1)


@pytest.mark.parametrize("V", VOCABULARIES)
def test_the_splits_depend_on_the_vocabulary_alone(V, monkeypatch):
    monkeypatch.setattr(triton_path, "SPLITS", 128)
    tile, _ = triton_path.layout(torch.float32, DEVICE)
    seen = set()

    class Spy:
        def __getitem__(self, grid):
            return lambda *args, **options: seen.add((grid[0] // triton.cdiv(N, tile["ROWS"]), args[13]))

    monkeypatch.setattr(triton_path, "forward_kernel", Spy())
    monkeypatch.setattr(triton_path, "combine_kernel", defaultdict(lambda: lambda *args, **options: None))
    for N in (1, 128, 1000):
        hidden, weight, ones = (torch.ones(size, device=DEVICE) for size in ((N, 16), (V, 16), (N,)))
        triton_path.forward(hidden, weight, ones.long(), ones)
    (splits, per_split), = seen
    last = (splits - 1) * per_split * tile["COLS"]  # the first column of the last split
    assert splits <= 128 and last < V <= last + per_split * tile["COLS"]


def test_auto_is_triton_on_cuda_and_chunked_elsewhere(monkeypatch):
    case = problem(6, 4, 9, 3)
    expected, used = {"cpu": chunked, "cuda": triton_path}[DEVICE], []
    apply = expected.LogprobEntropy.apply
    monkeypatch.setattr(expected.LogprobEntropy, "apply", lambda *args: used.append(1) or apply(*args))
    segment_logprobs(*case)
    assert used


def test_gpus_before_ampere_take_the_chunked_path(monkeypatch):
    """A T4 (7.5) has no bf16 and no asynchronous copies: the kernels would spill kilobytes there."""
    monkeypatch.setattr(triton_path, "INTERPRET", False)
    hidden = SimpleNamespace(is_cuda=True, device=torch.device("cuda:0"))
    for capability, path in (((7, 5), chunked), ((8, 0), triton_path), ((12, 0), triton_path)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        assert kernels.select_path("auto", hidden) is path
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(ValueError, match="backend 'triton': .* 8.0 on, not on compute capability 7.5"):
        kernels.select_path("triton", hidden)


def test_triton_on_a_cpu_without_the_interpreter_is_an_error(monkeypatch):
    monkeypatch.setattr(triton_path, "INTERPRET", False)
    with pytest.raises(ValueError, match="backend 'triton': expected hidden on CUDA .*, not on cpu"):
        segment_logprobs(*common.problem(6, 4, 9, 3), "triton")


def test_importing_and_using_the_chunked_path_needs_no_triton():
    code = ("import sys; sys.modules['triton'] = None; import torch, kernels; zeros = torch.zeros(2).long(); "
            "kernels.segment_logprobs(torch.ones(2, 3), torch.ones(4, 3), zeros, zeros)")
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


# ---- on a GPU only


@gpu
@pytest.mark.parametrize("V", VOCABULARIES)
@pytest.mark.parametrize("case", [dict(), dict(scale=40.0), dict(temperature="rows"), dict(masked=0.6)])
def test_full_size_against_float64(V, case):
    common.compare(problem(300, 256, V, 5, dtype=torch.bfloat16, **case), "triton", 1e-4, grad_tolerance=2e-2)


@gpu
@pytest.mark.parametrize("V", VOCABULARIES)
def test_full_size_all_logits_far_below_zero(V):
    """Columns beyond V in the last tile would outweigh the real ones if their logits were 0."""
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
def test_full_size_a_row_has_the_same_bits_alone_and_in_a_batch():
    case = problem(1000, 1536, VOCABULARIES[0], 1, masked=0.0, dtype=torch.bfloat16)
    same_bits_in_any_batch(case, [0], [999], [500, 3], list(range(100, 356)))
