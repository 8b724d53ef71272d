"""Equations (3), (6) and (7), the gradient of a whole batch, and the command line."""
import dataclasses
import json
import math
import re
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from helpers import ROOT, close, made_rollouts, refusal, within

import alchemy.world as alchemy
import evaluate
import inputs
import sear
from batches import MicroBatch, micro_batch, micro_batches, pack
from judges import Verdict
from lib.chat import CLOSE, encode_prompt
from lib.data import Prompt
from model import Transformer
from rewards import Scores, process_returns, thought_pay
from sear import (
    OBJECTIVES,
    Config,
    TokenCounts,
    accumulate,
    advantages,
    policy_loss,
    token_advantages,
)

nan = math.nan


def credited(objective, scores, harmful, G):
    """Advantages of thought and answer under a named objective."""
    target, credit = OBJECTIVES[objective]
    return sear.player_advantages(credit, thought_pay(target, scores, harmful), scores, G)


def made_scores(potential, answer, harmful, ok=None, gamma=1.0):
    """Scores of B rollouts from the potentials of their thoughts, as rewards.score computes them."""
    B, K = len(potential), max(map(len, potential)) - 1
    ok = torch.tensor([True] * B if ok is None else ok)
    phi = torch.tensor([p + [nan] * (K + 1 - len(p)) for p in potential])
    n_segments = torch.tensor([len(p) - 1 for p in potential])
    exists = torch.arange(K) < n_segments[:, None]
    answer = torch.tensor(answer)
    tail = torch.where(~harmful & ok, answer, 0.0)
    returns = torch.where(exists & ~ok[:, None], -1.0, process_returns(phi, exists, tail, gamma))
    unsafe = torch.where(ok & harmful, 1 - answer, torch.where(ok, 0.0, nan))
    verdict = Verdict(unsafe, torch.zeros(B), answer)
    return Scores(torch.where(ok, answer, -1.0), phi, returns, tail, n_segments, ok, verdict, 0, 0)


# ---- (3) and (6) -----------------------------------------------------------------------------------------

def test_advantages_by_hand():
    answer = torch.tensor([1.0, 0.0, nan, 0.5, 3.0, 3.0, 3.0, 3.0])
    std = math.sqrt((0.25 + 0.25 + 0) / 3)
    assert close(advantages(answer, 4), [0.5 / std, -0.5 / std, 0.0, 0.0, 0, 0, 0, 0])
    assert close(advantages(answer[:, None], 4)[:, 0], advantages(answer, 4))


@pytest.mark.parametrize("value", (0.85, 0.9, 1.85, -1.0, 1e-5, 0.0))
@pytest.mark.parametrize("G", (2, 8, 12))
def test_equal_returns_have_advantage_zero_in_fp32(value, G):
    assert (advantages(torch.full((G,), value), G) == 0).all()
    ragged = torch.full((G, 6), value)
    for b in range(G):
        ragged[b, 1 + b % 6:] = nan
    assert (advantages(ragged, G) == 0).all()


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_group_in_which_all_rollouts_earn_the_same_has_no_advantage(objective):
    """Random thoughts of different lengths with the same last potential and answer, or all malformed."""
    generator = torch.Generator().manual_seed(0)
    for trial in range(60):
        G, value = (4, 8, 12)[trial % 3], (0.85, 1.0, 0.3)[trial % 3]
        harmful = torch.full((G,), trial % 2 == 0)
        malformed = trial % 5 == 0
        lengths = torch.randint(1, 7, (G,), generator=generator).tolist()
        potential = [[0.0, *torch.rand(n - 1, generator=generator).tolist(), value] for n in lengths]
        scores = made_scores(potential, [0.7] * G, harmful, [not malformed] * G)
        thought, answer = credited(objective, scores, harmful, G)
        assert (thought == 0).all() and (answer == 0).all()


