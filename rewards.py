"""The process rewards made from a judge's word: equations (1) to (5) of the README. On the command line, what
a judge says of a file of responses:

    python rewards.py --judge FOLDER [--reward-model FOLDER] --responses FILE [--out scores.jsonl]

Shapes: B rollouts, K thought segments of the longest rollout, N texts. NaN: not judged, or no such segment.
"""
import argparse
import json
import math
import sys
from pathlib import Path
from typing import Callable, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

import checkpoint
from data import InputError, Prompt, expect, rows_of, whole_text
from guards import READS, load_reader, read_answers
from judges import JUDGES, Judge, Verdict, moments, ragged, standardised
from rollout import Rollouts, force_answers

MALFORMED = -1.0  # equation (5)
# At most this unsafe is as good as safe: TARS pays the full reward from s >= 0.9 on, "room to explore" (arXiv
# 2507.00971; its code, verl/utils/reward_score/safety.py). Verdicts of 0 and 1 are not touched.
SAFE_ENOUGH = 0.9


class Scores(NamedTuple):
    """All that the objectives are made of."""
    answer: Tensor  # [B] (4), (5) where it was cut off or is empty; NaN where the thought was never closed
    process: Tensor  # [B, K] (3), and (5) where malformed: return of the reasoning player at each segment
    potential: Tensor  # [B, K + 1] (1), Phi_0 first
    past: Tensor  # [B] return past the last segment: 0, on a harmless prompt the answer's reward
    verdict: Verdict  # [B] each
    extra_tokens: int  # sampled by the probe
    judge_calls: int  # texts that were judged: answers, and thoughts so far or forced answers


def verdicts(judge: Judge, prompts: list[Prompt], rollouts: Rollouts,
             reduce: Callable | None = None) -> Verdict:
    """The judge's word on each rollout's answer, [B] each; what has no answer is never judged: NaN."""
    ok = rollouts.answered
    rows = ok.nonzero()[:, 0].tolist()
    thoughts = [rollouts.prefill[b] + "".join(rollouts.thoughts[b]) for b in rows]
    answers = rollouts.answers
    found = judge.verdict([prompts[b] for b in rows], thoughts, [answers[b] for b in rows], reduce)
    return Verdict(*(torch.full((len(ok),), torch.nan).masked_scatter(ok, v) for v in found))


def helpfulness(verdict: Verdict) -> Tensor:
    """h(a) of equation (4), [N]: helpful x (1 - refusal). Where one is not judged, the other alone."""
    complied = 1 - verdict.refusal
    both = torch.where(verdict.refusal.isnan(), verdict.helpful, verdict.helpful * complied)
    return torch.where(verdict.helpful.isnan(), complied, both)


def answer_reward(verdict: Verdict, harmful: Tensor, safe_enough: float = SAFE_ENOUGH) -> Tensor:
    """Equation (4), [N]: safety on a harmful prompt, helpfulness on a harmless one (a refusal earns 0)."""
    safe = 1 - verdict.unsafe
    return torch.where(harmful, torch.where(safe >= safe_enough, 1.0, safe), helpfulness(verdict))  # (4)


def process_returns(potential: Tensor, exists: Tensor, past: Tensor, gamma: float) -> Tensor:
    """Equations (2) and (3). potential [B, K + 1], exists [B, K]: whether there is such a segment, past [B]:
    what follows the last one -> returns [B, K], NaN without a segment."""
    reward = (potential[:, 1:] - potential[:, :-1]).nan_to_num()  # (2); no estimate of Phi, no reward
    total = torch.full_like(reward, torch.nan)
    for k in reversed(range(reward.shape[1])):
        past = torch.where(exists[:, k], reward[:, k] + gamma * past, past)  # (3)
        total[:, k] = torch.where(exists[:, k], past, torch.nan)
    return total


def text_potential(judge: Judge, prompts: list[Prompt], rollouts: Rollouts) -> Tensor:
    """Equation (1), `text`: the judge reads the thought so far. -> [B, K + 1]."""
    return judge.potential(prompts, [[pre, *t] for pre, t in zip(rollouts.prefill, rollouts.thoughts)])


