"""The ranks of a run, through torch.distributed. With a single process nothing is sent.

Counts, flags and objects travel on the CPU, gradients and weights on their device. Every rank makes every
call, in the same order.
"""
import atexit
import contextlib
import json
import math
import os
import sys
import threading
import time
import uuid
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lib.data import InputError

TIMEOUT = 600.0  # seconds that ranks wait for each other: at the start, in a collective, while one saves
LOST = ("gloo/transport", "NCCL", "Connection closed by peer", "Connection reset by peer", "Broken pipe")


# ---- start and end ---------------------------------------------------------------------------------------

def rank_device(choice: str) -> str:
    """The device of this rank: the CPU where mps is missing. Raises InputError for CUDA without a CUDA
    device, or with too few. Nobody has run mps so far."""
    if choice == "mps":
        if torch.backends.mps.is_available():
            return "mps"
        print("--device mps: torch sees no such device here, so the run is on the CPU", file=sys.stderr)
        return "cpu"
    if choice == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch sees no CUDA device here")
    if choice == "cpu" or not torch.cuda.is_available():
        return "cpu"
    place, found = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if place >= found:
        raise InputError(f"each rank needs a CUDA device: expected {place + 1} or more here, found {found}")
    torch.cuda.set_device(place)
    set_up_cuda()
    return f"cuda:{place}"


def set_up_cuda() -> None:
    """Settings of torch for all of a run on CUDA. No GPU has run them so far."""
    torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew for each number of keys: 20 ms a token
    # A continued run has the same bits only if sums do not depend on which thread is first. Where torch has
    # no such sum it warns.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # NaN in each new tensor costs time
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False  # sums in fp32, rounded once


@contextlib.contextmanager
def process_group(alone: bool):
    """Within the block this process is one of the ranks that torchrun or train.sh started; a single process
    forms a group only if `alone`. Raises InputError if the ranks do not meet. If one is lost later, this
    process ends with one sentence and exit code 1."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world == 1 and not alone:
        yield
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    if world == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    else:
        meet(backend, timedelta(seconds=TIMEOUT))
    try:
        yield
        all_sum(torch.zeros(1))  # rank 0 holds the store, so no rank leaves before all are done
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and not any(sign in str(error) for sign in LOST):
            raise
        reason = str(error).split("] ")[-1].split(". ")[0].splitlines()[0]
        leave(f"rank {dist.get_rank()} lost another rank ({reason}); start again with --resume auto to "
              "continue from the last checkpoint", 1)  # destroy_process_group can hang
    except BaseException:
        dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def end(code: int) -> None:
    """Ends this process. One of several ranks skips the interpreter's teardown, in which torch's threads can
    abort a rank that is done."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        atexit._run_exitfuncs()  # --log's sinks send what is left
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def meet(backend: str, limit: timedelta) -> None:
    """Finds the other ranks by MASTER_ADDR and MASTER_PORT. Raises InputError if one does not come."""
    where = ":".join(os.environ.get(k, "(not set)") for k in ("MASTER_ADDR", "MASTER_PORT"))
    name = f"rank {os.environ.get('RANK', '(not set)')} of {os.environ['WORLD_SIZE']}"
    # torch waits forever if another program holds the port and does not answer.
    alarm = threading.Timer(limit.total_seconds() + 5, leave, [f"{name} got no answer from {where}", 2])
    alarm.daemon = True
    alarm.start()
    try:
        store, rank, world = next(dist.rendezvous("env://", timeout=limit))
        start = agree_on_start(store, rank, world, time.monotonic() + limit.total_seconds())
        dist.init_process_group(backend, store=dist.PrefixStore(start, store), rank=rank, world_size=world,
                                timeout=limit)
        all_sum(torch.zeros(1))
    except (RuntimeError, ValueError) as error:
        reason = str(error).split("] ")[-1].splitlines()[0].rstrip(". ")
        raise InputError(f"{name} did not meet the others at {where}: {reason}") from None
    finally:
        alarm.cancel()


def agree_on_start(store: dist.Store, rank: int, world: int, end: float) -> str:
    """A name for this start of all ranks, by time.monotonic() `end`. torchrun keeps its store over restarts,
    with the addresses of dead ranks in it. So rank 0 makes up a name, and another rank accepts the name that
    comes together with the random word it has just written."""
    word, others = uuid.uuid4().hex, range(1, world)
    if rank > 0:
        store.set(f"word/{rank}", word)
    while time.monotonic() < end:
        if rank == 0:
            words = [store.get(f"word/{r}").decode() for r in others if store.check([f"word/{r}"])]
            store.set("start", " ".join([word, *words]))
            if all(store.check([f"{word}/here/{r}"]) for r in others):
                return word
        elif store.check(["start"]) and word in (words := store.get("start").decode().split()):
            store.set(f"{words[0]}/here/{rank}", "yes")
            return words[0]
        time.sleep(0.02)
    raise RuntimeError("some rank did not come in time")


