"""What RL begins from: the user's model and prompts, checked, or a start model trained on demonstrations.

Shapes: b rows of a micro-batch, T tokens.
"""
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import alchemy.world as alchemy
import evaluate
from alchemy.demonstrations import demonstrations, write_folder
from batches import micro_batches
from judges import JUDGES, Judge, load_judge
from judges.guards import read_spec
from kernels import segment_logprobs
from lib import checkpoint, plan, watch
from lib.data import InputError, Prompt, as_json, describe, expect, load_eval_files, load_prompts, without
from lib.parallel import rank_and_world, shard, wants_shards
from lib.tokenizer import Tokenizer
from lora import add_adapter
from model import Transformer, add_end_of_turn, read_configs
from rewards import PROBE_TOKENS
from rollout import CLOSE, OPEN, check_length, encode_prompt

STEPS, BATCH, RATE = 900, 32, 3e-3  # supervised steps, demonstrations a step, peak learning rate
ATTEMPTS, FLUENT = 3, 0.8  # random starts tried; a start is fluent (0.99) or not at all (0.00)


# ---- the user's flags and files -------------------------------------------------------------------------

def read_prompts(c) -> tuple[list[Prompt], list[Prompt]]:
    """The prompts to train on, and those to evaluate on: of other files, or one in ten. Raises InputError."""
    pool, test = load_prompts(c.prompts, c.label), load_eval_files(c.eval_file)
    lines = [describe(c.prompts, pool)]
    if test:
        train = without(pool, test)
        lines += [describe(c.eval_file, test, "measured"),
                  f"{len(pool) - len(train)} of {len(pool)} training prompts are in --eval-file too, but for "
                  "case, white space and punctuation, and are left out of training"]
    else:
        test = [p for p in pool if evaluate.held_out(p)]
        train = [p for p in pool if not evaluate.held_out(p)]
        lines[0] += f"; {len(test)} held out"
    if not train:
        raise InputError(f"{c.prompts}: all {len(pool)} prompts are held out for evaluation; add some")
    if rank_and_world()[0] == 0:
        print("\n".join(lines), file=sys.stderr)
    return train, test


def check_flags(c) -> None:
    """Raises InputError for flags that contradict each other."""
    if c.prompts and not c.model:
        raise InputError("--prompts needs --model: the embedded start model only knows the embedded world")
    for flag, name in (("--judge", c.judge), ("--eval-judge", c.eval_judge or c.judge)):
        if bool(c.prompts) == (name == "alchemy"):
            raise InputError(f"{flag} {name} cannot judge {c.prompts or 'the embedded world'}; expected "
                             f"{'rules, a folder or a judge file' if c.prompts else 'alchemy'}")
    if c.prefill_share and c.objective == "no-thought":
        raise InputError("--prefill-share needs a thought to prefill, and --objective no-thought has none")
    if c.plan and not c.prompts:
        raise InputError("--plan needs --prompts: the embedded world runs on any machine")
    if c.injections and not c.prompts:
        raise InputError("--injections needs --prompts: the embedded world has its own thoughts")
    if c.label and not c.prompts:
        raise InputError("--label needs --prompts: it labels the prompts of a file")
    if c.lora_alpha and not c.lora_rank:
        raise InputError("--lora-alpha needs --lora-rank: without an adapter there is nothing to scale")
    if c.lora_rank and c.shard == "yes":
        raise InputError("--lora-rank does not go with --shard yes: sampling gathers frozen weights anyway")
    if c.eval_file and not (c.prompts and c.eval_prompts):
        raise InputError("--eval-file needs --prompts to train on, and --eval-prompts above 0")
    if c.reward_model and not c.prompts:
        raise InputError("--reward-model does not apply to the embedded world, whose verifier judges help")


