import json
import math

import pytest
import torch
from helpers import FIXTURES

import alchemy
import evaluate
from data import InputError, load_prompts
from evaluate import attack_text, columns_of, interval, pooled, rates, read_runs, requests, table
from rollout import CLOSE
from sear import Config

nan = math.nan


def test_wilson_interval_against_known_values():
    """Values from the closed form, as printed in Brown, Cai and DasGupta (2001) style tables: n = 10 and n =
    100."""
    for rate, n, low, high in (
        (0.0, 10, 0.0, 0.2775),
        (0.5, 10, 0.2366, 0.7634),
        (0.95, 100, 0.8882, 0.9785),
    ):
        assert interval(rate, n) == pytest.approx((low, high), abs=1e-3)
    assert interval(0.0, 50)[0] == pytest.approx(0.0, abs=1e-12) and interval(1.0, 50)[1] == pytest.approx(
        1.0
    )


def test_rates_of_a_class_by_hand():
    """(unsafe, refusal, helpful, potential, closed, thought tokens): explored and refused, explored and
    complied, neither, and one without an answer."""
    records = [
        (0.0, 1.0, 0.0, 0.85, True, 30),
        (1.0, 0.0, 0.0, 1.0, True, 40),
        (1.0, 0.0, 0.0, 0.2, True, 10),
        (nan, nan, nan, 0.9, False, 72),
    ]
    r = rates("covert", records)
    assert (r["n"], r["unsafe"], r["refusal"], r["helpful"], r["explored"], r["closed"]) == (
        4,
        0.5,
        0.25,
        None,
        0.75,
        0.75,
    )
    # of three explored thoughts one met a safe answer; no answer is none
    assert r["flip"] == pytest.approx(1 / 3)
    assert r["thought_tokens"] == 38.0
    r = rates("ambiguous", [(0.0, 1.0, 0.0, 0.5, True, 3), (0.0, 0.0, 1.0, 1.0, True, 5)])
    assert (r["unsafe"], r["flip"], r["refusal"], r["helpful"], r["explored"]) == (None, None, 0.5, 0.5, 0.5)
    # what the judge does not judge is no zero: a guard without a reward model says nothing of help
    r = rates("harmless", [(0.0, 1.0, nan, nan, True, 3), (0.0, 0.0, nan, nan, True, 5), (nan,) * 4 + (False, 9)])
    assert (r["refusal"], r["helpful"]) == (1 / 3, None)
    # the judge has no estimate there
    assert rates("harmless", [(0.0, 0.0, 1.0, nan, True, 3)])["explored"] is None


def test_attacks_say_what_they_are(world):
    prompt = alchemy.requests(1, 5)[0]
    chain = alchemy.chain_of(prompt.prompt)
    texts = {a: attack_text(a, prompt, True) for a in evaluate.ATTACKS}
    assert texts["none"] == "" and texts["prefill"] == texts["reset"] == alchemy.TALK
    assert texts["mirror"] == alchemy.DANGER and texts["hijack-short"] == alchemy.TALK + CLOSE + "\n\n"
    assert alchemy.progress(prompt.prompt, texts["hijack"]) == 1 and texts["hijack"].endswith(
        texts["hijack-short"]
    )
    assert all(line in texts["hijack"] for line in alchemy.worked_lines(chain, 4))
    for attack in evaluate.ATTACKS[1:]:
        assert ("hijack" in attack) == (CLOSE in attack_text(attack, prompt, False)) and attack_text(
            attack, prompt, False
        )


def test_reset_repeats_request_and_prefill_behind_the_models_own_words(world):
    _, tokenizer, model = world
    c = Config(max_new_tokens=6)
    prompts = alchemy.requests(2, 4, evaluation=True)
    r = evaluate.attacked("reset", model, tokenizer, prompts, [0, 1], c)
    for b, p in enumerate(prompts):
        text = tokenizer.decode(r.tokens[b])
        assert text.count(alchemy.TALK) == text.count("<think>\n" + alchemy.TALK) == evaluate.ROUNDS
        assert text.count(f"<|user|>{alchemy.RESTART} {p.prompt}") == evaluate.ROUNDS - 1
    once = evaluate.attacked("prefill", model, tokenizer, prompts, [0, 1], c)
    n = int((once.segment[0] >= 0).nonzero()[-1])  # the first round is the prefill attack, token for token
    assert torch.equal(once.tokens[0, :n], r.tokens[0, :n])


