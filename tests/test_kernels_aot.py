"""The Triton kernels compiled for Hopper on a machine without one: registers, shared memory and machine code.

Run as a program, this file pretends that an sm_90 card is there, lets kernels/segment_logprob.py launch all
it has, stops each launch once it is compiled, and prints what the compiler made. So what is checked is what
ships: signatures, types and tile sizes are those of the real calls."""

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
# type of hidden and weight, KB of shared memory on the card, vocabulary (the second fits no tile)
CASES = [("bfloat16", 227, 151936), ("float16", 227, 151665), ("bfloat16", 99, 151936),
         ("float32", 99, 151936)]


def machine_code(kernel) -> dict:
    """Counts of the instructions that matter, from the disassembly of a compiled kernel."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"  # comes with the wheel
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        text = subprocess.run([tool, "-sass", "-res-usage", file.name], text=True, check=True,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT).stdout
    names = ("STL", "LDL", "HGMMA", "HMMA", "UTMALDG", "UTMASTG")
    return dict({name: len(re.findall(rf"\b{name}\b", text)) for name in names},
                stack=int(re.search(r"STACK:(\d+)", text)[1]),
                shared=kernel.metadata.shared, hash=kernel.hash,
                double="f64" in kernel.asm["ttir"],
                atomics=len(re.findall(r"\b(?:atom|red)\.", kernel.asm["ptx"])))


def compile_everything(dtype: torch.dtype, shared: int, vocabulary: int) -> None:
    """Prints one JSON line for each kernel that the host code launches."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    triton.runtime.driver.set_active(SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32), get_current_device=lambda: 0,
        get_current_stream=lambda device: 0))
    card = SimpleNamespace(shared_memory_per_block_optin=shared << 10)
    torch.cuda.get_device_properties = lambda device: card
    import kernels.segment_logprob as path

    launch = JITFunction.run

    def stop_before_launch(self, *args, grid, warmup, **options):
        compiled = launch(self, *args, grid=grid, warmup=True, **options)
        print(json.dumps(dict(name=self.__name__, **machine_code(compiled))), flush=True)

    JITFunction.run = stop_before_launch
    path.product = lambda *args, **kwargs: None  # cuBLAS is not here
    hidden = torch.zeros(4, 64, dtype=dtype, requires_grad=True)
    weight = torch.zeros(vocabulary, 64, dtype=dtype)
    ids, ones = torch.zeros(4, dtype=torch.long), torch.ones(4)
    logprob, entropy = path.LogprobEntropy.apply(hidden, weight, ids, ones)
    if shared == 227:
        path.forward(hidden.detach()[:1], weight, ids[:1], ones[:1])  # another N: nothing may change
        logprob.sum().backward(retain_graph=True)  # without the entropy's gradient
        path.segment_sum(logprob.detach(), ids, 1)
    (logprob + entropy).sum().backward()
    if dtype != torch.float16:
        path.Weighted.apply(hidden, weight, ids, ones, ones)


@pytest.fixture(scope="module")
def compiled():
    """For each case the kernels it launches; the cases compile side by side, about 20 s on two cores."""
    if importlib.util.find_spec("triton") is None:  # importorskip would import it: too early to interpret
        pytest.skip("no Triton here")
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    running = {case: subprocess.Popen([sys.executable, __file__, *map(str, case)], env=clean, text=True,
                                      stdout=subprocess.PIPE, stderr=subprocess.PIPE) for case in CASES}
    done = {case: process.communicate(timeout=300) for case, process in running.items()}
    for case, process in running.items():
        assert process.returncode == 0, done[case][1][-3000:]  # the end of what it wrote to stderr
    return {case: [json.loads(line) for line in out.splitlines()] for case, (out, _) in done.items()}


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_no_spills_wgmma_tma_and_room_in_shared_memory(compiled, case):
    kernels = compiled[case]
    assert {"forward_kernel", "combine_kernel", "dlogits_kernel"} <= {kernel["name"] for kernel in kernels}
    for kernel in kernels:
        assert kernel["STL"] == kernel["LDL"] == kernel["stack"] == 0, f"registers spill: {kernel}"
        assert kernel["shared"] <= case[1] << 10, kernel
        assert not kernel["double"], f"a Python float got in: {kernel}"
        assert not kernel["atomics"], f"their order is not fixed: {kernel}"
        if kernel["name"] in ("forward_kernel", "dlogits_kernel"):
            assert kernel["HGMMA"] and not kernel["HMMA"], f"not on Hopper's tensor cores: {kernel}"
            assert kernel["UTMALDG"], f"no TMA loads: {kernel}"
        if kernel["name"] == "dlogits_kernel":
            assert kernel["UTMASTG"], f"no TMA stores: {kernel}"


def test_every_kernel_was_compiled(compiled):
    source = (ROOT / "kernels/segment_logprob.py").read_text()
    shipped = set(re.findall(r"^def (\w+_kernel)\(", source, re.M))
    assert shipped == {kernel["name"] for kernels in compiled.values() for kernel in kernels}
    bf16 = [kernel["name"] for kernel in compiled[CASES[0]]]
    assert bf16.count("dlogits_kernel") == 2  # with the entropy's gradient and without


def test_one_compilation_serves_every_number_of_rows(compiled):
    """Else a row alone could have other bits than in a batch, from code that was compiled differently."""
    for name in ("forward_kernel", "combine_kernel"):
        hashes = [kernel["hash"] for kernel in compiled[CASES[0]] if kernel["name"] == name]
        assert len(hashes) == 2 and len(set(hashes)) == 1


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    compile_everything(getattr(torch, sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
