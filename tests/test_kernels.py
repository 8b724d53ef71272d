"""kernels/: the chunked path against the definition in float64, its memory, and every input error."""

from functools import partial

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import chunked, reference, segment_logprobs

NAMES = ("logprob", "entropy", "segment_logprob")


def problem(T, D, V, S, seed=0, scale=1.0, masked=0.3, dtype=torch.float32, temperature=1.0, target=None,
            device="cpu"):
    """Random inputs. A share of the rows is unowned and holds invalid targets and temperatures."""
    rng = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(T, D, generator=rng), torch.randn(V, D, generator=rng) * scale / D**0.5
    targets = torch.randint(V, (T,), generator=rng) if target is None else torch.full((T,), target % V)
    segment = torch.randint(max(S, 1), (T,), generator=rng)
    unowned = torch.rand(T, generator=rng) < masked
    segment[unowned], targets[unowned] = -1, V + 7
    if temperature == "rows":
        temperature = torch.rand(T, generator=rng) * 1.9 + 0.1  # [T] in 0.1..2
        temperature[unowned] = -1.0
    case = [hidden.to(dtype), weight.to(dtype), targets, segment, S, temperature]
    return [x.to(device) if isinstance(x, torch.Tensor) else x for x in case]


def upstream(T, S, device="cpu"):
    """Random gradients of the three outputs: mixed signs, a third of them exactly 0."""
    rng = torch.Generator().manual_seed(1)
    grads = [torch.randn(n, generator=rng) * (torch.rand(n, generator=rng) > 0.33) for n in (T, T, S)]
    return [g.to(device) for g in grads]


def run(case, backend, grads, wide=False):
    """Outputs, and the gradients of hidden and weight. wide: the definition in float64."""
    rest = case[2:]
    hidden, weight = (x.detach().to(torch.float64 if wide else x.dtype).requires_grad_() for x in case[:2])
    entry = reference.segment_logprobs if wide else partial(segment_logprobs, backend=backend)
    out = entry(hidden, weight, *rest)
    total = sum((o * g).sum() for o, g in zip(out, grads) if g is not None)
    return list(out), list(torch.autograd.grad(total, (hidden, weight)))


def close(got, want, tolerance, name):
    """Checks the largest error, relative to the largest true value or to 1 if that is larger."""
    if want.numel():
        error = (got.double() - want.double()).abs().max() / want.abs().max().clamp(min=1.0)
        assert error <= tolerance, f"{name}: {error:.1e} > {tolerance:.0e}"


def compare(case, backend, tolerance=2e-5, grads=None, grad_tolerance=None):
    grads = upstream(len(case[0]), case[4], device=case[0].device) if grads is None else grads
    out, dout = run(case, backend, grads)
    want, dwant = run(case, backend, grads, wide=True)
    for name, got, true in zip(NAMES, out, want):
        assert got.dtype == torch.float32 and got.shape == true.shape, name
        close(got, true, tolerance, name)
    for name, got, true in zip(("dhidden", "dweight"), dout, dwant):
        assert got.dtype == case[0].dtype and got.shape == true.shape, name
        close(got, true, grad_tolerance or tolerance, name)
    owned = case[3] >= 0
    assert not out[0][~owned].any() and not out[1][~owned].any() and not dout[0][~owned].any()


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("T,D,V,S", [(1, 1, 1, 1), (1, 8, 2, 1), (2, 3, 5, 4), (7, 5, 3, 2), (70, 33, 515, 6),
                                     (129, 96, 350, 9), (300, 17, 1031, 40)])
def test_equals_the_definition_in_float64(backend, T, D, V, S):
    compare(problem(T, D, V, S), backend)
    compare(problem(T, D, V, S, seed=2, temperature="rows"), backend)


