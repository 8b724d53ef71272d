"""python kernels/bench.py: errors, time and memory of the log-prob kernels.

On CUDA it compares the Triton path with every installed peer; on a CPU it compares the chunked path with its
matrix products alone. Adds a dated section to kernels/RESULTS.md. T tokens, N owned tokens, D width, V
vocabulary."""

import datetime
import gc
import importlib
import importlib.util
import platform
import sys
import time
import types
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from kernels import chunked, segment_logprobs  # noqa: E402

RESULTS = ROOT / "kernels/RESULTS.md"
VOCABULARY = 151936  # Qwen2.5 up to 3B
UNPROVEN = "**No GPU has run these kernels yet.**\n\n"  # in RESULTS.md until this bench has run on one
SECONDS = 1.0  # for each time on a GPU: the median of 3 to 20 runs


# ---- peers: (hidden [N, D], weight [V, D], targets [N]) -> log-probs [N]


def naive(h, w, y):
    return F.linear(h, w).float().log_softmax(-1).gather(1, y[:, None])[:, 0]


def compiled():
    """PyTorch without a kernel: chunks of rows, recomputed in the backward, compiled."""
    chunk = torch.compile(naive)
    return lambda h, w, y: torch.cat([checkpoint(chunk, part, w, ids, use_reentrant=False)
                                      for part, ids in zip(h.split(2048), y.split(2048))])


def liger(const):
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as loss

    options = dict(reduction="none", accum_dtype=torch.float32, chunk_mem_const=const)
    return lambda h, w, y: -loss(h, w, y, **options)


def liger_ppo():
    from liger_kernel.chunked_loss.fused_linear_ppo import LigerFusedLinearPPOBase as base

    return lambda h, w, y: base.chunk_forward(h[None], w, y[None], bias=None, temperature=1.0)[0]


def cce(filter_eps):
    from cut_cross_entropy import linear_cross_entropy as loss

    return lambda h, w, y: -loss(h, w, y, reduction="none", filter_eps=filter_eps, impl="cce")


def verl():
    """verl's kernel without the packages that verl imports: its parents become empty modules."""
    spec = importlib.util.find_spec("verl")
    if spec is None:
        raise ModuleNotFoundError("No module named 'verl'")
    root = Path(spec.submodule_search_locations[0])
    for name, folder in (("verl", root), ("verl.utils", root / "utils")):
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = [str(folder)]
    sys.modules["verl.utils.device"] = types.SimpleNamespace(
        is_cuda_available=True, get_device_name=lambda: "cuda", get_torch_device=lambda: torch.cuda,
        get_device_capability=torch.cuda.get_device_capability)
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy as loss

    return lambda h, w, y: loss(h, w, y, 1.0, "none", None)[0]


PEERS = {"naive torch": lambda: naive, "chunked torch, compiled": compiled,
         "Liger FLCE, chunk_mem_const 1": partial(liger, 1),
         "Liger FLCE, chunk_mem_const 16": partial(liger, 16), "Liger PPO log-probs": liger_ppo,
         "CCE, no filter": partial(cce, None), "CCE, filter auto": partial(cce, "auto"), "verl Triton": verl}


def available() -> tuple[dict, list[str]]:
    """The peers that can be imported, and a line for each that cannot."""
    found, absent = {}, []
    for name, load in PEERS.items():
        try:
            found[name] = load()
        except Exception as error:  # a peer may fail in any way
            absent.append(f"- {name}: absent ({short(error)})")
    return found, absent


# ---- problems and truth


