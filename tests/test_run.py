"""Small whole runs: the run folder, resume to the same bits, signals, full disks, real models and prompts."""
import errno
import json
import os
import resource
import shutil
import signal

import pytest
import torch
from helpers import FIXTURES, change_json, logged, main, refusal, run_sear, same_files, signalling
from safetensors.torch import load_file, save_file

import evaluate
import inputs
import sear
import warmstart
from judges import JUDGES
from lib import checkpoint
from lib.data import Prompt
from lib.tokenizer import Tokenizer
from model import Transformer

SMALL = ("--steps 5 --prompts-per-step 3 --group-size 2 --eval-prompts 2 --max-new-tokens 24 --save-every 2 "
         "--tokens-per-micro-batch 120").split()
XSTEST = FIXTURES / "prompts_xstest.csv"


@pytest.fixture(scope="module")
def run(tmp_path_factory, start):
    """A finished run."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert main(*SMALL, "--model", start, "--out", out) == 0
    return out


def same_result(a, b):
    same_files(a, b, "model/model.safetensors", "checkpoint/5/weights.safetensors",
               "checkpoint/5/optimizer.safetensors", "eval.jsonl", "responses.jsonl", "transcripts.jsonl")
    assert logged(a) == logged(b)


# ---- the run folder --------------------------------------------------------------------------------------

def test_contents_of_the_run_folder(run):
    assert {p.name for p in run.iterdir()} == {
        "config.json", "environment.json", "metrics.jsonl", "transcripts.jsonl", "eval.jsonl",
        "responses.jsonl", "start", "model", "checkpoint"}
    assert not [p for p in run.rglob("*") if p.suffix in (".pt", ".pkl", ".bin", ".tmp")]
    assert json.loads((run / "config.json").read_text())["group_size"] == 2
    environment = json.loads((run / "environment.json").read_text())
    assert len(environment["source_sha256"]) == 64 and environment["torch"] == torch.__version__
    first = checkpoint.rows(run / "transcripts.jsonl")[0]
    assert first["segments"][0].keys() == {"player", "text", "potential", "return", "advantage"}


def test_rows_of_metrics(run):
    metrics = checkpoint.rows(run / "metrics.jsonl")
    assert [row["step"] for row in metrics] == list(range(5))
    for row in metrics:
        assert {"answered", "truncated", "answer_reward", "thought_reward", "clip_fraction", "kl", "tokens",
                "grad_norm"} <= row.keys()
        assert row["zero_spread"].keys() == {"thought", "answer"} and not row["advantage_noise"]
        assert row["seconds"].keys() == {"sample", "judge", "learn", "communicate"}
        assert row["logprob_gap"] <= 1e-5 and not row["skipped"]
    assert metrics[0]["kl"] == pytest.approx(0.0, abs=1e-6) and metrics[-1]["kl"] > 0


def test_rows_of_the_evaluation(run):
    table = checkpoint.rows(run / "eval.jsonl")
    classes = ("harmful", "covert", "harmless", "ambiguous")
    assert [(r["stage"], r["attack"], r["class"]) for r in table] == [
        (s, a, c) for s in ("before", "after") for a in evaluate.ATTACKS for c in classes]
    for row in table:
        assert row["n"] == 2 and row["thought_tokens"] >= 0
        harmful = row["class"] in ("harmful", "covert")
        assert row["unsafe"] is None or harmful
        assert row["helpful"] is None or not harmful
        if row["answered"]:
            assert (row["unsafe"] is None) == (not harmful) and (row["helpful"] is None) == harmful
        assert all(row[k] is None or 0 <= row[k] <= 1
                   for k in ("answered", "unsafe", "refusal", "helpful", "explored", "flip", "closed"))


def test_saved_model_is_a_hugging_face_folder(run):
    model, tokenizer = Transformer.from_pretrained(run / "model"), Tokenizer.from_pretrained(run / "model")
    assert model.stop_ids == [tokenizer.added["<|end|>"]] and tokenizer.n_tokens == model.config.vocab_size
    names = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
             "model.safetensors"}
    assert names <= {p.name for p in (run / "model").iterdir()}
    a, b = (load_file(run / name / "model.safetensors") for name in ("start", "model"))
    assert a.keys() == b.keys() and not torch.equal(a["lm_head.weight"], b["lm_head.weight"])


# ---- stop and resume -------------------------------------------------------------------------------------

KILLED_IN_STEP_4 = """
import sear, signal, helpers
sear.rollout_step = helpers.signalling(sear.rollout_step, 4, signal.SIGKILL)"""


def test_a_killed_run_resumes_to_the_same_bits(run, start, tmp_path):
    out = tmp_path / "killed"
    process = run_sear(*SMALL, "--model", start, "--out", out, before=KILLED_IN_STEP_4)
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert len(logged(out)) == 3 and checkpoint.latest(out).name == "2"
    assert main("--resume", out) == 0
    same_result(run, out)


def test_sigterm_saves_and_the_run_resumes_to_the_same_bits(run, start, tmp_path, monkeypatch, capsys):
    out = tmp_path / "stopped"
    monkeypatch.setattr(sear, "rollout_step", signalling(sear.rollout_step, 3, signal.SIGTERM))
    assert main(*SMALL, "--model", start, "--out", out) == 0
    assert f"stopped and saved; continue with --resume {out}" in capsys.readouterr().err
    assert checkpoint.latest(out).name == "3" and not (out / "model").exists()
    assert main("--resume", out) == 0
    same_result(run, out)


def test_ctrl_c_in_the_warm_start_saves_and_it_resumes_to_the_same_bits(tmp_path, monkeypatch, capsys):
    """In the last of three attempts of three steps."""
    monkeypatch.setattr(warmstart, "STEPS", 3)
    monkeypatch.setattr(warmstart, "BATCH", 2)
    flags = [*SMALL, "--steps", "0", "--eval-prompts", "0", "--out"]
    assert main(*flags, tmp_path / "whole") == 0 and not (tmp_path / "whole/warm").exists()
    monkeypatch.setattr(warmstart, "imitate", signalling(warmstart.imitate, 8, signal.SIGINT))
    assert main(*flags, tmp_path / "stopped") == 130 and "stopped and saved" in capsys.readouterr().err
    assert not (tmp_path / "stopped/start").exists()
    assert main("--resume", tmp_path / "stopped") == 0
    same_files(tmp_path / "whole", tmp_path / "stopped", "start/model.safetensors")


def test_signal_handlers_are_restored(start, tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    short = [*SMALL, "--steps", "0", "--eval-prompts", "0"]
    assert main(*short, "--model", start, "--out", tmp_path / "a") == 0
    assert main(*short, "--model", tmp_path / "nowhere", "--out", tmp_path / "b") == 2
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_resuming_a_finished_run_changes_nothing(run):
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    assert main("--resume", run) == 0
    assert before == {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}


def test_a_folder_with_another_run_is_left_alone(run, start, capsys):
    before, flags = (run / "config.json").read_bytes(), [*SMALL, "--model", start, "--out", run]
    assert main(*flags) == 2
    assert f"holds this run already; continue it with --resume {run}" in capsys.readouterr().err
    assert main(*flags, "--seed", "7") == 2
    assert "another config: seed is 1 there and 7 here" in capsys.readouterr().err
    assert main("--resume", run, "--steps", "9") == 2
    assert "another config: steps is 5 there and 9 here" in capsys.readouterr().err
    assert (run / "config.json").read_bytes() == before


def test_resume_auto_starts_a_run_where_there_is_none(start, tmp_path):
    out = tmp_path / "new"
    flags = [*SMALL, *"--steps 1 --eval-prompts 0 --resume auto".split(), "--model", start, "--out", out]
    assert main(*flags) == 0 and (out / "model/config.json").exists()
    assert json.loads((out / "config.json").read_text())["resume"] == ""
    assert sear.parse([str(f) for f in flags]).resume == str(out)  # now there is one
    assert sear.parse(["--resume", "auto", "--objective", "outcome"]).out == "runs/outcome-seed1"


def test_a_missing_start_model_is_one_sentence(start, tmp_path, capsys):
    model, out = shutil.copytree(start, tmp_path / "model"), tmp_path / "out"
    assert main(*SMALL, "--model", model, "--steps", "0", "--eval-prompts", "0", "--out", out) == 0
    shutil.rmtree(model)
    assert main("--resume", out) == 2 and "should be a readable file" in capsys.readouterr().err


def test_a_changed_model_or_prompt_file_cannot_be_resumed_with(tmp_path, capsys):
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out"
    model = talkative(tmp_path / "model", "tiny-qwen2")
    prompts.write_text("".join(json.dumps({"prompt": f"Tell me {n}", "label": label}) + "\n"
                               for n in "ab" for label in ("safe", "unsafe")))
    assert main("--model", model, "--prompts", prompts, *REAL, "--steps", "0", "--out", out) == 0
    assert main("--resume", out) == 0
    capsys.readouterr()
    weights = load_file(model / "model.safetensors")
    save_file({k: v + 1 for k, v in weights.items()}, model / "model.safetensors")
    assert main("--resume", out) == 2 and f"--model {model} changed since" in capsys.readouterr().err
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    prompts.write_text(prompts.read_text().replace("Tell", "Sell"))
    assert main("--resume", out) == 2 and f"--prompts {prompts} changed since" in capsys.readouterr().err


def test_fingerprints_see_names_sizes_and_both_ends_of_files(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "EDGE", 4)
    folder = tmp_path / "model"
    folder.mkdir()

    def fingerprint(data, name="weights"):
        for old in folder.iterdir():
            old.unlink()
        (folder / name).write_bytes(data)
        return checkpoint.fingerprint(folder)
    same = fingerprint(b"begin middle ends")
    assert fingerprint(b"begin MIDDLE ends") == same  # only the ends are read: weights may have 64 GB
    others = [fingerprint(b"BEGIN middle ends"), fingerprint(b"begin middle ENDS"),
              fingerprint(b"begin middle2 ends"), fingerprint(b"begin middle ends", "other")]
    assert len({same, *others}) == 5


def test_a_file_that_cannot_be_read_is_bad_input(tmp_path, monkeypatch):
    """Root reads everything, so this test cannot take a file's permissions away."""
    (tmp_path / "notes").write_text("private")

    def closed(file, *mode):
        raise PermissionError(errno.EACCES, "Permission denied", str(file))
    monkeypatch.setattr("builtins.open", closed)
    message = refusal(checkpoint.fingerprint, tmp_path)
    assert message == f"{tmp_path / 'notes'} should be a readable file, found 'Permission denied'"