def test_dense_credit_compares_segments_that_start_from_the_same_potential():
    """Three rollouts work the chain out, one of them behind an idle line; one makes a mistake halfway."""
    harmful = torch.ones(4, dtype=torch.bool)
    scores = made_scores([[0, 0.5, 1.0], [0, 0.5, 1.0], [0, 0, 0.5, 1.0], [0, 0.5, 0.0]], [1.0] * 4, harmful)
    thought, _ = credited("sear", scores, harmful, 4)
    assert torch.equal(thought[0, :2], thought[1, :2]) and (thought[:2, 2] == 0).all()
    assert close(thought[2, 0], thought[2, 1])  # the idle line changes nothing
    assert (thought[:3][:, 0] > 0).all() and (thought[3, :2] < 0).all() and thought[3, 2] == 0
    # At 0: the pays 1, 1, 1 (twice, as the idle line starts there too), 0, and 0 for stopping there.
    assert thought[0, 0] / thought[0, 1] == pytest.approx((1 - 4 / 6) / (1 - 3 / 4))


def test_stopping_is_compared_with_going_on():
    """Both finish the chain, and one goes on to a last step that pays: the step before it is better."""
    harmful = torch.ones(2, dtype=torch.bool)
    scores = made_scores([[0, 0.85], [0, 0.85, 1.0]], [1.0, 1.0], harmful)
    thought, _ = credited("sear", scores, harmful, 2)
    assert thought[0, 0] < 0 < thought[1, 0] and thought[1, 1] > 0


def test_noise_of_a_judge_is_not_blown_up():
    noise = torch.tensor([1e-5, 2e-5, 3e-5, 4e-5, 1e-5, 1e-5, 1e-5, 4e-5])
    assert advantages(noise, 8).abs().max() < 1e-3
    one = torch.tensor([0.5001] + [0.5] * 7)
    assert advantages(one, 8).abs().max() < 5e-3
    real = torch.tensor([1.0] + [0.85] * 7)  # the smallest difference that the world pays for
    assert advantages(real, 8)[0] > 2


def test_one_endless_thought_costs_its_group_nothing():
    """A matrix over all places of 8 rollouts of 4,000 segments would have 8 GB."""
    returns, state = torch.full((8, 4000), nan), torch.zeros(8, 4000)
    returns[:, :3], state[:, :3] = torch.rand(8, 3), torch.rand(8, 3)
    short = sear.advantages(returns[:, :3], 8, state[:, :3])
    assert torch.equal(sear.advantages(returns, 8, state)[:, :3], short) and short.abs().max() > 0.1


def test_a_rank_without_a_prompt_has_no_advantages():
    assert advantages(torch.zeros(0), 8).shape == (0,) and advantages(torch.zeros(0, 3), 8).shape == (0, 3)
    none = torch.zeros(0)
    assert evaluate.credit_statistics(none, none, torch.zeros(0, 2), 8)["advantage_noise"] == (0, 0)


def test_groups_do_not_see_each_other():
    a, b = torch.rand(8, 3), torch.rand(8, 3) * 100
    assert close(advantages(torch.cat((a, b)), 8), torch.cat((advantages(a, 8), advantages(b, 8))))


def test_what_each_target_pays_the_thought():
    """Rollouts: harmful and safe, harmful and unsafe, harmless and helpful, malformed."""
    harmful = torch.tensor([True, True, False, True])
    scores = made_scores([[0, 0.8], [0, 0.3], [0, 0.6], [0, 0.5]], [1.0, 0.0, 1.0, -1.0], harmful,
                         [True, True, True, False])
    targets = ("process", "outcome", "answer", "safe")
    pay = {target: thought_pay(target, scores, harmful) for target in targets}
    assert close(pay["process"], [0.8, 0.3, 1.6, -1.0])
    assert close(pay["outcome"], [0.0, 1.0, 1.0, -1.0])
    assert close(pay["answer"], [1.0, 0.0, 1.0, -1.0])
    assert close(pay["safe"], [0.2, -0.3, 1.0, -1.0])


def test_how_each_credit_spreads_the_pay():
    harmful = torch.ones(4, dtype=torch.bool)
    potential = [[0, 0.5, 1.0], [0, 0.5, 0.5], [0, 0.0, 0.0], [0, 1.0]]
    scores = made_scores(potential, [1.0, 0.0, 1.0, 0.0], harmful)
    once, answer = credited("process-once", scores, harmful, 4)
    assert (once == once[:, :1]).all()
    assert close(once[:, 0], advantages(torch.tensor([1.0, 0.5, 0.0, 1.0]), 4))
    assert close(answer, advantages(torch.tensor([1.0, 0.0, 1.0, 0.0]), 4))
    shared, answer = credited("process-shared", scores, harmful, 4)
    assert close(shared[:, 0], answer) and close(answer, advantages(torch.tensor([2.0, 0.5, 1.0, 1.0]), 4))
    dense, _ = credited("sear", scores, harmful, 4)
    assert (dense[1, 0] != dense[1, 1]) and (dense[scores.returns.isnan()] == 0).all()


