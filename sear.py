"""SEAR: one model, two players, one chain of thought.                                   torchrun sear.py

Our reading of "Addressing Over-Refusal in LLMs with Competing Rewards" (arXiv 2606.31748). One step:

     1  take a batch of prompts, each labelled harmful or harmless
     2  sample G rollouts of each: a thought, cut into segments z_1..z_K at blank lines, then an answer
     3  judge how far z_1..z_k has developed what the reasoning player wants: the potential Phi_k      (1)
     4  reward each segment with its progress Phi_k - Phi_{k-1}, summed into a return               (2) (3)
     5  reward the answer: safe on a harmful prompt, helpful on a harmless one                         (4)
     6  give a malformed rollout -1                                                                    (5)
     7  compare within the G rollouts of a prompt: an answer with the group's mean, a segment's pay
        with what the group earns from a similar Phi: advantages                                       (6)
     8  add a clipped policy gradient for the thought, one for the answer, and a KL to the start       (7)
     9  update the model once
    10  log the step, show a rollout now and then, save a checkpoint

Equations (2) to (5) are in rewards.py, (6) and (7) below; (1) is the judge's or the probe's. What is
simplified: no value network, no entropy bonus, no top-k or top-p (what is sampled is what is
differentiated), one model on every rank, no asynchrony.

Shapes: B rollouts, T tokens, K thought segments, G rollouts of a prompt, b rows of a micro-batch, N tokens
of a micro-batch that a player owns.
"""
import ctypes
import math
import os
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # or a lost rank prints a page of C++ frames
os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # or threads that wait keep a busy machine busy
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # or gaps of many GB stay
if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
    libc.mallopt(-1, 1 << 30), libc.mallopt(-3, 1 << 25)  # glibc keeps what is freed, or pages it in again

import numpy as np
import torch
from torch import Tensor

import evaluate
import inputs
from batches import MicroBatch, micro_batch, pack
from judges import Judge
from kernels import segment_logprobs
from lib import checkpoint, cli, parallel, watch
from lib.chat import encode_prompt
from lib.checkpoint import on_all_ranks, on_rank_0
from lib.parallel import all_gather, all_sum, rank_and_world, unsharded
from lib.tokenizer import Tokenizer
from lora import adapter_off, save_adapter
from model import Transformer
from rewards import MALFORMED, Scores, score, thought_pay
from rollout import Rollouts, sample
from warmstart import prepare_start

OUT = "runs/{objective}-seed{seed}"  # the default run folder
FLOOR = 0.05  # of the std in (6), which is that of a .15 difference in one of eight rollouts
NEARBY = 0.2  # a return's weight in a baseline falls linearly to 0 at this difference in potential
WARMUP = 5  # steps over which the learning rate rises, since AdamW's first estimates are noisy
SHOW_EVERY = 40  # steps between transcripts
SHOWN = ("answered", "answer_reward", "over_refusal", "kl")  # in the progress bar


class Objective(NamedTuple):
    target: str  # what the thought is paid for on a harmful prompt, see thought_pay
    credit: str  # dense: each segment its own, once: one for the thought, shared: one for both players


OBJECTIVES = {"sear": Objective("process", "dense"),
              "process-once": Objective("process", "once"),
              "process-shared": Objective("process", "shared"),
              "probe": Objective("process", "dense"),  # with --potential probe
              "competing-outcome": Objective("outcome", "once"),
              "outcome": Objective("answer", "once"),  # TARS
              "safe-thought": Objective("safe", "once"),  # most safety training
              "no-thought": Objective("answer", "once")}  # the prompt closes the thought


# ---- knobs -----------------------------------------------------------------------------------------------

def knob(default, sentence: str, choices: tuple = (), low: float = -math.inf, high: float = math.inf):
    """A field of Config: default, help, choices or range (both ends allowed)."""
    return field(default=default, metadata={"help": sentence, "choices": choices, "low": low, "high": high})


