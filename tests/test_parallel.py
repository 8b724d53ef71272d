"""Ranks: the same result on 1, 2 and 4, sharded or not; and what happens if one differs, fails or dies.

Only the restart test uses torchrun; all others fork their ranks from one server (rank_helpers.py).
"""
import json
import math
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from functools import partial

import pytest
import torch
from helpers import ROOT, logged, made_rollouts, same_files, sharded, within
from rank_helpers import SERVER, become, begin, free_port, launch, poison, sentence, signal_in, stop_after
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

import alchemy.world as alchemy
import inputs
import sear
import warmstart
from alchemy.demonstrations import write_folder
from lib import checkpoint, parallel
from lib.chat import encode_prompt
from lib.data import InputError
from lib.tokenizer import Tokenizer
from model import Transformer
from rollout import sample

SMALL = ("--steps 4 --prompts-per-step 3 --group-size 2 --eval-prompts 0 --max-new-tokens 24 --save-every 2 "
         "--seed 3").split()
COSTS = ("row_steps", "prefilled_tokens", "logprob_gap", "seconds")  # depend on the number of ranks


@pytest.fixture(scope="module", autouse=True)
def importable():
    """Ranks find this file and the repository."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'tests'}")
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(scope="module")
def alone(tmp_path_factory, start):
    """A run of one process."""
    out = tmp_path_factory.mktemp("alone") / "run"
    assert sear.main([str(f) for f in flags_for(start, out)]) == 0
    assert all(row["grad_norm"] > 0 for row in checkpoint.rows(out / "metrics.jsonl"))
    return out


def flags_for(start, out, *flags):
    return [*SMALL, "--model", start, "--out", out, *flags]


def same_run(one, other):
    """Tokens and texts are equal, counts and rewards too; fp32 sums in another order are equal to 1e-5."""
    a, b = (checkpoint.rows(run / "metrics.jsonl") for run in (one, other))
    assert [row["step"] for row in a] == [row["step"] for row in b] == list(range(4))
    for x, y in zip(a, b):
        assert x.keys() == y.keys()
        for key in x.keys() - set(COSTS):
            if key in ("loss", "kl", "entropy", "grad_norm"):
                assert y[key] == pytest.approx(x[key], rel=1e-5, abs=1e-6), key
            else:
                assert y[key] == (x[key] if x[key] is None else pytest.approx(x[key], rel=1e-12)), key
    assert (one / "transcripts.jsonl").read_text() == (other / "transcripts.jsonl").read_text()
    a, b = (load_file(run / "model/model.safetensors") for run in (one, other))
    assert a.keys() == b.keys() and all(within(a[k], b[k], 1e-5) for k in a)


# ---- gradients, tokens, weights --------------------------------------------------------------------------

TEXTS = [f"a {'b ' * i}\n\nIt makes\n\n{'c' * i}</think>\n\nI cannot help with that.$" for i in range(8)]


def batch(folder, mine):
    """Made rollouts of these of four prompts, two of each, and their advantages."""
    tokenizer, model = Tokenizer.from_pretrained(folder), Transformer.from_pretrained(folder, "meta")
    prompts = [encode_prompt(tokenizer, p.prompt) for p in alchemy.requests(4, 1)]
    if not mine:
        return sample(model, [], tokenizer), torch.zeros(0, 1)
    rows = [2 * i + j for i in mine for j in (0, 1)]
    rollouts = made_rollouts(tokenizer, [prompts[i] for i in mine], [TEXTS[row] for row in rows],
                             model.stop_ids[0], 2)
    advantage = torch.randn(8, 100, generator=torch.Generator().manual_seed(0))  # [B, T]
    return rollouts, advantage[rows, :rollouts.tokens.shape[1]]


def gradients(folder, mine, shard, budget, dtype=None, again=False):
    """{name: gradient}, their norm, the logs and the models, of these prompts' rollouts on this rank.
    again: blocks run again in the backward pass."""
    arrange = (lambda model: parallel.shard(model, "cpu")) if shard else lambda model: None
    model = Transformer.from_pretrained(folder / "start", dtype=dtype, arrange=arrange)
    reference = Transformer.from_pretrained(folder / "other", dtype=dtype, arrange=arrange,
                                            masters=dtype is None)
    reference.requires_grad_(False)
    model.checkpoint_activations = again
    logs = sear.accumulate(model, reference, *batch(folder / "start", mine),
                           sear.Config(beta=0.1, tokens_per_micro_batch=budget))
    norm = parallel.sum_gradients(model)
    found = {n: parallel.gather_full(p.grad) for n, p in model.named_parameters()}
    return found, norm, logs, (model, reference)


class Sent(TorchDispatchMode):
    """Counts the bytes that FSDP's collectives send from this rank: (N - 1) / N of each tensor that N ranks
    gather or sum."""
    bytes = 0.0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        whole = {"_allgather_base_": 0, "_reduce_scatter_base_": 1}.get(func._schema.name.split("::")[1])
        if whole is not None:
            world = parallel.rank_and_world()[1]
            self.bytes += args[whole].numel() * args[whole].element_size() * (world - 1) / world
        return func(*args, **(kwargs or {}))


def check_gradients(folder, mine):
    """Equal to those of one process, sharded or not, in one micro-batch or in many. -> sharded models."""
    expected = load_file(folder / "expected.safetensors")
    for shard in (False, True):
        for budget, again in ((1, False), (400, True), (10_000, False)):
            found, norm, logs, models = gradients(folder, mine, shard, budget, again=again)
            for name, g in found.items():
                assert within(g, expected[name], 1e-6), (shard, budget, name)
            assert norm == pytest.approx(expected["norm"].item(), rel=1e-6)
            loss = parallel.all_sum(torch.tensor(logs["loss"], dtype=torch.float64)).item()
            assert loss == pytest.approx(expected["loss"].item(), abs=1e-6)
    a, b = (gradients(folder, mine, shard, 300, torch.bfloat16)[0] for shard in (False, True))
    heads = {"lm_head.weight", "model.embed_tokens.weight"}
    assert all(within(a[n], b[n], 1e-3 if n in heads else 1e-6) for n in a)
    return models


def check_bytes(folder, mine, model, reference):
    """Bytes sent in a step agree with the formula behind the table of ranks, here for fp32."""
    B, P = (sum(p.numel() for p in m.parameters()) for m in (model.model.layers, model))
    world = parallel.rank_and_world()[1]
    with Sent() as sent:
        with parallel.unsharded(model):
            pass
        sear.accumulate(model, reference, *batch(folder / "start", mine), sear.Config())
    assert sent.bytes == pytest.approx(sharded(B, P - B, 0, 1, world, 1, cast=4)[1], rel=0.02)
    for p in model.parameters():  # each rank holds only its rows
        assert len(parallel.local_rows(p)[0]) <= math.ceil(len(p) / world) and p.grad is not None


def check_sampling(folder, rank, model):
    """A sharded model samples what the whole one samples, with unequal prompts on the ranks."""
    plain = Transformer.from_pretrained(folder / "start")
    tokenizer = Tokenizer.from_pretrained(folder / "start")
    prompts = [encode_prompt(tokenizer, p.prompt) for p in alchemy.requests(2 + rank, 3)]
    with parallel.unsharded(model):
        ours = sample(model, prompts, tokenizer, group_size=2, max_new_tokens=8, keep_cache=True)
    other = sample(plain, prompts, tokenizer, group_size=2, max_new_tokens=8)
    assert torch.equal(ours.tokens, other.tokens) and torch.equal(ours.logprob, other.logprob)
    assert all(parallel.is_sharded(p) for p in model.parameters())
    for p, q in zip(model.parameters(), plain.parameters()):
        assert torch.equal(parallel.gather_full(p), q)


def check_checkpoint(folder, run, model):
    """Each rank loads the rows that it holds, of weights and moments."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    optimizer.step()
    checkpoint.save(run, 7, model, optimizer)
    again = Transformer.from_pretrained(folder / "other", arrange=lambda m: parallel.shard(m, "cpu"))
    restored = torch.optim.AdamW(again.parameters(), lr=0.1)
    parallel.all_gather([])  # rank 0 has written
    assert checkpoint.load(checkpoint.latest(run), again, restored) == 7
    for p, q in zip(model.parameters(), again.parameters()):
        moments = ((optimizer.state[p][k], restored.state[q][k]) for k in ("exp_avg", "exp_avg_sq"))
        assert all(torch.equal(x.to_local(), y.to_local()) for x, y in ((p, q), *moments))