def test_gamma_zero_compares_the_progress_of_single_segments():
    harmful = torch.ones(2, dtype=torch.bool)
    scores = made_scores([[0, 0.5, 1.0], [0, 0.5, 0.5]], [1.0, 1.0], harmful, gamma=0.0)
    thought, _ = credited("sear", scores, harmful, 2)
    assert close(thought[0, 0], thought[1, 0]) and thought[0, 1] > 0 > thought[1, 1]


def test_statistics_of_credit():
    """Two groups: in the first all earn the same and the thought's advantage is noise, in the second not."""
    pay = torch.tensor([0.85] * 4 + [1.0, 0.0, 0.0, 0.0])
    answer = torch.tensor([1.0] * 8)
    thought = torch.tensor([[1.0, -1.0]] * 4 + [[3.0, 3.0]] * 4)
    found = evaluate.credit_statistics(pay, answer, thought, 4)
    assert found == {"zero_spread_thought": (1, 2), "zero_spread_answer": (2, 2),
                     "advantage_noise": (8.0, 32.0)}


def test_the_objectives_are_the_points_of_the_grid():
    assert list(OBJECTIVES) == ["sear", "process-once", "process-shared", "probe", "competing-outcome",
                                "outcome", "safe-thought", "no-thought"]
    assert {o.target for o in OBJECTIVES.values()} == {"process", "outcome", "answer", "safe"}
    assert {o.credit for o in OBJECTIVES.values()} == {"dense", "once", "shared"}


def test_which_player_owns_a_token(world):
    _, tokenizer, model = world
    texts = ["a\n\nb</think>\n\nI$", "a\n\nb$", "a</think>\n\nI"]
    r = made_rollouts(tokenizer, [[1, 2]], texts, model.stop_ids[0], 3)
    thought, answer = r.owners
    assert not (thought & answer).any() and not (thought | answer)[r.segment < 0].any()
    for b in range(3):
        assert torch.equal((thought | answer)[b], r.segment[b] >= 0)
    stop = (r.tokens == model.stop_ids[0]) & (r.segment >= 0)
    assert answer[0][stop[0]].all() and stop[0].sum() == 1  # the stop token belongs to the answer
    tag = tokenizer.added["</think>"]
    assert thought[r.tokens == tag].all()  # the closing tag belongs to the thought
    assert answer[2].sum() == len(tokenizer.encode("I")) and thought[2].any()
    A = token_advantages(r, torch.tensor([[1.0, 2.0]] * 3), torch.tensor([7.0] * 3))
    assert set(A[0][r.segment[0] == 1].tolist()) == {2.0} and set(A[0][r.segment[0] == 2].tolist()) == {7.0}
    assert set(A[0][r.segment[0] == 0].tolist()) == {1.0} and (A[r.segment < 0] == 0).all()


# ---- (7) -------------------------------------------------------------------------------------------------

def tokens_of_a_batch(old, advantage, is_thought, is_answer):
    return MicroBatch(None, None, None, old, advantage, is_thought, is_answer)


def counts(thought, answer, owned):
    return TokenCounts(*map(torch.tensor, (thought, answer, owned)))


def three_tokens(thought_A=(2.0, -1.0), **knobs):
    """Gradient of the loss of three tokens over a vocabulary of three, two of them the thought's."""
    c = Config(**{"beta": 0.0, "answer_weight": 1.0} | knobs)
    logits = torch.tensor([[0.3, -0.2, 0.5], [1.0, 0.0, -1.0], [0.1, 0.2, 0.3]], dtype=torch.float64,
                          requires_grad=True)
    target, A = torch.tensor([0, 2, 1]), torch.tensor([*thought_A, 3.0], dtype=torch.float64)
    thought = torch.tensor([True, True, False])
    logprob = logits.log_softmax(-1).gather(1, target[:, None])[:, 0]
    batch = tokens_of_a_batch(logprob.detach(), A, thought, ~thought)
    policy_loss(logprob, None, batch, counts(2.0, 1.0, 3.0), c)[0].backward()
    onehot = torch.nn.functional.one_hot(target, 3)
    # d(-A log pi) / dz = -A (onehot - p)
    return logits.grad, -(onehot - logits.detach().softmax(-1)) * A[:, None]


