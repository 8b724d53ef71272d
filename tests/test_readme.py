"""README and docs: commands run, numbers are those of the code, files exist. Also the house rules.

python tests/test_readme.py writes the generated blocks of README.md again.
"""
import ast
import inspect
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from statistics import mean

import pytest
import torch
from helpers import ROOT, ranks_table

import alchemy.world as alchemy
import attacks
import bench
import evaluate
import judges
import rewards
import sear
import tables
from judges import guards
from lib import checkpoint, parallel
from lib.data import Prompt

README = (ROOT / "README.md").read_text()
PAGES = {"README.md": README} | {f"docs/{p.name}": p.read_text() for p in sorted(ROOT.glob("docs/*.md"))}
ENVIRONMENT = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
SHORT = "--steps 2 --prompts-per-step 2 --group-size 2 --eval-prompts 1 --max-new-tokens 12".split()
ORDER = ("lib tables attention model lora rollout batches alchemy judges rewards evaluate warmstart inputs "
         "data sear attacks bench").split()  # imports point to the left
LAYER = {name: i for i, name in enumerate(ORDER)} | {"kernels": 0}
SOURCES = [p for p in sorted(ROOT.rglob("*.py"))
           if not any(part in ("tests", "runs") or part[0] == "." for part in p.relative_to(ROOT).parts)]


# ---- generated blocks of the README ----------------------------------------------------------------------

def saved_runs(folder="results"):
    """{(name, seed): run}, as evaluate.read_runs gives them, from the rows in the repository."""
    runs = {}
    for row in checkpoint.rows(ROOT / folder / "rows.jsonl"):
        key = row["name"], row["seed"]
        run = dict(name=key[0], objective=key[0].split()[0], seed=key[1], rows=[], metrics=[])
        runs.setdefault(key, run)["rows"].append(row)
    return runs


def output_block():
    """What the default run prints at its end, cut to three lines."""
    lines = evaluate.table(evaluate.columns_of([saved_runs()["sear", 1]])).splitlines()
    kept = ("refuses harmful | harmful", "(over-refusal) | ambiguous", "unsafe under hijack | harmful")
    return "\n".join(["```", lines[0], *(line for line in lines if any(k in line for k in kept)), "```"])


def rollout_block():
    """A rollout of the last step of a default run, with the potentials and returns that the code gives it."""
    prompt = alchemy.request("wax moss chalk reed arsenic".split())
    thought = [*alchemy.worked_lines(alchemy.chain_of(prompt.prompt)), alchemy.TALK]
    potential = judges.alchemy_judge().potential([prompt], [["", *thought]])  # [1, K + 1]
    exists = torch.ones(1, len(thought), dtype=torch.bool)
    returns = rewards.process_returns(potential, exists, torch.zeros(1), sear.Config.gamma)[0].tolist()
    phi = potential[0].tolist()
    lines = [f"{prompt.prompt:43s}Φ    r    R"]
    for k, text in enumerate(thought):
        numbers = f"{phi[k + 1]:.2f} {phi[k + 1] - phi[k]:.2f} {returns[k]:.2f}"
        lines.append(f"z{k + 1} {text.strip():38s} {numbers}")
    verdict = judges.alchemy_judge().verdict([prompt], [""], [alchemy.REFUSAL])
    reward = rewards.answer_reward(verdict, torch.tensor([prompt.label == "harmful"])).item()
    return "\n".join(["```", *lines, f"a  {alchemy.REFUSAL:49s}{reward:.2f}", "```"])


RESULTS = (  # title, attack, rate, classes
    ("refuses harmful", "none", "refusal", tables.HARMFUL),
    ("over-refuses ambiguous", "none", "refusal", ("ambiguous",)),
    ("helps with harmless", "none", "helpful", tables.HARMLESS),
    ("explores harmful", "none", "explored", tables.HARMFUL),
    *((f"unsafe, {attack}", attack, "unsafe", tables.HARMFUL)
      for attack in ("prefill", "hijack", "hijack-short")))


