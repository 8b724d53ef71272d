"""SEAR: one model, two players, one chain of thought.                                   torchrun sear.py

The algorithm is our reading of "Addressing Over-Refusal in LLMs with Competing Rewards" (arXiv 2606.31748).
One step:

    sample     G rollouts of each prompt: a thought cut into segments z_1..z_K, then an answer
    judge  (1) potential Phi_k: how far z_1..z_k has come towards what the reasoning player wants
           (2) process reward r_k = Phi_k - Phi_{k-1}, and (3) its return R_k
           (4) reward of the answer player: safety on a harmful prompt, helpfulness on a harmless one
           (5) a malformed rollout earns -1 on its thought, and on an answer cut off or empty
    learn  (6) advantages, for each player on its own
           (7) clipped policy gradient, one mean for each player, KL to the frozen start

(1) to (5) stand in rewards.py, (6) and (7) below. Left out on purpose: a value network, an entropy bonus,
top-k and top-p (what is sampled is what is differentiated). With one update a batch the clip in (7) is idle.

Shapes: B rollouts, T tokens, K thought segments, G rollouts of a prompt, N owned tokens of a micro-batch.
"""
import math
import os
import signal
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # or a lost rank prints a page of C++ frames

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

import alchemy
import checkpoint
import evaluate
from data import InputError, Prompt, Tokenizer
from inputs import load_start, prepare_start, read_inputs
from kernels import SegmentLogprobs, segment_logprobs
from model import Transformer
from judges import Judge, Verdict, load_judge
from parallel import (RankLost, gathered, gathered_once, joined, keep_up, largest, means, own_device,
                      rank_and_world, sum_gradients, total)
from rewards import MALFORMED, SAFE_ENOUGH, Scores, score
from rollout import Rollouts, encode_chat, micro_batches, sample

OUT = "runs/{objective}-seed{seed}"  # the default run folder
OBJECTIVES = ("sear", "competing-outcome", "outcome", "safe-thought", "no-thought")
EPS = 1e-6  # of equation (6)


def knob(default, sentence: str, choices: tuple = (), low: float = -math.inf, high: float = math.inf):
    """A field of Config: its default, its reason, its choices or its range (both ends allowed)."""
    return field(default=default, metadata={"help": sentence, "choices": choices, "low": low, "high": high})