def test_the_stop_token_has_a_gradient(world, batch):
    """Only the stop tokens have an advantage: the gradient is not zero, and it raises their log-prob."""
    model, (r, _) = world[2], batch
    stop = (r.tokens == model.stop_ids[0]) & (r.segment >= 0)
    assert stop.any()
    found, _ = gradient(model, r, stop.float())
    assert found.norm() > 1e-3
    head = model.lm_head.weight.grad[model.stop_ids[0]]
    b, t = stop.nonzero()[0].tolist()
    state = model.hidden(r.tokens[b:b + 1, :t])[0, -1]
    assert torch.dot(head, state) < 0  # descent moves the stop token's row towards the state that precedes it


def test_gradient_equals_the_hand_derived_one_for_each_player():
    found, one = three_tokens()
    assert close(found, one / torch.tensor([[2.0], [2.0], [1.0]]), 1e-12)  # two and one token
    found, one = three_tokens(thought_A=(0.0, 0.0))
    assert (found[:2] == 0).all() and close(found[2], one[2], 1e-12)
    found, one = three_tokens(answer_weight=0.0)
    assert (found[2] == 0).all() and close(found[:2], one[:2] / 2, 1e-12)
    found, one = three_tokens(answer_weight=2.0)
    assert close(found, one * torch.tensor([[0.5], [0.5], [2.0]]), 1e-12)


def test_clip_stops_the_gradient_only_in_the_direction_of_the_advantage():
    c, yes, no = Config(beta=0.0, clip=0.2), torch.tensor([True]), torch.tensor([False])
    for shift, A, moves in ((0.5, 1.0, False), (0.5, -1.0, True), (-0.5, 1.0, True), (-0.5, -1.0, False),
                            (0.1, 1.0, True)):
        logprob = torch.tensor([-1.0], requires_grad=True)
        batch = tokens_of_a_batch(logprob.detach() - shift, torch.tensor([A]), yes, no)
        loss, _, clipped = policy_loss(logprob, None, batch, counts(1, 1, 1), c)
        loss.backward()
        assert (logprob.grad.item() != 0) == moves and clipped.item() == (not moves)
        if moves:
            assert logprob.grad.item() == pytest.approx(-A * math.exp(shift))


def test_kl_is_k3_and_pulls_towards_the_reference():
    c, nobody = Config(beta=0.5), torch.tensor([False, False])
    logprob, ref = torch.tensor([-1.0, -2.0], requires_grad=True), torch.tensor([-2.0, -2.0])
    batch = tokens_of_a_batch(logprob.detach(), torch.zeros(2), nobody, nobody)
    loss, kl, _ = policy_loss(logprob, ref, batch, counts(1, 1, 2), c)
    k3 = math.exp(-1.0) + 1.0 - 1.0
    assert kl.item() == pytest.approx(k3 / 2) and loss.item() == pytest.approx(0.5 * k3 / 2)
    loss.backward()
    assert logprob.grad[0] > 0 and logprob.grad[1] == 0  # descent lowers what the reference finds less likely


# ---- the whole gradient ----------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def batch(world):
    """Rollouts of a random model on the world, some well-formed, with advantages."""
    _, tokenizer, model = world
    prompts = [encode_prompt(tokenizer, p.prompt) for p in alchemy.requests(3, 1)]
    texts = [f"a {'b ' * i}\n\nIt makes\n\n{'c' * i}</think>\n\nI cannot help with that.$" for i in range(9)]
    texts += ["never", "closed\n\nat all", "x</think>\n\ncut off"]
    r = made_rollouts(tokenizer, prompts, texts, model.stop_ids[0], 4)
    generator = torch.Generator().manual_seed(0)
    A = token_advantages(r, torch.randn(12, 3, generator=generator), torch.randn(12, generator=generator))
    full = model(r.tokens[:, :-1]).log_softmax(-1).gather(2, r.tokens[:, 1:, None])[..., 0].detach()
    r.logprob[:, 1:] = torch.where(r.segment[:, 1:] >= 0, full, 0.0)
    return r, A


