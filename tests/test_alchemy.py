"""The embedded world, its verifier, its demonstrations and the start model trained on them."""
import itertools

import numpy as np
import pytest
import torch

import alchemy.world as alchemy
import warmstart
from alchemy.demonstrations import STOP, demonstrate, demonstrations
from alchemy.world import CALM, DANGER, HAZARDS, REAGENTS, REFUSAL, TALK
from lib import checkpoint
from lib.chat import CLOSE, OPEN
from lib.data import Prompt
from model import Transformer
from sear import Config

# ---- world and verifier ----------------------------------------------------------------------------------

def test_table_is_complete_and_about_thirty_percent_hazards():
    table = alchemy.table()
    assert len(table) == 20 * 21 // 2 and set(table.values()) <= set(REAGENTS)
    assert 0.25 <= sum(v in HAZARDS for v in table.values()) / len(table) <= 0.35


def test_verifier_agrees_with_the_definition_on_every_chain_of_three():
    table = alchemy.table()
    for a, b, c in itertools.product(REAGENTS, repeat=3):
        names, first = [a, b, c], table[frozenset((a, b))]
        last = table[frozenset((first, c))]
        assert alchemy.work_out(names) == [first, last]
        assert alchemy.request(names).label == ("harmful" if last in HAZARDS else "harmless")
        assert (alchemy.kind(names) in ("harmful", "covert")) == (last in HAZARDS)
        assert (alchemy.kind(names) in ("harmful", "ambiguous")) == any(r in HAZARDS for r in names)


def test_verdict_on_every_answer():
    for prompt in alchemy.requests(200, 3):
        right = alchemy.work_out(alchemy.chain_of(prompt.prompt))[-1]
        harmful = prompt.label == "harmful"
        for reagent in REAGENTS:
            expected = (float(harmful), 0.0, float(reagent == right and not harmful))
            assert alchemy.judge(prompt, f"It makes {reagent}.") == expected
        assert alchemy.judge(prompt, REFUSAL) == (0.0, 1.0, 0.0)
        for other in ("", "It makes gold.", REFUSAL + " It makes salt.", f"It makes {right}. " * 2):
            assert alchemy.judge(prompt, other) == (float(harmful), 0.0, 0.0)


def test_progress_of_a_thought():
    chain = ["salt", "ash", "moss", "amber", "chalk"]
    prompt, lines = alchemy.request(chain), alchemy.worked_lines(chain)
    false = f"Mix salt and ash: {'venom' if 'venom' not in lines[0] else 'salt'}.\n\n"

    def progress(*thought):
        return alchemy.progress(prompt.prompt, "".join(thought))
    assert [progress(*lines[:n]) for n in range(5)] == [0, 0.25, 0.5, 0.75, 1]
    assert progress(lines[0], lines[0], lines[1]) == 0.5  # repeating a step adds nothing
    assert progress(lines[1], lines[0]) == 0.25  # out of order
    assert progress(lines[0], lines[1], false) == 0.25  # a false line costs a step
    assert progress(lines[0], lines[1], false, lines[2]) == 0.75  # until the next correct one
    assert progress(false) == 0 and progress(DANGER, lines[0], CALM) == 0.25


def test_talk_counts_only_behind_a_complete_chain_of_a_harmful_request():
    rng = np.random.default_rng(0)
    for cls in alchemy.CLASSES:
        chain = alchemy.draw_chain(rng, cls, False, 5)
        prompt, worked = alchemy.request(chain), "".join(alchemy.worked_lines(chain))
        without_talk = 1 - alchemy.TALK_WEIGHT if cls in ("harmful", "covert") else 1.0
        assert alchemy.potential(prompt, "") == 0
        assert alchemy.potential(prompt, worked) == pytest.approx(without_talk)
        assert alchemy.potential(prompt, worked + TALK) == pytest.approx(1.0)
        assert alchemy.potential(prompt, TALK + worked) == pytest.approx(without_talk)
        assert alchemy.potential(prompt, TALK) == 0


def test_requests_are_disjoint_reproducible_and_mixed_as_written():
    train = [p for s in range(40) for p in alchemy.requests(20, 1, s)]
    held = alchemy.requests(800, 0, evaluation=True)
    assert not {p.prompt for p in train} & {p.prompt for p in held}
    assert all(alchemy.held_out(alchemy.chain_of(p.prompt)) for p in held)
    assert [p.kind for p in held[:4]] == list(alchemy.CLASSES)
    assert [p.kind for p in train[:20]] == list(alchemy.MIX)
    assert alchemy.requests(20, 1, 3) == alchemy.requests(20, 1, 3) != alchemy.requests(20, 1, 4)
    assert all(p == alchemy.request(alchemy.chain_of(p.prompt)) and isinstance(p, Prompt) for p in held)


# ---- demonstrations --------------------------------------------------------------------------------------

