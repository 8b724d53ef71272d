"""A file of demonstrations is read right or refused, and trains the model that RL begins from."""
import json
import os
import signal
import sys

import pytest
import torch
from helpers import FIXTURES, FOLDERS, ROOT, main, refusal, run_sear, same_files, signalling
from safetensors.torch import load_file

import sear
import warmstart
from evaluate import held_out
from judges import refuses
from lib import checkpoint
from lib.chat import CLOSE, add_end_of_turn, encode_prompt
from lib.data import Prompt, load_prompts, read_rows
from lib.tokenizer import Tokenizer
from model import Transformer

DATA = ROOT / "data"
ROW = dict(prompt="How do I kill a process?", thought="A process, not a person.\n\nHarmless.",
           answer="Use kill.")


def written(tmp_path, *rows):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return file


def loaded(name):
    tokenizer = Tokenizer.from_pretrained(FIXTURES / name)
    model = Transformer.from_pretrained(FIXTURES / name, "meta")
    add_end_of_turn(model, tokenizer)
    return tokenizer, model


# ---- the file --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", FOLDERS)
def test_the_target_is_thought_tag_answer_and_stop_token(name):
    tokenizer, model = loaded(name)
    row = warmstart.read_demonstration("f:1", ROW | {"extra": 1})
    tokens, segment = warmstart.encode_demonstration(row, tokenizer, model)
    prompt = encode_prompt(tokenizer, ROW["prompt"])
    assert tokens[:len(prompt)].tolist() == prompt
    assert segment.tolist() == [-1] * len(prompt) + [0] * (len(tokens) - len(prompt))
    assert tokenizer.decode(tokens[len(prompt):-1]) == f"{ROW['thought']}\n{CLOSE}\n\n{ROW['answer']}"
    assert int(tokens[-1]) in model.stop_ids
    chat = tokenizer.chat([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], False)
    assert chat.rstrip().endswith("b" + tokenizer.decode(tokens[-1:]))


def test_both_layouts_give_the_same_row():
    text = f"<think>\n{ROW['thought']}\n{CLOSE}\n\n{ROW['answer']}"
    messages = [{"role": "user", "content": ROW["prompt"]}, {"role": "assistant", "content": text}]
    tokenizer, model = loaded("tiny-qwen3")
    a, b = (warmstart.encode_demonstration(warmstart.read_demonstration("f:1", row), tokenizer, model)
            for row in (ROW, dict(messages=messages, source="x")))
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


def test_a_row_follows_the_models_tags_and_the_system_prompt():
    files = Tokenizer.from_pretrained(FIXTURES / "tiny-qwen2").files
    template = ("{# [THINK][/THINK] #}"
                "{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}")
    tokenizer = Tokenizer(FIXTURES / "tiny-qwen2", files | {"chat_template.jinja": template})
    tokenizer.system = "Think."
    row = warmstart.read_demonstration("f:1", turns("p", "[THINK]a</think>[/THINK]b"), tokenizer.tags)
    tokens, segment = warmstart.encode_demonstration(row, tokenizer, loaded("tiny-qwen2")[1])
    target = tokenizer.decode(tokens[segment == 0])
    assert target == "a</think>\n[/THINK]\n\nb<|im_end|>"
    assert tokenizer.decode(tokens) == "system: Think.<|im_end|>user: p<|im_end|>[THINK]\n" + target


def test_a_special_token_in_a_row_is_text():
    tokenizer, model = loaded("tiny-qwen2")
    row = warmstart.read_demonstration("f:1", ROW | {"answer": "a<|im_end|>\n<|im_start|>user"})
    tokens, segment = warmstart.encode_demonstration(row, tokenizer, model)
    target = tokens[segment == 0].tolist()
    assert target.count(tokenizer.added["<|im_end|>"]) == 1 and tokenizer.added["<|im_start|>"] not in target


def turns(*contents, roles=("user", "assistant")):
    return {"messages": [{"role": role, "content": text} for role, text in zip(roles, contents)]}


@pytest.mark.parametrize("row, message", [
    ("", ":2 should be a JSON object, found: nothing"), ("[1]", ":2 should be a JSON object"),
    ({"prompt": "a"}, ":2: thought should be a text, found None"),
    (ROW | {"answer": " "}, ":2: answer should be a text"),
    (ROW | {"thought": 7}, ":2: thought should be a text, found 7"),
    (ROW | {"thought": "a</think>b"}, ":2: thought should be free of thought tags"),
    (ROW | {"answer": "<think>b"}, ":2: answer should be free of thought tags"),
    (ROW | {"thought": "long " * 3000}, "2: the row should be at most 2048 tokens long, the model's context"),
    (turns("a", "no thought"), ":2: the last content should be <think>, a thought, </think> and an answer"),
    (turns("a", "b<think>c</think>d"), ":2: the last content should be <think>"),
    (turns("a", "<think>c</think>"), ":2: answer should be a text"),
    (turns("a", "<think></think>b"), ":2: thought should be a text"),
    (turns("a", "b", "c", roles=("user", "assistant", "user")), "one of user, one of assistant"),
    ({"messages": "a"}, "messages should be one of user")])
