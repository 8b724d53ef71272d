"""Ranks for tests: forked from a server that has imported everything once, with faults to choose from."""
import math
import multiprocessing
import os
import signal
import socket
import sys
import time

import torch
from helpers import signalling

import sear
from lib import checkpoint, parallel

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["sear", "torch.distributed.fsdp", "torch.distributed.device_mesh",
                               "torch._dynamo", "test_parallel"])  # AdamW imports torch._dynamo


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def become(rank, world, port):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    parallel.TIMEOUT = 60.0


def run_rank(rank, world, port, log, flags, spoil):
    become(rank, world, port)
    file = os.open(log, os.O_CREAT | os.O_WRONLY)
    os.dup2(file, 1), os.dup2(file, 2)
    if spoil:
        spoil(rank)
    code = sear.main(flags)
    sys.stdout.flush()
    os._exit(code)


def begin(folder, world, flags, spoil=None, ranks=None, port=None):
    """Begins sear.py on the ranks; spoil(rank) runs before it. -> {rank: process}, {rank: log file}."""
    folder.mkdir(parents=True, exist_ok=True)
    port, ranks = port or free_port(), range(world) if ranks is None else ranks
    logs = {r: folder / f"rank{r}.log" for r in ranks}
    processes = {r: SERVER.Process(target=run_rank, args=(
        r, world, port, str(logs[r]), [str(f) for f in (flags(r) if callable(flags) else flags)], spoil))
        for r in ranks}
    for p in processes.values():
        p.start()
    return processes, logs


def launch(*args, code=None, **options):
    """`begin`, and waits for the end, with this exit code of all. -> {rank: (exit code, output)}."""
    processes, logs = begin(*args, **options)
    end = time.monotonic() + 120
    for p in processes.values():
        p.join(max(0.1, end - time.monotonic()))
    late = [r for r, p in processes.items() if p.is_alive()]
    for r in late:
        processes[r].kill()
    texts = {r: log.read_text(errors="replace") for r, log in logs.items()}
    assert not late, (late, texts)
    assert code is None or {p.exitcode for p in processes.values()} == {code}, texts
    return {r: (p.exitcode, texts[r]) for r, p in processes.items()}


def sentence(text):
    """The one sentence of a rank that failed."""
    assert "Traceback" not in text and "frame #" not in text, text
    found = [line for line in text.splitlines() if line.startswith("sear.py: ")]
    assert len(found) == 1, text
    return found[0]


# ---- faults: called before sear.py begins, with the rank behind what a test fixes by partial() -----------

def signal_in(module, name, call, rank, number=signal.SIGKILL, timeout=60.0):
    """Rank 1 sends itself a signal in the nth call of a function. timeout: seconds that ranks wait."""
    parallel.TIMEOUT = timeout
    if rank == 1:
        function = getattr(sys.modules[module], name)
        setattr(sys.modules[module], name, signalling(function, call, number))


def stop_after(steps, rank):
    """Every rank is asked to stop after n steps."""
    calls = iter(range(1, 1000))
    checkpoint.stop_requested = lambda: next(calls) >= steps


def poison(in_gradient, n, rank):
    """On the last rank the first n losses, or only their gradients, are not finite."""
    loss, calls = sear.policy_loss, iter(range(1000))

    def poisoned(logprob, *args):
        value, *others = loss(logprob, *args)
        if next(calls) < n and rank == int(os.environ["WORLD_SIZE"]) - 1:
            # The square root is 0, and its gradient 0 * inf.
            value = value + ((logprob - logprob).sum().abs().sqrt() if in_gradient else math.inf)
        return value, *others
    sear.policy_loss = poisoned
