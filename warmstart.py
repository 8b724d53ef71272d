"""What RL begins from: the user's model, or one that is trained on demonstrations first.

Shapes: b rows of a batch, T tokens.
"""
import math
import shutil
import tempfile
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch
from torch import Tensor

import alchemy.world as alchemy
import evaluate
from alchemy.demonstrations import demonstrations, write_folder
from batches import micro_batches, pad
from kernels import segment_logprobs
from lib import checkpoint, parallel
from lib.chat import add_end_of_turn, encode_prompt, end_of_turn, unused_mark
from lib.data import Prompt, as_json, expect, read_rows, whole_text
from lib.parallel import all_gather, all_sum, from_rank_0, rank_and_world, say, shard, wants_shards
from lib.tokenizer import TAGS, Tokenizer
from model import Transformer
from rollout import owned_length

# The embedded world's start model, from random weights.
STEPS, BATCH, RATE = 900, 32, 3e-3  # supervised steps, demonstrations a step, peak learning rate
ATTEMPTS, FLUENT = 3, 0.8  # random starts tried; a start is fluent (0.99) or not at all (0.00)
BUDGET = 2048  # padded tokens of a micro-batch: a few rows are long, and would pad all the others
# --warm-start: passes over the file, fewest steps (90 taught SmolLM2-135M the format), rows a step, peak rate
PASSES, MIN_STEPS, ROWS, TUNE_RATE = 2, 90, 16, 5e-5


# ---- a folder's model --------------------------------------------------------------------------------------

def in_shuffled_passes(items: list, first: int, n: int, seed: int) -> list:
    """Items number first to first + n of endless passes over them; each pass has its own order."""
    places = [divmod(i, len(items)) for i in range(first, first + n)]  # (pass, place in its order)
    order = {e: np.random.default_rng([seed, e]).permutation(len(items)) for e, _ in places}
    return [items[order[e][i]] for e, i in places]


def prepare_start(c, run: Path, device: str) -> None:
    """Makes the run's start/ folder: the embedded world's start model, --model after its warm start, or a
    symlink to --model. Every rank calls."""
    start = run / "start"
    if from_rank_0(start.exists() or start.is_symlink()):
        return
    if not c.model:
        train_world(c, run, device)
    elif c.warm_start:
        train_on_file(c, run, device)
    else:
        checkpoint.on_rank_0(lambda: start.symlink_to(Path(c.model).resolve()))
    checkpoint.on_rank_0(lambda: shutil.rmtree(run / "warm", ignore_errors=True))


def load_tokenizer(c, folder) -> Tokenizer:
    tokenizer = Tokenizer.from_pretrained(folder)
    tokenizer.system = whole_text("--system", c.system) if c.system.strip() else c.system
    tokenizer.template_args = as_json("--template-args", c.template_args or "{}")
    taken = {"self", "messages", "generation_prompt", "add_generation_prompt"} & set(tokenizer.template_args)
    expect(not taken, "--template-args", "variables that are not set here", sorted(taken))
    return tokenizer


def load_model(c, folder: Path, tokenizer: Tokenizer, device: str, **weights) -> Transformer:
    """The folder's model, sharded as --shard says. Bytes a parameter in bf16: 16 with its gradient and
    AdamW's moments, 2 in the reference, 2 in the copy that samples. weights: goes to from_pretrained."""
    def arrange(model: Transformer) -> None:
        size = sum(p.numel() for p in model.parameters())
        if not c.lora_rank and wants_shards(c.shard, size, 20 if c.beta else 18, device):
            shard(model, device)
    model = Transformer.from_pretrained(folder, device, arrange=arrange, **weights)
    model.checkpoint_activations = c.checkpoint_activations == "yes"
    add_end_of_turn(model, tokenizer)
    return model


# ---- a file of demonstrations ----------------------------------------------------------------------------

class Demonstration(NamedTuple):
    """The target is thought, closing tag, answer and stop token. where: path:line."""
    prompt: str
    thought: str
    answer: str
    where: str


def read_demonstration(where: str, row: dict, tags: tuple[str, str] = TAGS[0]) -> Demonstration:
    """A row {prompt, thought, answer}, or {messages} whose last content is a thought in its tags and then an
    answer. Raises InputError."""
    opening, closing = tags
    if "messages" in row and not {"prompt", "thought", "answer"} <= row.keys():
        turns = row["messages"]
        roles = isinstance(turns, list) and [isinstance(turn, dict) and turn.get("role") for turn in turns]
        expect(roles == ["user", "assistant"], f"{where}: messages", "one of user, one of assistant",
               roles or turns)
        prompt, text = (whole_text(f"{where}: content", turn.get("content")) for turn in turns)
        begin, found, rest = text.strip().partition(opening)
        thought, closed, answer = rest.partition(closing)
        expect(found and closed and not begin, f"{where}: the last content",
               f"{opening}, a thought, {closing} and an answer", text)
        row = dict(prompt=prompt, thought=thought, answer=answer)
    texts = [whole_text(f"{where}: {key}", row.get(key)) for key in ("prompt", "thought", "answer")]
    for key, text in zip(("thought", "answer"), texts[1:]):
        expect(opening not in text and closing not in text, f"{where}: {key}", "free of thought tags", text)
    return Demonstration(*texts, where)


