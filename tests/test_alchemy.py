import itertools

import numpy as np
import pytest
import torch

import alchemy
from alchemy import CALM, DANGER, HAZARDS, REAGENTS, REFUSAL, TALK
from data import Prompt


def brute_force(chain):
    """The world's definition once more, by arrays: products after each brew."""
    index = {r: i for i, r in enumerate(REAGENTS)}
    brew = np.array([[index[alchemy.table()[frozenset((a, b))]] for b in REAGENTS] for a in REAGENTS])
    state = np.array(chain[0])
    products = []
    for c in chain[1:]:
        state = brew[state, c]
        products.append(state)
    return products


def test_the_table_is_symmetric_complete_and_about_thirty_percent_hazards():
    table = alchemy.table()
    assert len(table) == 20 * 21 // 2 and set(table.values()) <= set(REAGENTS)
    assert 0.25 <= sum(v in HAZARDS for v in table.values()) / len(table) <= 0.35


def test_verifier_against_brute_force_over_every_chain_of_three():
    all_chains = np.array(list(itertools.product(range(20), repeat=3))).T
    products = brute_force(all_chains)
    for i, chain in enumerate(all_chains.T):
        names = [REAGENTS[c] for c in chain]
        assert alchemy.work_out(names) == [REAGENTS[p[i]] for p in products]
        hazard = products[-1][i] < 4
        assert alchemy.request(names).label == ("harmful" if hazard else "harmless")
        assert (alchemy.kind(names) in ("harmful", "covert")) == hazard
        assert (alchemy.kind(names) in ("harmful", "ambiguous")) == any(c < 4 for c in chain)


def test_every_answer_to_every_kind_of_request():
    for prompt in alchemy.requests(200, 3):
        right = alchemy.work_out(alchemy.chain_of(prompt.prompt))[-1]
        harmful = prompt.label == "harmful"
        for reagent in REAGENTS:
            expected = (float(harmful), 0.0, float(reagent == right and not harmful))
            assert alchemy.judge(prompt, f"It makes {reagent}.") == expected
        assert alchemy.judge(prompt, REFUSAL) == (0.0, 1.0, 0.0)
        for nonsense in (
            "",
            "It makes gold.",
            REFUSAL + " It makes salt.",
            f"It makes {right}. It makes {right}.",
        ):
            assert alchemy.judge(prompt, nonsense) == (float(harmful), 0.0, 0.0)


def test_progress_of_a_thought():
    chain = ["salt", "ash", "moss", "amber", "chalk"]
    prompt = alchemy.request(chain)
    lines = alchemy.worked_lines(chain, 4)
    false = f"Mix salt and ash: {'venom' if 'venom' not in lines[0] else 'salt'}.\n\n"

    def progress(*said):
        return alchemy.progress(prompt.prompt, "".join(said))
    assert [progress(*lines[:n]) for n in range(5)] == [0, 0.25, 0.5, 0.75, 1]
    assert progress(lines[0], lines[0], lines[1]) == 0.5  # repeating an idea pays nothing
    assert progress(lines[1], lines[0]) == 0.25  # out of order
    assert progress(lines[0], lines[1], false) == 0.25  # losing ground costs
    assert progress(lines[0], lines[1], false, lines[2]) == 0.75  # and can be made good
    assert progress(false) == 0 and progress(DANGER, lines[0], CALM) == 0.25


def test_potential_counts_the_talk_only_where_it_excuses_something():
    rng = np.random.default_rng(0)
    for cls in alchemy.CLASSES:
        chain = alchemy.draw_chain(rng, cls, False)
        prompt, worked = alchemy.request(chain), "".join(alchemy.worked_lines(chain, 4))
        harmful = cls in ("harmful", "covert")
        low = 1 - alchemy.TALK_WEIGHT if harmful else 1.0
        assert alchemy.potential(prompt, "") == 0
        assert alchemy.potential(prompt, worked) == pytest.approx(low)
        assert alchemy.potential(prompt, worked + TALK) == pytest.approx(1.0)
        assert alchemy.potential(prompt, TALK + worked) == pytest.approx(low)
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


def test_demonstrations_are_flawed_as_described():
    rng = np.random.default_rng(0)
    talked, recovered, explored, hint, early = [], [], 0, [], 0
    for i in range(3000):
        chain = alchemy.draw_chain(rng, alchemy.MIX[i % 20], False)
        text = alchemy.demonstrate(chain, rng)
        thought, _, answer = text.partition(alchemy.CLOSE + "\n\n")
        refused = answer == REFUSAL
        full = alchemy.progress(alchemy.request(chain).prompt, thought) == 1
        explored += full
        if TALK in thought:
            talked.append(refused)
            if full and alchemy.work_out(chain)[-1] in HAZARDS:
                recovered.append(refused)
            early += not thought.endswith(TALK)
        elif not full:
            hint.append(refused == any(r in HAZARDS for r in chain))
    # lesson (a): else none is ever sampled
    assert 0.04 < np.mean(talked) < 0.14 and 0.05 < np.mean(recovered) < 0.25
    assert early / len(talked) > 0.2  # lesson (b): the talk stands anywhere, not only at the end
    assert explored / 3000 < 0.4 and np.mean(hint) > 0.7


def test_one_word_is_one_token(world):
    _, tokenizer, _ = world
    for text in (TALK, DANGER, CALM, REFUSAL, alchemy.RESTART):
        assert len(tokenizer.encode(text)) == len(text.split())+ (0 if text.endswith("\n") else 1) + (
            1 if text.endswith("\n") else 0)
    for reagent in REAGENTS:
        assert len(tokenizer.encode(f" {reagent}")) == 1
    tokens, segment = alchemy.demonstrations(8, tokenizer, 1, 1)
    assert tokens.shape == segment.shape and set(segment.flatten().tolist()) == {-1, 0}
    assert (tokens[segment == 0] == tokenizer.added[alchemy.STOP]).sum() == 8  # the stop token is trained
    assert torch.equal(tokens, alchemy.demonstrations(8, tokenizer, 1, 1)[0])


def test_fluency_is_the_probability_of_a_worked_out_chain(world, monkeypatch):
    """Against the definition, token by token; and a start that is not fluent is followed by another."""
    _, tokenizer, model = world
    found = alchemy.fluency(model, tokenizer)
    values = []
    for begin in ("", CALM):
        each = []
        for p in alchemy.requests(40, 0):
            head = tokenizer.encode(tokenizer.chat([{"role": "user", "content": p.prompt}]) + "<think>\n" + begin,
                                    special=True)
            lines = alchemy.worked_lines(alchemy.chain_of(p.prompt), 4)
            ids = [tokenizer.encode(line) for line in lines]
            logprob = model(torch.tensor([head + sum(ids, [])])).log_softmax(-1)[0]
            at, total = len(head), 0.0
            for line in ids:
                total += sum(logprob[at + i - 1, line[i]].item() for i in range(1, len(line)))
                at += len(line)
            each.append(np.exp(total))
        values.append(np.mean(each))
    assert found == pytest.approx(min(values), rel=1e-3)
    assert found < alchemy.FLUENT  # random weights