def permuted(r, order):
    fields = {f.name: getattr(r, f.name) for f in dataclasses.fields(r)}
    for name, value in fields.items():
        if isinstance(value, torch.Tensor):
            fields[name] = value[order]
        elif isinstance(value, list) and len(value) == len(order):
            fields[name] = [value[i] for i in order]
    return type(r)(**fields)


def gradient(model, r, A, reference=None, **knobs):
    model.zero_grad()
    logs = accumulate(model, reference, r, A, Config(**{"beta": 0.0} | knobs))
    return torch.cat([p.grad.flatten() for p in model.parameters()]), logs


def test_gradient_does_not_depend_on_micro_batches_or_order(world, batch):
    model, (r, A) = world[2], batch
    reference = Transformer.from_scratch(world[0], seed=6)
    whole, logs = gradient(model, r, A, reference, beta=0.1)
    for budget in (1, 60, 130, 300):
        split, split_logs = gradient(model, r, A, reference, beta=0.1, tokens_per_micro_batch=budget)
        assert within(split, whole, 1e-6)
        for key in logs:  # the logged loss is the optimised one, whatever the split
            assert split_logs[key] == pytest.approx(logs[key], abs=1e-5)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1)).tolist()
    turned, _ = gradient(model, permuted(r, order), A[order], reference, beta=0.1,
                         tokens_per_micro_batch=150)
    assert within(turned, whole, 1e-6)
    assert logs["logprob_gap"] <= 1e-5 and logs["kl"] > 0 and logs["entropy"] > 0


def test_gradient_equals_autograd_on_full_logits(world, batch):
    """The whole path, micro-batches and kernel, against equation (7) written out on [B, T, V] logits."""
    model, (r, A) = world[2], batch
    found, logs = gradient(model, r, A, answer_weight=1.3, tokens_per_micro_batch=100)
    thought, answer = r.owners
    model.zero_grad()
    logprob = model(r.tokens[:, :-1]).log_softmax(-1).gather(2, r.tokens[:, 1:, None])[..., 0]
    loss = (
        -((thought / thought.sum() + 1.3 * answer / answer.sum()) * A)[:, 1:]
        * (logprob - logprob.detach()).exp()
    )
    loss.sum().backward()
    assert within(found, torch.cat([p.grad.flatten() for p in model.parameters()]), 1e-6)
    assert logs["loss"] == pytest.approx(loss.sum().item(), abs=1e-6)


def test_micro_batches_respect_the_budget_and_lose_no_row():
    length = torch.tensor([5, 9, 3, 7, 9, 1])
    for budget in (1, 9, 18, 27, 1000):
        parts = micro_batches(length, budget)
        assert sorted(sum(parts, [])) == list(range(6))
        assert all(len(p) == 1 or len(p) * int(length[p].max()) <= budget for p in parts)
    assert len(micro_batches(length, 1000)) == 1


def test_packed_batches_respect_the_budget_and_lose_no_row(world, batch):
    r, _ = batch
    length, prompt = r.length - r.start + 1, r.prompt.tolist()
    for budget in (1, 60, 150, 400, 10_000):
        batches = pack(r, budget)
        assert sorted(b for blocks in batches for block in blocks for b in block) == list(range(12))
        for blocks in batches:
            rows = sum(blocks, [])
            padded = sum(len(block) * int(length[block].max()) for block in blocks)
            shared = int(r.start.max()) * len({prompt[b] for b in rows})
            assert len(rows) == 1 or padded + shared <= budget
            assert all(length[block].max() <= 1.2 * length[block].min() for block in blocks)
    assert len(pack(r, 10_000)) == 1