@dataclass
class Config:
    # What is trained on what
    objective: str = knob("sear", "what pays the two players; all five share every other line", OBJECTIVES)
    model: str = knob("", "Hugging Face folder to start from; none: a small start model is trained first")
    prompts: str = knob("", "prompt file (JSONL, XSTest, OR-Bench, HarmBench, ...); none: the embedded world")
    judge: str = knob("alchemy", "alchemy (the world's verifier), rules, a guard's folder or a judge file")
    reward_model: str = knob("", "folder of a reward model, for helpfulness; none: 1 - refusal")
    out: str = knob("", "run folder; none: runs/<objective>-seed<seed>")
    resume: str = knob("", "run folder to go on with, to the same bits; auto: that of --out, if there is one")
    device: str = knob("", "cpu or cuda; none: cuda where there is one", ("", "cpu", "cuda"))
    seed: int = knob(1, "of everything random: start model, requests, rollouts", low=0, high=2**31)
    # Sampling
    steps: int = knob(300, "optimizer steps of RL", low=0)
    prompts_per_step: int = knob(32, "prompts of one step, over all ranks: the more, the less noise", low=1)
    group_size: int = knob(8, "rollouts of one prompt (G): they are compared with each other only", low=2)
    max_new_tokens: int = knob(72, "thought and answer together; a longer rollout is malformed", low=1)
    temperature: float = knob(1.0, "of sampling and of the log-probs learned from, always the same", low=1e-3)
    max_rows: int = knob(512, "rollouts decoded at once: bounds the KV cache, changes no result", low=1)
    # Rewards
    potential: str = knob("text", "Phi: a judge reads the thought, or forced answers", ("text", "probe"))
    probe_samples: int = knob(2, "forced answers at each segment's end (m), for --potential probe", low=1)
    probe_tokens: int = knob(12, "length of a forced answer, for --potential probe", low=1)
    safe_enough: float = knob(SAFE_ENOUGH, "1 - unsafe from which (4) is 1: TARS's", low=0.5, high=1)
    gamma: float = knob(1.0, "of (3); 1 credits a segment with all that it leads to", low=0, high=1)
    # Loss and optimizer
    reasoning_weight: float = knob(1.0, "w_R of (7)", low=0)
    answer_weight: float = knob(2.0, "w_A of (7); above w_R: it has to keep up with the other player", low=0)
    beta: float = knob(0.02, "weight of the KL to the frozen start; 0 drops the reference model", low=0)
    clip: float = knob(0.2, "how far the ratio may leave 1 before the gradient stops", low=0)
    ratio: str = knob("token", "rho of (7): each token's, or its segment's mean", ("token", "segment"))
    updates: int = knob(1, "optimizer updates from one batch; 1 is strictly on-policy", low=1)
    learning_rate: float = knob(3e-4, "of AdamW, after the warm-up", low=0)
    schedule: str = knob("cosine", "of the learning rate; cosine ends at a tenth", ("cosine", "constant"))
    warmup: int = knob(5, "steps over which the rate rises: Adam's first moments are noise", low=0)
    weight_decay: float = knob(0.0, "of AdamW; RL moves little, decay would move the rest", low=0)
    max_grad_norm: float = knob(1.0, "gradients are scaled down to this norm", low=0)
    tokens_per_micro_batch: int = knob(8192, "padded tokens of one backward pass: memory only", low=1)
    # Start model of the embedded world
    warm_start_steps: int = knob(900, "supervised steps on demonstrations of a flawed model", low=0)
    warm_start_batch: int = knob(32, "demonstrations a step: small batches learn from fewest tokens", low=1)
    warm_start_rate: float = knob(3e-3, "peak learning rate of these steps", low=0)
    # What is kept
    eval_prompts: int = knob(200, "held-out requests of each class, before and after; 0: none", low=0)
    save_every: int = knob(75, "steps between checkpoints; signals and the end write one too", low=1)
    show_every: int = knob(40, "steps between transcripts", low=1)
    max_bad_steps: int = knob(3, "steps without a finite loss and gradient, in all, that end the run", low=1)
    # Ranks
    shard: str = knob("auto", "split weights and optimizer over ranks; auto: if half a GPU cannot hold them",
                      ("auto", "yes", "no"))
    timeout: float = knob(600.0, "seconds ranks wait for each other: starting, in a step, saving", low=1)


# A 1.5B checkpoint is another animal than a toy of 0.28M: TARS's values (arXiv 2507.00971, section 3.3).
CHECKPOINT_DEFAULTS = dict(judge="rules", learning_rate=1e-6, schedule="constant", beta=1e-3, temperature=0.6,
                           max_new_tokens=4096, probe_tokens=256, max_rows=256, tokens_per_micro_batch=16384,
                           eval_prompts=50)


# ---- from rewards to the loss ----------------------------------------------------------------------------

def thought_returns(objective: str, scores: Scores, harmful: Tensor) -> Tensor:
    """What pays the reasoning player: [B, K], NaN without a segment, or [B, 1] where one scalar pays all."""
    if objective == "sear":
        return scores.process
    paid = scores.answer.nan_to_num(MALFORMED)  # outcome, no-thought: the answer's reward, as in TARS
    played = harmful & ~scores.verdict.unsafe.isnan()  # well-formed, and judged
    if objective == "competing-outcome":  # two players as in sear, paid at the end: is the answer unsafe?
        paid = torch.where(played, scores.verdict.unsafe, paid)
    elif objective == "safe-thought":  # the verdict on the thought counts against it: most safety training
        paid = torch.where(played, paid - scores.potential.nan_to_num(0.0).amax(1), paid)
    return paid[:, None]