def check_rank(rank, world, port, folder):
    """One rank of the test below. A failed assertion is a nonzero exit code."""
    become(rank, world, port)
    mine = list(range(4))[rank::world - 1] if rank < world - 1 else []  # the last rank has no rollout
    with parallel.process_group(False):
        model, reference = check_gradients(folder, mine)
        check_bytes(folder, mine, model, reference)
        check_sampling(folder, rank, model)
        check_checkpoint(folder, folder / "run", model)
    os._exit(0)


@pytest.mark.parametrize("world", (2, 4))
def test_gradients_tokens_and_checkpoints_do_not_depend_on_the_ranks(tmp_path, world):
    for name, seed in (("start", 5), ("other", 6)):
        write_folder(tmp_path / name)
        Transformer.from_scratch(tmp_path / name, seed).save_pretrained(tmp_path / name)
    expected, norm, logs, _ = gradients(tmp_path, [0, 1, 2, 3], False, 400)
    save_file(expected | {"norm": torch.tensor(norm), "loss": torch.tensor(logs["loss"])},
              tmp_path / "expected.safetensors")
    port = free_port()
    ranks = [SERVER.Process(target=check_rank, args=(r, world, port, tmp_path)) for r in range(world)]
    for p in ranks:
        p.start()
    for p in ranks:
        p.join(200)
    assert [p.exitcode for p in ranks] == [0] * world
    model = Transformer.from_pretrained(tmp_path / "start")  # one process loads what sharded ranks saved
    saved = tmp_path / "run/checkpoint/7"
    assert checkpoint.load(saved, model, torch.optim.AdamW(model.parameters())) == 7
    weights = load_file(saved / "weights.safetensors")
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())


