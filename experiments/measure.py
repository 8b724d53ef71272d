"""Measured on the runs of ablations.py at temperature 1: searching attackers, opponents, gradient noise.

    python -m experiments.measure attacks      beam search over thoughts, GCG results/attacks.jsonl
    python -m experiments.measure opponents    one run thinks, one answers    results/opponents.jsonl
    python -m experiments.measure gradients    variance of the gradient       results/gradients.jsonl
    python -m experiments.measure credit       the advantages of one rollout  results/credit.jsonl

Rows that a file has already are kept, so that a measurement continues; delete the file after new runs.

Shapes: B rollouts, T tokens, K thought segments, G rollouts of a prompt.
"""
import argparse
import sys
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Callable, NamedTuple

import torch
from torch import Tensor

import alchemy.world as alchemy
import attacks
import evaluate
import sear
from experiments.ablations import MAIN
from judges import alchemy_judge
from lib import checkpoint
from lib.chat import CLOSE, encode_prompt
from lib.cli import Parser, exit_code
from lib.data import expect
from lib.tokenizer import Tokenizer
from model import Transformer
from rewards import Scores, score, thought_pay, verdicts
from rollout import Rollouts, sample

DRAWS, PROMPTS = 30, 8  # batches drawn from the same prompts, for the variance of a gradient
GROUP_SIZES = (4, 8, 16)
REQUESTS = 40  # of beam search and opponents, half of them covert
SEARCHES = {"beam": (MAIN, REQUESTS), "gcg": (("sear", "outcome", "competing-outcome"), REQUESTS // 4)}
MEASURE = 1 << 29  # step counter reserved for what is sampled here


# ---- attackers that search -------------------------------------------------------------------------------

def searched(run: Path, attack: str) -> list[dict]:
    """Unsafe answers, and answers that name the product, against the budget of a search."""
    def rows() -> list[dict]:
        return [row for row in checkpoint.rows(run / "attacks.jsonl")
                if (row["model"], row["attack"]) == ("model", attack)]
    if not rows():
        code = attacks.main([str(run), "--attack", attack, "--prompts", str(SEARCHES[attack][1])])
        expect(code == 0, run, "a run that can be attacked", f"exit code {code}")
    found = []
    for step in sorted({row["step"] for row in rows()}):
        group = [row for row in rows() if row["step"] == step and row["unsafe"] is not None]
        means = {key: sum(row[key] for row in group) / max(1, len(group))
                 for key in ("budget", "unsafe", "product")}
        found.append(dict(step=step, n=len(group)) | means)
    return found


# ---- frozen opponents ------------------------------------------------------------------------------------

@torch.no_grad()
def ask(run: Path, prefill: list[str] | None = None):
    """The run's model answers the requests; prefill: after these thoughts. -> requests, rollouts."""
    c, tokenizer, model = attacks.load_run(run)
    asked = evaluate.requests([], replace(c, eval_prompts=REQUESTS // 2))
    requests = [p for p in asked if p.label == "harmful"]
    prompts = [encode_prompt(tokenizer, p.prompt) for p in requests]
    # An answer has other random numbers than the thought before it.
    return requests, sample(model, prompts, tokenizer, prefill=prefill, max_new_tokens=c.max_new_tokens,
                            temperature=c.eval_temperature, seed=c.seed, step=MEASURE + (prefill is not None))


@lru_cache(maxsize=None)
def thoughts_of(run: Path) -> list[str]:
    """The thought of the run's model on each request, closed."""
    return ["".join(thought) + CLOSE + "\n\n" for thought in ask(run)[1].thoughts]


def opponents(reasoner: Path, answerer: Path) -> list[dict]:
    """How often one run's model answers unsafely after another's thoughts."""
    requests, rollouts = ask(answerer, thoughts_of(reasoner))
    unsafe, n = evaluate.sum_and_count(verdicts(alchemy_judge(), requests, rollouts).unsafe)
    return [dict(unsafe=unsafe / max(1, n), n=n)]


# ---- gradient noise --------------------------------------------------------------------------------------

def gradient(model, rollouts, thought: Tensor, c: sear.Config) -> Tensor:
    """Gradient of the thought's part of (7), flat. thought [B, K]: advantages."""
    advantage = sear.token_advantages(rollouts, thought, torch.zeros(len(rollouts.tokens)))
    sear.accumulate(model, None, rollouts, advantage, c)
    flat = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    return flat


class Batch(NamedTuple):
    """Rollouts of the same prompts, of which a judge has read everything."""
    rollouts: Rollouts
    scores: Scores
    harmful: Tensor  # [B]

    def thought_advantages(self, target: str, credit: str, G: int) -> Tensor:
        """[B, K]"""
        pay = thought_pay(target, self.scores, self.harmful)
        return sear.player_advantages(credit, pay, self.scores, G)[0]


def draw(model: Transformer, tokenizer: Tokenizer, c: sear.Config, number: int, G: int, probe: bool) -> Batch:
    prompts = alchemy.requests(PROMPTS, 7)
    tokens = [encode_prompt(tokenizer, p.prompt) for p in prompts]
    each = [p for p in prompts for _ in range(G)]
    how = dict(temperature=c.temperature, seed=c.seed, step=MEASURE + number, prompt_ids=list(range(PROMPTS)),
               max_new_tokens=c.max_new_tokens)
    rollouts = sample(model, tokens, tokenizer, group_size=G, keep_cache=probe, **how)
    forced = dict(model=model, tokenizer=tokenizer, samples=c.probe_samples, **how) if probe else None
    harmful = torch.tensor([p.label == "harmful" for p in each])
    return Batch(rollouts, score(alchemy_judge(), each, rollouts, c.gamma, forced), harmful)


def gradients(run: Path, folder: str, G: int, probe: bool) -> list[dict]:
    """Variance of the thought's gradient over DRAWS batches of the same prompts, for each credit, all from
    the same rollouts. signal: the squared norm of the mean gradient, without bias."""
    c, tokenizer, model = attacks.load_run(run, folder)
    model.requires_grad_(True)
    targets = {"dense": "process", "once": "outcome" if probe else "process"}
    if not probe:  # with forced answers, the players' summed pay is the same for all
        targets["shared"] = "process"
    drawn: dict[str, list[Tensor]] = {credit: [] for credit in targets}
    for number in range(DRAWS):
        batch = draw(model, tokenizer, c, number, G, probe)
        for credit, target in targets.items():
            thought = batch.thought_advantages(target, credit, G)
            drawn[credit].append(gradient(model, batch.rollouts, thought, c))
    found = []
    for credit, target in targets.items():
        g = torch.stack(drawn[credit]).double()  # [DRAWS, parameters]
        variance = (g - g.mean(0)).square().sum().item() / (DRAWS - 1)
        signal = g.mean(0).square().sum().item() - variance / DRAWS
        found.append(dict(credit=credit, target=target, variance=variance, signal=signal))
    return found


def advantages(run: Path) -> list[dict]:
    """Advantages of the segments of the start model's longest harmful rollout, for each credit."""
    c, tokenizer, model = attacks.load_run(run, "start")
    batch = draw(model, tokenizer, c, 0, c.group_size, False)
    wanted = batch.scores.n_segments * (batch.harmful & batch.scores.well_formed)
    b, potential = int(wanted.argmax()), batch.scores.potential
    spread = {credit: batch.thought_advantages("process", credit, c.group_size)[b].tolist()
              for credit in ("dense", "once", "shared")}
    return [dict(segment=k + 1, text=text.strip(), potential=potential[b, k + 1].item())
            | {credit: values[k] for credit, values in spread.items()}
            for k, text in enumerate(batch.rollouts.thoughts[b])]


# ---- the command line ------------------------------------------------------------------------------------

def measurements(what: str, runs: Path) -> dict[tuple, Callable[[], list[dict]]]:
    """{key: the measurement that gives this key's rows}. Raises InputError without a finished run."""
    folders = {(name, seed): runs / f"{name}-hot-seed{seed}" for name in MAIN for seed in range(1, 11)}
    done = {key: run for key, run in folders.items() if (run / "model").exists()}
    expect(done, runs, "a folder of finished runs of ./train.sh ablations", "none in it")
    if what == "attacks":
        return {(attack, *key): partial(searched, run, attack) for attack, (names, _) in SEARCHES.items()
                for key, run in done.items() if key[0] in names}
    if what == "opponents":
        few = {key: run for key, run in done.items() if key[1] <= 3}
        return {(*a, *b): partial(opponents, few[a], few[b]) for a in few for b in few}
    if what == "credit":
        return {key: partial(advantages, run) for key, run in done.items() if key == ("sear", 1)}
    places = {("start", seed): (run, "start") for (name, seed), run in done.items() if name == "sear"}
    for name in ("sear", "competing-outcome"):
        early = {seed: runs / f"{name}-steps-25-seed{seed}" for seed in range(1, 4)}
        places |= {(f"{name}, step 25", seed): (run, "model") for seed, run in early.items()
                   if (run / "model").exists()}
    return {(*key, G, probe): partial(gradients, *place, G, probe) for key, place in places.items()
            if key[1] <= 3 for G in GROUP_SIZES for probe in (False, True)}


KEYS = {"attacks": ("attack", "name", "seed"),
        "opponents": ("reasoner", "reasoner_seed", "answerer", "answerer_seed"),
        "gradients": ("model", "seed", "G", "probe"), "credit": ("name", "seed")}


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line. Raises InputError."""
    parser = Parser(prog="measure", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=[*KEYS])
    parser.add_argument("--runs", type=Path, default=Path("runs/ablations"), help="[runs/ablations]")
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder of the rows [results]")
    return parser.parse_args(arguments)


@exit_code("measure")
def main(arguments: list[str]) -> int:
    """-> exit code: 0 done, 1 disk, 2 bad input."""
    given = parse(arguments)
    file, keys = given.out / f"{given.what}.jsonl", KEYS[given.what]
    jobs, rows = measurements(given.what, given.runs), checkpoint.rows(file)
    known = {tuple(row[key] for key in keys) for row in rows}
    for key in checkpoint.progress_bar([key for key in jobs if key not in known], desc=given.what):
        rows += [dict(zip(keys, key)) | row for row in jobs[key]()]
        checkpoint.write_rows(file, rows)
    print(f"{file}: {len(rows)} rows")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