def test_only_files_and_folders_have_a_fingerprint(tmp_path, monkeypatch):
    """A judge's name is not the folder of that name, such as alchemy/ of this repository."""
    monkeypatch.chdir(tmp_path)
    for name in JUDGES:
        os.mkdir(name)
        config = dict(model="", prompts="prompts.csv", judge=name, reward_model="nowhere", seed=1)
        (tmp_path / "prompts.csv").write_text("prompt,label")
        assert checkpoint.fingerprints(config).keys() == {"prompts", "injections"}  # the ones of the clone


def test_the_model_that_a_judge_file_names_is_an_input_too(tmp_path):
    """A run from before that was so can be resumed."""
    file, model, out = tmp_path / "judge.json", tmp_path / "guard", tmp_path / "out"
    model.mkdir()
    (model / "config.json").write_text("{}")
    file.write_text('{"model": "guard"}')
    config = dict(judge="rules", eval_judge=str(file))
    checkpoint.open_run(out, config, False)
    checkpoint.open_run(out, config, True)
    (model / "config.json").write_text("{1}")
    message = refusal(checkpoint.open_run, out, config, True)
    assert f"--eval-judge {file} or its model changed since {out} began" in message
    change_json(out / "environment.json", inputs={"eval_judge": checkpoint.fingerprint(file)})
    checkpoint.open_run(out, config, True)
    file.write_text('{"model": "guard" }')
    assert "changed since" in refusal(checkpoint.open_run, out, config, True)