def test_safetensors_can_read_what_write_tensors_writes(tmp_path):
    tensors = {"a": torch.randn(3, 5), "b": torch.randn(7), "empty": torch.zeros(0, 4),
               "c": torch.randn(4, 4).T}
    parallel.write_tensors({tmp_path / "new" / "x.safetensors": tensors})
    found = load_file(tmp_path / "new" / "x.safetensors")
    assert found.keys() == tensors.keys() and all(torch.equal(found[k], tensors[k]) for k in tensors)


def test_parameters_are_sharded_if_half_a_gpu_cannot_hold_them(monkeypatch):
    wants = parallel.wants_shards
    assert not wants("auto", 10**12, 20, "cpu") and wants("yes", 1, 20, "cpu")
    monkeypatch.setattr(parallel, "rank_and_world", lambda: (0, 8))
    gpu = type("Properties", (), {"total_memory": 80e9})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    assert not wants("auto", int(1.5e9), 22, "cuda:0")  # 33 GB of 80
    assert wants("auto", int(7.6e9), 22, "cuda:0") and not wants("no", 10**12, 22, "cuda:0")


def test_each_rank_needs_a_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(InputError, match="each rank needs a CUDA device: expected 3 or more here, found 2"):
        parallel.rank_device("auto")
    assert parallel.rank_device("cpu") == "cpu"