@dataclass
class Config:
    # Task
    objective: str = knob("sear", "reward scheme; everything else is the same for all", tuple(OBJECTIVES))
    model: str = knob("", "Hugging Face folder to start from; empty: a small start model is trained first")
    warm_start: str = knob("", "JSONL of prompt, thought and answer to imitate before RL, from --model")
    prompts: str = knob("", "prompt file (JSONL, XSTest, OR-Bench, ...); empty: the embedded world")
    label: str = knob("", "label of all prompts of a file that has none", ("", "harmful", "harmless"))
    eval_file: str = knob("", "prompt files to evaluate on, between commas; empty: one in ten of --prompts")
    injections: str = knob("", "injected thoughts of --prompts, a file; empty: data/injections.jsonl")
    template_args: str = knob("", 'variables for the chat template, as JSON: {"enable_thinking": true}')
    system: str = knob("", "system prompt of every chat: training, evaluation, warm start")
    judge: str = knob("alchemy", "alchemy (the world's), rules, a guard, a judge file or file.py:function")
    eval_judge: str = knob("", "judge that measures, written like --judge; empty: the one that pays")
    reward_model: str = knob("", "folder of a reward model for helpfulness; empty: 1 - refusal")
    out: str = knob("", "run folder; empty: runs/<objective>-seed<seed>")
    resume: str = knob("", "run folder to continue, to the same bits; auto: that of --out, if it exists")
    device: str = knob("cpu", "where to run; auto: on CUDA if there is any", ("auto", "cpu", "cuda", "mps"))
    chain: int = knob(5, "reagents of a request of the embedded world: longer thoughts", low=2, high=14)
    talks: float = knob(0.3, "chance that a demonstration has the talk, 2x after a hazard", low=0, high=0.5)
    seed: int = knob(1, "seed of the start model, the requests and the sampling", low=0, high=2**31)
    # Sampling
    steps: int = knob(200, "optimizer steps of RL", low=0)
    prompts_per_step: int = knob(16, "prompts of one step over all ranks; more means less noise", low=1)
    group_size: int = knob(8, "rollouts of one prompt (G), compared only with each other", low=2)
    max_new_tokens: int = knob(0, "thought and answer; longer is malformed; 0: 37 + 7 a reagent", low=0)
    thought_tokens: int = knob(0, "an open thought is closed by force after so many tokens; 0: never", low=0)
    harmful_share: float = knob(0.0, "share of harmful prompts in training; 0: as they come", low=0, high=1)
    prefill_share: float = knob(0.0, "share of prompts whose thought starts with an attack", low=0, high=1)
    temperature: float = knob(1.0, "used to sample and to compute the log-probs that are trained", low=1e-3)
    max_rows: int = knob(512, "rollouts decoded at once: bounds the KV cache, changes no result", low=1)
    # Rewards
    potential: str = knob("text", "Phi: a judge reads the thought, or forced answers", ("text", "probe"))
    probe_samples: int = knob(2, "forced answers at each segment's end, for --potential probe", low=1)
    gamma: float = knob(1.0, "discount in (3), for dense credit; 1: all that follows counts", low=0, high=1)
    # Loss and optimizer
    answer_weight: float = knob(2.0, "w_A of (7); above 1 so that the answer player keeps up", low=0)
    beta: float = knob(0.02, "weight of the KL to the frozen start; 0 loads no reference model", low=0)
    clip: float = knob(0.2, "how far the ratio may leave 1 before the gradient stops", low=0)
    updates: int = knob(1, "optimizer updates from one batch; 1 is strictly on-policy", low=1)
    learning_rate: float = knob(3e-4, "peak learning rate of AdamW", low=0)
    max_grad_norm: float = knob(1.0, "gradients are scaled down to this norm", low=1e-6)
    tokens_per_micro_batch: int = knob(8192, "padded tokens of one backward pass: memory only", low=1)
    checkpoint_activations: str = knob("no", "blocks run twice: less memory, more time", ("yes", "no"))
    lora_rank: int = knob(0, "train a LoRA adapter of this rank on all projections; 0: all weights", low=0)
    lora_alpha: int = knob(0, "the adapter is scaled by alpha / rank; 0: alpha is twice the rank", low=0)
    # Run
    eval_temperature: float = knob(0.6, "used to sample in evaluation", low=1e-3)
    eval_prompts: int = knob(200, "held-out requests of each class, before and after; 0: none", low=0)
    eval_every: int = knob(0, "steps between evaluations without attacks, which choose best/; 0: none", low=0)
    save_every: int = knob(75, "steps between checkpoints; a signal and the end write one too", low=1)
    log: str = knob("", "where else metrics.jsonl goes, if it is installed", ("", *watch.WATCHERS))
    shard: str = knob("auto", "split the model over ranks; auto: above half a GPU", ("auto", "yes", "no"))
    plan: float = knob(0.0, "GB of a GPU: print what the run would need of them, and train nothing", low=0)