CORNERS = {
    "nothing masked": dict(masked=0.0), "all rows masked": dict(masked=1.0), "flat": dict(scale=0.0),
    "peaked": dict(scale=60.0), "cold": dict(temperature=0.05), "hot": dict(temperature=50),
    "first target": dict(target=0), "last target": dict(target=-1),
    "mixed temperatures": dict(temperature="rows", scale=5.0)}


@pytest.mark.parametrize("corner", CORNERS)
def test_corners(corner):
    compare(problem(90, 24, 301, 7, **CORNERS[corner]), "chunked")


@pytest.mark.parametrize("used", range(3))
def test_each_output_alone_has_the_right_gradient(used):
    case = problem(40, 12, 77, 5)
    compare(case, "chunked", grads=[g if i == used else None for i, g in enumerate(upstream(40, 5))])
    compare(case, "chunked", grads=[torch.zeros(n) for n in (40, 40, 5)])


def far_below_zero(backend, device="cpu"):
    """Fails if the vocabulary is padded with zeros: exp(0) would outweigh the rest."""
    case = problem(20, 4, 9, 2, masked=0.0, device=device)
    case[0][:, 0], case[1][:, 0] = 1.0, -50.0
    compare(case, backend)
    case[1][3, 0] = 40.0  # p(3) = 1: rounding must give no negative entropy and no positive log-prob
    case[2][:] = 3
    compare(case, backend)
    out = segment_logprobs(*case, backend)
    assert out.entropy.min() >= 0 and out.logprob.max() <= 0


def test_all_logits_far_below_zero_and_one_far_above():
    far_below_zero("chunked")