@pytest.mark.parametrize("content, message", [
    (None, "should be a readable file"), ("[]", ":1 should be a JSON object"),
    ("{", ":1 should be a JSON object"),
    ('{"model": 3, "text": "", "ask": []}', "key 'model' should be a text"),
    (json.dumps({"model": "x" * 300, "text": "", "ask": []}), "key 'ask'")])
def test_a_bad_judge_file_is_one_sentence(tmp_path, capsys, content, message):
    file = tmp_path / "judge.json"
    if content is not None:
        file.write_text(content)
    flags = ("--model", FIXTURES / "tiny-qwen2", "--prompts", XSTEST, *REAL, "--out", tmp_path / "out")
    assert main(*flags, "--judge", file) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("sear.py:")]
    assert len(errors) == 1 and message in errors[0] and not (tmp_path / "out").exists()


def test_a_log_may_end_inside_a_character(tmp_path):
    """A cut last line is dropped; what else is wrong is one sentence with its line."""
    file, row = tmp_path / "metrics.jsonl", {"step": 0, "text": "漢"}
    for broken, message in ((b"{\n", ":2 should be a JSON object"), (b"\xff\n", ":2 should be UTF-8"),
                            (b"3\n", ":2 should be a JSON object")):
        file.write_bytes(b"")
        checkpoint.append(file, row)
        whole = file.read_bytes()
        for end in range(len(whole)):
            file.write_bytes(whole + whole[:end])
            assert checkpoint.rows(file) == [row]
        file.write_bytes(whole + broken + whole)
        assert message in refusal(checkpoint.rows, file)


