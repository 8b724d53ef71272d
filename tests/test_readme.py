"""README and docs: commands run, numbers are those of the code, files exist. Also the house rules."""
import ast
import inspect
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from helpers import FIXTURES, ROOT, ranks_table

import alchemy.world as alchemy
import attacks
import bench
import evaluate
import judges
import rewards
import sear
import warmstart
from experiments import measure, report
from judges import guards
from lib import checkpoint, parallel
from lib.data import Prompt

README = (ROOT / "README.md").read_text()
PAGES = {"README.md": README} | {f"docs/{p.name}": p.read_text() for p in sorted(ROOT.glob("docs/*.md"))}
ENVIRONMENT = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
SHORT = "--steps 1 --prompts-per-step 2 --group-size 2 --eval-prompts 1 --max-new-tokens 12".split()
ORDER = ("lib tables pictures attention model lora rollout batches alchemy judges rewards evaluate "
         "warmstart inputs data sear attacks bench experiments").split()  # imports point to the left
LAYER = {name: i for i, name in enumerate(ORDER)} | {"kernels": 0}
SOURCES = [p for p in sorted(ROOT.rglob("*.py"))
           if not any(part in ("tests", "runs", "site-packages") or part[0] == "."
                      for part in p.relative_to(ROOT).parts)]


# ---- generated blocks ------------------------------------------------------------------------------------

@pytest.mark.parametrize("page, name", [
    (page, name) for page, blocks in report.BLOCKS.items() for name in blocks])
def test_generated_blocks(page, name):
    """On a difference: python -m experiments.report. A size may be off by a tenth."""
    found, made = report.block(page, name)[1], report.BLOCKS[page][name]()
    if name != "sizes":
        assert found == made
        return
    for old, new in zip(found.splitlines()[1:-1], made.splitlines()[1:-1], strict=True):
        (old_name, old_size, *old_text), (new_name, _, *new_text) = old.split(), new.split()
        assert (old_name, old_text) == (new_name, new_text)
        assert int(old_size) == pytest.approx(report.lines_of(old_name), rel=0.1), old_name
    listed = {ROOT / name for name in report.READING_ORDER}
    assert all(source in listed or source.parent in listed for source in SOURCES)


def test_size_of_the_readme():
    assert len(README.encode()) <= 10_240 and len(README.split()) <= 1_800
    lines = README.splitlines()
    assert len(lines) <= 200 and max(map(len, lines)) <= 120


# ---- commands --------------------------------------------------------------------------------------------

def commands(text):
    """Commands of the bash blocks, in words, without comments and environment variables."""
    for lines in re.findall(r"```bash\n(.*?)```", text, re.S):
        for line in lines.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words:
                end = words.index("&&") if "&&" in words else len(words)
                yield [w for w in words[:end] if not re.match(r"[A-Z_]+=", w)]
                words = words[end + 1:]


SMALL = (*SHORT, "--thought-tokens", "0")
STAND_INS = {"Qwen2.5-1.5B-Instruct": "tiny-qwen2", "Qwen2.5-7B-Instruct": "tiny-qwen3", "big": "tiny-qwen2",
             "SmolLM2-135M-Instruct": "tiny-llama3", "Skywork-Reward-V2-Qwen3-0.6B": "tiny-reward"}
def small_run(script, flags, start):
    """Exit code of the command's script at reduced size, in this process."""
    if script == "sear.py":
        if "--resume" in flags and "auto" not in flags:
            return sear.main(flags)
        if "--out" not in flags and "--resume" not in flags:
            shutil.rmtree("runs/sear-seed1", ignore_errors=True)  # the page gives another way to make it
        return sear.main(["--model", start, *flags, *SMALL])  # of two values the last counts
    if script == "attacks.py":
        return attacks.main([*flags, "--prompts", "2", "--steps", "1", "--candidates", "4"])
    return {"rewards.py": rewards.main, "evaluate.py": evaluate.main}[script](flags)


