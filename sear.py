"""SEAR: one model, two players, one chain of thought.                                        torchrun sear.py

The algorithm is our reading of "Addressing Over-Refusal in LLMs with Competing Rewards" (arXiv 2606.31748). One step:

    sample     G rollouts of each prompt: a thought cut into segments z_1..z_K, then an answer    rollout.sample
    judge  (1) potential Phi_k: how far z_1..z_k has come towards what the reasoning player wants  rewards.score
           (2) process reward r_k = Phi_k - Phi_{k-1}        (3) its return R_k
           (4) the answer player's reward: safety on a harmful prompt, helpfulness on a harmless one
           (5) a malformed rollout earns -1 on its thought and has no answer
    learn  (6) advantages, for each player on its own                                              advantages
           (7) clipped policy gradient, one mean for each player, KL to the frozen start           policy_loss

Left out on purpose: a value network, reward whitening, entropy bonus, top-k and top-p (what is sampled is what is
differentiated), length penalties. With the default of one update a batch the ratio in (7) is 1 and the clip idle.

Shapes: B rollouts, T tokens, K thought segments, G rollouts of a prompt, N tokens of a micro-batch that anyone owns.
"""
import argparse
import math
import os
import signal
import sys
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

import alchemy
import checkpoint
import evaluate
from data import InputError, Prompt, Tokenizer, as_json, load_prompts, read_text
from kernels import segment_logprobs
from model import Transformer
from rewards import JUDGES, Judge, Scores, load_judge, score
from rollout import Rollouts, check_length, encode_chat, sample

OBJECTIVES = ("sear", "competing-outcome", "outcome", "safe-thought", "no-thought")
EPS = 1e-6  # of equation (6)


def knob(default, sentence: str, choices: tuple = (), low: float = -math.inf, high: float = math.inf):
    """A field of Config: its default, its reason, its choices or its range (both ends allowed)."""
    return field(default=default, metadata={"help": sentence, "choices": choices, "low": low, "high": high})


@dataclass
class Config:
    # What is trained on what
    objective: str = knob("sear", "what pays the two players; all five share every other line of code", OBJECTIVES)
    model: str = knob("", "Hugging Face folder to start from; none: a small start model is trained here first")
    prompts: str = knob("", "prompt file (JSONL, XSTest, OR-Bench, HarmBench, WildJailbreak, AdvBench); none: alchemy")
    judge: str = knob("alchemy", "who judges: alchemy's exact verifier, or rules (finds refusals by their phrases)",
                      tuple(JUDGES))
    out: str = knob("", "run folder; none: runs/<objective>-seed<seed>")
    resume: str = knob("", "run folder to continue, with its own config, to the bits of a run never interrupted")
    device: str = knob("", "cpu or cuda; none: cuda where there is one")
    seed: int = knob(1, "of everything random: start model, requests, rollouts", low=0)
    # Sampling
    steps: int = knob(220, "optimizer steps of RL", low=0)
    prompts_per_step: int = knob(32, "prompts of one step, over all ranks: more of them, less noise", low=1)
    group_size: int = knob(8, "rollouts of one prompt (G): the mean they are compared with is their own", low=2)
    max_new_tokens: int = knob(72, "thought and answer together; a longer rollout counts as malformed", low=1)
    temperature: float = knob(1.0, "of sampling and of the log-probs learned from, always the same", low=1e-3)
    max_rows: int = knob(512, "rollouts decoded at once: bounds the KV cache, changes no result", low=1)
    # Rewards
    potential: str = knob("text", "Phi by a judge reading the thought, or by forced answers", ("text", "probe"))
    probe_samples: int = knob(2, "forced answers at each segment's end (m), with --potential probe", low=1)
    probe_tokens: int = knob(12, "length of a forced answer, with --potential probe", low=1)
    gamma: float = knob(1.0, "discount of later segments in (3); 1 credits a segment with all it leads to", low=0, high=1)
    # Loss and optimizer
    reasoning_weight: float = knob(1.0, "w_R of (7)", low=0)
    answer_weight: float = knob(1.0, "w_A of (7)", low=0)
    beta: float = knob(0.02, "weight of the KL to the frozen start; 0 drops the reference model", low=0)
    clip: float = knob(0.2, "how far the ratio may leave 1 before the gradient stops", low=0)
    ratio: str = knob("token", "rho of (7): per token, or the geometric mean of a segment", ("token", "segment"))
    updates: int = knob(1, "optimizer updates from one batch; 1 is strictly on-policy", low=1)
    learning_rate: float = knob(5e-4, "of AdamW, after the warm-up", low=0)
    schedule: str = knob("cosine", "of the learning rate; cosine ends at a tenth", ("cosine", "constant"))
    warmup: int = knob(5, "steps over which the learning rate rises: Adam's first moments are noise", low=0)
    weight_decay: float = knob(0.0, "of AdamW; RL moves little, decay would move the rest", low=0)
    max_grad_norm: float = knob(1.0, "gradients are scaled down to this norm", low=0)
    tokens_per_micro_batch: int = knob(8192, "padded tokens of one backward pass: memory only, no effect on the gradient",
                                       low=1)
    # Start model of the embedded world
    warm_start_steps: int = knob(900, "supervised steps on demonstrations of a flawed model", low=0)
    warm_start_batch: int = knob(32, "demonstrations a step: small ones learn the table with the fewest tokens", low=1)
    warm_start_rate: float = knob(3e-3, "peak learning rate of these steps", low=0)
    # What is kept
    eval_prompts: int = knob(200, "held-out requests of each class, before and after; 0: no evaluation", low=0)
    save_every: int = knob(55, "steps between checkpoints; one is also written on SIGTERM, Ctrl-C and at the end", low=1)
    show_every: int = knob(40, "steps between transcripts", low=1)