def read_inputs(c) -> tuple[list[Prompt], list[Prompt]]:
    """The prompts to train on ([]: the embedded world's) and the requests to evaluate. Checks every input,
    before a run folder exists. Raises InputError."""
    watch.check_installed(c.log)
    pool, test = read_prompts(c) if c.prompts else ([], [])
    with tempfile.TemporaryDirectory() as scratch:
        if not c.model:
            write_folder(Path(scratch), c.chain)
        tokenizer = load_tokenizer(c, c.model or scratch)
        # On "meta" only the headers of the weight files are read.
        model = (Transformer.from_pretrained(c.model, "meta") if c.model else
                 Transformer.from_scratch(scratch, c.seed))
        if c.model:
            add_end_of_turn(model, tokenizer)
    room, stops = model.config.max_position_embeddings, model.stop_ids
    if model.config.num_labels or tokenizer.n_tokens > model.config.vocab_size or not stops:
        raise InputError(f"{c.model} is not a causal language model to train: it has a score head, no "
                         "eos_token_id, or fewer embedding rows than its tokenizer has tokens")
    forced = len(tokenizer.encode(CLOSE + "\n\n", special=True)) + min(c.max_new_tokens, PROBE_TOKENS)
    for p in pool + test or alchemy.requests(1, c.seed, length=c.chain):
        tokens = len(encode_prompt(tokenizer, p.prompt, closed=True)) + longest_injection(tokenizer, p, c)
        check_length(room, tokens + forced * (c.potential == "probe"), c.max_new_tokens,
                     f"prompt '{p.prompt:.40}'")
    requests = evaluate.requests(test, c)
    evaluate.check_lengths(tokenizer, requests if pool else requests[:1], room, c)
    if c.eval_prompts and not requests and rank_and_world()[0] == 0:
        print(f"{c.prompts}: too few prompts to hold one out, so nothing is evaluated", file=sys.stderr)
    return pool, requests


def longest_injection(tokenizer: Tokenizer, prompt: Prompt, c) -> int:
    """Tokens of the longest thought that training may inject."""
    return max(evaluate.injected_tokens(tokenizer, prompt, c).values()) if c.prefill_share else 0


def memory_plan(c, pool: list[Prompt], requests: list[Prompt]) -> str:
    """What --plan prints. Raises InputError."""
    tokenizer, model = load_tokenizer(c, c.model), Transformer.from_pretrained(c.model, "meta")
    names = {c.judge, c.eval_judge, c.reward_model} - {"", *JUDGES}
    folders = [Path(name) for name in sorted(names) if ".py:" not in name]
    folders = [f.parent / read_spec(f)["model"] if f.suffix == ".json" else f for f in folders]
    attacks = [evaluate.attack_lengths(tokenizer, p, c) for p in requests]
    work = plan.Work(
        max(len(encode_prompt(tokenizer, p.prompt)) + longest_injection(tokenizer, p, c) for p in pool),
        max((max(lengths.values()) for lengths in attacks), default=0) + c.max_new_tokens, len(requests))
    return plan.report(model.config, [read_configs(folder)[0] for folder in folders], c, work)