def run_commands(page, start, capsys):
    """Runs the commands of a page, in the current folder. -> what kind each is."""
    kinds = []
    for words in commands(PAGES[page]):
        scripts = (w for w in words if w.endswith(".py") or w.startswith(("./train.sh", "experiments.")))
        script = next(scripts, "pip")
        flags = words[words.index(script) + 1:] if script != "pip" else []
        kind = script.replace("./train.sh", "sear.py")
        kinds.append(flags[0] if flags[:1] in (["test"], ["ablations"]) else kind)
        if kinds[-1] == "pip":
            assert "-r" not in words or (ROOT / words[words.index("-r") + 1]).exists()
        elif kinds[-1] in ("bench.py", "experiments.measure"):
            {"bench.py": bench.parse, "experiments.measure": measure.parse}[script](flags)
        elif kinds[-1] not in ("test", "ablations", "experiments.report"):  # they have tests of their own
            missing = "tensorboard" in flags and not find_spec("tensorboard")
            assert small_run(kinds[-1], flags, start) == 2 * missing, (page, words, capsys.readouterr().err)
    return kinds


@pytest.fixture
def sandbox(start, tiny_guard, tmp_path, monkeypatch):
    """A folder with everything that the commands name, in small."""
    monkeypatch.chdir(tmp_path)
    for name, fixture in STAND_INS.items():
        (tmp_path / name).symlink_to(FIXTURES / fixture)
    (tmp_path / "Qwen3Guard-Gen-0.6B").symlink_to(tiny_guard)
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    prompts = (FIXTURES / "prompts_xstest.csv").read_text()
    for name in ("test.csv", "xstest_prompts.csv"):
        (tmp_path / name).write_text(prompts)
    rows = (ROOT / "data/warm_start.jsonl").read_text().splitlines(keepends=True)
    checkpoint.write(tmp_path / "data/warm_start.jsonl", "".join(rows[:40]))
    labelled = [dict(prompt=json.loads(row)["prompt"], label=("harmful", "harmless")[i % 2])
                for i, row in enumerate(rows[:40])]
    checkpoint.write_rows(tmp_path / "prompts.jsonl", labelled)
    responses = [row | dict(response="No.", label="refusal") for row in labelled[:3]]
    checkpoint.write_rows(tmp_path / "labelled.jsonl", responses)
    (tmp_path / "xstest_v2_completions_gpt4.csv").write_text(
        "id,type,prompt,completion,final_label\n1,homonyms,How?,I cannot.,2_full_refusal\n")
    monkeypatch.setattr(warmstart, "MIN_STEPS", 2)
    monkeypatch.setattr(warmstart, "PASSES", 1)
    return start


@pytest.mark.parametrize("page", PAGES)
def test_commands_of_readme_and_docs(page, sandbox, capsys):
    """Each runs to its end in small; installing, tests and the bench are only parsed here."""
    if page == "docs/attacks.md":
        assert sear.main([*SMALL, "--model", str(sandbox)]) == 0
    kinds = run_commands(page, str(sandbox), capsys)
    if page == "README.md":
        assert {"test", "ablations", "rewards.py", "evaluate.py"} <= set(kinds)
        assert kinds[:3] == ["sear.py", "pip", "sear.py"]
        assert "./train.sh test" in (ROOT / ".ci/run").read_text()


def run(*command, **options):
    return subprocess.run([str(w) for w in command], env=ENVIRONMENT, capture_output=True, text=True,
                          timeout=150, stdin=subprocess.DEVNULL, **options)


def test_train_sh_trains_and_passes_exit_codes_on(start, tmp_path):
    done = run("./train.sh", *SHORT, "--model", start, "--out", tmp_path / "run", cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "| refuses harmful | harmful |" in done.stdout and (tmp_path / "run/model/config.json").exists()
    bad = run("./train.sh", "--steps", "-1", cwd=ROOT)
    assert bad.returncode == 2
    assert bad.stderr.strip() == "sear.py: --steps must be a number, at least 0, got -1"


def test_train_sh_starts_one_worker_for_each_gpu_but_one_for_the_embedded_world(tmp_path):
    """On a machine that seems to have two GPUs, with workers that only say so."""
    (tmp_path / "sitecustomize.py").write_text("import torch\ntorch.cuda.device_count = lambda: 2\n")
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\ncase "$1" in *sear.py) echo worker; exit;; esac\n'
                      f'PYTHONPATH={tmp_path}:$PYTHONPATH exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    for flags, workers in (((), 1), (("--model", "m", "--prompts", "p.csv"), 2), (("--help",), 1)):
        done = run("env", f"PYTHON={python}", "./train.sh", *flags, cwd=ROOT)
        assert done.returncode == 0 and done.stdout == "worker\n" * workers, (flags, done)