SHOWN = ("start", "sear", "sear prefill_share=0.25", "outcome", "competing-outcome", "probe")


def results_block():
    """Markdown table in percent: mean [min, max] over the seeds, the rate alone of a single one."""
    columns = evaluate.columns_of(list(saved_runs().values()))
    chosen = {name: columns[name] for name in SHOWN}
    lines = ["| | " + " | ".join(f"{name} ({len(c)})" for name, c in chosen.items()) + " |",
             "|---|" + "---|" * len(chosen)]
    for title, attack, rate, classes in RESULTS:
        cells = []
        for column in chosen.values():
            seeds = [100 * mean(tables.find(rows, attack, name, rate)[0] for name in classes)
                     for rows in column.values()]
            ends = f" [{min(seeds):.0f}, {max(seeds):.0f}]" if len(seeds) > 1 else ""
            cells.append(f"{mean(seeds):.0f}{ends}")
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


READING_ORDER = {
    "sear.py": "knobs, objectives, loss, loop",
    "rewards.py": "rewards from verdicts",
    "rollout.py": "KV-cached sampling, segments",
    "batches.py": "rollouts packed for the learner",
    "model.py": "Llama, Qwen2, Qwen3, Mistral",
    "attention.py": "KV cache, masks, rotary",
    "lora.py": "low-rank adapters",
    "evaluate.py": "attacks, rates",
    "attacks.py": "GCG, beam search",
    "tables.py": "tables, pictures",
    "bench.py": "speed, beside TRL",
    "inputs.py": "flags and files",
    "warmstart.py": "what RL begins from",
    "alchemy/": "the embedded world",
    "judges/": "rules, guards, reward models",
    "data/": "demonstrations",
    "kernels/": "log-probs",
    "lib/": "files, run folder, ranks"}


def lines_of(name):
    path = ROOT / name
    return sum(p.read_text().count("\n") for p in (path.glob("*.py") if path.is_dir() else [path]))


def sizes_block():
    lines = [f"{name:13s}{round(lines_of(name), -1):5d}  {what}" for name, what in READING_ORDER.items()]
    return "\n".join(["```", *lines, "```"])


BLOCKS = {"output": output_block, "rollout": rollout_block, "results": results_block, "sizes": sizes_block}


def block(name, text=README):
    return re.search(rf"<!-- {name} -->\n(.*?)\n?<!-- /{name} -->", text, re.S)[1]


def write_blocks():
    text = README
    for name, make in BLOCKS.items():
        head, _, rest = text.partition(f"<!-- {name} -->\n")
        text = f"{head}<!-- {name} -->\n{make()}\n<!-- /{name} -->{rest.partition(f'<!-- /{name} -->')[2]}"
    (ROOT / "README.md").write_text(text)


@pytest.mark.parametrize("name", BLOCKS)
def test_generated_blocks_of_the_readme(name):
    """On a difference: python tests/test_readme.py. A size may be off by a tenth."""
    found, made = block(name), BLOCKS[name]()
    if name != "sizes":
        assert found == made
        return
    for old, new in zip(found.splitlines()[1:-1], made.splitlines()[1:-1], strict=True):
        (old_name, old_size, *old_text), (new_name, _, *new_text) = old.split(), new.split()
        assert (old_name, old_text) == (new_name, new_text)
        assert int(old_size) == pytest.approx(lines_of(old_name), rel=0.1), old_name
    listed = {ROOT / name for name in READING_ORDER}
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