def test_settings_of_a_run_on_cuda(tmp_path):
    """In a process of its own, since they hold for all of torch. cuDNN would plan for each key length."""
    code = """
import os, torch, sear
from lib import parallel
torch.cuda.is_available, torch.cuda.device_count, torch.cuda.set_device = lambda: True, lambda: 1, print
assert parallel.rank_device("cpu") == "cpu" and torch.backends.cuda.cudnn_sdp_enabled()
assert parallel.rank_device("auto") == "cuda:0" and not torch.backends.cuda.cudnn_sdp_enabled()
assert torch.are_deterministic_algorithms_enabled() and torch.is_deterministic_algorithms_warn_only_enabled()
assert not torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
assert os.environ["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=100)
    assert done.returncode == 0, done.stderr


# ---- whole runs ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("before, stop, after", [(2, 2, 4), (4, 3, 1)])
def test_a_run_is_the_same_on_any_number_of_ranks(alone, start, tmp_path, before, stop, after):
    """Sharded ranks stop, and another number of ranks resumes, one of them without a prompt."""
    out = tmp_path / "run"
    ended = launch(tmp_path / "a", before, flags_for(start, out, "--shard", "yes"),
                   partial(stop_after, stop), code=0)
    assert all("stopped and saved" in text for _, text in ended.values()), ended
    assert checkpoint.latest(out).name == str(stop) and not (out / "model").exists()
    launch(tmp_path / "b", after, flags_for(start, out, "--resume", "auto"), code=0)
    same_run(alone, out)


def test_an_adapter_is_the_same_on_one_rank_and_on_two(start, tmp_path):
    """Two ranks stop, and one resumes."""
    one, two = tmp_path / "one", tmp_path / "two"
    lora = ("--lora-rank", "4", "--learning-rate", "0.001")
    assert sear.main([str(f) for f in flags_for(start, one, *lora)]) == 0
    launch(tmp_path / "a", 2, flags_for(start, two, *lora), partial(stop_after, 3), code=0)
    assert sear.main(["--resume", str(two)]) == 0
    same_run(one, two)
    a, b = (load_file(run / "adapter/adapter_model.safetensors") for run in (one, two))
    assert len(a) > 20 and a.keys() == b.keys() and all(within(a[k], b[k], 1e-6) for k in a)


def test_evaluations_are_the_same_on_any_number_of_ranks(start, tmp_path):
    """The best model too, which sharded ranks write together."""
    flags = ["--eval-prompts", 3, "--eval-every", 2, "--max-new-tokens", 72]
    one, two = tmp_path / "one", tmp_path / "two"
    assert sear.main([str(f) for f in flags_for(start, one, *flags)]) == 0
    launch(tmp_path / "log", 2, flags_for(start, two, *flags, "--shard", "yes"), code=0)
    for file in ("eval.jsonl", "responses.jsonl"):
        rows = [checkpoint.rows(out / file) for out in (one, two)]
        assert rows[0] == rows[1] and {"before", "step-2", "step-4", "after"} == {r["stage"] for r in rows[0]}
    a, b = (load_file(out / "best/model.safetensors") for out in (one, two))
    assert a.keys() == b.keys() and all(within(a[k], b[k], 1e-4) for k in a)


def few_supervised_steps(rank):
    warmstart.MIN_STEPS, warmstart.ROWS = 6, 3  # with three ranks and four, some have one row or none
    warmstart.STEPS, warmstart.ATTEMPTS, warmstart.BATCH = 4, 1, 2


@pytest.mark.parametrize("world, flags", [(2, "--shard no"), (4, "--shard yes --tokens-per-micro-batch 100")])
def test_a_warm_start_is_the_same_on_any_number_of_ranks(start, tmp_path, world, flags):
    """The embedded world's has the same bits."""
    file, shared = tmp_path / "rows.jsonl", ["--steps", "0", "--eval-prompts", "0"]
    file.write_text("".join(json.dumps(dict(prompt=p.prompt, thought="Hm.\n\n" * i, answer="No." * i)) + "\n"
                            for i, p in enumerate(alchemy.requests(12, 1), start=1)))
    for name, ranks, more in (("one", 1, []), ("many", world, flags.split())):
        for kind, model in (("file", ["--model", start, "--warm-start", file]), ("world", [])):
            out = tmp_path / kind / name
            launch(tmp_path / f"log-{kind}-{name}", ranks, [*shared, *model, *more, "--out", out],
                   few_supervised_steps, code=0)
    for kind in ("file", "world"):
        a, b = (load_file(tmp_path / kind / name / "start/model.safetensors") for name in ("one", "many"))
        assert kind == "file" or all(torch.equal(a[k], b[k]) for k in a)
        assert all(within(b[k], a[k], 1e-6) for k in a)
        a, b = (checkpoint.rows(tmp_path / kind / name / "warm_start.jsonl") for name in ("one", "many"))
        for x, y in zip(a, b):
            assert y == pytest.approx(x, rel=1e-5)