def problem(T, D, V, masked=0.0, peaked=False, device="cpu", dtype=torch.float32):
    """hidden, weight, targets, segment. Packs of 512 tokens: first the masked share, as a prompt, then
    segments of 64. peaked: targets have probabilities near 0.7, as in a trained model; else near 1 / V."""
    rng = torch.Generator(device).manual_seed(0)
    weight = torch.randn(V, D, generator=rng, device=device) / D**0.5
    hidden = torch.randn(T, D, generator=rng, device=device)
    targets = torch.randint(V, (T,), generator=rng, device=device)
    if peaked:  # the other logits are N(0, 1), so their log-sum-exp is log V + 1/2
        toward = weight[targets]
        hidden += toward * (torch.tensor(V).log() + 1.4) / toward.square().sum(1, keepdim=True)
    place = torch.arange(T, device=device)
    segment = torch.where(place % 512 >= round(512 * masked), place // 64, -1)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets, segment


@torch.no_grad()
def truth(h, w, y, g):
    """In float64: log-probs and gradients of the first 256 rows, gradients of 64 rows of the weight."""
    some = torch.linspace(0, len(w) - 1, 64, device=h.device).long()
    some[:32] = y[:32]  # half of them are targets
    wide, dw = w.double(), torch.zeros(64, h.shape[1], dtype=torch.float64, device=h.device)
    for start in range(0, len(h), 256):  # 311 MB of logits at a time
        part = slice(start, start + 256)
        logp = (h[part].double() @ wide.T).log_softmax(-1)  # [256, V]
        dz = -logp.exp() * g[part, None]
        dz.scatter_add_(1, y[part, None], g[part, None].double())
        dw += dz[:, some].T @ h[part].double()
        if start == 0:
            first = logp.gather(1, y[part, None])[:, 0], dz @ wide
    return *first, dw, some


def errors(run, h, w, y, g, want) -> list[str]:
    """Largest errors: of the log-probs in nats, of dH and of dW relative to their largest entry."""
    logp = run(h, w, y)
    dh, dw = torch.autograd.grad(logp, (h, w), g)
    *true, some = want
    gaps = [(mine.double() - right).abs().max()
            for mine, right in zip((logp.detach()[:256], dh[:256], dw[some]), true)]
    scales = 1.0, true[1].abs().max(), true[2].abs().max()
    return [f"{float(gap / scale):.1e}" for gap, scale in zip(gaps, scales)]


# ---- tables


def row(*cells) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def head(*cells) -> list[str]:
    return ["", row(*cells), row(*["---"] * len(cells))]


def short(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:60]}"


def attempt(run, *cells) -> str:
    """A row with what run() returns, or its error: a peer that needs 40 GB must not end the bench."""
    try:
        return row(*cells, *run())
    except Exception as error:
        torch.cuda.empty_cache()
        return row(*cells, short(error))


# ---- CUDA


def gpu_time(run) -> float:
    """Median milliseconds, with a cold L2 in each run."""
    flush, times = torch.empty(256 << 20, dtype=torch.int8, device="cuda"), []
    while len(times) < 3 or (sum(times) < 1000 * SECONDS and len(times) < 20):
        flush.zero_()  # in training, other layers fill the L2 between two calls
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return median(times)


def gpu_measure(forward, h, w, g, operations, ceiling) -> list[str]:
    """Milliseconds of the forward and with the backward, TFLOP/s, share of the ceiling, peak MB above inputs
    and gradients. g is the gradient of what forward() returns."""
    def both():
        h.grad = w.grad = None
        forward().backward(g)

    for _ in range(2):  # compiles and fills the allocator
        both()
    h.grad = w.grad = None
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    both()
    extra = torch.cuda.max_memory_allocated() - held - h.nbytes - w.nbytes  # gradients have the inputs' sizes
    with torch.no_grad():
        alone = gpu_time(forward)
    ms = gpu_time(both)
    return [f"{alone:.1f}", f"{ms:.1f}", f"{operations / ms / 1e9:.0f}", f"{ceiling / ms:.2f}",
            f"{extra / 2**20:.0f}"]