def leave(sentence: str, code: int) -> None:
    """Ends this process at once, whatever its main thread waits for."""
    print(f"sear.py: {sentence}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(code)


# ---- collectives -----------------------------------------------------------------------------------------

def rank_and_world() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def say(line: str) -> None:
    """Prints a line on rank 0's stderr."""
    if rank_and_world()[0] == 0:
        print(line, file=sys.stderr)


def all_sum(x: Tensor) -> Tensor:
    """Sum over ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def all_gather(items: list) -> list:
    """The ranks' lists, chained."""
    if not dist.is_initialized():
        return items
    lists = [None] * dist.get_world_size()
    dist.all_gather_object(lists, items)
    return sum(lists, [])


def from_rank_0(value):
    """Rank 0's value, on every rank."""
    return all_gather([value])[0]


def tuned(model: nn.Module) -> dict[str, nn.Parameter]:
    """{name: parameter} of what training changes: all, or an adapter's."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def sum_gradients(model: nn.Module) -> float:
    """Sums the gradients over ranks (they carry the global denominators). -> their norm."""
    parameters = tuned(model).values()
    for p in parameters:
        if p.grad is None:  # a rank without a rollout still takes part in the sum
            p.grad = torch.zeros_like(p)
        if not is_sharded(p):  # FSDP has summed sharded ones in the backward pass
            all_sum(p.grad)
    return gather_full(nn.utils.get_total_norm([p.grad for p in parameters])).item()


# ---- sharded parameters ----------------------------------------------------------------------------------

def wants_shards(choice: str, parameters: int, state_bytes: int, device: str) -> bool:
    """auto: on several GPUs, if state_bytes a parameter exceed half of the smallest GPU's memory."""
    if choice != "auto" or rank_and_world()[1] == 1 or device == "cpu":
        return choice == "yes"
    memory = min(all_gather([torch.cuda.get_device_properties(device).total_memory]))
    return parameters * state_bytes > memory / 2


def shard(model: nn.Module, device: str) -> None:
    """Splits each parameter by rows over the ranks with FSDP2. Each block is a group that is gathered when it
    runs; embedding, final norm and head form another. Blocks are gathered in the compute type, to which
    their layers cast anyway. Gradients are summed in fp32."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
    mesh = init_device_mesh(torch.device(device).type, (dist.get_world_size(),))
    cast = model.dtype or (torch.bfloat16 if mesh.device_type == "cuda" else None)
    blocks = MixedPrecisionPolicy(cast, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.model.layers:
        fully_shard(block, mesh=mesh, mp_policy=blocks)
    fully_shard(model, mesh=mesh)
    for part in (model, *model.model.layers):
        part.set_gradient_divide_factor(1.0)  # a sum, not a mean
        part.set_force_sum_reduction_for_comms(True)  # gloo has no other
    for method in ("hidden", "hidden_packed"):
        register_fsdp_forward_method(model, method)


def is_sharded(x: Tensor | nn.Module) -> bool:
    """By a method that only sharded tensors and modules have; importing their classes takes a second."""
    return hasattr(x, "full_tensor") or hasattr(x, "unshard")


@contextlib.contextmanager
def unsharded(model: nn.Module):
    """Within the block every rank holds all parameters, blocks in the compute type, so that sampling needs no
    other rank at each token. FSDP's hooks are skipped, since nothing is left to gather."""
    hook = model.__dict__.pop("hidden", None)
    for part in model.modules():
        if is_sharded(part):
            part.unshard()
    try:
        yield
    finally:
        if hook:
            model.hidden = hook
            reshard(model)


def reshard(model: nn.Module) -> None:
    """Frees the gathered parameters."""
    for part in model.modules():
        if is_sharded(part):
            part.reshard()


def run_missing_batches(model: nn.Module, reference: nn.Module | None, parts: int) -> None:
    """Joins the forward and backward passes of ranks that have more micro-batches, and adds zero gradients:
    sharded parameters need every rank in every pass."""
    if not is_sharded(model):
        return
    token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    for _ in range(parts):
        states = model.hidden(token)
        if reference is not None:
            with torch.no_grad():
                reference.hidden(token)
        if torch.is_grad_enabled():
            ((states.sum() + model.head.weight.sum()) * 0).backward()
    if reference is not None:
        reshard(reference)


def gather_full(x: Tensor) -> Tensor:
    """The whole tensor, gathered if it is sharded. Every rank calls."""
    return x.full_tensor() if is_sharded(x) else x


def local_rows(x: Tensor) -> tuple[Tensor, int]:
    """The rows of a tensor that this rank holds, and the index of the first. FSDP gives every rank the same
    number of rows, rounded up, and the last ranks the rest."""
    if not is_sharded(x):
        return x, 0
    rank, world = rank_and_world()
    return x.to_local(), min(len(x), rank * math.ceil(len(x) / world))


def write_tensors(files: dict[Path, dict[str, Tensor]], change=lambda name, x: x) -> None:
    """Writes safetensors files of fp32 tensors: 8 bytes of length, a JSON header, the numbers. Sharded
    tensors are gathered, and changed, one at a time; every rank calls, rank 0 writes. OSError is raised only
    at the end, since the other ranks cannot stop gathering halfway."""
    rank, failed = rank_and_world()[0], []

    def put(file: Path, data, mode: str) -> None:
        try:
            if rank == 0 and not failed:
                file.parent.mkdir(parents=True, exist_ok=True)
                with open(file, mode) as f:
                    f.write(data)
        except OSError as error:
            failed.append(error)

    for file, tensors in files.items():
        header, end = {"__metadata__": {"format": "pt"}}, 0
        for name, x in tensors.items():
            begin, end = end, end + 4 * x.numel()
            header[name] = {"dtype": "F32", "shape": list(x.shape), "data_offsets": [begin, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # aligns the numbers to 8 bytes
        put(file, len(text).to_bytes(8, "little") + text, "wb")
        for name, x in tensors.items():
            put(file, gather_full(change(name, x).detach()).float().contiguous().cpu().numpy().data, "ab")
    if failed:
        raise failed[0]
