"""Whole runs, small: the run folder, resume to the bit, signals, full disks, real folders and prompt files."""
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from helpers import FIXTURES, ROOT, run_sear
from safetensors.torch import load_file, save_file

import checkpoint
import evaluate
import sear
from data import Tokenizer
from model import Transformer

SMALL = (
    "--warm-start-steps 12 --warm-start-batch 4 --steps 5 --prompts-per-step 3 --group-size 2 --eval-prompts 2 "
    "--max-new-tokens 24 --save-every 2 --show-every 2 --tokens-per-micro-batch 120"
).split()


def finished(out, *flags):
    """A finished small run, in this process."""
    code = sear.run_once([*SMALL, *flags, "--out", str(out)])
    assert code == 0
    return out


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return finished(tmp_path_factory.mktemp("runs") / "whole")


def rows(run):
    return [
        {k: v for k, v in row.items() if k != "seconds"} for row in checkpoint.rows(run / "metrics.jsonl")
    ]


def same_result(a, b):
    """Weights and optimizer to the bit, logs to the last digit."""
    for name in ("model/model.safetensors", "start/model.safetensors", "checkpoint/5/weights.safetensors",
                 "checkpoint/5/optimizer.safetensors"):
        x, y = load_file(a / name), load_file(b / name)
        assert x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x), name
    assert rows(a) == rows(b)
    for log in ("eval.jsonl", "transcripts.jsonl"):
        assert (a / log).read_text() == (b / log).read_text(), log


def test_the_run_folder_holds_what_the_readme_says(run):
    assert {p.name for p in run.iterdir()} == {
        "config.json",
        "environment.json",
        "metrics.jsonl",
        "transcripts.jsonl",
        "eval.jsonl",
        "start",
        "model",
        "checkpoint",
    }
    assert json.loads((run / "config.json").read_text())["group_size"] == 2
    environment = json.loads((run / "environment.json").read_text())
    assert len(environment["source_sha256"]) == 64 and environment["torch"] == torch.__version__
    metrics = checkpoint.rows(run / "metrics.jsonl")
    assert [row["step"] for row in metrics] == list(range(5))
    for row in metrics:
        assert {
            "answer_reward",
            "thought_reward",
            "kl",
            "logprob_gap",
            "tokens",
            "seconds",
            "grad_norm",
        } <= row.keys()
        assert row["logprob_gap"] <= 1e-5 and row["seconds"].keys() == {"sample", "judge", "learn", "communicate"}
    assert metrics[0]["kl"] == pytest.approx(0.0, abs=1e-6) and metrics[-1]["kl"] > 0
    stages = [(r["stage"], r["attack"], r["class"]) for r in checkpoint.rows(run / "eval.jsonl")]
    classes = ("harmful", "covert", "harmless", "ambiguous")
    assert stages == [(s, a, c) for s in ("before", "after") for a in evaluate.ATTACKS for c in classes]
    keys = {
        "stage",
        "attack",
        "class",
        "n",
        "unsafe",
        "refusal",
        "helpful",
        "explored",
        "flip",
        "closed",
        "thought_tokens",
    }
    for row in checkpoint.rows(run / "eval.jsonl"):
        assert row.keys() == keys and row["n"] == 2
        harmful = row["class"] in ("harmful", "covert")
        assert (row["unsafe"] is None) == (not harmful) and (row["helpful"] is None) == harmful
        assert all(
            row[k] is None or 0 <= row[k] <= 1
            for k in keys - {"stage", "attack", "class", "n", "thought_tokens"}
        )
    first = checkpoint.rows(run / "transcripts.jsonl")[0]
    assert first["segments"][0].keys() == {"player", "text", "potential", "return", "advantage"}
    assert not [p for p in run.rglob("*") if p.suffix in (".pt", ".pkl", ".bin", ".tmp")]


def test_saved_folders_are_hugging_face_folders(run):
    for name in ("start", "model"):
        model, tokenizer = Transformer.from_pretrained(run / name), Tokenizer.from_pretrained(run / name)
        assert model.stop_ids == [tokenizer.added["<|end|>"]]
        assert tokenizer.n_tokens == model.config.vocab_size
        assert {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
                "model.safetensors"} <= {p.name for p in (run / name).iterdir()}
    a, b = (load_file(run / name / "model.safetensors") for name in ("start", "model"))
    assert a.keys() == b.keys() and not torch.equal(a["lm_head.weight"], b["lm_head.weight"])