def advantages(returns: Tensor, G: int, past: Tensor | None = None) -> Tensor:
    """Equation (6). returns [B, K], the G rollouts of a prompt side by side, NaN: nothing there -> [B, K], 0
    there. Each player on its own: added into one scalar they would cancel on harmful prompts."""
    group = returns.view(len(returns) // G, G, returns.shape[1])  # [P, G, K]
    # The mean is each segment index's. A thought that has ended counts there with what it would still earn,
    # past [B]: left out, a segment would be compared with others that went on too, never with stopping.
    reached = group if past is None else torch.where(group.isnan(), past.view(len(group), G, 1), group)
    centred = group - reached.nanmean(1, keepdim=True)
    std = centred.square().nanmean((1, 2), keepdim=True).sqrt()  # [P, 1, 1]: the player's, in this group
    return (centred / (std + EPS)).nan_to_num(0.0).view_as(returns)  # (6)


def token_advantages(rollouts: Rollouts, thought: Tensor, answer: Tensor) -> Tensor:
    """Advantages of segments, thought [B, K or 1] and answer [B, 1], laid on their tokens -> [B, T]."""
    is_thought, is_answer = rollouts.owners
    index = rollouts.segment.clamp(0, thought.shape[1] - 1)  # [B, T]
    return is_thought * thought.gather(1, index) + is_answer * answer


def policy_loss(logprob: Tensor, ref: Tensor | None, log_ratio: Tensor, advantage: Tensor,
                is_thought: Tensor, is_answer: Tensor, counts: Tensor, c: Config) -> tuple[Tensor, Tensor]:
    """Equation (7) over the tokens of a micro-batch, all [N]. counts: thought, answer and all tokens of the
    batch, over every rank and micro-batch; with one denominator for each mean no split changes the gradient.
    -> this micro-batch's part of the loss and of the KL."""
    rho = log_ratio.exp()
    surrogate = torch.minimum(rho * advantage, rho.clamp(1 - c.clip, 1 + c.clip) * advantage)
    k3 = torch.zeros_like(logprob) if ref is None else (ref - logprob).expm1() - (ref - logprob)
    kl = k3.sum() / counts[2]
    return (-c.reasoning_weight * (surrogate * is_thought).sum() / counts[0]
            - c.answer_weight * (surrogate * is_answer).sum() / counts[1] + c.beta * kl), kl.detach()  # (7)


def accumulate(model: Transformer, reference: Transformer | None, rollouts: Rollouts, advantage: Tensor,
               c: Config, chosen: list[int] | None = None) -> dict[str, float]:
    """Adds the gradient of (7) over this rank's rollouts, or the chosen of them, to the parameters'. [T, V]
    never exists: hidden states go straight into segment_logprobs. -> this rank's share of loss, kl, entropy;
    its logprob_gap."""
    device, owned = model.device, rollouts.segment >= 0
    is_thought, is_answer = rollouts.owners
    counts = total(torch.stack([m.sum() for m in (is_thought, is_answer, owned)])).clamp(min=1).to(device)
    length = (torch.arange(owned.shape[1]) * owned).amax(1) + 1  # [B], prompt included
    logs = dict(loss=0.0, kl=0.0, entropy=0.0, logprob_gap=0.0)
    chosen = list(range(len(length))) if chosen is None else chosen
    parts = [[chosen[i] for i in part] for part in micro_batches(length[chosen], c.tokens_per_micro_batch)]
    fewer = int(largest(len(parts))) - len(parts)  # than the rank that has most
    for rows in parts:
        T = int(length[rows].max())
        mine = owned[rows, 1:T].flatten()  # position t predicts token t + 1: all on the targets' side
        first = torch.tensor([0] + [len(rollouts.text[b]) for b in rows]).cumsum(0)  # ids unique in the pack
        segment = rollouts.segment[rows, 1:T] + first[:-1, None] * owned[rows, 1:T]  # [b, T - 1]

        def pick(x: Tensor) -> Tensor:  # [B, T] -> [N]
            return x[rows, 1:T].flatten()[mine].to(device)

        tokens = rollouts.tokens[rows, :T].to(device)  # right-padded: plain causal attention, no mask needed
        pack = (tokens[:, 1:].flatten(), segment.flatten().to(device), int(first[-1]), c.temperature)

        def read(reader: Transformer) -> SegmentLogprobs:
            return segment_logprobs(reader.hidden(tokens[:, :-1]).flatten(0, 1), reader.head.weight, *pack)

        out, ref = read(model), None
        if reference is not None:
            with torch.no_grad():
                ref = read(reference).logprob[mine]
        logprob, old = out.logprob[mine], pick(rollouts.logprob)  # [N]
        log_ratio = logprob - old
        if c.ratio == "segment":  # the geometric mean of a segment's ratios, so that its tokens clip together
            ids = pack[1][mine]
            change = out.segment_logprob - torch.zeros_like(out.segment_logprob).index_add(0, ids, old)  # [S]
            log_ratio = (change / torch.bincount(ids, minlength=len(change)).clamp(min=1))[ids]
        loss, kl = policy_loss(logprob, ref, log_ratio, pick(advantage), pick(is_thought),
                               pick(is_answer), counts, c)
        loss.backward()
        logs["loss"] += loss.item()
        logs["kl"] += kl.item()
        logs["entropy"] += (out.entropy.sum() / counts[2]).item()
        logs["logprob_gap"] = max(logs["logprob_gap"], (logprob - old).abs().max().item())
    keep_up(model, reference, fewer)
    return logs


# ---- one step --------------------------------------------------------------------------------------------

def step_prompts(c: Config, pool: list[Prompt], step: int) -> list[Prompt]:
    """The prompts of a step, all ranks'. From a file: shuffled epochs, end to end; else the world's."""
    if not pool:
        return alchemy.requests(c.prompts_per_step, c.seed, step)
    places = range(step * c.prompts_per_step, (step + 1) * c.prompts_per_step)
    epochs = {i // len(pool) for i in places}
    order = {e: np.random.default_rng([c.seed, e]).permutation(len(pool)) for e in epochs}
    return [pool[order[i // len(pool)][i % len(pool)]] for i in places]


def rollout_step(c: Config, model: Transformer, tokenizer: Tokenizer, judge: Judge, pool: list, step: int):
    """Samples and judges this rank's share. -> prompt of each rollout, rollouts, scores, seconds."""
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
    scores = score(judge, prompts, rollouts, c.gamma, probe, c.safe_enough, total)
    rollouts.caches.clear()  # gigabytes on a real model, and the learner needs the room
    return prompts, rollouts, scores, dict(sample=sampled - begin, judge=time.perf_counter() - sampled)


def train_step(c: Config, model, reference, optimizer, tokenizer, judge, pool, step: int):
    """-> the row of metrics.jsonl, transcripts of the first harmful and the first harmless rollout, and the
    rows of bad_steps.jsonl: an update whose loss or gradient is not finite is not made, nor any after it."""
    with gathered_once(model):
        prompts, rollouts, scores, seconds = rollout_step(c, model, tokenizer, judge, pool, step)
    begin, seconds["communicate"] = time.perf_counter(), 0.0
    harmful = torch.tensor([p.label == "harmful" for p in prompts], dtype=torch.bool)
    returns = thought_returns(c.objective, scores, harmful)
    ended = scores.past if returns.shape[1] > 1 else None
    thought = advantages(returns, c.group_size, ended)
    answer = advantages(scores.answer[:, None], c.group_size)
    advantage = token_advantages(rollouts, thought, answer)
    optimizer.param_groups[0]["lr"] = rate = learning_rate(c, step)
    logs, bad = None, []

    def gradient(chosen: list[int] | None = None) -> tuple[dict, float, bool]:
        optimizer.zero_grad()
        logs = accumulate(model, reference, rollouts, advantage, c, chosen)
        waiting = time.perf_counter()
        norm, loss = sum_gradients(model), total(torch.tensor(logs["loss"], dtype=torch.float64)).item()
        seconds["communicate"] += time.perf_counter() - waiting  # for the slowest rank, too
        return logs, norm, math.isfinite(norm) and math.isfinite(loss)

    for _ in range(c.updates):
        now, norm, finite = gradient()
        logs = logs or now  # of the first update: after it, sampler and learner are two models
        if not finite:
            bad = checkpoint.offenders(step, prompts, rollouts, lambda chosen: gradient(chosen)[2])
            break
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), c.max_grad_norm, torch.tensor(norm))
        optimizer.step()
    seconds["learn"] = time.perf_counter() - begin - seconds["communicate"]
    row = {"step": step} | summary(rollouts, scores, returns[:, 0], harmful, logs)
    row |= dict(grad_norm=norm, learning_rate=rate, skipped=bool(bad))
    row = {k: v if v is not None and math.isfinite(v) else None for k, v in row.items()}
    row["seconds"] = seconds
    chosen = {p.label: b for b, p in reversed(list(enumerate(prompts)))}
    shown = [checkpoint.transcript(step, prompts[b], b, rollouts, scores, returns, thought, answer)
             for b in sorted(chosen.values())]
    return row, shown, bad


def summary(rollouts: Rollouts, scores: Scores, first: Tensor, harmful: Tensor, logs: dict) -> dict:
    """What a step came to, over all ranks: rates over rollouts, counts of tokens. first [B]: the return of
    each thought's first segment. Where an answer is rated, a rollout without one counts as 0."""
    B, judged = len(harmful), Verdict(*(v.double() for v in scores.verdict))  # sums in another order: equal
    gap = largest(logs.pop("logprob_gap"))
    counts = dict(tokens=int((rollouts.segment >= 0).sum()), row_steps=rollouts.row_steps,
                  prefilled_tokens=rollouts.prefilled_tokens, probe_tokens=scores.extra_tokens,
                  judge_calls=scores.judge_calls)

    def rated(values: Tensor, of: Tensor) -> tuple[float, int]:  # an answer not judged on this is no 0
        unjudged = (of & values.isnan() & ~judged.unsafe.isnan()).sum().item()
        n = 0 if unjudged and values[of].isnan().all() else int(of.sum()) - unjudged
        return values[of].nansum().item(), n

    row = means({
        "answer_reward": (scores.answer.double().nansum().item(), B),
        "thought_reward": (first.double().nansum().item(), int((~first.isnan()).sum())),
        "unsafe": rated(judged.unsafe, harmful), "over_refusal": rated(judged.refusal, ~harmful),
        "helpful": rated(judged.helpful, ~harmful),
        "potential": (scores.potential.nan_to_num(0.0).amax(1).double().sum().item(), B),
        "answered": (int(rollouts.answered.sum()), B), "thought_tokens": (int(rollouts.owners[0].sum()), B)})
    summed = total(torch.tensor([*logs.values(), *counts.values()], dtype=torch.float64)).tolist()
    row |= dict(zip([*logs, *counts], summed)) | {"logprob_gap": gap}
    return row | {name: int(row[name]) for name in counts}


def learning_rate(c: Config, step: int) -> float:
    rise = min(1.0, (step + 1) / (c.warmup + 1))
    fall = 0.55 + 0.45 * math.cos(math.pi * step / max(1, c.steps)) if c.schedule == "cosine" else 1.0
    return c.learning_rate * rise * fall


# ---- the run ---------------------------------------------------------------------------------------------

def train(c: Config, run: Path) -> None:
    """The whole run: start model, evaluation, RL, evaluation. Goes on from what is in the run folder."""
    rank, together = rank_and_world()[0], checkpoint.together
    checkpoint.same_on_all(asdict(c))
    device, everything = together(lambda: (own_device(c.device), read_inputs(c)))
    judge = together(lambda: load_judge(c.judge, c.reward_model, device, everything))
    together(lambda: rank == 0 and checkpoint.open_run(run, asdict(c), bool(c.resume)))
    exported = gathered([(run / "model").exists()])[0]

    def bar(items, **kw):
        return tqdm(items, disable=rank > 0, dynamic_ncols=True, **kw)

    together(lambda: rank == 0 and prepare_start(c, run, device, bar), patient=True)
    tokenizer, model, reference = together(lambda: load_start(c, run / "start", device))
    tokenizer.now = checkpoint.begun(run)["time"]  # a template with a date in it keeps this one
    requests = evaluate.requests(everything, c.eval_prompts)
    pool = [p for p in everything if not evaluate.held_out(p)]
    saved = gathered([checkpoint.latest(run)])[0]
    if judge.scale is not None and not saved:  # evaluation needs a scale: that of the first step's answers
        with gathered_once(model):
            rollout_step(c, model, tokenizer, judge, pool, 0)
    evaluate.stage("before", run, model, tokenizer, judge, requests, c, bar)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=c.weight_decay)
    first = together(lambda: checkpoint.load(saved, model, optimizer, judge.scale) if saved else 0)
    together(lambda: rank == 0 and checkpoint.cut_logs(run, first))
    steps = bar(range(first, c.steps), desc=c.objective, initial=first, total=c.steps)
    for step in steps:
        row, shown, bad = train_step(c, model, reference, optimizer, tokenizer, judge, pool, step)
        if rank == 0:
            steps.set_postfix({k: f"{row[k] or 0:.3g}" for k in ("answer_reward", "potential", "kl")} |
                              {k: row[k] for k in ("probe_tokens", "judge_calls")})
        shown = gathered(shown) if step % c.show_every == 0 or step == c.steps - 1 else []
        together(lambda: rank == 0 and checkpoint.log_step(run, row, shown, bad, c.max_bad_steps))
        stop = checkpoint.stopping()
        if stop or (step + 1) % c.save_every == 0 or step == c.steps - 1:
            together(lambda: checkpoint.save(run, step + 1, model, optimizer, judge.scale))
        if stop:
            raise checkpoint.Stopped
    if not exported:
        together(lambda: checkpoint.export(run / "model", model, tokenizer))
    evaluate.stage("after", run, model, tokenizer, judge, requests, c, bar)
    if rank == 0 and requests:
        print(evaluate.table(evaluate.columns_of(evaluate.read_runs([run]))))


# ---- the command line ------------------------------------------------------------------------------------

def parse(arguments: list[str]) -> Config:
    """Config from the command line. Raises InputError for flags that are unknown, out of range or at odds."""
    c = Config(**checkpoint.read_flags(arguments, Config, __doc__, {"prompts": CHECKPOINT_DEFAULTS}, OUT))
    if c.prompts and not c.model:
        raise InputError("--prompts needs --model: the embedded start model knows only the embedded world")
    if bool(c.prompts) == (c.judge == "alchemy"):
        raise InputError(f"--judge {c.judge} cannot judge {c.prompts or 'the embedded world'}; expected "
                         f"{'rules, a folder or a judge file' if c.prompts else 'alchemy'}")
    if c.reward_model and not c.prompts:
        raise InputError("--reward-model cannot judge the embedded world, its verifier does; drop it")
    return c


def run_once(arguments: list[str]) -> int:
    """-> exit code: 0 done or SIGTERM, 1 disk, lost rank or too many bad steps, 2 bad input, 130 Ctrl-C."""
    checkpoint.STOP.clear()
    try:
        c = parse(arguments)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda received, frame: checkpoint.STOP.append(received))
        with joined(c.timeout, alone=c.shard == "yes"):
            train(c, Path(c.out))
    except checkpoint.Stopped:
        print(f"stopped and saved; continue with --resume {c.out}", file=sys.stderr)
        return 130 if signal.SIGINT in checkpoint.STOP else 0
    except (InputError, checkpoint.SaveError, checkpoint.Diverged, RankLost) as error:
        print(f"sear.py: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    return 0


def main() -> int:
    """Under train.sh the exit code goes through a file: torchrun would turn it into 1, with a traceback."""
    status, rank = os.environ.get("SEAR_STATUS"), os.environ.get("RANK", "0")
    if status:
        Path(status, f"{rank}.pid").write_text(str(os.getpid()))
    code = run_once(sys.argv[1:])
    if status:
        Path(status, "code").write_text(str(code))  # 0 too: it may follow on what a broken start has left
        code = 0
    if dist.is_initialized():  # a rank was lost: Python's own way out would wait for it, or abort
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


if __name__ == "__main__":
    sys.exit(main())