@torch.no_grad()
def products(h, w, rows, columns) -> None:
    """The four matrix products alone, 8NVD operations, in the chunks of the path."""
    space = h.new_empty(min(rows, len(h)), min(columns, len(w)))
    dh, dw = torch.zeros_like(h), torch.zeros_like(w)
    for backward in (False, True):
        for i in range(0, len(h), rows):
            for j in range(0, len(w), columns):
                a, b = h[i:i + rows], w[j:j + columns]
                dz = torch.mm(a, b.T, out=space[:len(a), :len(b)])
                if backward:
                    dh[i:i + rows].addmm_(dz, b)
                    dw[j:j + columns].addmm_(dz.T, a)


def gpu_case(T, D, masked, peaked, found) -> list[str]:
    h, w, y, segment = problem(T, D, VOCABULARY, masked, peaked, "cuda", torch.bfloat16)
    g, rows = torch.randn(T, device="cuda"), (segment >= 0).nonzero()[:, 0]
    hc, yc, gc = h.detach()[rows].requires_grad_(), y[rows], g[rows]  # [N, D]: peers do not pay for this copy
    operations = 8 * len(rows) * VOCABULARY * D
    ceiling = gpu_time(lambda: products(hc, w, len(hc), 8448))  # the chunk that the kernels use at N = 16k
    cells = "peaked" if peaked else "random", D, T, masked
    runs = {"SEAR": (lambda: segment_logprobs(h, w, y, segment).logprob, h, w, g)}
    runs |= {name: (partial(run, hc, w, yc), hc, w, gc) for name, run in found.items()}
    speed = f"{operations / ceiling / 1e9:.0f}"
    bare = row(*cells, "products alone", "", f"{ceiling:.1f}", speed, "1.00", "")
    return [bare] + [attempt(partial(gpu_measure, *run, operations, ceiling), *cells, name)
                     for name, run in runs.items()]


def gpu_correct(D, peaked, found) -> list[str]:
    h, w, y, segment = problem(2048, D, VOCABULARY, 0.0, peaked, "cuda", torch.bfloat16)
    g = torch.randn(2048, device="cuda")
    want = truth(h, w, y, g)
    runs = {"SEAR": lambda h, w, y: segment_logprobs(h, w, y, segment).logprob}
    return [attempt(partial(errors, run, h, w, y, g, want), "peaked" if peaked else "random", D, name)
            for name, run in (runs | found).items()]


def gpu_bits() -> str:
    h, w, y, segment = problem(4096, 1536, VOCABULARY, 0.6, False, "cuda", torch.bfloat16)
    mixed = torch.linspace(-1, 1, 4096, device="cuda")

    def run():
        out = segment_logprobs(h, w, y, segment)
        total = (out.logprob * mixed).sum() + out.segment_logprob.tanh().sum()
        return [out.logprob, out.segment_logprob, *torch.autograd.grad(total, (h, w))]

    first = run()  # a race or an atomic would change a bit now and then
    equal = sum(all(map(torch.equal, first, run())) for _ in range(19))
    return f"Of 19 further runs, {equal} gave the bits of the first: log-probs, segment sums, dH and dW."


@torch.no_grad()
def gpu_decode(D, N, found) -> list[str]:
    h, w, y, segment = problem(N, D, VOCABULARY, 0.0, False, "cuda", torch.bfloat16)
    runs = {"SEAR": lambda: segment_logprobs(h, w, y, segment)}
    runs |= {name: partial(run, h, w, y) for name, run in found.items()}
    return [attempt(lambda: [f"{gpu_time(run):.3f}"], D, N, name) for name, run in runs.items()]


def gpu_report() -> list[str]:
    found, absent = available()
    lines = [*absent, "", gpu_bits(), ""]
    lines += ["Errors against float64 at T = 2048, those of dH and dW over their largest entry.",
              *head("data", "D", "provider", "log-prob, nats", "dH", "dW")]
    for D, peaked in product((1536, 3584), (False, True)):
        lines += gpu_correct(D, peaked, found)
    lines += ["", "The time of peers excludes gathering the owned rows. TFLOP/s: 8NVD operations.",
              "Share: time of the products alone over the time. Extra: peak MB above inputs and gradients.",
              *head("data", "D", "T", "masked", "provider", "forward ms", "ms", "TFLOP/s", "share", "extra")]
    for D, T, masked, peaked in product((1536, 3584), (4096, 16384, 65536), (0.0, 0.6), (False, True)):
        lines += gpu_case(T, D, masked, peaked, found)
    lines += ["", "A decode step: log-probs of N rows.", *head("D", "N", "provider", "forward ms")]
    return lines + [line for D in (1536, 3584) for N in (1, 64, 128) for line in gpu_decode(D, N, found)]