def wait_for(condition, process, seconds=100):
    end = time.time() + seconds
    while not condition():
        assert process.poll() is None and time.time() < end, process.communicate()
        time.sleep(0.02)


@pytest.mark.parametrize(
    "when, number", [("steps", signal.SIGKILL), ("steps", signal.SIGTERM), ("warm", signal.SIGINT)]
)
def test_stopped_anywhere_and_resumed_to_the_same_bits(run, tmp_path, when, number):
    out = tmp_path / "stopped"
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "sear.py"), *SMALL, "--out", str(out)],
        text=True,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    if when == "steps":
        wait_for(lambda: len(checkpoint.rows(out / "metrics.jsonl")) >= 3, process)
    else:
        wait_for(lambda: any(out.glob(".start*")), process)
    process.send_signal(number)
    _, errors = process.communicate(timeout=100)
    assert process.returncode == {signal.SIGKILL: -9, signal.SIGTERM: 0, signal.SIGINT: 130}[number], errors
    if number != signal.SIGKILL:
        assert "stopped and saved" in errors and not (out / "model").exists()
        assert when == "steps" or not (out / "start").exists()
    assert sear.run_once(["--resume", str(out)]) == 0
    same_result(run, out)


def test_resuming_a_finished_run_changes_nothing(run):
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    assert sear.run_once(["--resume", str(run)]) == 0
    assert before == {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}


def test_a_folder_with_another_run_is_left_alone(run, capsys):
    before = (run / "config.json").read_bytes()
    assert sear.run_once([*SMALL, "--out", str(run)]) == 2
    assert f"holds this run already; continue it with --resume {run}" in capsys.readouterr().err
    assert sear.run_once([*SMALL, "--seed", "7", "--out", str(run)]) == 2
    assert "another config: seed is 1 there and 7 here" in capsys.readouterr().err
    assert sear.run_once(["--resume", str(run), "--steps", "9"]) == 2
    assert "another config: steps is 5 there and 9 here" in capsys.readouterr().err
    assert (run / "config.json").read_bytes() == before


def test_a_broken_checkpoint_is_one_sentence(run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "copy")
    file = tmp_path / "copy/checkpoint/5/optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    assert sear.run_once(["--resume", str(tmp_path / "copy")]) == 2
    assert "is no whole checkpoint" in capsys.readouterr().err