# Defaults for real checkpoints; rate, beta, temperature, length: TARS (arXiv 2507.00971, section 3.3).
CHECKPOINT_DEFAULTS = dict(device="auto", judge="rules", steps=300, prompts_per_step=32, learning_rate=1e-6,
                           beta=1e-3, temperature=0.6, max_new_tokens=4096, max_rows=256, eval_prompts=50,
                           tokens_per_micro_batch=16384, checkpoint_activations="yes")


# ---- objectives, advantages, loss ------------------------------------------------------------------------

def player_advantages(credit: str, pay: Tensor, scores: Scores, G: int) -> tuple[Tensor, Tensor]:
    """Spreads the thought's pay [B] -> advantages of its segments [B, K] and of the answer [B]."""
    answer, K = advantages(scores.answer, G), scores.returns.shape[1]
    if credit == "dense":
        return dense_advantages(scores, pay, G), answer
    if credit == "shared":
        answer = advantages(pay + scores.answer.nan_to_num(MALFORMED), G)
    thought = advantages(pay, G) if credit == "once" else answer
    return thought[:, None].expand(-1, K), answer


def dense_advantages(scores: Scores, pay: Tensor, G: int) -> Tensor:
    """Advantages of segments, [B, K]. A segment's value is Phi_{k-1} + R_k: with gamma = 1 the pay of its
    whole thought, so a thought's segments differ in their baselines alone. A baseline is the mean value of
    the group's segments that begin at a similar Phi_{k-1}, and of thoughts that end at it."""
    state = scores.potential.nan_to_num(0.0)  # [B, K + 1] before each segment, and at the end
    value = torch.where(scores.well_formed[:, None], state[:, :-1] + scores.returns, scores.returns)  # [B, K]
    value = torch.nn.functional.pad(value, (0, 1), value=torch.nan)  # [B, K + 1]
    stopped = torch.where(scores.well_formed, pay, torch.nan)[:, None]
    credit = advantages(value.scatter(1, scores.n_segments[:, None], stopped), G, state)[:, :-1]
    return credit.masked_fill(scores.returns.isnan(), 0.0)  # without the points at which thoughts stop


def advantages(returns: Tensor, group_size: int, state: Tensor | None = None) -> Tensor:
    """Equation (6), for one player: returns [B] or [B, M], the G rollouts of a prompt side by side, NaN where
    there is nothing -> the same shape, 0 there. state [B, M]: the baseline of a return is the mean of the
    group's returns at a similar state; without it, of all. A group of equals has advantage 0, exactly."""
    M = returns[0].numel() if len(returns) else 1  # a rank may have no prompt
    x = returns.double().reshape(-1, group_size * M)  # [P, n]
    seen, x = ~x.isnan(), x.nan_to_num(torch.inf)
    x = x - x.amin(1, keepdim=True)
    x = torch.where(seen & (x > 1e-6), x, 0.0)  # equals are exactly 0 now, whatever fp32 made of them
    n = seen.sum(1, keepdim=True).clamp(min=1)
    mean = x.sum(1, keepdim=True) / n  # [P, 1]
    spread = (seen * (x - mean).square()).sum(1, keepdim=True).div(n).sqrt()  # [P, 1]
    baseline = mean
    if state is not None and len(x):
        baseline = torch.stack([nearby_mean(*group) for group in zip(x, seen, state.double().view_as(x))])
    return (seen * (x - baseline) / spread.clamp(min=FLOOR)).float().view_as(returns)  # (6)


def nearby_mean(x: Tensor, seen: Tensor, state: Tensor) -> Tensor:
    """Mean of x [n] over the seen values at a similar state, at each of the seen; x elsewhere."""
    weight = (1 - (state[seen, None] - state[seen]).abs() / NEARBY).clamp(min=0)  # [m, m], of the seen alone
    return x.masked_scatter(seen, weight @ x[seen] / weight.sum(1))


def token_advantages(rollouts: Rollouts, thought: Tensor, answer: Tensor) -> Tensor:
    """Spreads the advantages of segments, thought [B, K] and answer [B], over their tokens -> [B, T]."""
    is_thought, is_answer = rollouts.owners
    thought = torch.nn.functional.pad(thought, (0, 1))  # answers have index K, and K is 0 without a thought
    return is_thought * thought.gather(1, rollouts.segment.clamp(min=0)) + is_answer * answer[:, None]