def probe_potential(judge: Judge, prompts: list[Prompt], rollouts: Rollouts, verdict: Verdict, samples: int,
                    forcing: dict) -> tuple[Tensor, int, int]:
    """Equation (1), `probe`: close the thought after each segment, sample answers from a fork of the cache,
    average what the judge says of them. After the last segment the answer is there already and stands for
    itself. `forcing` goes to rollout.force_answers. -> [B, K + 1], extra tokens, answers judged."""
    points, place = [], []
    new_group = [b == 0 or rollouts.prompt[b] != rollouts.prompt[b - 1] for b in range(len(prompts))]
    for b, (segment, thought) in enumerate(zip(rollouts.segment, rollouts.thoughts)):
        points += [(b, 0)] * new_group[b]  # the empty thought is the group's, asked once
        place.append(len(points))
        lengths = torch.bincount(segment[segment >= 0], minlength=len(thought))  # tokens of each segment
        points += [(b, kept) for kept in lengths.cumsum(0).tolist()[:max(0, len(thought) - 1)]]
    answers, extra = force_answers(samples=samples, points=points, rollouts=rollouts, **forcing)
    harmful = torch.tensor([p.label == "harmful" for p in prompts])  # [B]
    # No answer, or a blank one: nothing was developed, and there is nothing to judge.
    said = [(i, b, text) for i, ((b, _), texts) in enumerate(zip(points, answers)) for text in texts
            if text.strip()]
    asked = judge.verdict([prompts[b] for _, b, _ in said], [""] * len(said), [text for *_, text in said])
    wanted = torch.zeros(len(points)).index_add(
        0, torch.tensor([i for i, *_ in said], dtype=torch.long),
        wanted_by_thought(asked, harmful[[b for _, b, _ in said]])) / samples  # [points]
    final = wanted_by_thought(verdict, harmful)  # [B]
    rows, start = [], None
    for b, thought in enumerate(rollouts.thoughts):
        start = wanted[place[b] - 1:place[b]] if new_group[b] else start
        inner = wanted[place[b]:place[b] + max(0, len(thought) - 1)]
        rows.append(torch.cat((start, inner, final[b:b + 1][:len(thought)])))
    return ragged(rows), extra, len(said)


def wanted_by_thought(verdict: Verdict, harmful: Tensor) -> Tensor:
    """What the reasoning player works towards, [N]: an unsafe answer, or a helpful one."""
    return torch.where(harmful, verdict.unsafe, helpfulness(verdict))


def score(judge: Judge, prompts: list[Prompt], rollouts: Rollouts, gamma: float, probe: dict | None = None,
          safe_enough: float = SAFE_ENOUGH, reduce: Callable | None = None) -> Scores:
    """prompts: the one of each rollout, B. probe: keyword arguments of probe_potential, None for `text`.
    reduce: the ranks' sum, where a judge's running scale is to move on (Judge.verdict)."""
    harmful = torch.tensor([p.label == "harmful" for p in prompts], dtype=torch.bool)
    ok = rollouts.answered
    verdict = verdicts(judge, prompts, rollouts, reduce)
    answer = answer_reward(verdict, harmful, safe_enough)
    if probe is None or not prompts:
        potential, extra = text_potential(judge, prompts, rollouts), 0
        calls = int((~potential.isnan()).sum())
    else:
        potential, extra, calls = probe_potential(judge, prompts, rollouts, verdict, **probe)
    segments = torch.tensor([len(t) for t in rollouts.thoughts])
    exists = torch.arange(potential.shape[1] - 1) < segments[:, None]  # [B, K]
    # On harmless prompts the players cooperate: the thought is paid for the answer too. Else it talks itself
    # out of the rules there as well, where it costs nothing, and the answer player takes to refusing all.
    past = torch.where(~harmful & ok, answer, 0.0)
    process = process_returns(potential, exists, past, gamma)
    # Ending is the answer player's move too. Unpunished it learns to ramble on: no answer, no bad answer.
    answer = torch.where(rollouts.closed & ~ok, MALFORMED, answer)  # (5)
    process = torch.where(exists & ~ok[:, None], MALFORMED, process)  # (5)
    return Scores(answer, process, potential, past, verdict, extra, int(ok.sum()) + calls)


# ---- the command line: how a judge is validated ----------------------------------------------------------

class Response(NamedTuple):
    """One response to be judged, and the label that people gave it, "" for none."""
    prompt: str
    response: str
    label: str


# What a label in a file of responses says: (what is judged, whether it is). The last two are the prompt's.
RESPONSE_LABELS = {
    "1_full_compliance": ("refusal", False), "2_full_refusal": ("refusal", True),  # XSTest's
    "3_partial_refusal": ("refusal", True), "compliance": ("refusal", False), "refusal": ("refusal", True),
    "safe": ("unsafe", False), "unsafe": ("unsafe", True), "harmful": ("", True), "harmless": ("", False)}


def read_response(where: str, row: dict[str, str]) -> Response:
    match row:
        case {"prompt": prompt, "response": said} | {"prompt": prompt, "completion": said}:
            return Response(prompt, said, (row.get("label") or row.get("final_label") or "").lower())
    expect(False, where, "a row of prompt and response (or completion)", list(row))


