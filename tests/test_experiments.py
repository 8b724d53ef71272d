"""The runs behind results/: planned, run several at a time, continued, measured, reported."""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict

import pytest
import torch
from helpers import ROOT

import attacks
import pictures
import sear
from experiments import ablations, measure, report
from lib import checkpoint
from tables import read_results, read_runs


@pytest.fixture(scope="module")
def folder(start, tmp_path_factory):
    """Start models in place of those that take a minute each."""
    out = tmp_path_factory.mktemp("ablations")
    for seed in (1, 2):
        (out / f"start-seed{seed}").mkdir()
        for name in ("start", "model"):
            (out / f"start-seed{seed}" / name).symlink_to(start)
    return out


@pytest.fixture(scope="module")
def runs(start, tmp_path_factory):
    """A finished run of each of two objectives."""
    out = tmp_path_factory.mktemp("runs")
    for name in ("sear", "outcome"):
        assert sear.main([*ablations.QUICK, "--objective", name, "--model", str(start), "--out",
                          str(out / f"{name}-hot-seed1")]) == 0
    return out


def test_the_plan_covers_the_grid(tmp_path):
    starts, tables = ablations.plan(ablations.EXPERIMENTS, tmp_path)
    names = {e.name for e in ablations.EXPERIMENTS}
    assert set(sear.OBJECTIVES) <= names and len(names) == len(ablations.EXPERIMENTS)
    assert len({run.folder for runs in tables.values() for run in runs}) == sum(
        e.seeds for e in ablations.EXPERIMENTS)
    made = {str(run.folder / "start") for run in starts}
    for table, runs in tables.items():
        assert all(run.flags[run.flags.index("--model") + 1] in made for run in runs)
        assert all(("--chain" in run.flags) == (table == "long") for run in runs)


def test_columns_have_the_names_of_the_experiments(tmp_path):
    """With one finished run of each, made up from the flags of the plan."""
    chosen = [e._replace(seeds=1) for e in ablations.EXPERIMENTS]
    tables = ablations.plan(chosen, tmp_path)[1]
    for run in (run for runs in tables.values() for run in runs):
        checkpoint.write(run.folder / "config.json", json.dumps(asdict(sear.parse([*run.flags]))))
        checkpoint.write_rows(run.folder / "eval.jsonl", [dict(stage="after")])
        (run.folder / "model").mkdir()
    for table, runs in tables.items():
        if table != "early":  # of which no table is made
            found = [run["name"] for run in read_runs([run.folder for run in runs])]
            assert found == [e.name.removesuffix(f" {e.table}") for e in chosen if e.table == table]