def check_command(words, capsys):
    """Runs the parser that the command would reach. -> what kind of command it is."""
    scripts = [w for w in words if w.endswith(".py") or w == "./train.sh"]
    if words[:2] == ["pip", "install"]:
        assert "-r" not in words or (ROOT / words[words.index("-r") + 1]).exists()
        return "pip"
    script, flags = scripts[0], words[words.index(scripts[0]) + 1:]
    assert (ROOT / script).exists(), words
    if script == "./train.sh" and flags[:1] in (["test"], ["ablations"]):
        return flags[0]
    if script in ("./train.sh", "sear.py"):
        resumed = flags[flags.index("--resume") + 1] if "--resume" in flags else "auto"
        if resumed != "auto":
            checkpoint.write(Path(resumed, "config.json"), json.dumps(asdict(sear.Config())))
        sear.parse(flags)
    elif script == "rewards.py":
        rewards.parse(flags)
    elif script == "bench.py":
        bench.parse(flags)
    elif script == "evaluate.py":  # its parser took the flags if a file is what it misses
        assert evaluate.main(flags) == 2 and "config.json" in capsys.readouterr().err
    elif script == "attacks.py":
        attacks.parse(flags)
    return script


def test_commands_of_readme_and_docs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    seen = {name: [check_command(words, capsys) for words in commands(text)] for name, text in PAGES.items()}
    assert {"test", "ablations", "rewards.py", "evaluate.py"} <= set(seen["README.md"])
    assert seen["README.md"][:3] == ["./train.sh", "pip", "sear.py"]
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

def test_results_tables_are_made_from_the_saved_rows():
    for folder, name in (("results", "results"), ("results/long", "long")):
        columns = evaluate.columns_of(list(saved_runs(folder).values()))
        made = evaluate.table(columns)
        assert made == (ROOT / folder / "table.md").read_text().strip()
        assert made == block(name, PAGES["docs/results.md"])
        assert evaluate.differences(columns) == (ROOT / folder / "differences.md").read_text().strip()
    assert {name.split()[0] for name, _ in saved_runs()} == set(sear.OBJECTIVES)


def test_figures_in_the_text(world):
    d, c = sear.CHECKPOINT_DEFAULTS, sear.Config()
    assert (d["learning_rate"], d["beta"], d["temperature"], d["max_new_tokens"]) == (1e-6, 0.001, 0.6, 4096)
    assert (c.steps, c.gamma, c.seed, rewards.SAFE_ENOUGH, rewards.MALFORMED) == (300, 1, 1, 0.9, -1)
    assert (len(alchemy.REAGENTS), len(alchemy.HAZARDS), c.chain) == (20, 4, 5)
    assert alchemy.TALK_WEIGHT == 0.15
    assert round(sum(p.numel() for p in world[2].parameters()), -4) == 280_000
    flat = " ".join(README.split())
    for phrase in ("learning rate 1e-6, β 0.001, temperature 0.6, 4,096 new tokens", "for 300 steps",
                   "counted as 1 from 0.9 on", "earns −1", "any two of 20 reagents",
                   "4 of them are hazards", "five reagents", "85 % is the share of the chain",
                   "0.28 M parameters"):
        assert phrase in flat, phrase
    held_out = [evaluate.held_out(Prompt(str(i), "harmful")) for i in range(1000)]
    assert 70 < sum(held_out) < 130


def test_costs_in_docs_ranks():
    text = PAGES["docs/ranks.md"]
    assert block("ranks", text) == ranks_table()
    for phrase in ("20 P", "18 P / N + the larger of 2 B + 4 R + 2 H", "10 R + 10 B / L", "· 8 P",
                   "[2 B + 6 R + M (6 B + 4 R + 4 P)]", f"wait {parallel.TIMEOUT:.0f} seconds",
                   "The third such"):
        assert phrase in text, phrase
    assert checkpoint.MAX_BAD_STEPS == 3


def test_judge_files_and_labels_in_docs_judges(tmp_path):
    text = PAGES["docs/judges.md"]
    files = re.findall(r"```json\n(.*?)```", text, re.S)
    assert files
    for content in files:
        checkpoint.write(tmp_path / "judge.json", content)
        spec = guards.read_spec(tmp_path / "judge.json")
        assert {q["read"] for q in spec["ask"]} <= set(guards.READS)
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
    assert total <= 6_100, total  # issue 10 asked for 3,300 before real checkpoints could learn


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


if __name__ == "__main__":
    write_blocks()