def test_a_full_disk_is_exit_code_1_and_loses_no_checkpoint(run, tmp_path):
    """A limit on the size of a file stands in for the disk: weights fit, the optimizer's state does not."""
    out = tmp_path / "full"
    limit = (run / "checkpoint/5/weights.safetensors").stat().st_size + 100_000
    process = run_sear(*SMALL, "--out", out, "--eval-prompts", 0,
                       preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    assert process.returncode == 1 and "Traceback" not in process.stderr
    assert "could not be saved" in process.stderr and "checkpoint/2" in process.stderr
    assert (out / "start/model.safetensors").exists() and not list((out / "checkpoint").iterdir())
    assert sear.run_once(["--resume", str(out)]) == 0  # room again
    assert torch.equal(load_file(run / "model/model.safetensors")["lm_head.weight"],
                       load_file(out / "model/model.safetensors")["lm_head.weight"])


def test_a_failed_save_leaves_what_was_there(tmp_path):
    folder = tmp_path / "x"
    with checkpoint.whole_folder(folder) as f:
        (f / "a").write_text("old")
    with pytest.raises(checkpoint.SaveError, match="x could not be saved: .*No space left"):
        with checkpoint.whole_folder(folder) as f:
            (f / "a").write_text("new")
            raise OSError(28, "No space left on device")
    assert (folder / "a").read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize(
    "flags",
    (
        "--objective competing-outcome",
        "--objective outcome",
        "--objective safe-thought",
        "--objective no-thought",
        "--potential probe",
        "--updates 2 --ratio segment",
    ),
)
def test_every_objective_and_potential_runs(run, tmp_path, flags):
    out = finished(
        tmp_path / "other",
        "--model",
        str(run / "start"),
        "--steps",
        "2",
        "--eval-prompts",
        "1",
        *flags.split(),
    )
    assert (out / "start").is_symlink()  # nobody wants a checkpoint's gigabytes twice
    row = rows(out)[-1]
    assert row["logprob_gap"] <= 1e-5 or "updates" in flags
    assert (row["probe_tokens"] > 0) == ("probe" in flags)
    assert (row["thought_tokens"] == 0) == ("no-thought" in flags)


def talkative(folder, name):
    """A copy of a fixture that stops every few tokens: a random model else never finds an end, and earns
    nothing."""
    shutil.copytree(FIXTURES / name, folder)
    file = folder / "generation_config.json"
    config = json.loads(file.read_text())
    config["eos_token_id"] = [*range(0, 1950, 8), *config["eos_token_id"]]
    file.write_text(json.dumps(config))
    return folder


REAL = ("--judge rules --steps 2 --prompts-per-step 4 --group-size 2 --max-new-tokens 24 --eval-prompts 2 "
        "--learning-rate 1e-4").split()


@pytest.mark.parametrize(
    "name, flags",
    [
        ("tiny-qwen2", "--objective no-thought"),
        ("tiny-qwen3", "--potential probe"),
        ("tiny-llama3", "--objective no-thought"),
    ],
)
def test_rl_on_a_real_folder_with_xstest(tmp_path, name, flags):
    folder, out = talkative(tmp_path / "model", name), tmp_path / "real"
    assert (
        sear.run_once(
            [
                "--model",
                str(folder),
                "--prompts",
                str(FIXTURES / "xstest_prompts.csv"),
                *REAL,
                *flags.split(),
                "--probe-tokens",
                "8",
                "--out",
                str(out),
            ]
        )
        == 0
    )
    model, old = Transformer.from_pretrained(out / "model"), Transformer.from_pretrained(folder)
    assert model.stop_ids == old.stop_ids and len(model.stop_ids) > 200
    changed = any(not torch.equal(a, b) for a, b in zip(model.parameters(), old.parameters()))
    assert changed == any(row["grad_norm"] > 0 for row in rows(out)) and (changed or "probe" in flags)
    assert (out / "model/tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    assert rows(out)[0]["logprob_gap"] <= 1e-5
    assert {r["class"] for r in checkpoint.rows(out / "eval.jsonl")} == {"harmful", "harmless"}
    assert {t["label"] for t in checkpoint.rows(out / "transcripts.jsonl")} == {"harmful", "harmless"}
    if "no-thought" in flags:
        assert rows(out)[0]["answered"] > 0.3 and max(row["answer_reward"] for row in rows(out)) > 0
        first = rows(out)[0]  # an answer that is a stop token alone says nothing and earns -1
        assert first["judge_calls"] >= 8 * first["answered"] > 2


@pytest.mark.parametrize("content, message", [
    ("", "prompts.jsonl"), ('{"prompt": "a", "label": "maybe"}\n', "prompts.jsonl:1"),
    ('{"prompt": "a", "label": "safe"}\n\n', "prompts.jsonl:2"),
    ('{"prompt": "' + "long " * 2100 + '", "label": "safe"}\n', "24 more may follow"),
])
def test_bad_prompt_files_stop_the_run_before_it_begins(tmp_path, capsys, content, message):
    (tmp_path / "prompts.jsonl").write_text(content)
    code = sear.run_once(
        [
            "--model",
            str(FIXTURES / "tiny-qwen2"),
            "--prompts",
            str(tmp_path / "prompts.jsonl"),
            *REAL,
            "--out",
            str(tmp_path / "out"),
        ]
    )
    errors = capsys.readouterr().err
    assert code == 2 and message in errors and not (tmp_path / "out").exists()  # nothing in the corrected run's way
    assert [line for line in errors.splitlines() if line.startswith("sear.py:")]


def test_a_template_that_refuses_is_one_sentence(tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(FIXTURES / "tiny-qwen3", folder)
    (folder / "chat_template.jinja").write_text("{{ raise_exception('only on Sundays') }}")
    code = sear.run_once(
        [
            "--model",
            str(folder),
            "--prompts",
            str(FIXTURES / "xstest_prompts.csv"),
            *REAL,
            "--out",
            str(tmp_path / "out"),
        ]
    )
    assert code == 2 and "only on Sundays" in capsys.readouterr().err


def test_what_is_no_policy_is_refused_before_a_run_folder_is_made(run, tmp_path, capsys):
    nowhere = shutil.copytree(run / "start", tmp_path / "endless")
    (nowhere / "generation_config.json").unlink()
    config = json.loads((nowhere / "config.json").read_text())
    (nowhere / "config.json").write_text(json.dumps(config | {"eos_token_id": None}))
    for model, message in ((FIXTURES / "tiny-reward", "score head"), (nowhere, "no eos_token_id"),
                           (tmp_path / "nowhere", "nowhere/tokenizer.json")):
        assert sear.run_once([*SMALL, "--model", str(model), "--out", str(tmp_path / "out")]) == 2
        assert message in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert sear.run_once([*SMALL, "--max-new-tokens", "600", "--out", str(tmp_path / "out")]) == 2
    assert "context holds 512" in capsys.readouterr().err and not (tmp_path / "out").exists()
    if not torch.cuda.is_available():
        assert sear.run_once([*SMALL, "--device", "cuda", "--out", str(tmp_path / "out")]) == 2
        assert "no CUDA device" in capsys.readouterr().err


def test_a_start_model_that_went_away_is_one_sentence(run, tmp_path, capsys):
    shutil.copytree(run / "start", tmp_path / "model")
    out = finished(tmp_path / "out", "--model", str(tmp_path / "model"), "--steps", "2", "--eval-prompts", "0")
    shutil.rmtree(tmp_path / "model")
    capsys.readouterr()
    assert sear.run_once(["--resume", str(out)]) == 2
    assert "should be a readable file" in capsys.readouterr().err


def test_a_changed_model_or_prompt_file_cannot_be_resumed_with(tmp_path, capsys):
    model, prompts, out = tmp_path / "model", tmp_path / "prompts.jsonl", tmp_path / "out"
    talkative(model, "tiny-qwen2")
    lines = [json.dumps({"prompt": f"Tell me {n}", "label": label}) for n in "ab" for label in ("safe", "unsafe")]
    prompts.write_text("\n".join(lines) + "\n")
    begin = ["--model", str(model), "--prompts", str(prompts), *REAL, "--steps", "0", "--out", str(out)]
    assert sear.run_once(begin) == 0 and sear.run_once(["--resume", str(out)]) == 0
    capsys.readouterr()
    weights = load_file(model / "model.safetensors")
    save_file({k: v + 1 for k, v in weights.items()}, model / "model.safetensors")
    assert sear.run_once(["--resume", str(out)]) == 2
    assert f"--model {model} is not what it was" in capsys.readouterr().err
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    prompts.write_text(prompts.read_text().replace("Tell", "Sell"))
    assert sear.run_once(["--resume", str(out)]) == 2
    assert "prompts.jsonl is not what it was" in capsys.readouterr().err


def test_a_prompt_file_too_small_to_hold_one_out_is_said(tmp_path, capsys):
    words = [w for w in "abcdefghij" if not evaluate.held_out(sear.Prompt(w, "harmful"))][:2]
    (tmp_path / "prompts.jsonl").write_text("".join(f'{{"prompt": "{w}", "label": "unsafe"}}\n' for w in words))
    code = sear.run_once(["--model", str(FIXTURES / "tiny-qwen2"), "--prompts", str(tmp_path / "prompts.jsonl"),
                          *REAL, "--steps", "0", "--out", str(tmp_path / "out")])
    assert code == 0 and "so nothing is evaluated" in capsys.readouterr().err
    assert not (tmp_path / "out/eval.jsonl").exists()


def test_what_attacks_and_probes_add_is_checked_against_the_context_up_front(tmp_path, capsys):
    long = [*REAL, "--max-new-tokens", "1100", "--model", str(FIXTURES / "tiny-qwen2"), "--prompts",
            str(FIXTURES / "xstest_prompts.csv"), "--out", str(tmp_path / "out")]
    assert sear.run_once(long) == 2 and "under attack 'reset'" in capsys.readouterr().err
    close = [*long, "--eval-prompts", "0", "--potential", "probe", "--probe-tokens", "1000"]
    assert sear.run_once(close) == 2 and "the model's context holds 2048" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_evaluation_can_be_stopped(run):
    model, tokenizer = Transformer.from_pretrained(run / "model"), Tokenizer.from_pretrained(run / "model")
    checkpoint.STOP.append(signal.SIGTERM)
    try:
        with pytest.raises(checkpoint.Stopped):
            evaluate.measure(model, tokenizer, None, evaluate.requests([], 1), sear.Config(), "after")
    finally:
        checkpoint.STOP.clear()