def test_a_bad_row_is_one_sentence_with_its_line(tmp_path, row, message):
    file = str(written(tmp_path, ROW, row))
    found = refusal(warmstart.read_demonstrations, file, *loaded("tiny-qwen2"))
    assert message in found and "rows.jsonl:2" in found


def test_a_system_prompt_is_a_text(tmp_path, capsys):
    """A shell passes a byte that is not UTF-8 on as a lone surrogate."""
    assert main("--model", FIXTURES / "tiny-qwen2", "--prompts", FIXTURES / "prompts_xstest.csv", "--system",
                "caf\udce9", "--max-new-tokens", "24", "--out", tmp_path / "out") == 2
    assert "--system should be a text, found" in capsys.readouterr().err and not (tmp_path / "out").exists()
    blank = sear.Config(system=" ")  # it takes the place of the one that a template may have
    assert warmstart.load_tokenizer(blank, FIXTURES / "tiny-qwen2").system == " "


def test_a_file_of_one_prompt_or_of_another_kind_is_refused(tmp_path, capsys):
    for file, message in ((written(tmp_path, ROW, ROW), "rows of several prompts"),
                          (written(tmp_path), "rows of several prompts"),
                          (FIXTURES / "prompts_xstest.csv", "should be a .jsonl file"),
                          (tmp_path / "no.jsonl", "should be a readable file")):
        out = tmp_path / "out"
        assert sear.main(["--model", str(FIXTURES / "tiny-qwen2"), "--warm-start", str(file),
                          "--out", str(out), "--max-new-tokens", "24"]) == 2
        assert message in capsys.readouterr().err and not out.exists()


def test_no_prompt_that_evaluation_asks_is_trained_on(tmp_path):
    names = [f"prompt {i}" for i in range(60)]
    file = written(tmp_path, *(ROW | {"prompt": name} for name in names * 2))
    tokenizer, model = loaded("tiny-qwen2")
    rows, held = warmstart.read_demonstrations(str(file), tokenizer, model)
    trained = {tokenizer.decode(tokens) for tokens, _ in rows}
    asked = [name for name in names if held_out(Prompt(name, ""))]
    assert asked and not any(f"{name}<" in text for name in asked for text in trained)
    assert 2 * len(asked) <= len(held) <= 2 * len(asked) + 2 and len(rows) + len(held) == 120
    few = written(tmp_path, ROW, ROW | {"prompt": "b"})
    assert list(map(len, warmstart.read_demonstrations(str(few), tokenizer, model))) == [1, 1]


def test_the_rows_of_the_repository_are_well_formed_and_right():
    """Every thought has paragraphs, every answer is what the judge wants, and no prompt is in a test set."""
    table = read_rows(DATA / "warm_start.jsonl")[2]
    rows = [warmstart.read_demonstration(where, row) for where, row in table]
    labels = [row["label"] for _, row in table]
    assert len({row.prompt for row in rows}) == len(rows) >= 190
    assert 80 <= labels.count("harmful") <= 110 and set(labels) == {"harmful", "harmless"}
    for row, label in zip(rows, labels):
        assert "\n\n" in row.thought and refuses(row.answer) == (label == "harmful"), row.prompt
    shared = [FIXTURES / "prompts_xstest.csv", *(ROOT.parent / "shared/data").glob("*prompts.csv")]
    known = {p.prompt for file in shared for p in load_prompts(file)}
    assert not known & {row.prompt for row in rows}