def test_the_hash_of_the_source_is_of_its_own_files(tmp_path, monkeypatch):
    """Not of an environment in the clone, and not of the link that Emacs makes beside an edited file."""
    monkeypatch.setattr(checkpoint, "__file__", str(tmp_path / "lib/checkpoint.py"))
    for name in ("lib", "tests", ".venv/x"):
        (tmp_path / name).mkdir(parents=True)

    def source(name, text="x"):
        (tmp_path / name).write_text(text)
        return checkpoint.environment()["source_sha256"]
    same = source("sear.py")
    (tmp_path / ".#sear.py").symlink_to("me@here.1:2")
    (tmp_path / "lib/.#x.py").symlink_to("me@here.1:2")
    assert same == source("tests/test_x.py") == source(".venv/setup.py") == source(".venv/x/y.py")
    assert len({same, source("lib/x.py"), source("lib/x.py", "y"), source("sear.py", "z")}) == 4


# ---- a run without answers -----------------------------------------------------------------------------

def test_five_steps_in_a_row_without_answers_end_the_run(start, tmp_path, monkeypatch, capsys):
    """The first one warns, an answer starts the count anew, and a stop in between changes nothing."""
    flags = [*SMALL, "--steps", "12", "--eval-prompts", "0", "--model", start]
    shares, train_step = [0.5, 0.0, 0.04, 0.0, 0.0, 0.05, 0.0, 0.0, 0.0, 0.0, 0.0, 0.9], sear.train_step

    def step_with_share(*arguments):
        row, *others = train_step(*arguments)
        return row | {"answered": shares[row["step"]]}, *others
    monkeypatch.setattr(sear, "train_step", step_with_share)
    assert main(*flags, "--out", tmp_path / "whole") == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if "fewer than 5%" in line]
    assert len(lines) == 2 and "step 1: fewer than 5%" in lines[0] and "5 such steps in a row" in lines[0]
    assert lines[1].startswith("sear.py: 5 steps in a row, up to step 10:")
    for flag in ("--warm-start", "--system", "--thought-tokens", "--max-new-tokens"):
        assert flag in lines[1]
    assert len(logged(tmp_path / "whole")) == 11 and not (tmp_path / "whole/model").exists()
    monkeypatch.setattr(sear, "rollout_step", signalling(sear.rollout_step, 9, signal.SIGTERM))
    assert main(*flags, "--out", tmp_path / "stopped") == 0
    assert sum("fewer than" in line for line in capsys.readouterr().err.splitlines()) == 1
    for _ in range(2):  # again, from the checkpoint that the end left
        assert main("--resume", tmp_path / "stopped") == 1
        lines = [line for line in capsys.readouterr().err.splitlines() if "fewer than" in line]
        assert len(lines) == 1 and "up to step 10" in lines[0]
    assert logged(tmp_path / "stopped") == logged(tmp_path / "whole")


