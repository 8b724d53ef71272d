"""The ranks of a run, through torch.distributed. One process is the case of one rank: nothing is sent then.

Counts, flags and words travel on the CPU, gradients and weights where they are; every rank makes every call,
in the same order. A rank that dies ends the others: what they wait for fails, or `watch` misses its pulse.
"""
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

from data import InputError

PULSE, SILENCE = 2.0, 20.0  # seconds; torchrun kills what is left of a broken job after 30
LOST = ("gloo/transport", "NCCL", "Connection closed by peer", "Connection reset by peer", "Broken pipe")
AGAIN = "start again with --resume auto to go on from the last checkpoint"


class RankLost(Exception):
    """A rank died, or did not come within the timeout: one sentence."""


# ---- start and end ---------------------------------------------------------------------------------------

def own_device(choice: str) -> str:
    """The device of this rank. Raises InputError for CUDA where there is none, or none left."""
    if choice == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch sees no CUDA device here")
    if choice == "cpu" or not torch.cuda.is_available():
        return "cpu"
    place, found = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if place >= found:
        raise InputError(f"each rank needs a CUDA device, {place + 1} here at least, and there are {found}")
    torch.cuda.set_device(place)
    return f"cuda:{place}"


@contextlib.contextmanager
def joined(timeout: float, alone: bool):
    """Within the block this process is one of the ranks that torchrun (or srun, mpirun) started; a single one
    only where `alone` asks for it. timeout, in seconds, bounds how long a rank waits for the others: here, in
    each collective, in saving. Raises InputError where they do not meet, RankLost where one is lost later."""
    world, ended = int(os.environ.get("WORLD_SIZE", 1)), threading.Event()
    if world == 1 and not alone:
        yield
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    if world == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    else:
        meet(backend, timedelta(seconds=timeout), ended)
    try:
        yield
        total(torch.zeros(1))  # all have come to the end, all stop looking at each other, and only then
        ended.set()
        total(torch.zeros(1))  # the first may go: the store in which they look is its own
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and not any(sign in str(error) for sign in LOST):
            raise
        ended.set()  # and the group is left as it is: to take leave of the dead can take forever
        reason = str(error).split("] ")[-1].split(". ")[0].splitlines()[0]
        raise RankLost(f"rank {dist.get_rank()} lost another rank ({reason}); {AGAIN}") from None
    except BaseException:
        ended.set()
        dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def meet(backend: str, limit: timedelta, ended: threading.Event) -> None:
    """Finds the other ranks by the environment's MASTER_ADDR and MASTER_PORT, and starts to watch them."""
    where = ":".join(os.environ.get(k, "(not set)") for k in ("MASTER_ADDR", "MASTER_PORT"))
    name = f"rank {os.environ.get('RANK', '(not set)')} of {os.environ['WORLD_SIZE']}"
    # Where another program holds the port, torch waits for its answer forever.
    silent = f"{name} got no answer from {where}"
    alarm = threading.Timer(limit.total_seconds() + 5, leave, [silent, ended, 2])
    alarm.daemon = True
    alarm.start()
    try:
        # Two connections: while the group waits on one of them, nothing else goes through it.
        store, rank, world = next(dist.rendezvous("env://", timeout=limit))
        pulse, *_ = next(dist.rendezvous("env://", timeout=limit))
        life = this_life(store, rank, world, time.monotonic() + limit.total_seconds())
        store, pulse = dist.PrefixStore(life, store), dist.PrefixStore(life, pulse)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=limit)
        pulse.set(f"pulse/{rank}", "0")
        total(torch.zeros(1))
    except (RuntimeError, ValueError) as error:
        reason = str(error).split("] ")[-1].splitlines()[0].rstrip(". ")
        raise InputError(f"{name} did not meet the others at {where}: {reason}") from None
    finally:
        alarm.cancel()
    threading.Thread(target=watch, args=(pulse, rank, world, ended), daemon=True).start()


def this_life(store: dist.Store, rank: int, world: int, end: float) -> str:
    """A name for this start of all ranks. torchrun keeps its store over restarts, and in it the addresses of
    the dead; nor do its machines count restarts alike. So rank 0 makes up a name, and a rank believes it once
    it comes with the random word that this rank has just said. end: of time.monotonic()."""
    word, others = uuid.uuid4().hex, range(1, world)
    if rank > 0:
        store.set(f"word/{rank}", word)
    while time.monotonic() < end:
        if rank == 0:
            heard = [store.get(f"word/{r}").decode() for r in others if store.check([f"word/{r}"])]
            store.set("life", " ".join([word, *heard]))
            if all(store.check([f"{word}/here/{r}"]) for r in others):
                return word
        elif store.check(["life"]) and word in (said := store.get("life").decode().split()):
            store.set(f"{said[0]}/here/{rank}", "yes")
            return said[0]
        time.sleep(0.02)
    raise RuntimeError("some rank did not come in time")


def watch(store: dist.Store, rank: int, world: int, ended: threading.Event) -> None:
    """A thread of each rank: shows that this one lives and looks at the next. A dead rank is found here while
    nobody waits for it, on CUDA, where waiting cannot be interrupted, and if its whole machine is gone."""
    other, beat, seen, since = (rank + 1) % world, 0, b"", time.monotonic()
    while not ended.wait(PULSE):
        try:
            beat += 1
            store.set(f"pulse/{rank}", str(beat))
            if store.check(["lost"]):
                leave(f"rank {rank} was told that rank {store.get('lost').decode()} is gone; {AGAIN}", ended)
            now = store.get(f"pulse/{other}")
        except RuntimeError:
            if not ended.wait(PULSE):  # else it was the end, and rank 0 was the first to go
                leave(f"rank {rank} no longer reaches {os.environ['MASTER_ADDR']}; {AGAIN}", ended)
            return
        if now != seen:
            seen, since = now, time.monotonic()
        elif time.monotonic() - since > SILENCE:
            store.set("lost", str(other))
            leave(f"rank {rank} had no sign of life from rank {other} for {SILENCE:.0f} s; {AGAIN}", ended)