@pytest.mark.parametrize("dtype,tolerance", [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_half_precision_rounds_only_the_gradients(dtype, tolerance):
    compare(problem(60, 16, 130, 4, dtype=dtype, scale=8.0), "chunked", 2e-5, grad_tolerance=tolerance)


def test_an_fp32_weight_is_cast_as_in_linear_and_gets_an_fp32_gradient():
    case = problem(60, 16, 130, 4)
    hidden, weight = case[0].bfloat16().requires_grad_(), case[1].requires_grad_()
    got = segment_logprobs(hidden, weight, *case[2:])
    want = reference.segment_logprobs(hidden.double(), weight.bfloat16().double(), *case[2:])
    close(got.logprob, want.logprob, 2e-5, "logprob")
    grads = upstream(60, 4)
    totals = [sum((o * g).sum() for o, g in zip(out, grads)) for out in (got, want)]
    mine, true = (torch.autograd.grad(total, weight)[0] for total in totals)
    assert mine.dtype == torch.float32
    close(mine, true, 2e-2, "dweight")  # the cast rounds `true` to bf16; ours is not rounded


def test_a_tied_head_adds_both_gradients():
    table = (torch.randn(50, 8) * 0.3).requires_grad_()
    tokens = torch.randint(50, (30,))
    segment = torch.arange(30) // 7 - 1

    def gradient(backend):
        out = segment_logprobs(table[tokens], table, tokens.roll(-1), segment, backend=backend)
        return torch.autograd.grad(out.segment_logprob.tanh().sum() + out.entropy.sum(), table)[0]

    close(gradient("chunked"), gradient("reference"), 1e-5, "dtable")


def without_owned_rows(backend, device="cpu"):
    for T, S in ((6, 3), (0, 3), (6, 0)):
        case = problem(T, 4, 9, S, masked=1.0, device=device)
        hidden, weight = case[0].requires_grad_(), case[1].requires_grad_()
        out = segment_logprobs(hidden, weight, *case[2:], backend)
        assert [o.shape for o in out] == [(T,), (T,), (S,)] and not any(o.any() for o in out)
        sum(o.sum() for o in out).backward()
        assert not hidden.grad.any() and not weight.grad.any() and weight.grad.shape == weight.shape


def test_without_owned_rows_all_outputs_and_gradients_are_zero():
    without_owned_rows("chunked")


def test_chunk_sizes_do_not_change_the_result(monkeypatch):
    case, grads = problem(50, 12, 40, 6, temperature="rows"), upstream(50, 6)
    whole = run(case, "chunked", grads)
    monkeypatch.setattr(chunked, "MIN_ROWS", 1)
    monkeypatch.setattr(chunked, "BLOCK_BYTES", 4 * 40 * 4)  # blocks of 4 rows, so that a chunk has several
    for rows in (1, 3, 17, 49):
        monkeypatch.setattr(chunked, "CHUNK_BYTES", 4 * 40 * rows)
        for got, want in zip(sum(run(case, "chunked", grads), []), sum(whole, [])):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def same_bits_twice(backend, device="cpu"):
    case, grads = problem(200, 32, 500, 9, device=device), upstream(200, 9, device=device)
    first, second = (sum(run(case, backend, grads), []) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    hidden, weight = case[0].requires_grad_(), case[1].requires_grad_()
    total = sum(out.sum() for out in segment_logprobs(hidden, weight, *case[2:], backend))
    once, again = (torch.autograd.grad(total, (hidden, weight), retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, again))


def test_the_same_bits_twice_and_after_a_second_backward():
    same_bits_twice("chunked")


def test_only_what_needs_a_gradient_gets_one():
    case = problem(30, 8, 40, 3)
    case[0].requires_grad_()
    segment_logprobs(*case).segment_logprob.sum().backward()
    assert case[0].grad is not None and case[1].grad is None
    with torch.no_grad():
        assert segment_logprobs(*case).logprob.grad_fn is None
    case[0] = case[0].detach()
    assert segment_logprobs(*case).logprob.grad_fn is None
    case[1].requires_grad_()
    segment_logprobs(*case).entropy.sum().backward()
    assert case[1].grad is not None and case[0].grad is None


def test_num_segments_and_segments_without_tokens():
    case = problem(30, 8, 40, 5, masked=0.0)
    case[3] = torch.tensor([3, -1, 1] * 10, dtype=torch.int32)
    case[2] = case[2].int()
    sums = segment_logprobs(*case).segment_logprob
    assert sums.shape == (5,) and not sums[[0, 2, 4]].any() and sums[[1, 3]].all()
    case[4] = None
    assert torch.equal(segment_logprobs(*case).segment_logprob, sums[:4])


class Largest(TorchDispatchMode):
    """Records the bytes of the largest tensor that an operation makes, and the peak of all live tensors."""

    def __init__(self):
        super().__init__()
        self.alive, self.largest, self.peak = {}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                store = tensor.untyped_storage()
                self.alive[store._cdata] = StorageWeakRef(store), store.nbytes()
                self.largest = max(self.largest, store.nbytes())
        self.alive = {key: held for key, held in self.alive.items() if not held[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return out


def memory(T, V, D, masked, entropy):
    case = problem(T, D, V, 4, masked=masked)
    hidden, weight = case[0].requires_grad_(), case[1].requires_grad_()
    with Largest() as seen:
        out = segment_logprobs(hidden, weight, *case[2:])
        (out.segment_logprob.sum() + (out.entropy.sum() if entropy else 0)).backward()
    return seen


@pytest.mark.parametrize("entropy", [True, False])
def test_memory_does_not_grow_with_tokens_times_vocabulary(entropy):
    T, V, D = 4096, 2001, 16
    seen = memory(T, V, D, 0.0, entropy)
    assert seen.largest < T * V * 4 / 6  # the [T, V] fp32 logits would be 33 MB
    *_, space = chunked.prepare(torch.empty(T, D), torch.empty(V, D))
    buffers = sum(part.nbytes for part in space)
    assert seen.peak < buffers + 6 * T * D * 4 + 2 * V * D * 4 + 20 * T * 8  # rows, gradients and [T] vectors
    assert memory(2 * T, V, D, 0.0, entropy).peak - seen.peak < T * V * 4 / 20
    assert memory(2 * T, V, D, 0.99, entropy).peak < seen.peak  # unowned rows are not copied


def at(row, value):
    return lambda tensor: tensor.index_fill(0, torch.tensor([row]), value)


@pytest.mark.parametrize("match,change", [
    (r"hidden \[6\] .*\[T, D\]", dict(hidden=lambda x: x[:, 0])),
    (r"hidden \[6, 4\] torch.int64", dict(hidden=lambda x: x.long())),
    (r"hidden \[6, 4\] torch.float64", dict(hidden=lambda x: x.double())),
    (r"hidden 3", dict(hidden=lambda x: 3)),
    (r"hidden \[6, 4\].*contiguous last dimension.*\(1, 6\)", dict(hidden=lambda x: x.T.contiguous().T)),
    (r"weight \[9, 4\].*contiguous last dimension", dict(weight=lambda x: x.T.contiguous().T)),
    (r"weight \[9, 3\].*\[V, 4\]", dict(weight=lambda x: x[:, :3].contiguous())),
    (r"weight \[0, 4\].*V > 0", dict(weight=lambda x: x[:0])),
    (r"targets \[5\].*\[6\]", dict(targets=lambda x: x[:5])),
    (r"targets \[6\] torch.float32", dict(targets=lambda x: x.float())),
    (r"targets \[6\].*0\.\.8 on owned rows, not 9 in row 3", dict(targets=at(3, 9))),
    (r"targets \[6\].*0\.\.8 on owned rows, not -1 in row 5", dict(targets=at(5, -1))),
    (r"segment \[7\].*\[6\]", dict(segment=lambda x: torch.cat((x, x[:1])))),
    (r"segment \[6\] torch.bool", dict(segment=lambda x: x > 0)),
    (r"segment \[6\].*>= 0, not -2 in row 1", dict(segment=at(1, -2))),
    (r"segment \[6\].*below num_segments = 3, not 3 in row 5", dict(segment=at(5, 3))),
    (r"num_segments -1", dict(num_segments=lambda x: -1)),
    (r"num_segments 2\.0", dict(num_segments=lambda x: 2.0)),
    (r"temperature 0", dict(temperature=lambda x: 0)),
    (r"temperature -1\.0", dict(temperature=lambda x: -1.0)),
    (r"temperature nan", dict(temperature=lambda x: float("nan"))),
    (r"temperature 'hot'", dict(temperature=lambda x: "hot")),
    (r"temperature \[1\].*\[6\]", dict(temperature=lambda x: torch.ones(1))),
    (r"temperature \[6\] torch.int64", dict(temperature=lambda x: torch.ones(6, dtype=torch.long))),
    (r"temperature \[6\].*not 0.0 in row 2", dict(temperature=lambda x: at(2, 0.0)(torch.ones(6)))),
    (r"temperature \[6\].*not nan in row 0", dict(temperature=lambda x: at(0, float("nan"))(torch.ones(6)))),
    (r"backend 'cuda'.*auto, reference, chunked, triton", dict(backend=lambda x: "cuda")),
])
def test_bad_input_raises_an_error_that_names_it(match, change):
    names = "hidden", "weight", "targets", "segment", "num_segments", "temperature"
    case = dict(zip(names, problem(6, 4, 9, 3, masked=0.0)), backend="auto")
    case["segment"] = torch.tensor([0, 1, 2, 2, -1, 1])
    case.update({name: make(case[name]) for name, make in change.items()})
    with pytest.raises(ValueError, match=match):
        segment_logprobs(**case)


def test_unowned_rows_may_hold_invalid_values():
    case = problem(6, 4, 9, 3, masked=0.0)
    case[3] = torch.tensor([0, 1, 2, 2, -1, 1])
    want = segment_logprobs(*case)
    case[2][4], case[0][4], case[5] = -100, float("nan"), torch.tensor([1.0, 1, 1, 1, -3, 1])
    assert all(torch.equal(a, b) for a, b in zip(segment_logprobs(*case), want))