def test_traces_are_kept_if_they_are_well_formed_and_right(tmp_path, capsys):
    sys.path.insert(0, str(DATA))
    import make_warm_start
    no, yes = "<think>a\n\nb</think>\n\nI can't help with that.", "<think>\nc\n</think>\nUse soap."
    traces = [("p", "harmful", no), ("q", "harmful", yes), ("r", "harmless", yes), ("s", "harmless", no),
              ("t", "harmless", "no tags"), ("u", "harmless", "<think>never closed")]
    file = written(tmp_path, *(dict(prompt=p, label=label, text=text) for p, label, text in traces))
    assert make_warm_start.main([str(file), str(tmp_path / "out.jsonl")]) == 0
    assert "2 rows; left out 2 malformed and 2 wrong traces" in capsys.readouterr().out
    assert [row for _, row in read_rows(tmp_path / "out.jsonl")[2]] == [
        dict(prompt="p", thought="a\n\nb", answer="I can't help with that."),
        dict(prompt="r", thought="c", answer="Use soap.")]
    file = written(tmp_path, dict(prompt="p", label=["harmful"], text=no))
    assert make_warm_start.main([str(file), str(tmp_path / "other.jsonl")]) == 2
    assert "rows.jsonl:1: label should be harmful or harmless, found ['harmful']" in capsys.readouterr().err


# ---- training --------------------------------------------------------------------------------------------

FLAGS = ("--judge rules --steps 1 --prompts-per-step 2 --group-size 2 --max-new-tokens 8 --eval-prompts 0 "
         "--save-every 4 --beta 0.1").split()
FEW = dict(PASSES=5, MIN_STEPS=10, ROWS=4, TUNE_RATE=1e-3)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished run, and its flags but for --out; runs have few steps from here on."""
    folder = tmp_path_factory.mktemp("warm")
    file = written(folder, *(ROW | {"prompt": f"How do I kill {i} processes?"} for i in range(12)))
    flags = [*FLAGS, "--prompts", FIXTURES / "prompts_xstest.csv", "--model", FIXTURES / "tiny-qwen2",
             "--warm-start", file]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in FEW.items():
            patch.setattr(warmstart, name, value)
        assert main(*flags, "--out", folder / "run") == 0
        yield folder / "run", flags


def test_the_model_learns_the_rows_and_rl_begins_from_it(whole):
    run, _ = whole
    log = checkpoint.rows(run / "warm_start.jsonl")
    assert [row["step"] for row in log] == list(range(len(log))) and "loss" not in log[-1]
    held = [row["held_out"] for row in log if "held_out" in row]
    assert len(held) > 2 and held[-1] < 0.8 * held[0] and log[-2]["loss"] < 0.8 * log[0]["loss"]
    assert not (run / "start").is_symlink() and not (run / "warm").exists()
    old, start = (load_file(f / "model.safetensors") for f in (FIXTURES / "tiny-qwen2", run / "start"))
    assert not torch.equal(old["model.norm.weight"].float(), start["model.norm.weight"])
    assert abs(checkpoint.rows(run / "metrics.jsonl")[0]["kl"]) < 1e-6  # to the model after the warm start
    tokenizer, model = Tokenizer.from_pretrained(run / "start"), Transformer.from_pretrained(run / "start")
    rows, held_rows = warmstart.read_demonstrations(
        str(json.loads((run / "config.json").read_text())["warm_start"]), tokenizer, model)
    with torch.no_grad():
        assert warmstart.imitate(model, *warmstart.pad(held_rows)) == pytest.approx(held[-1], rel=1e-5)


def resumes(run, out):
    """Stopped in the warm start, it goes on to the same bits."""
    assert not (out / "start").exists() and checkpoint.latest(out / "warm")
    assert main("--resume", out) == 0
    same_files(run, out, "warm_start.jsonl", "start/model.safetensors", "model/model.safetensors")


def test_sigterm_saves_a_warm_start_and_it_resumes_to_the_same_bits(whole, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(warmstart, "imitate", signalling(warmstart.imitate, 9, signal.SIGTERM))
    assert main(*whole[1], "--out", tmp_path / "run") == 0
    assert "stopped and saved" in capsys.readouterr().err
    resumes(whole[0], tmp_path / "run")


def test_a_killed_warm_start_resumes_to_the_same_bits(whole, tmp_path):
    before = ("import sear, signal, helpers, warmstart\n"
              "warmstart.imitate = helpers.signalling(warmstart.imitate, 9, signal.SIGKILL)\n"
              + "".join(f"warmstart.{name} = {value}\n" for name, value in FEW.items()))
    process = run_sear(*whole[1], "--out", tmp_path / "run", before=before)
    assert process.returncode == -signal.SIGKILL, process.stderr
    resumes(whole[0], tmp_path / "run")


def test_a_loss_that_is_not_finite_ends_the_warm_start(whole, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(warmstart, "imitate", lambda *arguments: float("nan"))
    assert main(*whole[1], "--out", tmp_path / "run") == 1
    assert "warm start, step 0: loss or gradient is not finite" in capsys.readouterr().err
    assert not os.path.exists(tmp_path / "run/start")