def leave(sentence: str, ended: threading.Event, code: int = 1) -> None:
    """Ends this process from a thread, whatever its main thread waits for, unless that is at its end too."""
    if not ended.is_set():
        print(f"sear.py: {sentence}", file=sys.stderr, flush=True)
        os._exit(code)


# ---- what ranks say to each other ------------------------------------------------------------------------

def rank_and_world() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def total(x: Tensor) -> Tensor:
    """Sum over ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def largest(x: float) -> float:
    """The largest of the ranks' numbers."""
    number = torch.tensor(x, dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(number, dist.ReduceOp.MAX)
    return number.item()


def gathered(items: list, group: dist.ProcessGroup | None = None) -> list:
    """The ranks' lists, chained."""
    if not dist.is_initialized():
        return items
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, items, group)
    return sum(everyone, [])


def patient_group() -> dist.ProcessGroup | None:
    """A group whose members wait for each other as long as all of them live. Every rank makes it."""
    return dist.new_group(backend="gloo", timeout=timedelta(days=30)) if dist.is_initialized() else None


def means(sums: dict[str, tuple[float, float]]) -> dict[str, float | None]:
    """{name: (sum, count)} of this rank -> {name: mean over all ranks}, None where nothing was counted."""
    table = total(torch.tensor(list(sums.values()), dtype=torch.float64))
    return {name: s / n if n else None for name, (s, n) in zip(sums, table.tolist())}


def sum_gradients(model: nn.Module) -> float:
    """Sums the gradients over ranks, as they carry the global denominators. -> the norm of all of them."""
    for p in model.parameters():
        if p.grad is None:  # nothing to say here, but the other ranks wait for this one's part of the sum
            p.grad = torch.zeros_like(p)
        if not is_sharded(p):  # of sharded ones the backward pass has summed this rank's rows
            total(p.grad)
    return whole(nn.utils.get_total_norm([p.grad for p in model.parameters()])).item()


# ---- sharded parameters ----------------------------------------------------------------------------------

def wants_shards(choice: str, parameters: int, state_bytes: int, device: str) -> bool:
    """auto: on several GPUs, if state_bytes for each parameter take more than half of the smallest one."""
    if choice != "auto" or rank_and_world()[1] == 1 or device == "cpu":
        return choice == "yes"
    memory = -largest(-torch.cuda.get_device_properties(device).total_memory)
    return parameters * state_bytes > memory / 2


def shard(model: nn.Module, device: str) -> None:
    """Splits each parameter by rows over the ranks with FSDP2. A block is a group, gathered when it is run;
    embedding, final norm and head are another. A block is gathered in the compute type, to which its layers
    cast anyway: the same bits, half the traffic. Gradients are summed in fp32."""
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
    register_fsdp_forward_method(model, "hidden")


def is_sharded(x: Tensor | nn.Module) -> bool:
    """Told by a method that only sharded tensors and modules have: importing their classes takes a second."""
    return hasattr(x, "full_tensor") or hasattr(x, "unshard")


@contextlib.contextmanager
def gathered_once(model: nn.Module):
    """Within the block all parameters are whole, blocks in the compute type, on every rank: for the thousands
    of steps of sampling, which then need no other rank. FSDP's hooks are kept out: they cost."""
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
    """Gives back what gathering took."""
    for part in model.modules():
        if is_sharded(part):
            part.reshard()


def keep_up(model: nn.Module, reference: nn.Module | None, parts: int) -> None:
    """Takes part in the micro-batches that other ranks have more, with a token that nobody owns, and adds
    zeros: a forward or backward of sharded parameters is the work of all ranks."""
    if not is_sharded(model):
        return
    token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    for _ in range(parts):
        states = model.hidden(token)
        if reference is not None:
            with torch.no_grad():
                reference.hidden(token)
        ((states.sum() + model.head.weight.sum()) * 0).backward()
    if reference is not None:
        reshard(reference)


def whole(x: Tensor) -> Tensor:
    """The tensor itself or, of a sharded one, all of it, gathered: every rank has to ask."""
    return x.full_tensor() if is_sharded(x) else x


def own_rows(x: Tensor) -> tuple[Tensor, int]:
    """What this rank holds of a tensor, and which row of the whole that begins with. FSDP gives all ranks the
    same number of rows, rounded up, and the last ones what is left."""
    if not is_sharded(x):
        return x, 0
    rank, world = rank_and_world()
    return x.to_local(), min(len(x), rank * math.ceil(len(x) / world))


def write_tensors(files: dict[Path, dict[str, Tensor]]) -> None:
    """Writes safetensors files of fp32 tensors: 8 bytes of length, a JSON header, the numbers. Sharded ones
    are gathered one at a time: all ranks call, rank 0 writes. It raises OSError at the end only: the others
    cannot stop gathering halfway."""
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
        text += b" " * (-len(text) % 8)  # the numbers begin at a multiple of 8
        put(file, len(text).to_bytes(8, "little") + text, "wb")
        for x in tensors.values():
            put(file, whole(x.detach()).float().contiguous().cpu().numpy().data, "ab")
    if failed:
        raise failed[0]