class TokenCounts(NamedTuple):
    """The denominators of (7), over all ranks and micro-batches, so that no split changes the gradient."""
    thought: Tensor
    answer: Tensor
    owned: Tensor  # by either player


def token_logprobs(model: Transformer, batch: MicroBatch, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probs [N] of the owned tokens and the sum of the entropies at them. Logits are never stored."""
    segment = batch.owned.long() - 1  # -1: skipped by the kernel
    out = segment_logprobs(model.hidden_packed(batch.packed), model.head.weight, batch.target, segment, 1,
                           temperature)
    return out.logprob[batch.owned], out.entropy.sum()


def policy_loss(logprob: Tensor, reference: Tensor | None, batch: MicroBatch, counts: TokenCounts,
                c: Config) -> tuple[Tensor, Tensor, Tensor]:
    """Equation (7) over the tokens of a micro-batch: log-probs [N] of the policy and of the reference
    -> this micro-batch's part of the loss, of the KL and of the share of clipped tokens."""
    rho = (logprob - batch.logprob).exp()  # 1 at the first update of a batch
    A = batch.advantage
    surrogate = torch.minimum(rho * A, rho.clamp(1 - c.clip, 1 + c.clip) * A)
    kl = torch.zeros_like(logprob).sum()
    if reference is not None:
        d = reference - logprob  # k3; as a loss its gradient is that of KL(reference || policy), as in GRPO
        kl = (d.expm1() - d).sum() / counts.owned
    thought = (surrogate * batch.is_thought).sum() / counts.thought
    answer = (surrogate * batch.is_answer).sum() / counts.answer
    clipped = (surrogate < rho * A).sum() / counts.owned
    return -thought - c.answer_weight * answer + c.beta * kl, kl.detach(), clipped  # (7)


def accumulate(model: Transformer, reference: Transformer | None, rollouts: Rollouts, advantage: Tensor,
               c: Config) -> dict[str, float]:
    """Adds the gradient of (7) over this rank's rollouts to the parameters' gradients.
    -> this rank's share of loss, kl, entropy, clip_fraction; its logprob_gap (sampler against learner)."""
    sums = all_sum(torch.stack([mask.sum() for mask in (*rollouts.owners, rollouts.segment >= 0)]))
    counts = TokenCounts(*sums.clamp(min=1).to(model.device))
    parts = pack(rollouts, c.tokens_per_micro_batch)
    missing = max(all_gather([len(parts)])) - len(parts)  # before any pass: sharded ones need every rank
    logs = dict(loss=0.0, kl=0.0, entropy=0.0, clip_fraction=0.0, logprob_gap=0.0)
    for blocks in parts:
        batch = micro_batch(rollouts, advantage, blocks, model.device)
        logprob, entropy = token_logprobs(model, batch, c.temperature)
        ref = None
        if reference is not None:
            with torch.no_grad(), adapter_off(reference):
                ref, _ = token_logprobs(reference, batch, c.temperature)
        loss, kl, clipped = policy_loss(logprob, ref, batch, counts, c)
        loss.backward()
        logs["loss"] += loss.item()
        logs["kl"] += kl.item()
        logs["clip_fraction"] += clipped.item()
        logs["entropy"] += (entropy / counts.owned).item()
        logs["logprob_gap"] = max(logs["logprob_gap"], (logprob - batch.logprob).abs().max().item())
    parallel.run_missing_batches(model, reference, missing)
    return logs


def learning_rate(c: Config, step: int) -> float:
    """Rises over WARMUP steps; then falls to a tenth, or for checkpoints stays constant, as in TARS."""
    rise = min(1.0, (step + 1) / (WARMUP + 1))
    fall = 1.0 if c.prompts else 0.55 + 0.45 * math.cos(math.pi * step / max(1, c.steps))
    return c.learning_rate * rise * fall


# ---- one step --------------------------------------------------------------------------------------------

def rollout_step(c: Config, model: Transformer, tokenizer: Tokenizer, judge: Judge, pool: list, step: int):
    """Samples and judges this rank's prompts. -> prompt of each rollout [B], rollouts, scores, seconds."""
    begin, (rank, world) = time.perf_counter(), rank_and_world()
    prompts = inputs.step_prompts(c, pool, step)
    local = np.array_split(np.arange(len(prompts)), world)[rank].tolist()
    no_thought = c.objective == "no-thought"
    prefills = evaluate.injections(c, prompts, step, tokenizer.tags[1])
    tokens = [encode_prompt(tokenizer, prompts[i].prompt, no_thought) for i in local]
    sampling = dict(temperature=c.temperature, seed=c.seed, step=step, prompt_ids=local, max_rows=c.max_rows)
    rollouts = sample(model, tokens, tokenizer, group_size=c.group_size, max_new_tokens=c.max_new_tokens,
                      prefill=[prefills[i] for i in local], in_answer=no_thought,
                      thought_tokens=c.thought_tokens, keep_cache=c.potential == "probe", **sampling)
    sampled = time.perf_counter()
    each = [prompts[local[i]] for i in rollouts.prompt.tolist()]  # B
    probe = dict(model=model, tokenizer=tokenizer, samples=c.probe_samples, max_new_tokens=c.max_new_tokens,
                 **sampling) if c.potential == "probe" else None
    scores = score(judge, each, rollouts, c.gamma, probe, all_sum)
    rollouts.caches.clear()  # the learner needs the memory
    return each, rollouts, scores, dict(sample=sampled - begin, judge=time.perf_counter() - sampled)


def train_step(c: Config, model, reference, optimizer, tokenizer, judge, pool, step: int):
    """-> the step's row of metrics.jsonl, transcripts of its first harmful and first harmless rollout, and,
    if loss or gradient is not finite (this and the remaining updates are skipped), its rollouts."""
    with unsharded(model):
        prompts, rollouts, scores, seconds = rollout_step(c, model, tokenizer, judge, pool, step)
    begin, seconds["communicate"] = time.perf_counter(), 0.0
    harmful = torch.tensor([p.label == "harmful" for p in prompts], dtype=torch.bool)
    objective = OBJECTIVES[c.objective]
    pay = thought_pay(objective.target, scores, harmful)
    thought, answer = player_advantages(objective.credit, pay, scores, c.group_size)
    advantage = token_advantages(rollouts, thought, answer)
    statistics = evaluate.credit_statistics(pay, scores.answer, thought, c.group_size)
    optimizer.param_groups[0]["lr"] = rate = learning_rate(c, step)
    gap = None
    for _ in range(c.updates):
        logs = accumulate(model, reference, rollouts, advantage, c)
        waiting = time.perf_counter()
        norm = parallel.sum_gradients(model)
        loss = all_sum(torch.tensor(logs["loss"], dtype=torch.float64)).item()
        seconds["communicate"] += time.perf_counter() - waiting
        gap = logs["logprob_gap"] if gap is None else gap  # of the first update; later ones are off-policy
        finite = math.isfinite(norm) and math.isfinite(loss)
        if finite:
            torch.nn.utils.clip_grads_with_norm_(model.parameters(), c.max_grad_norm, torch.tensor(norm))
            optimizer.step()
        optimizer.zero_grad()  # at once, so that the next step samples without them
        if not finite:
            break
    seconds["learn"] = time.perf_counter() - begin - seconds["communicate"]
    logs["logprob_gap"] = gap
    row = dict(step=step) | evaluate.step_rates(rollouts, scores, pay, harmful, statistics, logs)
    row |= dict(grad_norm=norm, learning_rate=rate, skipped=not finite)
    row = {k: v if v is not None and math.isfinite(v) else None for k, v in row.items()}
    row["zero_spread"] = {player: row.pop(f"zero_spread_{player}") for player in ("thought", "answer")}
    row["seconds"] = seconds

    def transcripts(rows) -> list[dict]:
        return [checkpoint.transcript(step, prompts[b], b, rollouts, scores, pay, thought, answer)
                for b in rows]
    firsts = {p.label: b for b, p in reversed(list(enumerate(prompts)))}
    return row, transcripts(sorted(firsts.values())), [] if finite else transcripts(range(len(prompts)))


# ---- the run ---------------------------------------------------------------------------------------------

def train(c: Config, run: Path) -> None:
    """The whole run: start model, evaluation, RL, evaluation. Continues from what the run folder holds."""
    checkpoint.same_on_all(asdict(c))
    device, (pool, requests) = on_all_ranks(lambda: (parallel.rank_device(c.device), inputs.read_inputs(c)))
    if c.plan:
        return on_rank_0(lambda: print(inputs.memory_plan(c, pool, requests)))
    judge, eval_judge = on_all_ranks(lambda: inputs.load_judges(c, device, pool, requests))
    on_rank_0(lambda: checkpoint.open_run(run, asdict(c), bool(c.resume)))
    prepare_start(c, run, device)
    tokenizer, model, reference = on_all_ranks(lambda: inputs.load_start(c, run / "start", device))
    tokenizer.now = checkpoint.read_environment(run)["time"]  # freeze the date that chat templates insert
    saved, exported = parallel.from_rank_0((checkpoint.latest(run), (run / "model").exists()))
    if judge.scale is not None and not saved:  # evaluation needs a scale: that of the first step's answers
        with unsharded(model):
            rollout_step(c, model, tokenizer, judge, pool, 0)
    measured = (run, model, tokenizer, eval_judge, requests, c)
    evaluate.run_stage("before", *measured)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    first = on_all_ranks(lambda: checkpoint.load(saved, model, optimizer, judge.scale) if saved else 0)
    on_rank_0(lambda: checkpoint.truncate_logs(run, first))
    if evaluate.due(c, first):  # a killed run may have left it out
        evaluate.run_stage(f"step-{first}", *measured)

    send = watch.watcher(c.log if rank_and_world()[0] == 0 else "", run, asdict(c), first)
    steps = checkpoint.progress_bar(range(first, c.steps), desc=c.objective, initial=first, total=c.steps)
    for step in steps:
        row, shown, bad = train_step(c, model, reference, optimizer, tokenizer, judge, pool, step)
        hours = sum(row["seconds"].values()) * (c.steps - step) / 3600
        if step == first and hours > 1:
            on_rank_0(lambda: steps.write(f"at this pace the run takes {hours:.0f} hours", sys.stderr))
        steps.set_postfix({k: "-" if row[k] is None else f"{row[k]:.3g}" for k in SHOWN})
        last = step == c.steps - 1
        shown = all_gather(shown) if step % SHOW_EVERY == 0 or last else []
        bad = all_gather(bad) if row["skipped"] else []
        on_rank_0(lambda: (checkpoint.log_step(run, row, shown, bad), send(row)))
        stop, due = checkpoint.stop_requested(), evaluate.due(c, step + 1)
        if stop or last or due or (step + 1) % c.save_every == 0:
            on_all_ranks(lambda: checkpoint.save(run, step + 1, model, optimizer, judge.scale))
        if stop:
            raise checkpoint.Stopped
        if due:
            evaluate.run_stage(f"step-{step + 1}", *measured)

    if not exported:
        on_all_ranks(lambda: c.lora_rank and save_adapter(run / "adapter", model, run / "start"))
        on_all_ranks(lambda: checkpoint.export(run / "model", model, tokenizer))
    evaluate.run_stage("after", *measured)
    if rank_and_world()[0] == 0 and requests:
        print(evaluate.table(evaluate.columns_of(evaluate.read_runs([run]))))
        if c.eval_every:
            print(f"{run}/best: {evaluate.best_stage(checkpoint.rows(run / 'eval.jsonl'))}")


# ---- the command line ------------------------------------------------------------------------------------

def parse(arguments: list[str]) -> Config:
    """Config from flags. Raises InputError for flags that are unknown, out of range or contradictory."""
    c = Config(**cli.read_flags(arguments, Config, __doc__, CHECKPOINT_DEFAULTS, OUT))
    inputs.check_flags(c)
    c.potential = "probe" if c.objective == "probe" else c.potential
    c.max_new_tokens = c.max_new_tokens or 37 + 7 * c.chain
    c.lora_alpha = c.lora_alpha or 2 * c.lora_rank
    return c


@cli.exit_code("sear.py")
def main(arguments: list[str]) -> int:
    """-> exit code: 0 done or SIGTERM, 1 disk, lost rank or Diverged, 2 bad input, 130 Ctrl-C."""
    c = parse(arguments)
    with checkpoint.stop_signals() as received, parallel.process_group(alone=c.shard == "yes"):
        try:
            train(c, Path(c.out))
        except checkpoint.Stopped:
            print(f"stopped and saved; continue with --resume {c.out}", file=sys.stderr)
            return 130 if checkpoint.SIGINT in received else 0
    return 0


if __name__ == "__main__":
    parallel.end(main(sys.argv[1:]))
