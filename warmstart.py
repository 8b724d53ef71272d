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
from judges import Judge, load_judge
from kernels import segment_logprobs
from lib import checkpoint, watch
from lib.data import InputError, Prompt, as_json, describe, expect, load_eval_files, load_prompts, without
from lib.parallel import rank_and_world, shard, wants_shards
from lib.tokenizer import Tokenizer
from model import Transformer, add_end_of_turn
from rewards import PROBE_TOKENS
from rollout import CLOSE, OPEN, check_length, encode_prompt, micro_batches

STEPS, BATCH, RATE = 900, 32, 3e-3  # supervised steps, demonstrations a step, peak learning rate
ATTEMPTS, FLUENT = 3, 0.8  # random starts tried; a start is fluent (0.99) or not at all (0.00)


# ---- the user's files ------------------------------------------------------------------------------------

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
        tokens = encode_prompt(tokenizer, p.prompt, closed=True)
        check_length(room, len(tokens) + forced * (c.potential == "probe"), c.max_new_tokens,
                     f"prompt '{p.prompt:.40}'")
    requests = evaluate.requests(test, c)
    evaluate.check_lengths(tokenizer, requests if pool else requests[:1], room, c)
    if c.eval_prompts and not requests and rank_and_world()[0] == 0:
        print(f"{c.prompts}: too few prompts to hold one out, so nothing is evaluated", file=sys.stderr)
    return pool, requests


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
    """Tokenizer, model and frozen reference. Bytes a parameter: 16 with its gradient and AdamW's moments, 4
    in the reference, 2 in the bf16 copy that samples."""
    def arrange(model: Transformer) -> None:
        size = sum(p.numel() for p in model.parameters())
        if wants_shards(c.shard, size, 22 if c.beta else 18, device):
            shard(model, device)
    tokenizer = load_tokenizer(c, start)
    model = Transformer.from_pretrained(start, device, arrange=arrange)
    add_end_of_turn(model, tokenizer)
    reference = Transformer.from_pretrained(start, device, arrange=arrange) if c.beta else None
    return tokenizer, model, reference and reference.requires_grad_(False)


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