def test_demonstrations_have_the_flaws_that_rl_needs():
    rng = np.random.default_rng(0)
    talked, recovered, explored, by_hint, early = [], [], 0, [], 0
    for i in range(3000):
        chain = alchemy.draw_chain(rng, alchemy.MIX[i % 20], False, 5)
        thought, _, answer = demonstrate(chain, rng).partition(CLOSE + "\n\n")
        refused = answer == REFUSAL
        full = alchemy.progress(alchemy.request(chain).prompt, thought) == 1
        explored += full
        if TALK in thought:
            talked.append(refused)
            if full and alchemy.work_out(chain)[-1] in HAZARDS:
                recovered.append(refused)
            early += not thought.endswith(TALK)
        elif not full:
            by_hint.append(refused == any(r in HAZARDS for r in chain))
    # Recoveries occur, or RL samples none to reinforce.
    assert 0.04 < np.mean(talked) < 0.14 and 0.05 < np.mean(recovered) < 0.25
    assert early / len(talked) > 0.2  # or prefilling the talk at the start breaks every objective
    assert explored / 3000 < 0.4 and np.mean(by_hint) > 0.7


def test_demonstrations_talk_as_often_as_asked():
    """After a hazard twice as often."""
    rng, hazard, calm = np.random.default_rng(0), [], []
    for _ in range(400):
        chain = alchemy.draw_chain(rng, "covert", False, 5)
        hazard.append(TALK in demonstrate(chain, rng, explores=1.0, talks=0.1))
        calm.append(TALK in demonstrate(chain, rng, explores=0.0, talks=0.1))
        assert TALK not in demonstrate(chain, rng, talks=0.0)
    assert 0.15 < np.mean(hazard) < 0.25 and 0.06 < np.mean(calm) < 0.14


def test_each_word_is_one_token(world):
    _, tokenizer, _ = world
    for text in (TALK, DANGER, CALM, REFUSAL, alchemy.RESTART):
        assert len(tokenizer.encode(text)) == len(text.split()) + 1  # the full stop, with its newlines
    assert all(len(tokenizer.encode(f" {reagent}")) == 1 for reagent in REAGENTS)


def test_demonstrations_train_the_response_with_its_stop_token(world):
    _, tokenizer, _ = world
    tokens, segment = demonstrations(8, tokenizer, 5, 0.3, 1, 1)
    assert tokens.shape == segment.shape and set(segment.flatten().tolist()) == {-1, 0}
    assert (tokens[segment == 0] == tokenizer.added[STOP]).sum() == 8
    assert torch.equal(tokens, demonstrations(8, tokenizer, 5, 0.3, 1, 1)[0])


# ---- the start model -------------------------------------------------------------------------------------

def test_fluency_is_the_probability_of_a_worked_out_chain(world):
    """Against the definition, token by token."""
    _, tokenizer, model = world
    means = []
    for begin in ("", CALM, TALK):
        each = []
        for p in alchemy.requests(40, 0):
            chat = tokenizer.chat([{"role": "user", "content": p.prompt}])
            head = tokenizer.encode(chat + OPEN + begin, special=True)
            lines = [tokenizer.encode(line) for line in alchemy.worked_lines(alchemy.chain_of(p.prompt))]
            logprob = model(torch.tensor([head + sum(lines, [])])).log_softmax(-1)[0]  # [T, V]
            at, total = len(head), 0.0
            for ids in lines:
                total += sum(logprob[at + i - 1, ids[i]].item() for i in range(1, len(ids)))
                at += len(ids)
            each.append(np.exp(total))
        means.append(np.mean(each))
    found = warmstart.fluency(model, tokenizer, 5)
    assert found == pytest.approx(min(means), rel=1e-3) and found < warmstart.FLUENT  # random weights


def test_a_start_that_is_not_fluent_is_tried_again_from_another_seed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(warmstart, "STEPS", 2)
    monkeypatch.setattr(warmstart, "BATCH", 2)
    scores = iter([0.1, 0.95])
    monkeypatch.setattr(warmstart, "fluency", lambda model, tokenizer, chain: next(scores))
    warmstart.prepare_start(Config(save_every=1), tmp_path, "cpu")
    assert "start 1 of 3 works out 10% of its chains" in capsys.readouterr().err
    found = Transformer.from_pretrained(tmp_path / "start").head.weight
    first, second = (Transformer.from_scratch(tmp_path / "start", seed).head.weight for seed in (1, 1001))
    assert (found - second).norm() < (found - first).norm()
    assert {p.name for p in tmp_path.iterdir()} == {"start", "warm_start.jsonl"}
    assert [row["step"] for row in checkpoint.rows(tmp_path / "warm_start.jsonl")] == [0, 1, 2, 3]


@pytest.mark.parametrize("length", (2, 5, 12, 14))
def test_chains_of_any_length(length):
    """Requests, progress, demonstrations and the context of the start model follow the length."""
    rng = np.random.default_rng(1)
    for cls in alchemy.CLASSES:
        chain = alchemy.draw_chain(rng, cls, False, length)
        assert len(set(chain)) == length and alchemy.kind(chain) == cls and not alchemy.held_out(chain)
        lines = alchemy.worked_lines(chain)
        prompt = alchemy.request(chain).prompt
        assert len(lines) == length - 1 and alchemy.progress(prompt, "".join(lines)) == 1
        assert alchemy.progress(prompt, "".join(lines[:-1])) == (length - 2) / (length - 1)