def test_little_is_computed_on_padding_and_a_prompt_once():
    """256 rollouts of 32 prompts, of the embedded world's lengths: at most a tenth is padding."""
    generator = torch.Generator().manual_seed(0)
    new = torch.randint(12, 57, (256,), generator=generator)
    segment = torch.full((256, 16 + 57), -1)
    for b, n in enumerate(new.tolist()):
        segment[b, 16:16 + n] = 0
    prompt = torch.arange(256) // 8
    r = SimpleNamespace(segment=segment, prompt=prompt, start=torch.full((256,), 16), length=16 + new,
                        tokens=segment.clamp(min=0), logprob=torch.zeros(segment.shape),
                        owners=(segment == 0, segment == 1))
    (blocks,) = pack(r, 100_000)
    made = micro_batch(r, torch.zeros(segment.shape), blocks, "cpu")
    assert len(made.packed.prompts) == 32 and made.packed.prompts.shape[1] == 15
    assert int(made.owned.sum()) == int(new.sum()) == len(made.advantage)
    assert len(made.target) <= 1.1 * int(new.sum())


# ---- one step --------------------------------------------------------------------------------------------

def test_prompts_of_a_step_are_shuffled_epochs():
    pool = [f"p{i}" for i in range(10)]
    c = Config(prompts_per_step=4, seed=3)
    drawn = [p for step in range(5) for p in inputs.step_prompts(c, pool, step)]
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == sorted(pool) and drawn[:10] != drawn[10:] != pool
    assert inputs.step_prompts(Config(prompts_per_step=24), pool, 0)  # more than one epoch in a step


