"""What the README promises: commands that run, numbers that the code made, files that are there."""
import ast
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import ROOT, ranks_table

import alchemy
import evaluate
import guards
import parallel
import rewards
import sear
from model import Transformer

README = (ROOT / "README.md").read_text()
CORE = ("sear", "model", "rollout", "rewards", "judges", "guards", "data", "alchemy", "evaluate", "checkpoint", "inputs",
        "parallel")
ENVIRONMENT = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
SHORT = ("--warm-start-steps 2 --warm-start-batch 2 --steps 2 --prompts-per-step 2 --group-size 2 --eval-prompts 1 "
         "--max-new-tokens 12").split()


def commands():
    """Command lines of the README's bash blocks, comments left out."""
    blocks = re.findall(r"```bash\n(.*?)```", README, re.S)
    return [shlex.split(line, comments=True) for block in blocks for line in block.splitlines() if line.strip()]


def test_every_command_of_the_readme_is_one_that_the_code_takes():
    seen = set()
    for words in commands():
        if words[0] == "./train.sh":
            if words[1:] and words[1] in ("test", "ablations"):
                seen.add(words[1])
                continue
            flags = words[1:]
        elif "sear.py" in words:
            flags = words[words.index("sear.py") + 1:]
        elif "rewards.py" in words:
            rewards.parse(words[words.index("rewards.py") + 1:])
            seen.add("judge")
            continue
        else:
            assert words[1:2] == ["evaluate.py"], words
            continue
        if "--resume" in flags:
            continue  # needs the folder; test_run.py resumes
        sear.parse(flags)
        seen.add("train")
    assert {"train", "test", "judge"} <= seen and "`./train.sh ablations`" in README
    assert "./train.sh test" in (ROOT / ".ci/run").read_text()


def test_the_judge_file_of_the_readme_is_one(tmp_path):
    (tmp_path / "judge.json").write_text(re.search(r"```json\n(.*?)```", README, re.S)[1])
    spec = guards.read_spec(tmp_path / "judge.json")
    assert [q["read"] for q in spec["ask"]] == ["unsafe", "refusal"] and "{answer}" in spec["messages"][0]["content"]
    assert f"from {rewards.SAFE_ENOUGH} on" in README and f"less than {guards.LEAST_MASS} of the probability" in README
    for label in rewards.RESPONSE_LABELS:
        assert f"`{label}`" in README