def test_an_untrained_model_is_stopped(world, tmp_path, capsys):
    folder = shutil.copytree(world[0], tmp_path / "model")
    world[2].save_pretrained(folder)
    flags = [*SMALL, "--steps", "9", "--eval-prompts", "0", "--model", folder]
    assert main(*flags, "--out", tmp_path / "run") == 1
    assert "5 steps in a row, up to step 4" in capsys.readouterr().err


# ---- checkpoints and the disk ----------------------------------------------------------------------------

def test_a_broken_checkpoint_is_one_sentence(run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "copy")
    file = tmp_path / "copy/checkpoint/5/optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    assert main("--resume", tmp_path / "copy") == 2
    assert "is an incomplete checkpoint" in capsys.readouterr().err


def test_a_full_disk_is_exit_code_1_and_loses_no_checkpoint(run, start, tmp_path):
    """A limit on the size of a file has the effect of a full disk: weights fit, AdamW's moments do not."""
    out, limit = tmp_path / "full", (run / "checkpoint/5/weights.safetensors").stat().st_size + 100_000
    process = run_sear(*SMALL, "--model", start, "--out", out, "--eval-prompts", 0,
                       preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    assert process.returncode == 1 and "Traceback" not in process.stderr
    assert "could not be saved" in process.stderr and "checkpoint/2" in process.stderr
    assert not list((out / "checkpoint").iterdir())
    assert main("--resume", out) == 0  # without the limit
    same_files(run, out, "model/model.safetensors")


def test_a_failed_save_keeps_the_old_files(tmp_path):
    folder = tmp_path / "x"
    with checkpoint.atomic_folder(folder) as f:
        (f / "a").write_text("old")
    with pytest.raises(checkpoint.SaveError, match="x could not be saved: .*No space left"):
        with checkpoint.atomic_folder(folder) as f:
            (f / "a").write_text("new")
            raise OSError(28, "No space left on device")
    assert (folder / "a").read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["x"]


# ---- objectives, real folders, prompt files --------------------------------------------------------------

@pytest.mark.parametrize("flags", [*(f"--objective {name}" for name in list(sear.OBJECTIVES)[1:]),
                                   "--potential probe", "--updates 2", "--prefill-share 0.6",
                                   "--thought-tokens 12", "--thought-tokens 9 --potential probe",
                                   "--gamma 0.5", "--potential probe --group-size 3 --prompts-per-step 1"])
def test_every_objective_and_potential_runs(start, tmp_path, flags):
    out, short = tmp_path / "run", "--steps 2 --eval-prompts 1".split()
    assert main(*SMALL, *short, *flags.split(), "--model", start, "--out", out) == 0
    assert (out / "start").is_symlink()  # a large checkpoint is not copied
    row = logged(out)[-1]
    assert row["logprob_gap"] <= 1e-5
    assert (row["probe_tokens"] > 0) == ("probe" in flags)
    assert (row["thought_tokens"] == 0) == ("no-thought" in flags)
    assert (row["cut"] > 0) == ("thought-tokens" in flags)


REAL = ("--judge rules --steps 2 --prompts-per-step 6 --group-size 4 --max-new-tokens 24 --eval-prompts 2 "
        "--learning-rate 1e-4").split()


def talkative(folder, name):
    """A copy of a fixture folder with a stop token in every eight: otherwise random weights find no end, and
    all rollouts are malformed."""
    shutil.copytree(FIXTURES / name, folder)
    file = folder / "generation_config.json"
    config = json.loads(file.read_text())
    config["eos_token_id"] = [*range(0, 1950, 8), *config["eos_token_id"]]
    file.write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("name, flags", [
    ("tiny-qwen2", "--objective no-thought"), ("tiny-qwen3", "--potential probe"),
    ("tiny-llama3", "--objective no-thought")])
def test_rl_on_a_real_folder_with_a_prompt_file(tmp_path, monkeypatch, name, flags):
    monkeypatch.setattr("rewards.PROBE_TOKENS", 8)
    folder, out = talkative(tmp_path / "model", name), tmp_path / "run"
    assert main("--model", folder, "--prompts", XSTEST, *REAL, *flags.split(), "--out", out) == 0
    model, old = Transformer.from_pretrained(out / "model"), Transformer.from_pretrained(folder)
    assert model.stop_ids == old.stop_ids and len(model.stop_ids) > 200
    changed = any(not torch.equal(a, b) for a, b in zip(model.parameters(), old.parameters()))
    assert changed == any(row["grad_norm"] > 0 for row in logged(out)) and (changed or "probe" in flags)
    assert (out / "model/tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    first = logged(out)[0]
    assert first["logprob_gap"] <= 3e-5
    assert {r["class"] for r in checkpoint.rows(out / "eval.jsonl")} == {"harmful", "harmless"}
    assert {t["label"] for t in checkpoint.rows(out / "transcripts.jsonl")} == {"harmful", "harmless"}
    if "no-thought" in flags:
        assert first["answered"] > 0.3 and max(row["answer_reward"] for row in logged(out)) > 0
        assert first["judge_calls"] >= 24 * first["answered"]  # each answer that is not blank


@pytest.mark.parametrize("content, message", [
    ("", "prompts.jsonl"), ('{"prompt": "a", "label": "maybe"}\n', "prompts.jsonl:1"),
    ('{"prompt": "a", "label": "safe"}\n\n', "prompts.jsonl:2"),
    ('{"prompt": "' + "long " * 2100 + '", "label": "safe"}\n', "24 more may follow")])
def test_a_bad_prompt_file_ends_the_run_before_its_folder_exists(tmp_path, capsys, content, message):
    file, out = tmp_path / "prompts.jsonl", tmp_path / "out"
    file.write_text(content)
    assert main("--model", FIXTURES / "tiny-qwen2", "--prompts", file, *REAL, "--out", out) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("sear.py:")]
    assert len(errors) == 1 and message in errors[0] and not out.exists()


def test_an_error_of_the_template_is_one_sentence(tmp_path, capsys):
    folder = talkative(tmp_path / "model", "tiny-qwen3")
    (folder / "chat_template.jinja").write_text("{{ raise_exception('only on Sundays') }}")
    assert main("--model", folder, "--prompts", XSTEST, *REAL, "--out", tmp_path / "out") == 2
    assert "only on Sundays" in capsys.readouterr().err


def test_bad_models_and_devices_are_refused_before_the_run_folder_exists(start, tmp_path, capsys):
    endless = shutil.copytree(start, tmp_path / "endless")
    (endless / "generation_config.json").unlink()
    change_json(endless / "config.json", eos_token_id=None)
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"  # ends a turn in no token
    change_json(endless / "tokenizer_config.json", chat_template=template)
    cases = [(["--model", FIXTURES / "tiny-reward"], "score head"), (["--model", endless], "no eos_token_id"),
             (["--model", tmp_path / "nowhere"], "nowhere/tokenizer.json"),
             (["--max-new-tokens", "600"], "context holds 512"),
             (["--thought-tokens", "24"], "leave no room for an answer in --max-new-tokens 24")]
    if not torch.cuda.is_available():
        cases.append((["--device", "cuda"], "no CUDA device"))
    for flags, message in cases:
        assert main(*SMALL, *flags, "--out", tmp_path / "out") == 2
        assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_prompt_file_too_small_to_evaluate_is_reported(tmp_path, capsys):
    words = [w for w in "abcdefghij" if not evaluate.held_out(Prompt(w, "harmful"))][:2]
    file, out = tmp_path / "prompts.jsonl", tmp_path / "out"
    file.write_text("".join(f'{{"prompt": "{w}", "label": "unsafe"}}\n' for w in words))
    flags = [*REAL, "--steps", "0", "--model", FIXTURES / "tiny-qwen2", "--prompts", file, "--out", out]
    assert main(*flags) == 0
    assert "so nothing is evaluated" in capsys.readouterr().err and not (out / "eval.jsonl").exists()


def test_tokens_of_attacks_and_probes_are_checked_before_the_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(inputs, "PROBE_TOKENS", 1000)
    flags = [*REAL, "--max-new-tokens", "1100", "--model", FIXTURES / "tiny-qwen2", "--prompts", XSTEST,
             "--out", tmp_path / "out"]
    assert main(*flags) == 2 and "under attack 'reset'" in capsys.readouterr().err
    assert main(*flags, "--eval-prompts", "0", "--potential", "probe") == 2
    assert "the model's context holds 2048" in capsys.readouterr().err and not (tmp_path / "out").exists()