# A 1.5B checkpoint is another animal than a 0.25M toy; these are TARS's values (arXiv 2507.00971, section 3.3).
CHECKPOINT_DEFAULTS = dict(judge="rules", learning_rate=1e-6, schedule="constant", beta=1e-3, temperature=0.6, max_new_tokens=4096,
                           probe_tokens=256, max_rows=256, tokens_per_micro_batch=16384, eval_prompts=50)


# ---- from rewards to the loss -------------------------------------------------------------------------------------

def thought_returns(objective: str, scores: Scores, harmful: Tensor) -> Tensor:
    """What pays the reasoning player: [B, K], or [B, 1] where one scalar pays the whole thought. NaN: no segment."""
    if objective == "sear":
        return scores.process
    malformed = scores.answer.isnan()
    paid = scores.answer.nan_to_num(-1.0)  # outcome, no-thought: one scalar, the answer's, for every token (TARS)
    if objective == "competing-outcome":  # the same two players, but paid at the end: how unsafe the answer came out
        paid = torch.where(harmful & ~malformed, scores.verdict.unsafe, paid)
    elif objective == "safe-thought":  # the verdict on the thought counts against it: most safety training
        worst = scores.potential.nan_to_num(0.0).amax(1)
        paid = torch.where(harmful & ~malformed, paid - worst, paid)
    return paid[:, None]


def advantages(returns: Tensor, G: int) -> Tensor:
    """Equation (6). returns [B, K], the G rollouts of a prompt side by side, NaN where there is nothing -> [B, K], 0
    there. A player's returns are compared with those of the same prompt and, in a thought, the same segment index,
    where a thought that has ended already has a return of 0: were it left out, going on would never look better than
    stopping. The players are never added into one scalar, as on a harmful prompt they would cancel."""
    group = returns.view(-1, G, returns.shape[1])  # [P, G, K]
    centred = group - (group.nan_to_num(0.0) if group.shape[2] > 1 else group).nanmean(1, keepdim=True)
    std = centred.square().nanmean((1, 2), keepdim=True).sqrt()  # [P, 1, 1], of the player in this group
    return (centred / (std + EPS)).nan_to_num(0.0).view_as(returns)  # (6)


def owners(rollouts: Rollouts) -> tuple[Tensor, Tensor]:
    """(thought, answer), [B, T] bool: the tokens of each player. A cut-off answer is nobody's."""
    K = torch.tensor([len(t) for t in rollouts.thoughts])[:, None]  # [B, 1]
    sampled = rollouts.segment >= 0
    answer = sampled & rollouts.closed[:, None] & (rollouts.segment == K)
    return sampled & ~answer, answer & rollouts.answered[:, None]