def test_train_sh_trains_through_torchrun_and_passes_exit_codes_on(tmp_path):
    def train(*flags):
        return subprocess.run(["./train.sh", *flags], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True,
                              timeout=150, stdin=subprocess.DEVNULL)
    done = train(*SHORT, "--out", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    assert "| refuses harmful | harmful |" in done.stdout and (tmp_path / "run/model/config.json").exists()
    bad = train("--steps", "-1")
    assert bad.returncode == 2 and bad.stderr.strip() == "sear.py: --steps must be a number, at least 0, got -1"


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_train_sh_hands_signals_to_the_workers(tmp_path, number, code):
    process = subprocess.Popen(["./train.sh", *SHORT, "--steps", "4000", "--out", str(tmp_path / "run")], cwd=ROOT,
                               env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                               start_new_session=True)
    log, end = tmp_path / "run/metrics.jsonl", time.time() + 100
    while not (log.exists() and log.read_text()) and time.time() < end:
        time.sleep(0.05)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code and "stopped and saved" in errors and "Traceback" not in errors


def test_the_results_table_is_what_the_code_made_of_the_runs():
    for folder, objectives in (("results", sear.OBJECTIVES), ("results/rare-talk", ("sear", "outcome"))):
        runs = {}
        for line in (ROOT / folder / "rows.jsonl").read_text().splitlines():
            row = json.loads(line)
            key = (row["objective"], row["seed"])
            runs.setdefault(key, dict(objective=key[0], seed=key[1], rows=[]))["rows"].append(row)
        assert set(runs) == {(o, s) for o in objectives for s in (1, 2, 3)}
        made = evaluate.table(evaluate.columns_of(list(runs.values())))
        assert made == (ROOT / folder / "table.md").read_text().strip()
        assert folder != "results" or made == re.search(r"<!-- results -->\n(.*?)\n<!-- /results -->", README, re.S)[1].strip()
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", README):
        assert (ROOT / picture).read_bytes().startswith(b"\x89PNG")
    assert "results/tradeoff.png" in README and "results/curves.png" in README


def test_figures_in_the_text():
    d = sear.CHECKPOINT_DEFAULTS
    assert (d["learning_rate"], d["beta"], d["temperature"], d["max_new_tokens"]) == (1e-6, 0.001, 0.6, 4096)
    assert "learning rate 1e-6, β 0.001, temperature 0.6, 4,096 new tokens" in README
    assert (len(alchemy.REAGENTS), len(alchemy.HAZARDS), alchemy.CHAIN) == (20, 4, 5)
    assert "20 reagents, 4 of them hazards" in README and "names five reagents" in README
    assert "one prompt in ten is held out" in README


def test_what_ranks_cost_is_computed_by_the_formulas_of_the_readme():
    shown = re.search(r"<!-- ranks -->\n(.*?)\n<!-- /ranks -->", README, re.S)[1]
    assert shown == ranks_table()
    for formula in ("22 P", "20 P / N + the larger of 2 B + 4 R + 2 H", "12 R + 10 B / L", "· 8 P",
                    "[2 B + 8 R + M (6 B + 4 R + 4 P)]"):
        assert formula in README
    assert f"within {parallel.SILENCE + 2 * parallel.PULSE + 1:.0f} seconds" in README


def test_the_start_model_is_as_small_as_the_readme_says(world):
    assert 0.275e6 < sum(p.numel() for p in Transformer.from_scratch(world[0], 1).parameters()) < 0.285e6
    assert "0.28 M parameters" in README


def test_file_map_and_house_rules():
    listed = re.search(r"## 4. The files\n\n```\n(.*?)```", README, re.S)[1]
    named = [line.split()[0] for line in listed.splitlines()]
    assert named[:len(CORE)] == [f"{m}.py" for m in CORE]
    assert all((ROOT / name).exists() for name in named)
    for path in [ROOT / f"{m}.py" for m in CORE] + sorted((ROOT / "kernels").glob("*.py")):
        source = path.read_text()
        assert source.count("\n") <= 450, path
        assert max(map(len, source.split("\n"))) <= 110, path
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 60, (path, node.name)
            assert not (isinstance(node, ast.ExceptHandler) and node.type is None), path


def test_imports_point_one_way():
    order = {"data": 0, "kernels": 0, "parallel": 1, "model": 2, "checkpoint": 2, "rollout": 3, "alchemy": 4, "guards": 4,
             "judges": 5, "rewards": 6, "evaluate": 7, "inputs": 8, "sear": 9}
    for name in CORE:
        for node in ast.walk(ast.parse((ROOT / f"{name}.py").read_text())):
            found = [a.name for a in node.names] if isinstance(node, ast.Import) else (
                [node.module or ""] if isinstance(node, ast.ImportFrom) else [])
            for module in found:
                if module in order:
                    assert order[module] < order[name], f"{name} imports {module}"
    for path in (ROOT / "kernels").glob("*.py"):
        assert not re.search(rf"^(from|import) ({'|'.join(CORE)})\b", path.read_text(), re.M), path


def test_equations_have_the_numbers_of_the_readme():
    numbered = re.findall(r"^\*\*\((\d)\)\*\*", README, re.M)
    assert numbered == list("1234567")
    code = {m: (ROOT / f"{m}.py").read_text() for m in ("rewards", "sear")}
    for n in "2345":
        assert re.search(rf"# \({n}\)", code["rewards"]), n
    assert "Equation (1)" in code["rewards"] and "# (6)" in code["sear"] and "# (7)" in code["sear"]
    assert Path(ROOT / "requirements.txt").read_text().startswith("torch==2.13.0\n")