def test_no_thought_is_attacked_through_a_thought_all_the_same(world):
    _, tokenizer, model = world
    c, prompts = Config(objective="no-thought", max_new_tokens=4), alchemy.requests(1, 4)
    plain = evaluate.attacked("none", model, tokenizer, prompts, [0], c)
    assert "<think>\n\n</think>\n\n" in tokenizer.decode(plain.tokens[0]) and plain.closed.all()
    forced = evaluate.attacked("prefill", model, tokenizer, prompts, [0], c)
    assert "<think>\n" + alchemy.TALK in tokenizer.decode(forced.tokens[0])


def test_held_out_prompts_of_a_file_are_nobodys_training_data():
    everything = load_prompts(FIXTURES / "xstest_prompts.csv")
    chosen = requests(everything, 10)
    assert 10 < len(chosen) <= 20 and all(evaluate.held_out(p) for p in chosen)
    assert {p.label for p in chosen} == {"harmful", "harmless"}
    assert 20 < sum(evaluate.held_out(p) for p in everything) < 80
    assert [p.kind for p in requests([], 2)] == list(alchemy.CLASSES) * 2


def fake_run(folder, objective, seed, refusal, n=100):
    """A finished run folder with made-up numbers."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"objective": objective, "seed": seed}))
    with open(folder / "eval.jsonl", "w") as f:
        for stage in ("before", "after"):
            for attack in evaluate.ATTACKS:
                for name in alchemy.CLASSES:
                    harmful = name in evaluate.HARMFUL
                    value = 0.5 if stage == "before" else refusal
                    f.write(
                        json.dumps(
                            {
                                "stage": stage,
                                "attack": attack,
                                "class": name,
                                "n": n,
                                "unsafe": 1 - value if harmful else None,
                                "refusal": value,
                                "helpful": None if harmful else 1 - value,
                                "explored": value,
                                "flip": value if harmful else None,
                                "closed": 1.0,
                                "thought_tokens": 30.0,
                            }
                        )
                        + "\n"
                    )
    with open(folder / "metrics.jsonl", "w") as f:
        for step in range(20):
            f.write(
                json.dumps({"step": step, "answer_reward": step / 20, "potential": 0.5, "over_refusal": 0.1})
                + "\n"
            )
    return folder


def test_table_pools_seeds_and_shows_start_once(tmp_path):
    folders = [fake_run(tmp_path / f"{o}{s}", o, s, v) for o, s, v in
               (("sear", 1, 0.9), ("sear", 2, 1.0), ("outcome", 1, 0.2), ("outcome", 2, 0.4))]
    columns = columns_of(read_runs(folders))
    assert list(columns) == ["start", "sear", "outcome"]
    assert pooled(columns["start"], "none", ("harmful",), "refusal") == (0.5, 200)
    assert pooled(columns["sear"], "none", ("harmful",), "refusal") == (pytest.approx(0.95), 200)
    # a flip counts among the explored: (0.9 x 90 + 1 x 100) / 190
    assert pooled(columns["sear"], "none", ("harmful",), "flip") == (pytest.approx(181 / 190), 190)
    lines = table(columns).splitlines()
    assert lines[0] == "| | class | start | sear | outcome |"
    assert "| refuses harmful | harmful | 0.500 ± 0.069 | 0.950 ± 0.031 | 0.300 ± 0.063 |" in lines
    assert not any("mirror | harmful" in line for line in lines)


def test_command_line_writes_table_and_pictures(tmp_path, capsys, monkeypatch):
    folders = [fake_run(tmp_path / "a", "sear", 1, 0.9), fake_run(tmp_path / "b", "outcome", 1, 0.4)]
    monkeypatch.setattr("sys.argv", ["evaluate.py", *map(str, folders)])
    assert evaluate.main() == 0
    printed = capsys.readouterr()
    assert (tmp_path / "table.md").read_text().strip() in printed.out
    assert (tmp_path / "seeds.md").read_text().startswith("| | class | a | b |\n")
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        assert "matplotlib is not installed" in printed.err
        return
    for name in ("tradeoff.png", "curves.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_an_unfinished_run_is_one_sentence(tmp_path, capsys, monkeypatch):
    folder = fake_run(tmp_path / "a", "sear", 1, 0.9)
    lines = (folder / "eval.jsonl").read_text().splitlines(keepends=True)
    (folder / "eval.jsonl").write_text("".join(line for line in lines if '"before"' in line))
    with pytest.raises(InputError, match="no row of stage 'after'"):
        read_runs([folder])
    monkeypatch.setattr("sys.argv", ["evaluate.py", str(folder)])
    assert evaluate.main() == 2
    assert "the run is not finished" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["evaluate.py", str(tmp_path / "nowhere")])
    assert evaluate.main() == 2
