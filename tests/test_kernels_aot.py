"""The Triton kernels compiled for GPUs that this machine does not have: spills, load widths, tensor cores.

Run as a program, this file pretends that a GPU is there, lets kernels/segment_logprob.py launch its kernels,
stops each launch after compiling, and prints what the machine code contains. So the checked code is the
shipped code: signatures, types and tile sizes are those of the real calls."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
SHARED = {80: 163, 89: 99, 90: 227, 100: 227, 120: 99}  # KB a block: A100; L4, 4090; H100; B200; 5090
MMA = {80: "mma.sync", 89: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma", 120: "mma.sync"}
# compute capability, type of hidden and weight, vocabulary (151665 is a multiple of no tile and not of 16)
CASES = [(80, "bfloat16", 151936), (80, "float32", 151665), (89, "float16", 151665), (89, "float32", 151936),
         (90, "bfloat16", 151936), (90, "float32", 151665), (100, "bfloat16", 151936),
         (100, "float32", 151936), (120, "bfloat16", 151665), (120, "float32", 151936)]


def machine_code(kernel, disassemble: bool) -> dict:
    """What the compiler made: bytes of stack (spilled registers), shared memory, instructions that matter."""
    import triton

    def cuobjdump(option):
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"  # part of the wheel
        return subprocess.run([tool, option, file.name], text=True, check=True, capture_output=True).stdout

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        stack = int(re.search(r"STACK:(\d+)", cuobjdump("-res-usage"))[1])
        code = cuobjdump("-sass") if disassemble else ""
    ptx = kernel.asm["ptx"]
    return dict(hash=kernel.hash, stack=stack, shared=kernel.metadata.shared,
                scratch=kernel.metadata.global_scratch_size,
                double="f64" in kernel.asm["ttir"],
                memory=sorted(set(re.findall(r"\b(?:LDG|LDGSTS|STG)\.[A-Z0-9_.]+", code))),
                mma=sorted({name for name in set(MMA.values()) if name in ptx}),
                atomics=len(re.findall(r"\b(?:atom|red)\.", ptx)),
                tma_loads="cp.async.bulk.tensor.2d.shared" in ptx,
                tma_stores="cp.async.bulk.tensor.2d.global" in ptx)


def compile_case(path, capability: int, dtype: str, vocabulary: int) -> None:
    hidden = torch.zeros(4, 64, dtype=getattr(torch, dtype), requires_grad=True)
    weight = torch.zeros(vocabulary, 64, dtype=hidden.dtype)
    ids, ones = torch.zeros(4, dtype=torch.long), torch.ones(4)
    logprob, entropy = path.LogprobEntropy.apply(hidden, weight, ids, ones)
    if dtype == "bfloat16" and capability < 100:
        path.forward(hidden.detach()[:1], weight, ids[:1], ones[:1])  # another N must not compile again
        logprob.sum().backward(retain_graph=True)  # without the entropy's gradient
        path.segment_sum(logprob.detach(), ids, 1)
    (logprob + entropy).sum().backward()


def compile_everything() -> None:
    """Prints one JSON line for each launch: the index of its case, the kernel's name, its machine code."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    case = CASES[0]
    triton.runtime.driver.set_active(SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", case[0], 32),
        get_current_device=lambda: case[0],  # one device for each capability: Triton keeps kernels by device
        get_current_stream=lambda device: 0))
    torch.cuda.get_device_capability = lambda device: divmod(case[0], 10)
    torch.cuda.get_device_properties = lambda device: SimpleNamespace(
        shared_memory_per_block_optin=SHARED[case[0]] << 10)
    import kernels.segment_logprob as path

    launch, known = JITFunction.run, {}

    def stop_before_launch(self, *args, grid, warmup, **options):
        kernel = launch(self, *args, grid=grid, warmup=True, **options)
        if kernel.hash not in known:
            pointers = case[0] < 90 and self.__name__ in ("forward_kernel", "dlogits_kernel")
            known[kernel.hash] = machine_code(kernel, disassemble=pointers)
        print(json.dumps([CASES.index(case), self.__name__, known[kernel.hash]]), flush=True)

    JITFunction.run = stop_before_launch
    path.matmul_into = lambda *args, **kwargs: None  # cuBLAS needs the GPU
    for case in CASES:
        compile_case(path, *case)


@pytest.fixture(scope="module")
def compiled():
    """For each case its launches as (name, machine code). 20 s; less once Triton has cached the kernels."""
    if importlib.util.find_spec("triton") is None:  # importing it here would be too early for the interpreter
        pytest.skip("Triton is not installed")
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, __file__], env=clean, text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    launches = {case: [] for case in CASES}
    for index, name, code in map(json.loads, done.stdout.splitlines()):
        launches[CASES[index]].append((name, code))
    return launches


def allowed_stack(capability, dtype, name) -> int:
    if capability == 100 and dtype == "bfloat16" and name == "forward_kernel":
        return 24  # six registers in Triton 3.9.0, none in the product's loop: two are reloaded once a tile
    return 8 if capability == 120 else 0  # Triton 3.6.0 stores 8 bytes that it never reads


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_no_spills_tensor_cores_and_wide_loads(compiled, case):
    capability, dtype, vocabulary = case
    assert {"forward_kernel", "combine_kernel", "dlogits_kernel"} <= {name for name, _ in compiled[case]}
    for name, code in compiled[case]:
        assert code["stack"] <= allowed_stack(capability, dtype, name), f"registers spill: {name} {code}"
        assert code["shared"] <= SHARED[capability] << 10, (name, code)
        assert not code["scratch"], f"{name} needs an allocator, which autograd's threads do not have"
        assert not code["double"], f"{name} computes in fp64: a Python float reached it"
        assert not code["atomics"], f"{name} has atomics, whose order is not fixed"
        if name not in ("forward_kernel", "dlogits_kernel"):
            continue
        assert code["mma"] == [MMA[capability]], (name, code)
        if capability >= 90:
            assert code["tma_loads"] and code["tma_stores"] == (name == "dlogits_kernel"), (name, code)
        else:  # asynchronous copies of 16 bytes a thread, and no others; no load of 2 bytes
            copies = [copy for copy in code["memory"] if copy.startswith("LDGSTS")]
            assert copies and all(copy.endswith(".128") for copy in copies), (name, code)
            assert not any(load.startswith("LDG.E.U") for load in code["memory"]), (name, code)
            if name == "dlogits_kernel" and vocabulary % 16 == 0:
                assert "STG.E.128" in code["memory"], code


def test_every_kernel_was_compiled(compiled):
    source = (ROOT / "kernels/segment_logprob.py").read_text()
    shipped = set(re.findall(r"^def (\w+_kernel)\(", source, re.M))
    assert shipped == {name for launches in compiled.values() for name, _ in launches}
    bf16 = [name for name, _ in compiled[90, "bfloat16", 151936]]
    assert bf16.count("dlogits_kernel") == 2  # with the entropy's gradient and without


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", ["forward_kernel", "combine_kernel"])
def test_one_compilation_serves_every_number_of_rows(compiled, name, capability):
    """Differently compiled code could give a row other bits alone than in a batch."""
    launches = compiled[capability, "bfloat16", 151936]
    hashes = [code["hash"] for launched, code in launches if launched == name]
    assert len(hashes) == 2 and len(set(hashes)) == 1


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    compile_everything()