def step_prompts(c, pool: list[Prompt], step: int) -> list[Prompt]:
    """The prompts of a step, for all ranks: shuffled epochs of the file, or the world's requests."""
    if not pool:
        return alchemy.requests(c.prompts_per_step, c.seed, step, length=c.chain)
    places = range(step * c.prompts_per_step, (step + 1) * c.prompts_per_step)
    epochs = {i // len(pool) for i in places}
    order = {e: np.random.default_rng([c.seed, e]).permutation(len(pool)) for e in epochs}
    return [pool[order[i // len(pool)][i % len(pool)]] for i in places]


def prepare_start(c, run: Path, device: str) -> None:
    """Makes the run's start/ folder: a start model trained here, or a symlink to --model."""
    start = run / "start"
    if not start.exists() and not start.is_symlink():
        if c.model:
            start.symlink_to(Path(c.model).resolve())
        else:
            warm_start(c.seed, c.chain, run, device)


def load_tokenizer(c, folder) -> Tokenizer:
    tokenizer = Tokenizer.from_pretrained(folder)
    tokenizer.template_args = as_json("--template-args", c.template_args or "{}")
    taken = {"self", "messages", "generation_prompt", "add_generation_prompt"} & set(tokenizer.template_args)
    expect(not taken, "--template-args", "variables that are not set here", sorted(taken))
    return tokenizer


def load_start(c, start: Path, device: str) -> tuple[Tokenizer, Transformer, Transformer | None]:
    """Tokenizer, model and frozen reference. Bytes a parameter in bf16: 16 with its gradient and AdamW's
    moments, 2 in the reference, 2 in the copy that samples. With LoRA 2 in all: the reference is the model
    without its adapter. Frozen weights are held in the compute type, to which layers cast them anyway."""
    def arrange(model: Transformer) -> None:
        size = sum(p.numel() for p in model.parameters())
        if not c.lora_rank and wants_shards(c.shard, size, 20 if c.beta else 18, device):
            shard(model, device)
    tokenizer, frozen = load_tokenizer(c, start), {}
    if c.lora_rank:
        frozen = dict(masters=False, dtype=torch.float32 if device == "cpu" else torch.bfloat16)
    model = Transformer.from_pretrained(start, device, arrange=arrange, **frozen)
    model.checkpoint_activations = c.checkpoint_activations == "yes"
    add_end_of_turn(model, tokenizer)
    if c.lora_rank:
        add_adapter(model, c.lora_rank, c.lora_alpha, c.seed)
        return tokenizer, model, model if c.beta else None
    if not c.beta:
        return tokenizer, model, None
    reference = Transformer.from_pretrained(start, device, model.compute_dtype, arrange, masters=False)
    return tokenizer, model, reference.requires_grad_(False)


def load_judges(c, device: str, pool: list[Prompt], requests: list[Prompt]) -> tuple[Judge, Judge]:
    """The judge that pays and the one that measures, often the same. Raises InputError."""
    if evaluate.judge_of(c)["pays"]:
        return (load_judge(c.judge, c.reward_model, device, pool + requests),) * 2
    return (load_judge(c.judge, c.reward_model, device, pool),
            load_judge(c.eval_judge, "", device, requests, "--eval-judge"))


# ---- the supervised warm start ---------------------------------------------------------------------------

def imitate(model: Transformer, tokens: Tensor, segment: Tensor) -> float:
    """Adds the gradient of the mean cross-entropy over the tokens [b, T] whose segment is 0. -> that mean."""
    loss, count = 0.0, (segment[:, 1:] >= 0).sum().to(model.device)
    length = (torch.arange(tokens.shape[1]) * (segment >= 0)).amax(1) + 1
    for rows in micro_batches(length, 2048):  # a few rows are long; in one batch all would be padded to them
        x, y = (t[rows, :int(length[rows].max())].to(model.device) for t in (tokens, segment))
        out = segment_logprobs(model.hidden(x[:, :-1]).flatten(0, 1), model.head.weight, x[:, 1:].flatten(),
                               y[:, 1:].flatten(), 1)
        part = -out.segment_logprob[0] / count
        part.backward()
        loss += part.item()
    return loss


@torch.no_grad()
def fluency(model: Transformer, tokenizer: Tokenizer, chain: int) -> float:
    """Probability that the model works a training chain out: at the start of the thought, behind an idle line
    or behind the talk, whichever is lowest. Some random starts learn the position of a reagent instead of the
    order; a line in front then breaks every chain, and RL cannot reinforce what is never sampled."""
    worst, device = 1.0, model.device
    for begin in ("", alchemy.CALM, alchemy.TALK):
        rows = []
        for p in alchemy.requests(40, 0, length=chain):
            chat = tokenizer.chat([{"role": "user", "content": p.prompt}])
            prompt = tokenizer.encode(chat + OPEN + begin, special=True)
            rows.append(prompt + tokenizer.encode("".join(alchemy.worked_lines(alchemy.chain_of(p.prompt)))))
        tokens = torch.tensor(rows, device=device)  # [40, T]: all requests have as many tokens
        logprob = model(tokens[:, :-1]).log_softmax(-1).gather(2, tokens[:, 1:, None])[:, len(prompt) - 1:, 0]
        inside = logprob.unflatten(1, (chain - 1, -1))[:, :, 1:]  # not whether a line begins at all
        worst = min(worst, inside.sum((1, 2)).exp().mean().item())
    return worst


def warm_start(seed: int, chain: int, run: Path, device: str) -> None:
    """Trains the embedded world's start model into run/start, on the demonstrations' responses. Only rank 0
    calls. If a random start does not become fluent, another one is tried."""
    scratch = run / "warm"
    with checkpoint.atomic_folder(run / "start") as folder:
        write_folder(folder, chain)
        tokenizer, saved = Tokenizer.from_pretrained(folder), checkpoint.latest(scratch)
        done = int(saved.name) if saved else 0
        for attempt in range(done // STEPS, ATTEMPTS):
            model = Transformer.from_scratch(folder, seed + 1000 * attempt, device)
            optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
            first = checkpoint.load(saved, model, optimizer) % STEPS if saved else 0
            steps = checkpoint.progress_bar(range(first, STEPS), desc="warm start", initial=first,
                                            total=STEPS)
            for step in steps:
                left = 1 - step / STEPS  # constant, then linear to 0
                optimizer.param_groups[0]["lr"] = RATE * min(1.0, (step + 1) / 20, left / 0.7)
                optimizer.zero_grad()
                loss = imitate(model, *demonstrations(BATCH, tokenizer, chain, seed, step))
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                steps.set_postfix(loss=f"{loss:.3f}")
                if checkpoint.STOP and step < STEPS - 1:
                    checkpoint.save(scratch, attempt * STEPS + step + 1, model, optimizer)
                    raise checkpoint.Stopped
            saved, fluent = None, fluency(model, tokenizer, chain)
            if fluent >= FLUENT:
                break
            print(f"start {attempt + 1} of {ATTEMPTS} works out {fluent:.0%} of its chains", file=sys.stderr)
        model.save_pretrained(folder)
    shutil.rmtree(scratch, ignore_errors=True)