def test_torchrun_restarts_a_killed_rank_and_the_run_has_the_same_bits(start, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    launch(tmp_path / "log", 2, flags_for(start, whole), code=0)
    process = subprocess.run(
        [sys.executable, *"-m torch.distributed.run --standalone --nproc-per-node=2 --max-restarts=1".split(),
         __file__, *map(str, flags_for(start, broken))], capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    same_files(whole, broken, "model/model.safetensors", "checkpoint/4/weights.safetensors",
               "checkpoint/4/optimizer.safetensors")
    assert logged(whole) == logged(broken)


# ---- failures --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("where, flags, kept", [
    (("inputs", "load_start", 1), "", []),
    (("sear", "rollout_step", 4), "", ["2"]),
    (("lib.parallel", "gather_full", 60), "--shard yes --save-every 1", [])])  # in the first checkpoint
def test_a_killed_rank_ends_the_others_with_one_sentence(start, tmp_path, where, flags, kept):
    out = tmp_path / "run"
    ended = launch(tmp_path / "log", 3, flags_for(start, out, *flags.split()), partial(signal_in, *where))
    assert ended[1][0] == -signal.SIGKILL
    for rank in (0, 2):
        assert ended[rank][0] == 1 and f"rank {rank} lost another rank" in sentence(ended[rank][1])
    assert [f.name for f in out.glob("checkpoint/*")] == kept  # complete or absent


def test_a_rank_that_hangs_ends_the_others_after_the_timeout(start, tmp_path):
    """In the middle of a checkpoint; its connections stay open."""
    hang = partial(signal_in, "lib.parallel", "gather_full", 60, number=signal.SIGSTOP, timeout=3.0)
    flags = flags_for(start, tmp_path / "run", "--shard", "yes", "--save-every", "1")
    processes, logs = begin(tmp_path, 2, flags, hang)
    processes[0].join(120)
    processes[1].kill()
    assert processes[0].exitcode == 1 and "Timed out waiting 3000ms" in sentence(logs[0].read_text())
    assert not list(tmp_path.glob("run/checkpoint/*"))


def other_code(rank):
    if rank == 1:
        environment = checkpoint.environment()
        checkpoint.environment = lambda: environment | {"source_sha256": "another"}


def in_its_folder(folder, rank):
    os.chdir(folder / f"machine{rank}")


def check_difference(folder, flags, spoil, what):
    """All ranks say that rank 1 differs, and no run folder is made."""
    for code, text in launch(folder / "log", 3, flags, spoil).values():
        assert code == 2 and f"rank 1 differs from rank 0 in {what}" in sentence(text)
    assert not (folder / "run").exists()


def test_ranks_with_other_code_or_flags_are_refused(start, tmp_path):
    check_difference(tmp_path / "a", flags_for(start, tmp_path / "a/run"), other_code, "code")
    check_difference(tmp_path / "b", lambda r: flags_for(start, tmp_path / "b/run", "--seed", 7 + r % 2),
                     None, "config (--seed)")


def test_ranks_with_another_prompt_file_are_refused(start, tmp_path):
    """Three machines with a file of one name; that of rank 1 is older."""
    for rank in range(3):
        (tmp_path / f"machine{rank}").mkdir()
        word = "b" if rank == 1 else "a"
        (tmp_path / f"machine{rank}/p.jsonl").write_text(f'{{"prompt": "{word}", "label": "safe"}}\n')
    check_difference(tmp_path, flags_for(start, tmp_path / "run", "--prompts", "p.jsonl", "--judge", "rules"),
                     partial(in_its_folder, tmp_path), "the content of --prompts")