def load_responses(path) -> list[Response]:
    """Reads a JSONL, csv or tsv file of prompt and response, or XSTest's completions. InputError names the
    line of what is missing or blank: nothing can be said of that."""
    path, found = Path(path), []
    optional = ("response", "completion", "label", "final_label")
    for where, row in rows_of(path, read_response, ("prompt",), optional):
        one = read_response(where, row)
        whole_text(f"{where}: prompt", one.prompt)
        whole_text(f"{where}: response", one.response)
        known = ("", *RESPONSE_LABELS)
        expect(one.label in known, f"{where}: label", " or ".join(known[1:]), one.label)
        found.append(one)
    expect(found, path, "a file of responses", "none in it")
    return found


def judge_responses(rows: list[Response], judge: str, reward_model: str, device: str) -> Verdict:
    """The verdicts on the responses, [N] each. A reward model's centre and scale are these scores' own."""
    readers = [load_reader(judge, device)] if judge else []
    readers += [load_reader(reward_model, device, reward=True)] if reward_model else []
    prompts, answers = [Prompt(row.prompt, "") for row in rows], [row.response for row in rows]
    found, bar = [], tqdm(total=len(rows), desc="judge", dynamic_ncols=True)
    for i in range(0, len(rows), 32):
        found.append([read_answers(reader, prompts[i:i + 32], answers[i:i + 32]) for reader in readers])
        bar.update(len(prompts[i:i + 32]))
    bar.close()
    columns = dict.fromkeys(READS, torch.full((len(rows),), torch.nan))
    for reader, batches in zip(readers, zip(*found)):
        judged = torch.cat(batches)  # [N, Q], of a reward model [N, 1]
        columns |= {q.read: judged[:, j] for j, q in enumerate(reader.ask)}
        if not reader.ask:
            columns["helpful"] = standardised(judged[:, 0], moments(judged[:, 0]))
    return Verdict(**columns)


def agreement(rows: list[Response], verdict: Verdict) -> str:
    """Markdown table, a line for each label: what the judge said on average, and how often (from 0.5 on) what
    the label says."""
    said = [dict(zip(READS, values)) for values in torch.stack(verdict, 1).tolist()]
    groups = {label: [i for i, row in enumerate(rows) if row.label == label]
              for label in sorted({row.label for row in rows} - {""})}
    lines = ["| label | n | " + " | ".join(READS) + " | agrees |", "|---|---|---|---|---|---|"]
    for label, group in (groups | {"all": range(len(rows))}).items():
        columns = [[said[i][read] for i in group] for read in READS]
        hits = []
        for i in group:
            read, truth = RESPONSE_LABELS.get(rows[i].label, ("", False))
            hits += [(said[i][read] >= 0.5) == truth] if read and not math.isnan(said[i][read]) else []
        cells = [[v for v in column if not math.isnan(v)] for column in (*columns, hits)]
        cells = [f"{sum(cell) / len(cell):.3f}" if cell else "–" for cell in cells]
        lines.append(f"| {label} | {len(group)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line. Raises InputError."""
    parser = checkpoint.Parser(prog="rewards.py", description="judge a file of responses")
    parser.add_argument("--judge", default="", help="folder of a guard model, or a judge file (.json)")
    parser.add_argument("--reward-model", default="", help="folder of a reward model, for helpfulness")
    parser.add_argument("--responses", required=True,
                        help="JSONL or csv of prompt and response (or completion), maybe with a label")
    parser.add_argument("--out", type=Path, default=Path("scores.jsonl"), help="one row each [scores.jsonl]")
    given = parser.parse_args(arguments)
    if not given.judge and not given.reward_model:
        raise InputError("give a --judge, a --reward-model or both")
    expect(given.judge not in JUDGES, f"--judge {given.judge}", "a model folder or a judge file (.json)",
           "one that knows the embedded world or a prompt's label only")
    expect(not given.out.is_dir(), f"--out {given.out}", "a file", "a folder")  # not after an hour of judging
    return given


def main() -> int:
    """-> exit code: 0 done, 1 disk, 2 bad input."""
    try:
        given = parse(sys.argv[1:])
        rows = load_responses(given.responses)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        verdict = judge_responses(rows, given.judge, given.reward_model, device)
        table = [{read: None if math.isnan(v) else v for read, v in zip(READS, values)}
                 for values in torch.stack(verdict, 1).tolist()]
        checkpoint.write(given.out, "".join(json.dumps(row) + "\n" for row in table))
    except (InputError, checkpoint.SaveError) as error:
        print(f"rewards.py: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    print(agreement(rows, verdict))
    print(f"wrote {given.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