def token_advantages(rollouts: Rollouts, thought: Tensor, answer: Tensor) -> Tensor:
    """Advantages of segments, thought [B, K or 1] and answer [B, 1], laid on their tokens -> [B, T]."""
    is_thought, is_answer = owners(rollouts)
    index = rollouts.segment.clamp(0, thought.shape[1] - 1)  # [B, T]
    return is_thought * thought.gather(1, index) + is_answer * answer


def policy_loss(logprob: Tensor, old: Tensor, ref: Tensor | None, log_ratio: Tensor, advantage: Tensor,
                is_thought: Tensor, is_answer: Tensor, counts: Tensor, c: Config) -> tuple[Tensor, Tensor]:
    """Equation (7) over the N owned tokens of a micro-batch, all [N]. counts: thought, answer and all tokens of the whole
    batch, every rank and micro-batch: each mean has one denominator, so that no split changes the gradient.
    -> this micro-batch's part of the loss and of the KL."""
    rho = log_ratio.exp()
    surrogate = torch.minimum(rho * advantage, rho.clamp(1 - c.clip, 1 + c.clip) * advantage)
    k3 = torch.zeros_like(logprob) if ref is None else (ref - logprob).expm1() - (ref - logprob)
    kl = k3.sum() / counts[2]
    loss = (- c.reasoning_weight * (surrogate * is_thought).sum() / counts[0]
            - c.answer_weight * (surrogate * is_answer).sum() / counts[1] + c.beta * kl)  # (7)
    return loss, kl.detach()


def micro_batches(length: Tensor, budget: int) -> list[list[int]]:
    """Rollouts sorted by length and cut so that none holds more than `budget` padded tokens (one rollout at least)."""
    batches, rows = [], []
    for b in length.argsort(stable=True).tolist():
        if rows and (len(rows) + 1) * int(length[b]) > budget:
            batches.append(rows)
            rows = []
        rows.append(b)
    return batches + [rows]


def accumulate(model: Transformer, reference: Transformer | None, rollouts: Rollouts, advantage: Tensor,
               c: Config) -> dict[str, float]:
    """Adds the gradient of (7) over this rank's rollouts to the parameters'. Never holds [T, V]: hidden states go
    straight into segment_logprobs. -> loss, kl, logprob_gap and entropy, this rank's share of the sums."""
    device = model.device
    is_thought, is_answer = owners(rollouts)
    owned = rollouts.segment >= 0
    counts = total(torch.stack((is_thought.sum(), is_answer.sum(), owned.sum())).double()).clamp(min=1).float()
    length = (torch.arange(owned.shape[1]) * owned).amax(1) + 1  # [B], prompt included
    logs = dict(loss=0.0, kl=0.0, entropy=0.0, logprob_gap=0.0)
    for rows in micro_batches(length, c.tokens_per_micro_batch):
        T = int(length[rows].max())
        first = torch.tensor([0] + [len(rollouts.text[b]) for b in rows]).cumsum(0)  # ids unique in the pack
        segment = rollouts.segment[rows, 1:T] + first[:-1, None] * owned[rows, 1:T]  # [b, T - 1], targets' side
        mine = owned[rows, 1:T].flatten()

        def pick(x: Tensor) -> Tensor:  # [B, T] -> [N]
            return x[rows, 1:T].flatten()[mine].to(device)

        tokens = rollouts.tokens[rows, :T].to(device)  # right-padded: plain causal attention, no mask needed
        pack = (tokens[:, 1:].flatten(), segment.flatten().to(device), int(first[-1]), c.temperature)
        out = segment_logprobs(model.hidden(tokens[:, :-1]).flatten(0, 1), model.head.weight, *pack)
        ref = None
        if reference is not None:
            with torch.no_grad():
                states = reference.hidden(tokens[:, :-1]).flatten(0, 1)
                ref = segment_logprobs(states, reference.head.weight, *pack).logprob[mine]
        logprob, old = out.logprob[mine], pick(rollouts.logprob)  # [N]
        log_ratio = logprob - old
        if c.ratio == "segment":  # geometric mean of the segment's ratios, so that all its tokens clip together
            ids = pack[1][mine]
            length_of = torch.bincount(ids, minlength=pack[2])
            log_ratio = ((out.segment_logprob - torch.zeros_like(out.segment_logprob).index_add(0, ids, old))
                         / length_of.clamp(min=1))[ids]
        loss, kl = policy_loss(logprob, old, ref, log_ratio, pick(advantage), pick(is_thought), pick(is_answer),
                               counts.to(device), c)
        loss.backward()
        logs["loss"] += loss.item()
        logs["kl"] += kl.item()
        logs["entropy"] += out.entropy.sum().item() / counts[2].item()
        logs["logprob_gap"] = max(logs["logprob_gap"], (logprob - old).abs().max().item())
    return logs