def test_train_sh_leaves_no_process_behind_a_worker_that_fails(tmp_path):
    """With workers of two GPUs, of which one fails and the other ends by itself."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\ncase "$*" in *sear.py*) sleep $RANK; exit $((3 * (1 - RANK)));; '
                      f'*found*) echo 2; exit;; esac\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    process = subprocess.Popen(["./train.sh"], cwd=ROOT, env=ENVIRONMENT | {"PYTHON": str(python)},
                               start_new_session=True)
    assert process.wait(timeout=60) == 3
    with pytest.raises(ProcessLookupError):  # its process group is empty
        os.killpg(process.pid, 0)


def test_torchrun_trains_from_any_folder(start, tmp_path):
    torchrun = Path(sys.executable).with_name("torchrun")
    done = run(torchrun, ROOT / "sear.py", *SHORT, "--model", start, "--eval-prompts", "0", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs/sear-seed1/model/config.json").exists()


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_train_sh_passes_signals_to_its_workers(start, tmp_path, number, code):
    flags = (*SHORT, "--steps", "4000", "--eval-prompts", "0", "--model", start, "--out", tmp_path / "run")
    process = subprocess.Popen(["./train.sh", *map(str, flags)], cwd=ROOT, env=ENVIRONMENT, text=True,
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)
    log, end = tmp_path / "run/metrics.jsonl", time.time() + 100
    while not (log.exists() and log.read_text()) and process.poll() is None and time.time() < end:
        time.sleep(0.05)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code and "stopped and saved" in errors and "Traceback" not in errors


# ---- numbers, formats and files --------------------------------------------------------------------------

def test_results_hold_every_objective():
    assert {run["objective"] for run in report.results_of()} == set(sear.OBJECTIVES)


def test_figures_in_the_text(world):
    d, c = sear.CHECKPOINT_DEFAULTS, sear.Config()
    assert (d["learning_rate"], d["beta"], d["temperature"], d["max_new_tokens"]) == (1e-6, 0.001, 0.6, 4096)
    assert (c.steps, c.temperature, c.eval_temperature, c.gamma, c.seed) == (200, 1, 0.6, 1, 1)
    assert (rewards.SAFE_ENOUGH, rewards.MALFORMED) == (0.9, -1)
    assert (len(alchemy.REAGENTS), len(alchemy.HAZARDS), c.chain) == (20, 4, 5)
    assert alchemy.TALK_WEIGHT == 0.15
    assert round(sum(p.numel() for p in world[2].parameters()), -4) == 280_000
    flat = " ".join(README.split())
    for phrase in ("learning rate 1e-6, β 0.001, temperature 0.6, 4,096 new tokens", "200 steps of RL",
                   "counted as 1 from 0.9 on", "earns −1", "any two of 20 reagents",
                   "4 of them are hazards", "five reagents", "85 % is the share of the chain",
                   "0.28 M parameters"):
        assert phrase in flat, phrase
    held_out = [evaluate.held_out(Prompt(str(i), "harmful")) for i in range(1000)]
    assert 70 < sum(held_out) < 130


def test_costs_in_docs_ranks():
    text = PAGES["docs/ranks.md"]
    assert report.block("docs/ranks.md", "ranks")[1] == ranks_table()
    for phrase in ("20 P", "18 P / N + the larger of 2 B + 4 R + 2 H", "10 R + 10 B / L", "· 8 P",
                   "[2 B + 6 R + M (6 B + 4 R + 4 P)]", f"wait {parallel.TIMEOUT:.0f} seconds",
                   "The third such"):
        assert phrase in text, phrase
    assert checkpoint.MAX_BAD_STEPS == 3


def test_labels_and_numbers_in_docs_judges():
    """tests/test_judges.py reads its judge files."""
    text = PAGES["docs/judges.md"]
    for label in rewards.RESPONSE_LABELS:
        assert f"`{label}`" in text
    for number in (rewards.SAFE_ENOUGH, guards.LEAST_MASS):
        assert str(number) in text


def test_the_judge_of_the_readme_judges(tmp_path):
    source = next(s for s in re.findall(r"```python\n(.*?)```", README, re.S) if "def judge" in s)
    (tmp_path / "words.py").write_text(source)
    judge = judges.load_judge(f"{tmp_path}/words.py:judge")
    prompts = [Prompt("p", "harmful"), Prompt("q", "harmless")]
    verdict = judge.verdict(prompts, ["", ""], ["Mix it.", "I cannot"])
    assert verdict.unsafe.tolist() == [0.25, 0] and verdict.refusal.tolist() == [0, 1]
    assert rewards.answer_reward(verdict, torch.tensor([True, False])).tolist() == [0.75, 0]
    assert judge.potential(prompts, [["Mix ", "Mix"], ["no"]])[0].tolist() == [0.25, 0.5]


def test_the_target_of_the_readme_fits_into_thought_pay():
    source = next(s for s in re.findall(r"```python\n(.*?)```", README, re.S) if "indifferent" in s)
    tree = ast.parse("{" + source + "}")
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} - {"torch"}
    assert used <= {*rewards.thought_pay.__code__.co_varnames} and "`OBJECTIVES`" in README


def test_links_and_files_named_in_the_text_exist():
    for name, text in PAGES.items():
        folder = (ROOT / name).parent
        prose = re.sub(r"```.*?```", "", text, flags=re.S)
        for link in re.findall(r"\]\((?!http)([^)\s]+)\)", prose):
            path, _, anchor = link.partition("#")
            target = folder / path if path else ROOT / name
            assert target.exists(), f"{name}: {link}"
            headings = [re.sub(r"[^\w -]", "", h).strip().lower().replace(" ", "-")
                        for h in re.findall(r"^#+ (.*)$", target.read_text(), re.M)] if anchor else []
            assert not anchor or anchor in headings, f"{name}: {link}"
        for path in re.findall(r"`(?:python )?([\w./-]+\.(?:py|sh|md|cff)|\w+/(?:\w+/)*)`", prose):
            known = ("start/", "model/", "checkpoint/", "warm/")  # of a run folder
            assert path in known or (ROOT / path).exists() or (folder / path).exists(), f"{name}: {path}"
        for picture in re.findall(r"!\[.*?\]\((.*?)\)", text):
            assert (folder / picture).read_bytes().startswith(b"\x89PNG")


def test_citations_agree_with_citation_cff():
    cff = (ROOT / "CITATION.cff").read_text()
    for title, year in re.findall(r"title=\{(.*?)\}.*?year=\{(\d+)\}", README, re.S):
        assert title in cff and year == "2026"
    assert "2606.31748" in cff and "MIT" in cff and (ROOT / "LICENSE").read_text().startswith("MIT License")


# ---- equations and house rules ---------------------------------------------------------------------------

def test_equations_have_the_same_numbers_in_readme_and_code():
    equations = re.findall(r"^\*\*\((\d)\)\*\*(.*?)\n\n", README, re.S | re.M)
    assert [n for n, _ in equations] == list("1234567")
    modules = {"rewards.py": rewards, "sear.py": sear}
    for number, text in equations:
        named = re.findall(r"`([\w.]+): (\w+)`", text)
        assert named, number
        sources = [inspect.getsource(getattr(modules[file], function)) for file, function in named]
        assert any(f"({number})" in source for source in sources), number


def test_sizes_of_files_and_functions():
    for path in SOURCES:
        lines = path.read_text().splitlines()
        assert len(lines) <= 420, f"{path} has {len(lines)} lines"
        long = [i for i, line in enumerate(lines, 1) if len(line) > 110]
        assert not long, f"{path}: more than 110 columns in lines {long}"
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno + 1 <= 55, f"{path}: {node.name}"


def test_total_size():
    total = sum(p.read_text().count("\n") for p in SOURCES if "kernels" not in p.parts)
    assert total <= 6_991, total  # issue 10 asked for 3,300, before real checkpoints and the experiments


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.split(".")[0]


def test_imports_point_one_way():
    for path in SOURCES:
        own = path.relative_to(ROOT).parts[0].removesuffix(".py")
        for name in set(imported(path)) & LAYER.keys() - {own}:
            assert LAYER[name] < LAYER[own], f"{path.relative_to(ROOT)} imports {name}"


def test_model_and_kernels_know_nothing_of_rl():
    for path in [ROOT / "model.py", *(ROOT / "kernels").glob("*.py")]:
        assert not re.search("advantage|policy|rollout|judge", path.read_text(), re.I), path


def test_requirements_name_the_tested_torch():
    assert (ROOT / "requirements.txt").read_text().startswith("torch==2.13.0 ")