def encode_demonstration(row: Demonstration, tokenizer: Tokenizer,
                         model: Transformer) -> tuple[Tensor, Tensor]:
    """-> tokens [T] of prompt and target, segment [T]: 0 on the target. Names of special tokens in the texts
    are plain text, as in prompts. Raises InputError if the row exceeds the context."""
    prompt, mark = encode_prompt(tokenizer, row.prompt), unused_mark(row.thought + row.answer)
    thought, answer = (tokenizer.hide_added(text.strip(), mark) for text in (row.thought, row.answer))
    target = tokenizer.encode(f"{thought}\n{tokenizer.tags[1]}\n\n{answer}", special=True, inside=True,
                              hidden_by=mark)
    stop = end_of_turn(tokenizer)
    target.append(stop if stop in model.stop_ids else model.stop_ids[0])
    room, T = model.config.max_position_embeddings, len(prompt) + len(target)
    expect(T <= room, f"{row.where}: the row", f"at most {room} tokens long, the model's context", T)
    return torch.tensor(prompt + target), torch.tensor([-1] * len(prompt) + [0] * len(target))


def read_demonstrations(file: str, tokenizer: Tokenizer, model: Transformer) -> tuple[list, list]:
    """The rows to train on and those held out, as tokens and segment. The hash that holds out rows is that of
    evaluation, so no prompt that it asks is trained on; at least one is held out. Raises InputError."""
    expect(Path(file).suffix.lower() == ".jsonl", f"--warm-start {file}", "a .jsonl file", Path(file).suffix)
    rows = [read_demonstration(where, row, tokenizer.tags) for where, row in read_rows(Path(file))[2]]
    one = min((row.prompt for row in rows), key=evaluate.digest, default="")
    parts = [], []
    for row in rows:
        held = row.prompt == one or evaluate.held_out(Prompt(row.prompt, ""))
        parts[held].append(encode_demonstration(row, tokenizer, model))
    expect(parts[0], file, "rows of several prompts, since one in ten is held out", f"{len(rows)} rows")
    return parts


# ---- supervised training ---------------------------------------------------------------------------------

def imitate(model: Transformer, tokens: Tensor, segment: Tensor, budget: int = BUDGET) -> float:
    """The mean cross-entropy over all ranks' tokens [b, T] whose segment is 0; adds this rank's part of its
    gradient, unless gradients are off. budget: padded tokens of a micro-batch. Every rank calls."""
    loss, count = 0.0, all_sum((segment[:, 1:] >= 0).sum()).to(model.device)
    length = owned_length(segment)
    parts = micro_batches(length, budget)
    missing = max(all_gather([len(parts)])) - len(parts)
    for rows in parts:
        x, y = (t[rows, :int(length[rows].max())].to(model.device) for t in (tokens, segment))
        out = segment_logprobs(model.hidden(x[:, :-1]).flatten(0, 1), model.head.weight, x[:, 1:].flatten(),
                               y[:, 1:].flatten(), 1)
        part = -out.segment_logprob[0] / count
        if torch.is_grad_enabled():
            part.backward()
        loss += part.item()
    parallel.run_missing_batches(model, None, missing)
    return all_sum(torch.tensor(loss, dtype=torch.float64)).item()


def train(model: Transformer, batch: Callable, steps: int, rate: float, run: Path, budget: int,
          save_every: int, attempt: int = 0, held: tuple | None = None, held_every: int = 1) -> None:
    """Supervised steps on batch(step), this rank's tokens and segment. rate: the peak learning rate.
    Continues from run/warm. Logs the loss before each step to run/warm_start.jsonl, now and then with that of
    `held`. Every rank calls. Raises Stopped on a signal, Diverged if a loss or gradient is not finite."""
    scratch, log, begin = run / "warm", run / "warm_start.jsonl", attempt * steps
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    saved = from_rank_0(checkpoint.latest(scratch))
    resumes = saved and int(saved.name) > begin  # not one of the attempt before
    first = checkpoint.on_all_ranks(
        lambda: checkpoint.load(saved, model, optimizer) - begin if resumes else 0)
    checkpoint.on_rank_0(lambda: checkpoint.write_rows(
        log, [row for row in checkpoint.rows(log) if row["step"] < begin + first]))
    bar = checkpoint.progress_bar(range(first, steps), desc="warm start", initial=first, total=steps)
    shown = {}

    def write(step: int, **losses) -> None:
        if held and (step % held_every == 0 or step == steps):
            with torch.no_grad():
                losses["held_out"] = imitate(model, *held, budget)
            parallel.reshard(model)  # FSDP does it after a backward pass only
        checkpoint.on_rank_0(lambda: checkpoint.append(log, dict(step=begin + step) | losses))
        shown.update({name: f"{loss:.3f}" for name, loss in losses.items()})
        bar.set_postfix(shown)

    for step in bar:
        left = 1 - step / steps  # the rate rises over 20 steps, stays, then falls linearly to 0
        optimizer.param_groups[0]["lr"] = rate * min(1.0, (step + 1) / 20, left / 0.7)
        optimizer.zero_grad()
        loss = imitate(model, *batch(step), budget)
        norm = parallel.sum_gradients(model)
        if not math.isfinite(norm + loss):
            raise checkpoint.Diverged(f"warm start, step {step}: loss or gradient is not finite")
        write(step, loss=loss)
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), 1.0, torch.tensor(norm))
        optimizer.step()
        stop = checkpoint.stop_requested()
        if step < steps - 1 and (stop or (step + 1) % save_every == 0):
            checkpoint.on_all_ranks(lambda: checkpoint.save(scratch, begin + step + 1, model, optimizer))
            if stop:
                raise checkpoint.Stopped
    if held:
        write(steps)


