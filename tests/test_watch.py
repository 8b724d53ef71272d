"""Watchers of metrics.jsonl, and the table of its keys."""
import json
import re
import sys
from unittest.mock import Mock, call

import pytest
from helpers import ROOT, logged, main
from test_run import SMALL

import inputs
from lib import checkpoint, watch

FAKE = '''
calls = []
def init(**given):
    calls.append(given)
def log(values, step):
    calls.append((step, values))
'''


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Packages that only write down what they are sent."""
    for name in watch.WATCHERS:
        (tmp_path / f"{name}.py").write_text(FAKE)
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(tmp_path)


@pytest.fixture(scope="module")
def run(start, tmp_path_factory):
    """A run without a watcher."""
    out = tmp_path_factory.mktemp("watch") / "run"
    flags = [*SMALL, "--eval-prompts", 0, "--model", start]
    assert main(*flags, "--out", out) == 0
    return flags, out


@pytest.mark.parametrize("name", ["trackio", "wandb"])
def test_each_row_is_sent_and_a_resumed_run_is_the_same_one(run, tmp_path, installed, name):
    flags, whole = run
    out = tmp_path / "run"
    assert main(*flags, "--steps", 3, "--log", name, "--out", out) == 0
    begun, *sent = sys.modules[name].calls
    assert begun["project"] == "sear" and begun["config"]["group_size"] == 2 and begun["resume"] == "allow"
    assert [step for step, _ in sent] == [0, 1, 2]
    row = checkpoint.rows(out / "metrics.jsonl")[1]
    assert sent[1][1] == watch.flat(row) and sent[1][1]["seconds/learn"] == row["seconds"]["learn"]
    assert sent[1][1]["skipped"] == 0.0 and "step" not in sent[1][1] and None not in sent[1][1].values()
    watch.watcher(name, out, {}, 3)
    assert sys.modules[name].calls[-1]["name"] == begun["name"] and out.name in begun["name"]


def test_tensorboard_drops_the_steps_that_a_resumed_run_takes_again(tmp_path, monkeypatch):
    module = Mock()
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    send = watch.watcher("tensorboard", tmp_path, {}, 7)
    send({"step": 7, "kl": 0.5, "helpful": None, "zero_spread": {"thought": 1.0}})
    writer = call.SummaryWriter()
    assert module.mock_calls == [
        call.SummaryWriter(tmp_path / "tensorboard", purge_step=7), writer.add_scalar("kl", 0.5, 7),
        writer.add_scalar("zero_spread/thought", 1.0, 7), writer.flush()]


def test_no_watcher_is_imported_unless_asked_for_and_none_changes_the_run(run, tmp_path, installed):
    flags, whole = run
    assert main(*flags, "--steps", 0, "--out", tmp_path / "run") == 0
    assert not sys.modules.keys() & {*watch.WATCHERS, "torch.utils.tensorboard"}
    assert main(*flags, "--log", "trackio", "--out", tmp_path / "sent") == 0
    assert logged(whole) == logged(tmp_path / "sent")


@pytest.mark.parametrize("name", watch.WATCHERS)
def test_a_missing_package_is_one_sentence_before_the_run_folder_exists(tmp_path, capsys, monkeypatch, name):
    monkeypatch.setattr(inputs, "find_spec", lambda name: None)
    assert main("--log", name, "--out", tmp_path / "run") == 2
    sentence, = capsys.readouterr().err.splitlines()
    assert f"--log {name} should be an installed package (pip install {name})" in sentence
    assert not (tmp_path / "run").exists()


def test_the_table_of_the_docs_has_each_key_of_a_row_in_its_order(run):
    table = re.findall(r"^\| `(\S+)` \|(.*)\|$", (ROOT / "docs/metrics.md").read_text(), re.M)

    def names(row, prefix=""):
        for key, value in row.items():
            yield from names(value, f"{key}/") if isinstance(value, dict) else [prefix + key]
    for row in checkpoint.rows(run[1] / "metrics.jsonl"):
        assert sorted(names(row)) == sorted(key for key, _ in table)
    assert all(len(cells.split(" | ")) == 3 and all(map(str.strip, cells.split(" | "))) for _, cells in table)
    assert json.loads((run[1] / "config.json").read_text())["log"] == ""
