"""bench.py at tiny sizes: every row, finite numbers, products that take no longer than their step."""
import json
import math
import re

import pytest
import torch
from helpers import FIXTURES

import bench
import sear
from lib.data import InputError
from model import Linear

STEP = "RL step", "sample", "judge", "communicate", "learn", "products", "computed", "peak"
ROWS = ("sample 16 x 8", "products", "peak", *STEP, *STEP, "sample 2 x 8", "products", "peak")
PEERS = ("transformers", "TRL")


@pytest.fixture
def page(tmp_path, monkeypatch):
    file = tmp_path / "speed.md"
    file.write_text("before\n<!-- bench -->\nold\n<!-- /bench -->\nafter\n")
    monkeypatch.setattr(bench, "PAGE", file)
    return file


def test_quick_prints_every_row_and_writes_the_page(page, capsys):
    assert bench.main(["--quick", "--write"]) == 0
    text = capsys.readouterr().out
    about, _, head, _, *lines = text.splitlines()
    assert page.read_text() == f"before\n<!-- bench -->\n{text}<!-- /bench -->\nafter\n"
    assert f"torch {torch.__version__}" in about and re.match(r"\d{4}-\d\d-\d\d, ", about)
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("|")]
    assert len(head.split("|")) == 5 and all(line.count("|") == 4 for line in lines if line[:1] == "|")
    own = [row for row in rows if not any(name in row[0] for name in PEERS)]
    assert len(own) == len(ROWS) and all(name in row[0] for name, row in zip(ROWS, own)), own
    for row in rows:
        numbers = [float(x.replace(",", "")) for x in re.findall(r"[\d,.]*\d", row[1])]
        assert len(numbers) == 1 and math.isfinite(numbers[0]) and numbers[0] >= 0, row
        if "products" in row[0]:
            assert 0 < float(row[2]) <= 1, row
        if "computed" in row[0]:
            assert numbers[0] > 1, row
    assert ("Not compared" in lines[-1]) != ("TRL" in text)  # a peer has a row, or a sentence


def test_products_are_those_of_forward_and_backward(world):
    """FLOPs of two layers and the head: 2 a weight and token in the forward pass, 4 in the backward pass."""
    model, tokens = world[2], torch.arange(24).view(2, 12)
    with bench.Products([model]) as products:
        model(tokens).square().sum().backward()
    model.zero_grad()
    flop = sum(2 * len(a) * b.numel() for a, b in products.found)
    weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, Linear))
    assert flop == 6 * weights * tokens.numel()
    products.run()
    assert all(p.grad is None for p in model.parameters())


def test_early_stops_leave_22_of_48_tokens(tmp_path):
    """At the sizes of the table, without timing it."""
    bench.write_folder(tmp_path)
    bench.Transformer.from_scratch(tmp_path, 1).save_pretrained(tmp_path)
    c = sear.Config(max_new_tokens=48)
    tokenizer, model, _ = bench.load_start(c, tmp_path, "cpu")
    model.stop_ids = [*range(bench.STOPS)]
    rollouts = sear.rollout_step(c, model, tokenizer, bench.load_judge("alchemy"), [], 0)[1]
    lengths = (rollouts.segment >= 0).sum(1)
    assert 21 < lengths.float().mean() < 23 and lengths.max() == 48


def test_a_peer_that_fails_without_a_word_is_named_by_its_error(world):
    def peers():
        raise NotImplementedError
    *_, last = bench.measure("work", [world[2]], lambda: None, peers, 1, [])
    assert last == "NotImplementedError"


@pytest.mark.parametrize("name, changes", [
    ("tiny-qwen3", dict(num_attention_heads=8, num_key_value_heads=8, head_dim=5)),
    ("tiny-llama3", dict(num_attention_heads=128, head_dim=None)),
    ("tiny-qwen2", dict(num_hidden_layers=28, layer_types=["full_attention"] * 28))])
def test_quick_takes_the_kind_of_a_folder_and_not_its_sizes(name, changes, tmp_path, monkeypatch, capsys):
    config, found = json.loads((FIXTURES / name / "config.json").read_text()) | changes, []
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(bench, "rl_step", lambda *_: lambda: [])
    monkeypatch.setattr(bench, "sampling", lambda folder, model, *_: found.append(model) or (lambda: []))
    assert bench.main(["--quick", "--model", str(tmp_path)]) == 0
    assert found[1].config.raw["architectures"] == config["architectures"]
    assert found[1](torch.arange(12)[None]).shape == (1, 12, 400)


def test_a_bad_folder_is_one_sentence(tmp_path, capsys):
    assert bench.main(["--model", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("bench.py: ")
    with pytest.raises(InputError):
        bench.parse(["--slow"])
