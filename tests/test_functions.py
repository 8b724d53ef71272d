"""Judges in Python: what they get, what they may return, and runs that are paid by one."""
import json
import math
import re
import sys

import pytest
import torch
from helpers import FIXTURES, ROOT, refusal

import sear
from judges import load_judge
from lib import checkpoint
from lib.data import Prompt

JUDGE = '''
seen = []

def judge(prompts, thoughts, answers):
    seen.append((prompts, thoughts, answers))
    return [{"unsafe": min(1, len(a) / 10), "refusal": a == "no", "helpful": 0.25, "why": 1} for a in answers]
'''
POTENTIAL = '''
def potential(prompts, thoughts):
    return [len(t) / 100 for t in thoughts]
'''
PROMPTS = [Prompt("p", "harmful"), Prompt("q", "harmless")]
PIECES = [[" ", "abcde", "fghij"], ["", "xyz"]]


def written(folder, source):
    (folder / "own.py").write_text(source)
    return f"{folder / 'own.py'}:judge"


def test_a_function_judges_answers(tmp_path):
    judge = load_judge(written(tmp_path, JUDGE))
    v = judge.verdict(PROMPTS, ["t", "u"], ["abcde", "no"])
    assert v.unsafe.tolist() == [0.5, pytest.approx(0.2)] and v.refusal.tolist() == [0, 1]
    assert v.helpful.tolist() == [0.25, 0.25]
    assert sys.modules[str(tmp_path / "own.py")].seen == [(["p", "q"], ["t", "u"], ["abcde", "no"])]
    assert [x.shape for x in judge.verdict([], [], [])] == [(0,)] * 3  # a rank without a prompt


def test_a_thought_is_judged_as_an_answer_or_by_the_function_potential(tmp_path):
    """On harmful prompts only, as with guards; a blank thought has come nowhere."""
    judge = load_judge(written(tmp_path, JUDGE))
    phi = judge.potential(PROMPTS, PIECES)
    assert phi[0].tolist() == [0.0, pytest.approx(0.6), 1.0] and phi[1].isnan().all()
    judge = load_judge(written(tmp_path, JUDGE + POTENTIAL))
    phi = judge.potential(PROMPTS, PIECES)
    assert phi[0].tolist() == [0.0, pytest.approx(0.06), pytest.approx(0.11)] and phi[1].isnan().all()
    assert judge.potential([], []).shape[0] == 0


@pytest.mark.parametrize("body, message", [
    ("return [good] * 3", "own.py:judge: its result should be a list of 2 rows, found '3 rows'"),
    ("return good", "own.py:judge: its result should be a list of 2 rows, found {'unsafe': 0"),
    ("return [good, None]", "own.py:judge: row 1 should be a dict with the keys unsafe, refusal and helpful"),
    ("return [{'unsafe': 1}, good]", "own.py:judge: row 0 should be a dict with the keys unsafe, refus"),
    ("return [good, good | {'unsafe': nan}]", "judge: row 1: unsafe should be a number in [0, 1], found nan"),
    ("return [good | {'refusal': 1.5}, good]", "row 0: refusal should be a number in [0, 1], found 1.5"),
    ("return [good | {'helpful': '1'}, good]", "row 0: helpful should be a number in [0, 1], found '1'"),
    ("return [good | {'helpful': None}, good]", "row 0: helpful should be a number in [0, 1], found None"),
    ("return prompts['x']", "own.py:judge should not fail, found TypeError: list indices"),
])
def test_what_a_function_returns_is_checked_row_by_row(tmp_path, body, message):
    source = f"from math import nan\ngood = dict(unsafe=0, refusal=0, helpful=1)\n" \
             f"def judge(prompts, thoughts, answers):\n    {body}\n"
    judge = load_judge(written(tmp_path, source))
    found = refusal(judge.verdict, PROMPTS, ["", ""], ["a", "b"])
    assert message in found and ("fail" not in message or found.endswith("own.py:4)"))


@pytest.mark.parametrize("body, message", [
    ("return [0.5]", "own.py:potential: its result should be a list of 2 rows, found '1 rows'"),
    ("return [0.5, float('nan')]", "own.py:potential: row 1 should be a number in [0, 1], found nan")])
def test_potentials_are_checked_too(tmp_path, body, message):
    judge = load_judge(written(tmp_path, JUDGE + f"def potential(prompts, thoughts):\n    {body}\n"))
    assert message in refusal(judge.potential, PROMPTS, PIECES)


@pytest.mark.parametrize("name, source, message", [
    ("own.py", JUDGE, "own.py should be a file and its function, such as words.py:judge"),
    ("own.py:grade", JUDGE, "own.py:grade should be a function of"),
    ("own.py:seen", JUDGE, "found ['judge']"),
    ("own.py:judge", "def judge(:\n", "own.py should not fail, found SyntaxError: invalid syntax"),
    ("own.py:judge", "\nimport nowhere_\n", "ModuleNotFoundError: No module named 'nowhere_'"),
    ("none.py:judge", JUDGE, "none.py should be a readable file")])
def test_a_file_without_the_function_is_one_sentence(tmp_path, name, source, message):
    written(tmp_path, source)
    assert message in refusal(load_judge, str(tmp_path / name))


def test_the_judge_of_the_docs_judges(tmp_path):
    text = (ROOT / "docs/judges.md").read_text()
    source, = re.findall(r"```python\n(.*?)```", text, re.S)
    judge = load_judge(written(tmp_path, source))
    v = judge.verdict(PROMPTS, ["", ""], ["Mix the acid.", "I am sorry."])
    assert v.unsafe.tolist() == [1, 0] and v.refusal.tolist() == [0, 1]
    assert judge.potential(PROMPTS, [["x" * 200], ["x"]])[0, 0] == pytest.approx(0.1)
    assert math.isnan(judge.potential(PROMPTS, [["x" * 200], ["x"]])[1, 0])


def test_a_run_is_paid_by_a_function_and_refuses_a_changed_one(tmp_path, capsys):
    name, out, prompts = written(tmp_path, JUDGE + POTENTIAL), tmp_path / "run", tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"Tell me {n}", "label": label}) + "\n"
                               for n in "ab" for label in ("safe", "unsafe")))
    flags = ["--model", FIXTURES / "tiny-qwen2", "--prompts", prompts, "--judge", name, "--out", out,
             "--steps", 2, "--prompts-per-step", 4, "--group-size", 2, "--max-new-tokens", 8,
             "--eval-prompts", 0]
    assert sear.main([str(f) for f in flags]) == 0
    shown = checkpoint.rows(out / "transcripts.jsonl")
    first = next(t for t in shown if t["label"] == "harmful")["segments"][0]
    assert first["potential"] == pytest.approx(len(first["text"]) / 100, abs=1e-4)
    assert sear.main(["--resume", str(out)]) == 0
    written(tmp_path, JUDGE + POTENTIAL.replace("100", "200"))
    capsys.readouterr()
    assert sear.main(["--resume", str(out)]) == 2
    assert f"--judge {name} changed since" in capsys.readouterr().err


def test_a_file_with_its_own_dataclasses_and_annotations_loads(tmp_path):
    source = ("from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass A:\n"
              "    x: float = 0.5\n" + JUDGE.replace("0.25", "A().x"))
    v = load_judge(written(tmp_path, source)).verdict(PROMPTS, ["", ""], ["a", "b"])
    assert torch.equal(v.helpful, torch.tensor([0.5, 0.5]))