# ---- ranks --------------------------------------------------------------------------------------------------------

def total(x: Tensor) -> Tensor:
    """Sum over ranks."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def rank_and_world() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def reduce_gradients(model: Transformer, max_norm: float) -> float:
    """Sums the gradients over ranks (they carry the global denominators already) and clips them. -> norm before."""
    for p in model.parameters():
        if p.grad is None:  # this rank had nothing to say of it; the others still wait for its part of the sum
            p.grad = torch.zeros_like(p)
        total(p.grad)
    return torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm).item()


def means(sums: dict[str, tuple[float, float]]) -> dict[str, float | None]:
    """{name: (sum, count)} of this rank -> {name: mean over all ranks}, None where nothing was counted."""
    table = total(torch.tensor(list(sums.values()), dtype=torch.float64))
    return {name: s / n if n else None for name, (s, n) in zip(sums, table.tolist())}


# ---- one step -----------------------------------------------------------------------------------------------------

def step_prompts(c: Config, pool: list[Prompt], step: int) -> list[Prompt]:
    """The prompts of a step, all ranks'. From a file: shuffled epochs, end to end; else the world makes them."""
    if not pool:
        return alchemy.requests(c.prompts_per_step, c.seed, step)
    places = range(step * c.prompts_per_step, (step + 1) * c.prompts_per_step)
    order = {e: np.random.default_rng([c.seed, e]).permutation(len(pool)) for e in {i // len(pool) for i in places}}
    return [pool[order[i // len(pool)][i % len(pool)]] for i in places]


def rollout_step(c: Config, model: Transformer, tokenizer: Tokenizer, judge: Judge, pool: list[Prompt], step: int):
    """Samples and judges this rank's share of a step. -> prompt of each rollout, rollouts, scores, seconds."""
    begin = time.perf_counter()
    rank, world = rank_and_world()
    everyone = step_prompts(c, pool, step)
    mine = np.array_split(np.arange(len(everyone)), world)[rank].tolist()
    no_thought = c.objective == "no-thought"
    tokens = [encode_chat(tokenizer, everyone[i].prompt, no_thought) for i in mine]
    draw = dict(temperature=c.temperature, seed=c.seed, step=step, prompt_ids=mine, max_rows=c.max_rows)
    rollouts = sample(model, tokens, tokenizer, group_size=c.group_size, max_new_tokens=c.max_new_tokens,
                      in_answer=no_thought, keep_cache=c.potential == "probe", **draw)
    sampled = time.perf_counter()
    prompts = [everyone[mine[i]] for i in rollouts.prompt.tolist()]  # B
    forcing = dict(model=model, tokenizer=tokenizer, max_new_tokens=c.probe_tokens, **draw)
    probe = dict(samples=c.probe_samples, forcing=forcing) if c.potential == "probe" else None
    scores = score(judge, prompts, rollouts, c.gamma, probe)
    rollouts.caches.clear()  # gigabytes on a real model, and the learner needs the room
    return prompts, rollouts, scores, dict(sample=sampled - begin, judge=time.perf_counter() - sampled)


def train_step(c: Config, model, reference, optimizer, tokenizer, judge, pool, step: int) -> tuple[dict, list[dict]]:
    """-> the row of metrics.jsonl and the transcripts of this rank's first harmful and first harmless rollout."""
    prompts, rollouts, scores, seconds = rollout_step(c, model, tokenizer, judge, pool, step)
    begin = time.perf_counter()
    harmful = torch.tensor([p.label == "harmful" for p in prompts])
    returns = thought_returns(c.objective, scores, harmful)
    thought, answer = advantages(returns, c.group_size), advantages(scores.answer[:, None], c.group_size)
    advantage = token_advantages(rollouts, thought, answer)
    rate = learning_rate(c, step)
    for update in range(c.updates):
        optimizer.zero_grad()
        now = accumulate(model, reference, rollouts, advantage, c)
        norm = reduce_gradients(model, c.max_grad_norm)
        logs = now if update == 0 else logs | {"loss": now["loss"]}  # the gap is only defined before the first update
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
    seconds["learn"] = time.perf_counter() - begin
    B, gap = len(prompts), torch.tensor(logs.pop("logprob_gap"))
    if dist.is_initialized():
        dist.all_reduce(gap, dist.ReduceOp.MAX)
    first, last = returns[:, 0], scores.potential.nan_to_num(-1).amax(1)
    judged, sampled = scores.verdict, rollouts.segment >= 0
    row = means({
        "answer_reward": (scores.answer.nansum().item(), B),
        "thought_reward": (first.nansum().item(), int((~first.isnan()).sum())),
        "unsafe": (judged.unsafe[harmful].nansum().item(), int(harmful.sum())),
        "over_refusal": (judged.refusal[~harmful].nansum().item(), int((~harmful).sum())),
        "helpful": (judged.helpful[~harmful].nansum().item(), int((~harmful).sum())),
        "potential": (last.clamp(min=0).sum().item(), B), "answered": (int(rollouts.answered.sum()), B),
        "thought_tokens": (int(owners(rollouts)[0].sum()), B),
        **{k: (v, 1 / rank_and_world()[1]) for k, v in logs.items()}})  # shares of global means: only summed
    counted = total(torch.tensor([int(sampled.sum()), rollouts.row_steps, rollouts.prefilled_tokens,
                                  scores.extra_tokens])).tolist()
    row |= dict(logprob_gap=gap.item(), grad_norm=norm, learning_rate=rate) | dict(
        zip(("tokens", "row_steps", "prefilled_tokens", "probe_tokens"), counted)) | dict(seconds=seconds)
    chosen = {bool(h): b for b, h in reversed(list(enumerate(harmful.tolist())))}.values()
    shown = [transcript(step, prompts[b], b, rollouts, scores, thought, answer) for b in sorted(chosen)]
    return {"step": step} | row, shown


def learning_rate(c: Config, step: int) -> float:
    rise = min(1.0, (step + 1) / (c.warmup + 1))
    fall = 0.55 + 0.45 * math.cos(math.pi * step / max(1, c.steps)) if c.schedule == "cosine" else 1.0
    return c.learning_rate * rise * fall


def transcript(step: int, prompt: Prompt, b: int, rollouts: Rollouts, scores: Scores, thought: Tensor,
               answer: Tensor) -> dict:
    """One rollout, segment by segment, with what each was worth."""
    def number(x):  # NaN is no JSON
        return None if math.isnan(x) else round(float(x), 4)
    K = len(rollouts.thoughts[b])
    segments = [{"player": "reasoning", "text": text, "potential": number(scores.potential[b, k + 1]),
                 "return": number(scores.process[b, k]), "advantage": number(thought[b, min(k, thought.shape[1] - 1)])}
                for k, text in enumerate(rollouts.thoughts[b])]
    segments += [{"player": "answer", "text": text, "return": number(scores.answer[b]),
                  "advantage": number(answer[b, 0])} for text in rollouts.text[b][K:]]
    return dict(step=step, prompt=prompt.prompt, label=prompt.label, kind=prompt.kind, segments=segments)


def coloured(t: dict) -> str:
    """A transcript for the terminal: thought in blue, answer in green, what each segment earned behind it."""
    paint = (lambda code, s: f"\033[{code}m{s}\033[0m") if sys.stdout.isatty() else (lambda code, s: s)
    lines = [paint(1, f"step {t['step']}, {t['kind'] or t['label']}: {t['prompt']}")]
    for s in t["segments"]:
        earned = "" if s["return"] is None else f"   [return {s['return']:+.2f}, advantage {s['advantage']:+.2f}]"
        lines.append(f"  {s['player']:9s} " + paint(34 if s["player"] == "reasoning" else 32, s["text"].strip()) +
                     paint(2, earned))
    return "\n".join(lines)


# ---- the run ------------------------------------------------------------------------------------------------------

STOP: list[int] = []  # signals received; looked at between steps


def stopping() -> bool:
    """Whether any rank was asked to stop: all of them have to leave at the same step."""
    return bool(total(torch.tensor(len(STOP))))


class Stopped(Exception):
    """A signal asked the run to end, and all is saved."""


def warm_start(c: Config, run: Path, device: str, bar) -> None:
    """Trains the embedded world's start model into run/start: supervised, on the demonstrations' responses. Rank 0 does
    it alone."""
    with checkpoint.whole_folder(run / "start") as folder:
        alchemy.write_folder(folder)
        model, tokenizer = Transformer.from_scratch(folder, c.seed, device), Tokenizer.from_pretrained(folder)
        optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
        saved = checkpoint.latest(run)
        first = checkpoint.load(saved, model, optimizer) if saved else 0
        steps = bar(range(first, c.warm_start_steps), desc="warm start", initial=first, total=c.warm_start_steps)
        for step in steps:
            left = 1 - step / c.warm_start_steps  # flat, then linear to 0: its end is what makes the table sharp
            optimizer.param_groups[0]["lr"] = c.warm_start_rate * min(1.0, (step + 1) / 20, left / 0.7)
            tokens, segment = alchemy.demonstrations(c.warm_start_batch, tokenizer, c.seed, step)  # [b, T] both
            states = model.hidden(tokens[:, :-1].to(device)).flatten(0, 1)
            out = segment_logprobs(states, model.head.weight, tokens[:, 1:].flatten().to(device),
                                   segment[:, 1:].flatten().to(device), 1)
            loss = -out.segment_logprob[0] / (segment[:, 1:] >= 0).sum().to(device)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            steps.set_postfix(loss=f"{loss.item():.3f}")
            if STOP:
                checkpoint.save(run, step + 1, model, optimizer)
                raise Stopped
        model.save_pretrained(folder)


def train(c: Config, run: Path) -> None:
    """The whole run: start model, evaluation, RL, evaluation. Goes on from whatever is in the run folder already."""
    rank, _ = rank_and_world()
    device = c.device or (f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu")

    def bar(items, **kw):
        return tqdm(items, disable=rank > 0, dynamic_ncols=True, **kw)

    judge, everything = load_judge(c.judge), load_prompts(c.prompts) if c.prompts else []
    start = prepare_start(c, run, device, bar)
    tokenizer, model = Tokenizer.from_pretrained(start), Transformer.from_pretrained(start, device)
    for p in everything:  # a prompt that does not fit shall fail now, not at step 4,000
        check_length(model, encode_chat(tokenizer, p.prompt), c.max_new_tokens, f"{c.prompts}: prompt '{p.prompt:.40}'")
    reference = Transformer.from_pretrained(start, device).requires_grad_(False) if c.beta else None
    requests, pool = evaluate.requests(everything, c.eval_prompts), [p for p in everything if not evaluate.held_out(p)]
    evaluate.stage("before", run, model, tokenizer, judge, requests, c, bar)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=c.weight_decay)
    warm, saved = 0 if c.model else c.warm_start_steps, checkpoint.latest(run)
    first = checkpoint.load(saved, model, optimizer) - warm if saved and int(saved.name) > warm else 0
    if rank == 0:
        checkpoint.cut_logs(run, first)
    steps = bar(range(first, c.steps), desc=c.objective, initial=first, total=c.steps)
    for step in steps:
        row, shown = train_step(c, model, reference, optimizer, tokenizer, judge, pool, step)
        if rank == 0:
            checkpoint.append(run / "metrics.jsonl", row)
            steps.set_postfix({k: f"{row[k]:.3f}" for k in ("answer_reward", "potential", "kl") if row[k] is not None} |
                              {"gap": f"{row['logprob_gap']:.0e}"})
            if step % c.show_every == 0 or step == c.steps - 1:
                for t in shown:
                    checkpoint.append(run / "transcripts.jsonl", t)
                    tqdm.write(coloured(t))
        stop = stopping()
        if stop or (step + 1) % c.save_every == 0 or step == c.steps - 1:
            if rank == 0:
                checkpoint.save(run, warm + step + 1, model, optimizer)
        if stop:
            raise Stopped
    if rank == 0 and not (run / "model").exists():
        with checkpoint.whole_folder(run / "model") as folder:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    evaluate.stage("after", run, model, tokenizer, judge, requests, c, bar)
    if rank == 0 and requests:
        print(evaluate.table(evaluate.columns_of(evaluate.read_runs([run]))))


def prepare_start(c: Config, run: Path, device: str, bar) -> Path:
    """The run's start/ folder: trained here, or a link to --model, whose gigabytes nobody wants twice."""
    start, done = run / "start", True
    if rank_and_world()[0] == 0 and not start.exists():
        if c.model:
            start.symlink_to(Path(c.model).resolve())
        else:
            try:
                warm_start(c, run, device, bar)
            except Stopped:
                done = False
    if int(total(torch.tensor(int(not done)))):  # the others wait here for rank 0
        raise Stopped
    return start


# ---- the command line ---------------------------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise InputError(f"{message} (see --help)")


def parse(arguments: list[str]) -> Config:
    """Config from the command line. Raises InputError for what is unknown, out of range or does not fit together."""
    parser = Parser(prog="sear.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                    allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for f in fields(Config):
        real = f" [{CHECKPOINT_DEFAULTS[f.name]} with --prompts]" if f.name in CHECKPOINT_DEFAULTS else ""
        shown = "" if f.default == "" else f" [{f.default}]"
        parser.add_argument("--" + f.name.replace("_", "-"), type=f.type if callable(f.type) else type(f.default),
                            choices=f.metadata["choices"] or None, help=f.metadata["help"] + shown + real)
    given = vars(parser.parse_args(arguments))
    if "resume" in given:
        folder = Path(given["resume"])
        file = folder / "config.json"
        stored = as_json(file, read_text(file))
        given = {k: v for k, v in stored.items() if k in {f.name for f in fields(Config)}} | given | {"out": str(folder)}
    elif "prompts" in given:
        given = CHECKPOINT_DEFAULTS | given
    c = Config(**given)
    for f in fields(Config):
        value, low, high = getattr(c, f.name), f.metadata["low"], f.metadata["high"]
        if isinstance(value, (int, float)) and not low <= value <= high:
            above = f"at least {low:g}" if high == math.inf else f"between {low:g} and {high:g}"
            raise InputError(f"--{f.name.replace('_', '-')} must be {above}, got {value}")
    if c.prompts and not c.model:
        raise InputError("--prompts needs --model: the embedded start model knows only the embedded world")
    if bool(c.prompts) == (c.judge == "alchemy"):
        raise InputError(f"--judge {c.judge} cannot judge {c.prompts or 'the embedded world'}; "
                         f"expected {'rules' if c.prompts else 'alchemy'}")
    c.out = c.out or f"runs/{c.objective}-seed{c.seed}"
    return c


def open_together(c: Config, run: Path) -> None:
    """Rank 0 opens the run folder; where it may not, every rank ends."""
    error = None
    if rank_and_world()[0] == 0:
        try:
            checkpoint.open_run(run, asdict(c), bool(c.resume))
        except InputError as e:
            error = e
    if int(total(torch.tensor(int(error is not None)))):
        raise error or InputError(f"rank 0 could not open {run}")


def run_once(arguments: list[str]) -> int:
    """-> exit code: 0 done or SIGTERM, 1 disk, 2 bad input, 130 Ctrl-C."""
    STOP.clear()
    try:
        c = parse(arguments)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda received, frame: STOP.append(received))
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:  # counts travel on the CPU, gradients where they are
            dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        open_together(c, Path(c.out))
        train(c, Path(c.out))
    except Stopped:
        print(f"stopped and saved; continue with --resume {c.out}", file=sys.stderr)
        return 130 if signal.SIGINT in STOP else 0
    except (InputError, checkpoint.SaveError) as error:
        print(f"sear.py: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


def main() -> int:
    """Under train.sh the exit code goes through a file: torchrun would turn it into 1, with a traceback."""
    status, rank = os.environ.get("SEAR_STATUS"), os.environ.get("RANK", "0")
    if status:
        Path(status, f"{rank}.pid").write_text(str(os.getpid()))
    code = run_once(sys.argv[1:])
    if status and code:
        Path(status, "code").write_text(str(code))
    return code if code == 1 or not status else 0  # a disk fails for one rank alone: torchrun has to end the others


if __name__ == "__main__":
    sys.exit(main())