@pytest.mark.parametrize("n", [5, 16, 32])
def test_any_number_of_prompts_a_step_gives_the_same_mix(n):
    c = Config(prompts_per_step=n)
    drawn = [p.kind for step in range(400 // n) for p in inputs.step_prompts(c, [], step)]
    share = {kind: count / len(drawn) for kind, count in Counter(drawn).items()}
    wanted = {"harmful": 0.35, "covert": 0.1, "harmless": 0.45, "ambiguous": 0.1}
    assert share == pytest.approx(wanted, abs=0.01)


@pytest.mark.parametrize("share", [0.1, 0.29, 0.5, 0.9])
def test_harmful_share(share):
    """In the world and in a file; the hint word is right as often as without it."""
    c = Config(prompts_per_step=16, harmful_share=share)
    drawn = [p for step in range(20) for p in inputs.step_prompts(c, [], step)]
    kinds = Counter(p.kind for p in drawn)
    assert kinds["harmful"] + kinds["covert"] == int(320 * share + 1e-9)
    assert kinds["covert"] / (320 * share) == pytest.approx(2 / 9, abs=0.06)
    assert kinds["ambiguous"] / (320 * (1 - share)) == pytest.approx(2 / 11, abs=0.06)
    pool = [Prompt(f"p{i}", "harmful" if i < 3 else "harmless") for i in range(10)]
    drawn = [p for step in range(20) for p in inputs.step_prompts(c, pool, step)]
    assert sum(p.label == "harmful" for p in drawn) == int(320 * share + 1e-9)
    for label, size in (("harmful", 3), ("harmless", 7)):  # whole passes over each label
        assert {p for p in drawn if p.label == label} == {p for p in pool if p.label == label}
        times = Counter(p.prompt for p in drawn if p.label == label)
        assert max(times.values()) - min(times.values()) <= 1


def test_harmful_share_needs_prompts_of_both_labels(tmp_path):
    file = tmp_path / "one.jsonl"
    file.write_text("".join(json.dumps(dict(prompt=f"p{i}", label="harmful")) + "\n" for i in range(30)))
    message = refusal(inputs.read_prompts, Config(prompts=str(file), model="m", harmful_share=0.5))
    assert "--harmful-share, should be harmful and harmless, found 'harmful'" in message


def test_a_share_of_the_prompts_gets_an_injected_thought():
    c, prompts = Config(prefill_share=0.25), alchemy.requests(400, 1, 1)
    begun = evaluate.injections(c, prompts, 3)
    assert 0.18 < sum(map(bool, begun)) / 400 < 0.32
    assert {text.partition(CLOSE)[1] for text in begun if text} == {"", CLOSE}  # open and closed ones
    allowed = {evaluate.attack_text(a, p, c) for p in prompts for a in evaluate.ATTACKS}
    assert set(begun) <= allowed
    assert begun == evaluate.injections(c, prompts, 3) != evaluate.injections(c, prompts, 4)
    assert not any(evaluate.injections(Config(), prompts, 3))


# ---- knobs and the command line --------------------------------------------------------------------------

def test_every_knob_has_a_sentence_and_a_reader():
    source = "".join((ROOT / f).read_text() for f in ("sear.py", "evaluate.py", "inputs.py", "warmstart.py"))
    knobs = dataclasses.fields(Config)
    assert len(knobs) <= 47  # a reader meets them before the algorithm
    for f in knobs:
        assert len(f.metadata["help"].split()) >= 3, f.name
        assert re.search(rf"\bc\.{f.name}\b", source), f"nobody reads --{f.name}"
    assert set(sear.CHECKPOINT_DEFAULTS) <= {f.name for f in knobs}


@pytest.mark.parametrize("flags, message", [
    ("--bogus 1", "unrecognized arguments: --bogus 1"),
    ("--steps x", "invalid int value: 'x'"),
    ("--group-size 1", "--group-size must be a number, at least 2, got 1"),
    ("--gamma 1.5", "between 0 and 1, got 1.5"),
    ("--prefill-share 2", "between 0 and 1, got 2"),
    ("--prefill-share 0.2 --objective no-thought", "--prefill-share needs a thought to prefill"),
    ("--chain 21", "--chain must be between 2 and 14, got 21"),
    ("--max-grad-norm 0", "--max-grad-norm must be a number, at least 1e-06, got 0.0"),
    ("--temperature 0", "--temperature must be a number, at least 0.001"),
    ("--temperature nan", "got nan"),
    ("--objective best", "invalid choice: 'best'"),
    ("--seed -1", "--seed must be between 0 and"),
    ("--prompts p.csv", "--prompts needs --model"),
    ("--plan 80", "--plan needs --prompts"),
    ("--label harmful", "--label needs --prompts"),
    ("--system Think.", "--system needs --model"),
    ("--warm-start f.jsonl", "--warm-start needs --model"),
    ("--judge rules", "--judge rules cannot judge the embedded world"),
    ("--model m --prompts p.csv --judge alchemy", "--judge alchemy cannot judge p.csv; expected rules"),
    ("--reward-model r", "--reward-model needs --prompts: the embedded world's verifier judges help"),
    ("--lora-rank -1", "--lora-rank must be a number, at least 0, got -1"),
    ("--lora-alpha 8", "--lora-alpha needs --lora-rank"),
    ("--lora-rank 8 --shard yes", "--lora-rank does not go with --shard yes"),
    ("--resume nowhere", "nowhere/config.json"),
    ("--step 3", "unrecognized arguments: --step 3"),
])
def test_bad_flags_are_one_sentence(flags, message):
    assert message in refusal(sear.parse, flags.split())


def test_defaults_of_the_world_and_of_checkpoints():
    c = sear.parse([])
    assert (c.out, c.max_new_tokens, c.potential) == ("runs/sear-seed1", 72, "text")
    assert sear.parse(["--chain", "12"]).max_new_tokens == 121
    assert (c.device, c.checkpoint_activations) == ("cpu", "no")  # even where there is a GPU
    assert (c.lora_rank, c.lora_alpha) == (0, 0) and sear.parse(["--lora-rank", "16"]).lora_alpha == 32
    assert sear.parse(["--objective", "probe"]).potential == "probe"
    real = sear.parse("--model m --prompts p.csv --beta 0.5".split())
    assert (real.device, real.checkpoint_activations) == ("auto", "yes")
    assert (real.learning_rate, real.judge, real.beta, real.max_new_tokens) == (1e-6, "rules", 0.5, 4096)


@pytest.mark.parametrize("objective", [name for name in OBJECTIVES if name != "no-thought"])
def test_a_batch_of_prefilled_thoughts_trains_its_answers(start, tmp_path, objective, monkeypatch):
    """K is 0, in a batch of one prompt."""
    monkeypatch.setattr(evaluate, "ATTACKS", ("none", "hijack-short"))  # which closes the thought
    flags = (f"--objective {objective} --steps 1 --prompts-per-step 1 --group-size 3 --eval-prompts 0 "
             f"--prefill-share 1 --max-new-tokens 24 --model {start} --out {tmp_path}/run")
    assert sear.main(flags.split()) == 0
    row = json.loads((tmp_path / "run/metrics.jsonl").read_text())
    assert row["thought_tokens"] == 0 and row["grad_norm"] >= 0 and not row["skipped"]