# ---- CPU


def cpu_times(T, V, D, runs) -> str:
    """Median milliseconds, interleaved so that other work on the machine slows all alike."""
    h, w, y, segment = problem(T, D, V)
    rows = chunked.chunks(T, V)[0].stop
    ways = [lambda: products(h, w, rows, V),
            lambda: segment_logprobs(h, w, y, segment).logprob.sum().backward(),
            lambda: segment_logprobs(h, w, y, segment, backend="reference").logprob.sum().backward()]
    times = [[] for _ in ways]
    for _ in range(runs):
        for run, spent in zip(ways, times):
            h.grad = w.grad = None  # else adding to a gradient is timed too
            start = time.perf_counter()
            run()
            spent.append(1000 * (time.perf_counter() - start))
    alone, *others = map(median, times)
    return row(T, V, D, f"{alone:.0f}", *(f"{ms:.0f} ({ms / alone:.2f}x)" for ms in others))


def cpu_memory(T, V, D) -> str:
    """Rise of this process's resident memory during forward and backward (Linux only)."""
    def status(name):
        return int(Path("/proc/self/status").read_text().split(name)[1].split()[0]) / 1024

    h, w, y, segment = problem(T, D, V)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = status("VmRSS:")
    segment_logprobs(h, w, y, segment).logprob.sum().backward()
    peak, gradients = status("VmHWM:") - before, (h.nbytes + w.nbytes) / 2**20
    return row(T, V, D, *(f"{size:.0f}" for size in (peak, gradients, peak - gradients, 4 * T * V / 2**20)))


def cpu_report() -> list[str]:
    h, w, y, segment = problem(300, 64, 5003, peaked=True)
    g = torch.randn(300)
    gaps = errors(lambda h, w, y: segment_logprobs(h, w, y, segment).logprob, h, w, y, g, truth(h, w, y, g))
    lines = ["The chunked path in fp32. Errors against float64 at T = 300, V = 5003, dH and dW over their",
             "largest entry: log-probs {} nats, dH {}, dW {}.".format(*gaps), "",
             "Forward and backward in ms, and relative to the products alone (8NVD):",
             *head("T", "V", "D", "products alone", "chunked", "definition, holds [T, V]")]
    for shape in ((512, VOCABULARY, 896, 5), (2048, 32000, 512, 9), (10000, 350, 96, 60)):
        lines.append(cpu_times(*shape))
    lines += ["", "Peak resident memory in MB, forward and backward, above the inputs:",
              *head("T", "V", "D", "peak", "gradients", "rest", "[T, V] alone would be")]
    for V in (50257, VOCABULARY):
        for T in (512, 2048, 8192):  # in separate processes: freed memory may stay resident
            with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                lines.append(pool.submit(cpu_memory, T, V, 64).result())
    return lines


def main() -> None:
    cuda = torch.cuda.is_available()
    triton = importlib.import_module("triton").__version__ if importlib.util.find_spec("triton") else "absent"
    name = torch.cuda.get_device_name() if cuda else f"CPU, torch threads: {torch.get_num_threads()}, no GPU"
    versions = f"torch {torch.__version__}, triton {triton}, Python {platform.python_version()}"
    title = f"## {datetime.date.today()}: {name}; {versions}"
    text = "\n".join(["", title, "", *(gpu_report() if cuda else cpu_report()), ""])
    before = RESULTS.read_text()
    RESULTS.write_text((before.replace(UNPROVEN, "") if cuda else before) + text)
    print(text)


if __name__ == "__main__":
    main()