def test_runs_are_stopped_continued_and_compared(folder, capsys):
    """SIGTERM while the first run works; the same command finishes it."""
    # Sixty steps, so that the run is not over before the signal reaches it.
    flags = [*ablations.QUICK, "--steps", "60", "--seeds", "1", "--out", str(folder), "--only", "sear"]
    process = subprocess.Popen([sys.executable, "-m", "experiments.ablations", *flags], cwd=ROOT, text=True,
                               stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"})
    end = time.time() + 60
    while not (folder / "sear-seed1/config.json").exists() and time.time() < end:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 0 and "the same command continues" in errors and "Traceback" not in errors
    assert not ablations.finished(folder / "sear-seed1")
    assert ablations.main(flags) == 0
    printed = capsys.readouterr().out
    assert "default world" in printed and "| start | sear |" in printed
    assert ablations.finished(folder / "sear-seed1")
    assert len(checkpoint.rows(folder / "sear-seed1/metrics.jsonl")) == 60
    assert [run["name"] for run in read_results(folder / "results")] == ["sear"]


def test_a_run_that_fails_is_named(folder, capsys):
    """In this process, but for the run itself."""
    (folder / "no-thought-seed1").mkdir()
    (folder / "no-thought-seed1/config.json").write_text('{"steps": 2, "chain": 99}')
    assert ablations.main(["--quick", "--only", "no-thought", "--out", str(folder)]) == 1
    run = folder / "no-thought-seed1"
    assert f"ablations: {run} failed, see {run}.log" in capsys.readouterr().err
    assert "--chain must be between 2 and 14, got 99" in (folder / "no-thought-seed1.log").read_text()


@pytest.mark.parametrize("flags, message", [
    (["--only", "sears"], "--only should be experiments that --help lists, found ['sears']"),
    (["--out", __file__], f"--out {__file__} should be a folder, found 'a file'"),
    (["--seeds", "0"], "--seeds should be above 0, found 0"),
    (["--jobs", "-1"], "--jobs should be above 0, found -1"),
    (["--steps", "-1"], "--steps must be a number, at least 0, got -1"),
    (["--quick", "--stepz", "3"], "unrecognized arguments: --stepz 3"),
    (["--seed", "3"], "flags for all runs should be none that the experiments set themselves")])
def test_bad_flags(flags, message, capsys):
    assert ablations.main(flags) == 2
    assert message in capsys.readouterr().err


def test_a_place_that_cannot_be_written_to_is_one_sentence(capsys):
    assert ablations.main(["--quick", "--only", "sear", "--out", f"{__file__}/x"]) == 1
    assert "could not be saved: [Errno 20] Not a directory" in capsys.readouterr().err


@pytest.mark.parametrize("what, rows", [
    ("attacks", 2 * 3 * 2), ("opponents", 4), ("gradients", 2 + 3), ("credit", 1)])
def test_measurements(what, rows, runs, tmp_path, monkeypatch):
    """In small; the second call adds nothing."""
    for name, value in dict(DRAWS=2, REQUESTS=2, PROMPTS=2, GROUP_SIZES=(2,)).items():
        monkeypatch.setattr(measure, name, value)
    for search in attacks.STEPS:
        monkeypatch.setitem(attacks.STEPS, search, 2)
    flags = [what, "--runs", str(runs), "--out", str(tmp_path)]
    assert measure.main(flags) == 0
    found = checkpoint.rows(tmp_path / f"{what}.jsonl")
    assert len(found) >= rows
    assert measure.main(flags) == 0 and checkpoint.rows(tmp_path / f"{what}.jsonl") == found
    for row in found:
        assert all(0 <= row[key] <= 1 for key in ("unsafe", "product", "potential") if key in row)
        assert row.get("variance", 1) > 0


def test_the_variance_of_a_gradient_that_is_the_same_in_each_draw_is_0(runs, monkeypatch):
    monkeypatch.setattr(measure, "DRAWS", 3)
    monkeypatch.setattr(measure, "gradient", lambda *a: torch.tensor([3.0, 4.0]))
    for row in measure.gradients(runs / "sear-hot-seed1", "start", 2, False):
        assert (row["variance"], row["signal"]) == (0, 25)


def test_the_report_leaves_pages_as_they_are(tmp_path, monkeypatch, capsys):
    """What it writes is what stands there, and a page without its markers is not touched."""
    for name in ("README.md", "docs", "results"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(report, "lines_of", lambda name: 0)
    monkeypatch.setattr(pictures, "pyplot", lambda: None)
    before = {page: (tmp_path / page).read_text() for page in report.BLOCKS}
    assert report.main() == 0
    for page, text in before.items():
        now = (tmp_path / page).read_text()
        if page == "README.md":
            now, text = (re.sub(r"<!-- sizes -->.*<!-- /sizes -->", "", t, flags=re.S) for t in (now, text))
        assert now == text, page
    broken = before["docs/attacks.md"].replace("<!-- /beam -->", "")
    (tmp_path / "docs/attacks.md").write_text(broken)
    assert report.main() == 2 and "the markers <!-- beam -->" in capsys.readouterr().err
    assert (tmp_path / "docs/attacks.md").read_text() == broken


def test_measurements_without_runs(tmp_path, capsys):
    assert measure.main(["opponents", "--runs", str(tmp_path)]) == 2
    assert "a folder of finished runs of ./train.sh ablations" in capsys.readouterr().err
