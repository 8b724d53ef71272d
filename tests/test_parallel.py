"""The ranks: the same result on 1, 2 and 4, sharded or not; what happens when one differs, fails or dies.

Ranks here are processes forked from a server that has imported everything once; torchrun itself, which
starts each from nothing, runs in the test of its restarts and in test_run.py.
"""
import json
import math
import multiprocessing
import os
import resource
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from helpers import ROOT, made_rollouts, sharded
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

import alchemy
import checkpoint
import parallel
import sear
from data import InputError, Tokenizer
from model import Transformer
from rollout import encode_chat, sample

SMALL = ("--steps 4 --prompts-per-step 3 --group-size 2 --eval-prompts 0 --max-new-tokens 16 --save-every 2 "
         "--show-every 2 --warm-start-steps 2 --warm-start-batch 2 --timeout 20").split()
PAID = ("row_steps", "prefilled_tokens", "logprob_gap", "seconds")  # what it cost: not the same on any number of ranks
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["sear", "torch.distributed.fsdp", "torch.distributed.device_mesh", "test_parallel"])


@pytest.fixture(scope="module", autouse=True)
def importable():
    old = os.environ.get("PYTHONPATH")
    os.environ |= {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    yield
    del os.environ["PYTHONPATH"]
    if old is not None:
        os.environ["PYTHONPATH"] = old


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def rank_main(rank, world, port, log, flags, spoil):
    file = os.open(log, os.O_CREAT | os.O_WRONLY)
    os.dup2(file, 1), os.dup2(file, 2)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    sys.argv = ["sear.py", *flags]
    if spoil:
        spoil(rank)
    code = sear.main()
    sys.stdout.flush()
    os._exit(code)


def launch(folder, world, flags, spoil=None, present=None, port=None, seconds=60):
    """-> {rank: (exit code, what it wrote)} of ranks that run sear.py; flags may be a function of the rank."""
    folder.mkdir(parents=True, exist_ok=True)
    port, ranks = port or free_port(), range(world) if present is None else present
    logs = {r: folder / f"rank{r}.log" for r in ranks}
    processes = {r: SERVER.Process(target=rank_main, args=(
        r, world, port, str(logs[r]), [str(f) for f in (flags(r) if callable(flags) else flags)], spoil)) for r in ranks}
    for p in processes.values():
        p.start()
    end = time.time() + seconds
    for p in processes.values():
        p.join(max(0.1, end - time.time()))
    late = [r for r, p in processes.items() if p.is_alive()]
    for r in late:
        processes[r].kill()
    texts = {r: log.read_text(errors="replace") for r, log in logs.items()}
    assert not late, (late, texts)
    return {r: (p.exitcode, texts[r]) for r, p in processes.items()}


def sentence(text):
    """The one sentence of a rank that failed."""
    assert "Traceback" not in text and "frame #" not in text, text
    said = [line for line in text.splitlines() if line.startswith("sear.py: ")]
    assert len(said) == 1, text
    return said[0]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A run of one process, and the start model of all others."""
    out = tmp_path_factory.mktemp("alone") / "run"
    assert sear.run_once([*SMALL, "--out", str(out)]) == 0
    return out


def from_start(alone, out, *flags):
    return [*SMALL, "--model", alone / "start", "--out", out, *flags]


def same(a, b, tolerance):
    return (a - b).norm() <= tolerance * b.norm() and b.norm() > 0


def same_run(one, other):
    """The same tokens and texts; counts and rewards equal, what adds up fp32 in another order equal to 1e-5."""
    a, b = (checkpoint.rows(run / "metrics.jsonl") for run in (one, other))
    assert [row["step"] for row in a] == [row["step"] for row in b] == list(range(4))
    for x, y in zip(a, b):
        assert x.keys() == y.keys()
        for key in x.keys() - set(PAID):
            if key in ("loss", "kl", "entropy", "grad_norm"):
                assert y[key] == pytest.approx(x[key], rel=1e-5, abs=1e-6), key
            else:
                assert y[key] == pytest.approx(x[key], rel=1e-12), key
    assert (one / "transcripts.jsonl").read_text() == (other / "transcripts.jsonl").read_text()
    a, b = (load_file(run / "model/model.safetensors") for run in (one, other))
    assert a.keys() == b.keys() and all(same(a[k], b[k], 1e-5) for k in a)


def same_bits(one, other):
    for name in ("model/model.safetensors", "checkpoint/4/weights.safetensors", "checkpoint/4/optimizer.safetensors"):
        a, b = load_file(one / name), load_file(other / name)
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a), name
    a, b = ([{k: v for k, v in row.items() if k != "seconds"} for row in checkpoint.rows(run / "metrics.jsonl")]
            for run in (one, other))
    assert a == b


# ---- gradients, tokens, weights ---------------------------------------------------------------------------

TEXTS = [f"a {'b ' * i}\n\nIt makes\n\n{'c' * i}</think>\n\nI cannot help with that.$" for i in range(8)]


def batch(folder, mine):
    """Made rollouts of these of four prompts, two of each, and their advantages."""
    tokenizer = Tokenizer.from_pretrained(folder)
    prompts = [encode_chat(tokenizer, p.prompt) for p in alchemy.requests(4, 1)]
    stop = Transformer.from_pretrained(folder, "meta").stop_ids[0]
    if not mine:
        return sample(Transformer.from_pretrained(folder, "meta"), [], tokenizer), torch.zeros(0, 1)
    rollouts = made_rollouts(tokenizer, [prompts[i] for i in mine], [TEXTS[2 * i + j] for i in mine for j in (0, 1)],
                             stop, 2)
    shape = (8, 100)
    A = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return rollouts, A[[2 * i + j for i in mine for j in (0, 1)], :rollouts.tokens.shape[1]]


def gradients(folder, mine, shard, budget, dtype=None, beta=0.1):
    """{name: gradient}, the norm and the logs, of these prompts' rollouts on this rank."""
    arrange = (lambda model: parallel.shard(model, "cpu")) if shard else lambda model: None
    model = Transformer.from_pretrained(folder, dtype=dtype, arrange=arrange)
    reference = Transformer.from_pretrained(folder.parent / "other", dtype=dtype, arrange=arrange).requires_grad_(False)
    c = sear.Config(beta=beta, tokens_per_micro_batch=budget)
    rollouts, A = batch(folder, mine)
    logs = sear.accumulate(model, reference, rollouts, A, c)
    norm = parallel.sum_gradients(model)
    return {n: parallel.whole(p.grad) for n, p in model.named_parameters()}, norm, logs, (model, reference)


class Sent(TorchDispatchMode):
    """Adds up what FSDP's collectives make this rank send: to gather a whole tensor from N ranks it passes on
    (N - 1) / N of it, and to sum one as much."""
    bytes = 0.0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        whole = {"_allgather_base_": 0, "_reduce_scatter_base_": 1}.get(func._schema.name.split("::")[1])
        if whole is not None:
            world = parallel.rank_and_world()[1]
            self.bytes += args[whole].numel() * args[whole].element_size() * (world - 1) / world
        return func(*args, **(kwargs or {}))


def compare(rank, world, port, folder):
    """A rank of the test below; asserts, so that its exit code tells."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    expected = load_file(folder / "expected.safetensors")
    mine = list(range(4))[rank::world - 1] if rank < world - 1 else []  # the last rank has nothing at all
    with parallel.joined(20, False):
        for shard in (False, True):
            for budget in (1, 10_000):
                found, norm, logs, (model, reference) = gradients(folder / "start", mine, shard, budget)
                for name, g in found.items():
                    assert same(g, expected[name], 1e-6), (shard, budget, name)
                assert norm == pytest.approx(expected["norm"].item(), rel=1e-6)
                loss = parallel.total(torch.tensor(logs["loss"], dtype=torch.float64)).item()
                assert loss == pytest.approx(expected["loss"].item(), abs=1e-6)
        B, P = (sum(p.numel() for p in m.parameters()) for m in (model.model.layers, model))
        formula = sharded(B, P - B, 0, 1, world, 1, cast=4)[1]  # fp32 here; the README's table is this formula
        with Sent() as sent:
            with parallel.gathered_once(model):
                pass
            sear.accumulate(model, reference, *batch(folder / "start", mine), sear.Config())
        assert sent.bytes == pytest.approx(formula, rel=0.02), rank
        for p in model.parameters():  # sharded: each holds its rows, and only those
            assert len(parallel.own_rows(p)[0]) <= math.ceil(len(p) / world) and p.grad is not None
        plain, tokenizer = Transformer.from_pretrained(folder / "start"), Tokenizer.from_pretrained(folder / "start")
        prompts = [encode_chat(tokenizer, p.prompt) for p in alchemy.requests(2 + rank, 3)]  # unequal on purpose
        with parallel.gathered_once(model):
            ours = sample(model, prompts, tokenizer, group_size=2, max_new_tokens=8, keep_cache=True)
        other = sample(plain, prompts, tokenizer, group_size=2, max_new_tokens=8)
        assert torch.equal(ours.tokens, other.tokens) and torch.equal(ours.logprob, other.logprob)
        assert all(parallel.is_sharded(p) for p in model.parameters())
        for name, p in model.named_parameters():
            assert torch.equal(parallel.whole(p), dict(plain.named_parameters())[name])
        a, b = (gradients(folder / "start", mine, shard, 300, torch.bfloat16)[0] for shard in (False, True))
        heads = {"lm_head.weight", "model.embed_tokens.weight"}
        assert all(same(a[n], b[n], 1e-6 if n not in heads else 1e-3) for n in a)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        optimizer.step()
        checkpoint.save(folder / f"run{world}", 7, model, optimizer)
        again = Transformer.from_pretrained(folder / "other", arrange=lambda m: parallel.shard(m, "cpu"))
        restored = torch.optim.AdamW(again.parameters(), lr=0.1)
        parallel.gathered([])  # rank 0 has written
        assert checkpoint.load(checkpoint.latest(folder / f"run{world}"), again, restored) == 7
        for p, q in zip(model.parameters(), again.parameters()):
            for x, y in ((p, q), *((optimizer.state[p][k], restored.state[q][k]) for k in ("exp_avg", "exp_avg_sq"))):
                assert torch.equal(x.to_local(), y.to_local())
    os._exit(0)


@pytest.mark.parametrize("world", (2, 4))
def test_gradients_tokens_and_checkpoints_do_not_depend_on_the_ranks(tmp_path, world):
    alchemy.write_folder(tmp_path / "start")
    Transformer.from_scratch(tmp_path / "start", seed=5).save_pretrained(tmp_path / "start")
    alchemy.write_folder(tmp_path / "other")
    Transformer.from_scratch(tmp_path / "other", seed=6).save_pretrained(tmp_path / "other")
    expected, norm, logs, _ = gradients(tmp_path / "start", [0, 1, 2, 3], False, 400)
    save_file(expected | {"norm": torch.tensor(norm), "loss": torch.tensor(logs["loss"])},
              tmp_path / "expected.safetensors")
    port = free_port()
    ranks = [SERVER.Process(target=compare, args=(r, world, port, tmp_path)) for r in range(world)]
    for p in ranks:
        p.start()
    for p in ranks:
        p.join(100)
    assert [p.exitcode for p in ranks] == [0] * world
    model = Transformer.from_pretrained(tmp_path / "start")  # what sharded ranks saved, one process loads
    optimizer = torch.optim.AdamW(model.parameters())
    assert checkpoint.load(tmp_path / f"run{world}/checkpoint/7", model, optimizer) == 7
    saved = load_file(tmp_path / f"run{world}/checkpoint/7/weights.safetensors")
    assert all(torch.equal(p, saved[n]) for n, p in model.named_parameters())


def test_safetensors_written_by_hand_are_safetensors(tmp_path):
    tensors = {"a": torch.randn(3, 5), "b": torch.randn(7), "empty": torch.zeros(0, 4), "c": torch.randn(4, 4).T}
    parallel.write_tensors({tmp_path / "new" / "x.safetensors": tensors})
    found = load_file(tmp_path / "new" / "x.safetensors")
    assert found.keys() == tensors.keys() and all(torch.equal(found[k], tensors[k]) for k in tensors)


def test_the_rule_of_auto(monkeypatch):
    assert not parallel.wants_shards("auto", 10**12, 20, "cpu") and parallel.wants_shards("yes", 1, 20, "cpu")
    monkeypatch.setattr(parallel, "rank_and_world", lambda: (0, 8))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda d: type("P", (), {"total_memory": 80e9}))
    assert not parallel.wants_shards("auto", int(1.5e9), 22, "cuda:0")  # 33 GB of 80
    assert parallel.wants_shards("auto", int(7.6e9), 22, "cuda:0") and not parallel.wants_shards("no", 10**12, 22, "cuda:0")


# ---- whole runs -------------------------------------------------------------------------------------------

class StopAfter:
    """A run that is asked to stop after n steps; every rank is."""
    def __init__(self, steps):
        self.steps = steps

    def __call__(self, rank):
        calls = iter(range(1, 1000))
        checkpoint.stopping = lambda: next(calls) >= self.steps


def test_a_run_is_the_same_on_any_number_of_ranks_and_resumes_on_another(alone, tmp_path):
    """2 sharded ranks, then 4 that are more than the prompts; 4 sharded ranks, then one process."""
    out = tmp_path / "two-then-four"
    for code, text in launch(tmp_path / "a", 2, from_start(alone, out, "--shard", "yes"), StopAfter(2)).values():
        assert code == 0 and "stopped and saved" in text
    assert [f.name for f in (out / "checkpoint").iterdir()] == ["2"] and not (out / "model").exists()
    for code, text in launch(tmp_path / "b", 4, from_start(alone, out, "--resume", "auto")).values():
        assert code == 0, text
    same_run(alone, out)
    out = tmp_path / "four-then-one"
    for code, text in launch(tmp_path / "c", 4, from_start(alone, out, "--shard", "yes"), StopAfter(3)).values():
        assert code == 0 and "stopped and saved" in text
    assert sear.run_once(["--resume", str(out)]) == 0
    same_run(alone, out)


def test_resume_auto_begins_afresh_where_there_is_nothing(alone, tmp_path):
    out = tmp_path / "fresh"
    flags = [str(f) for f in from_start(alone, out, "--resume", "auto", "--steps", "2")]
    assert sear.run_once(flags) == 0 and (out / "model/config.json").exists()
    assert json.loads((out / "config.json").read_text())["resume"] == ""
    assert sear.parse(["--resume", "auto", "--objective", "outcome"]).out == "runs/outcome-seed1"


def test_torchrun_restarts_to_the_same_bits_after_a_sigkill(alone, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for code, text in launch(tmp_path / "log", 2, from_start(alone, whole)).values():
        assert code == 0, text
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1", __file__]
    process = subprocess.run([sys.executable, *command, *map(str, from_start(alone, broken))], capture_output=True,
                             text=True, timeout=100)
    assert process.returncode == 0, process.stderr
    assert "lost another rank" in sentence(process.stderr)
    same_bits(whole, broken)


# ---- what goes wrong --------------------------------------------------------------------------------------

class Die:
    """Rank 1 kills itself, or stops moving, when it comes to a function for the nth time."""
    def __init__(self, module, name, times, by=signal.SIGKILL):
        self.module, self.name, self.times, self.by = module, name, times, by

    def __call__(self, rank):
        module = sys.modules[self.module]
        function, calls = getattr(module, self.name), iter(range(1, 1000))

        def dying(*args, **kw):
            if rank == 1 and next(calls) == self.times:
                os.kill(os.getpid(), self.by)
            return function(*args, **kw)
        setattr(module, self.name, dying)


@pytest.mark.parametrize("where, flags", [
    (Die("sear", "load_start", 1), ""),  # the others are at the start, too
    (Die("sear", "rollout_step", 4), ""),
    (Die("parallel", "whole", 60), "--shard yes --save-every 1"),  # in the middle of the first checkpoint
])
def test_a_killed_rank_ends_the_others_with_one_sentence(alone, tmp_path, where, flags):
    out, begin = tmp_path / "run", time.time()
    ended = launch(tmp_path / "log", 3, from_start(alone, out, *flags.split()), where)
    assert time.time() - begin < 60 and ended[1][0] == -signal.SIGKILL
    for rank in (0, 2):
        assert ended[rank][0] == 1 and f"rank {rank} lost another rank" in sentence(ended[rank][1])
    kept = [f.name for f in (out / "checkpoint").glob("*")] if (out / "checkpoint").exists() else []
    assert kept == (["2"] if where.name == "rollout_step" else [])  # complete or absent, and no rest of one


def hushed(rank):
    """Rank 1 hangs for good, as if its machine were gone: no connection is closed."""
    parallel.PULSE, parallel.SILENCE = 0.2, 1.5
    Die("sear", "load_start", 1, signal.SIGSTOP)(rank)


@pytest.mark.parametrize("spoil, flags, said", [
    (hushed, "", "no sign of life from rank 1"),
    (Die("parallel", "whole", 60, signal.SIGSTOP), "--shard yes --timeout 2 --save-every 1", "Timed out waiting 2000ms"),
])
def test_a_rank_that_hangs_ends_the_others(alone, tmp_path, spoil, flags, said):
    """By its pulse, and in the middle of a checkpoint by the timeout of what the other waits for."""
    port, out = free_port(), tmp_path / "run"
    processes = [SERVER.Process(target=rank_main, args=(
        r, 2, port, str(tmp_path / f"{r}.log"), [str(f) for f in from_start(alone, out, *flags.split())], spoil))
        for r in range(2)]
    for p in processes:
        p.start()
    processes[0].join(40)
    processes[1].kill()
    assert processes[0].exitcode == 1 and said in sentence((tmp_path / "0.log").read_text())
    assert not list(out.glob("checkpoint/*"))


def other_code(rank):
    if rank == 1:
        environment = checkpoint.environment()
        checkpoint.environment = lambda: environment | {"source_sha256": "another"}


@pytest.mark.parametrize("spoil, flag, what", [(other_code, [], "code"), (None, ["--seed", "7"], "config (--seed)")])
def test_ranks_that_differ_are_told_so(alone, tmp_path, spoil, flag, what):
    ended = launch(tmp_path / "log", 3, lambda r: from_start(alone, tmp_path / "run", *(flag if r == 1 else [])), spoil)
    for code, text in ended.values():
        assert code == 2 and f"rank 1 differs from rank 0 in {what}" in sentence(text)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("present, held", [([0], False), ([1], False), ([0, 1], True)])
def test_ranks_that_do_not_meet_say_so_and_end(tmp_path, present, held):
    """One is missing, or some other program that never answers holds the port."""
    with socket.socket() as s:
        s.bind(("", 0))
        if held:
            s.listen()
        begin = time.time()
        port = s.getsockname()[1] if held else free_port()
        ended = launch(tmp_path, 2, ["--timeout", "1"], present=present, port=port)
        assert time.time() - begin < 30
    for rank, (code, text) in ended.items():
        assert code == 2 and f"rank {rank} of 2" in sentence(text) and str(port) in text
    assert not held or "address already in use" in ended[0][1]


def full_disk(rank):
    if rank == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_500_000, 1_500_000))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)


def test_a_full_disk_is_one_sentence_on_every_rank(alone, tmp_path):
    """Weights fit, the optimizer's state does not; sharded, so that the others are needed to the end of it."""
    ended = launch(tmp_path / "log", 2, from_start(alone, tmp_path / "run", "--shard", "yes"), full_disk)
    for code, text in ended.values():
        assert code == 1 and "checkpoint/2 could not be saved" in sentence(text)
    assert not list((tmp_path / "run/checkpoint").iterdir())


class Poison:
    """The loss of rollouts of the step's last prompt is infinite, or its gradient: on the rank that has it."""
    def __init__(self, in_gradient=False):
        self.in_gradient = in_gradient

    def __call__(self, rank):
        loss, accumulate = sear.policy_loss, sear.accumulate
        last = rank == int(os.environ.get("WORLD_SIZE", 1)) - 1

        def poisoned(model, reference, rollouts, advantage, c, chosen=None):
            hit = rollouts.prompt.max() if len(rollouts.prompt) else -1

            def bad_loss(logprob, *args):
                value, kl = loss(logprob, *args)
                rows = range(len(rollouts.prompt)) if chosen is None else chosen
                if last and any(rollouts.prompt[b] == hit for b in rows):
                    if self.in_gradient:
                        value = value + 0 * (logprob - logprob).sum().abs().sqrt()  # 0, with the gradient 0 * inf
                    else:
                        value = value + math.inf
                return value, kl
            sear.policy_loss = bad_loss
            return accumulate(model, reference, rollouts, advantage, c, chosen)
        sear.accumulate = poisoned


@pytest.mark.parametrize("world, shard, in_gradient", [(1, "no", False), (2, "yes", True)])
def test_a_step_without_a_finite_number_is_skipped_reported_and_counted(alone, tmp_path, world, shard, in_gradient):
    out = tmp_path / "run"
    flags = from_start(alone, out, "--shard", shard, "--save-every", "1", "--max-bad-steps", "2")
    ended = launch(tmp_path / "log", world, flags, Poison(in_gradient))
    for code, text in ended.values():
        assert code == 1 and "step 1: loss or gradient was not finite" in sentence(text)
    assert "step 0: loss or gradient was not finite" in ended[0][1]
    metrics = checkpoint.rows(out / "metrics.jsonl")
    assert [row["skipped"] for row in metrics] == [True, True]
    assert metrics[0]["grad_norm" if in_gradient else "loss"] is None and metrics[0]["answer_reward"] is not None
    bad = checkpoint.rows(out / "bad_steps.jsonl")
    expected = [sear.step_prompts(sear.parse(["--prompts-per-step", "3"]), [], step)[-1].prompt for step in (0, 1)]
    assert [(row["step"], row["prompt"]) for row in bad] == [(0, expected[0]), (1, expected[1])]
    assert all(row["alone"] and len(row["rollouts"]) == 2 for row in bad)
    start, after = load_file(out / "start/model.safetensors"), load_file(out / "checkpoint/1/weights.safetensors")
    assert all(torch.equal(start[k], after[k]) for k in start)


def test_a_device_for_each_rank(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(InputError, match="each rank needs a CUDA device, 3 here at least, and there are 2"):
        parallel.own_device("")
    assert parallel.own_device("cpu") == "cpu"


if __name__ == "__main__":  # under torchrun: a rank that is killed in its first life
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        Die("sear", "rollout_step", 4)(int(os.environ["RANK"]))
    elif os.environ["RANK"] == "0":
        time.sleep(3)  # the others come first, and find in torchrun's store what the dead have left there
    sys.exit(sear.main())