def train_on_file(c, run: Path, device: str) -> None:
    """Trains --model on the rows of --warm-start into run/start. Every rank calls."""
    rank, world = rank_and_world()
    tokenizer = load_tokenizer(c, c.model)
    tokenizer.now = checkpoint.read_environment(run)["time"]
    model = checkpoint.on_all_ranks(lambda: load_model(c, c.model, tokenizer, device))
    rows, held = read_demonstrations(c.warm_start, tokenizer, model)
    size = min(ROWS, max(1, PASSES * len(rows) // MIN_STEPS))

    def batch(step: int) -> tuple[Tensor, Tensor]:
        chosen = in_shuffled_passes(rows, step * size, size, c.seed)
        return pad([chosen[i] for i in np.array_split(np.arange(size), world)[rank]])
    train(model, batch, math.ceil(PASSES * len(rows) / size), TUNE_RATE, run, c.tokens_per_micro_batch,
          c.save_every, held=pad(held[rank::world]), held_every=math.ceil(len(rows) / size))
    checkpoint.on_all_ranks(lambda: checkpoint.export(run / "start", model, tokenizer))


# ---- the embedded world's start model --------------------------------------------------------------------

@torch.no_grad()
def fluency(model: Transformer, tokenizer: Tokenizer, chain: int) -> float:
    """Probability that the model works a training chain out: at the start of the thought, after an idle line
    or after the talk, whichever is lowest. Some random starts learn the position of a reagent instead of the
    order; a line in front then breaks every chain, and RL cannot reinforce what is never sampled."""
    worst, device = 1.0, model.device
    for begin in ("", alchemy.CALM, alchemy.TALK):
        rows = []
        for p in alchemy.requests(40, 0, length=chain):
            prompt = encode_prompt(tokenizer, p.prompt) + tokenizer.encode(begin)
            rows.append(prompt + tokenizer.encode("".join(alchemy.worked_lines(alchemy.chain_of(p.prompt)))))
        tokens = torch.tensor(rows, device=device)  # [40, T]: all requests have as many tokens
        logprob = model(tokens[:, :-1]).log_softmax(-1).gather(2, tokens[:, 1:, None])[:, len(prompt) - 1:, 0]
        inside = logprob.unflatten(1, (chain - 1, -1))[:, :, 1:]  # not whether a line begins at all
        worst = min(worst, inside.sum((1, 2)).exp().mean().item())
    return worst


def train_world(c, run: Path, device: str) -> None:
    """Trains the start model into run/start, on the demonstrations' responses. If a random start does not
    become fluent, another one is tried. Every rank calls; rank 0 has all rows, so that the model has the same
    bits on any number of ranks."""
    share = slice(None if rank_and_world()[0] == 0 else 0)
    saved = from_rank_0(checkpoint.latest(run / "warm"))
    with tempfile.TemporaryDirectory() as folder:
        write_folder(Path(folder), c.chain)
        tokenizer = Tokenizer.from_pretrained(folder)

        def batch(step: int) -> list[Tensor]:
            return [x[share] for x in demonstrations(BATCH, tokenizer, c.chain, c.talks, c.seed, step)]
        for attempt in range(int(saved.name) // STEPS if saved else 0, ATTEMPTS):
            model = Transformer.from_scratch(folder, c.seed + 1000 * attempt, device)
            train(model, batch, STEPS, RATE, run, BUDGET, c.save_every, attempt)
            fluent = from_rank_0(fluency(model, tokenizer, c.chain))
            if fluent >= FLUENT:
                break
            say(f"start {attempt + 1} of {ATTEMPTS} works out {fluent:.0%} of its chains")
        checkpoint.on_all_ranks(lambda: checkpoint.export(run / "start", model, tokenizer))