def impatient(rank):
    parallel.TIMEOUT = 1.0


@pytest.mark.parametrize("ranks, held", [([0], False), ([1], False), ([0, 1], True)])
def test_ranks_that_do_not_meet_end_with_one_sentence(tmp_path, ranks, held):
    """One is missing, or another program holds the port and never answers."""
    with socket.socket() as s:
        s.bind(("", 0))
        if held:
            s.listen()
        port = s.getsockname()[1] if held else free_port()
        ended = launch(tmp_path, 2, [], impatient, ranks, port)
    for rank, (code, text) in ended.items():
        assert code == 2 and f"rank {rank} of 2" in sentence(text) and str(port) in text
    assert not held or "address already in use" in ended[0][1]


def full_disk(rank):
    """Weights fit, AdamW's moments do not."""
    if rank == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_500_000, 1_500_000))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)


def test_a_full_disk_is_one_sentence_on_every_rank(start, tmp_path):
    """Sharded, so that rank 0 needs the others until the last tensor."""
    ended = launch(tmp_path / "log", 2, flags_for(start, tmp_path / "run", "--shard", "yes"), full_disk)
    for code, text in ended.values():
        assert code == 1 and "checkpoint/2 could not be saved" in sentence(text)
    assert not list(tmp_path.glob("run/checkpoint/*"))


# ---- steps that are not finite ---------------------------------------------------------------------------

@pytest.mark.parametrize("world, shard, in_gradient", [(1, "no", False), (2, "yes", True)])
def test_three_steps_without_a_finite_number_end_the_run(start, tmp_path, world, shard, in_gradient):
    out = tmp_path / "run"
    flags = flags_for(start, out, "--shard", shard, "--save-every", "1")
    ended = launch(tmp_path / "log", world, flags, partial(poison, in_gradient, 9))
    for code, text in ended.values():
        assert code == 1 and "step 2: loss or gradient is not finite" in sentence(text)
    assert all(f"step {step}: loss or gradient is not finite" in ended[0][1] for step in (0, 1))
    metrics = checkpoint.rows(out / "metrics.jsonl")
    assert [row["skipped"] for row in metrics] == [True, True, True]
    assert metrics[0]["grad_norm" if in_gradient else "loss"] is None
    assert metrics[0]["answer_reward"] is not None
    bad = checkpoint.rows(out / "bad_steps.jsonl")  # all rollouts of the steps, from all ranks
    c = sear.parse([str(f) for f in SMALL])
    assert [(row["step"], row["prompt"]) for row in bad] == [
        (step, p.prompt) for step in range(3) for p in inputs.step_prompts(c, [], step) for _ in range(2)]
    assert all(row["segments"] for row in bad)
    before = load_file(start / "model.safetensors")
    after = load_file(checkpoint.latest(out) / "weights.safetensors")
    assert all(torch.equal(before[k], after[k]) for k in before)  # no update


def test_a_run_goes_on_after_a_step_without_a_finite_number(start, tmp_path):
    out = tmp_path / "run"
    launch(tmp_path / "log", 1, flags_for(start, out), partial(poison, False, 1), code=0)
    assert [row["skipped"] for row in checkpoint.rows(out / "metrics.jsonl")] == [True, False, False, False]
    before, after = load_file(start / "model.safetensors"), load_file(out / "model/model.safetensors")
    assert not torch.equal(before["lm_head.weight"], after["lm_head.weight"])


if __name__ == "__main__":  # under torchrun: rank 1 is killed before the restart
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        signal_in("sear", "rollout_step", 4, int(os.environ["RANK"]))
    elif os.environ["RANK"] == "0":
        time.sleep(2)  # so that rank 1 comes first and finds what the dead ranks left in torchrun's store
    parallel.end(sear.main(sys.argv[1:]))


def test_without_mps_the_run_is_on_the_cpu_and_says_so(capsys):
    if torch.backends.mps.is_available():
        pytest.skip("there is such a device here")
    assert parallel.rank_device("mps") == "cpu"
    assert "--device mps: torch sees no such device here" in capsys.readouterr().err
