import json
import shutil
import subprocess
import sys

import pytest
import torch
from helpers import FIXTURES, FOLDERS, ROOT, golden, write_random_folder
from safetensors.torch import load_file, save_file

from data import InputError
from model import Cache, Transformer, parse_config


@pytest.mark.parametrize("name", FOLDERS)
def test_golden_logits(name):
    model, g = Transformer.from_pretrained(FIXTURES / name), golden(name)["model"]
    for case in g["cases"]:
        logits = model(torch.tensor([case["ids"]]))[0]
        assert torch.allclose(logits[:, g["slice_ids"]], torch.tensor(case["slice"]), atol=1e-4)
        assert torch.allclose(logits.logsumexp(-1), torch.tensor(case["logsumexp"]), atol=1e-4)
        if "last" in case:
            assert torch.allclose(logits[-1], torch.tensor(case["last"]), atol=1e-4)


@pytest.mark.parametrize("name", FOLDERS)
def test_golden_logits_left_padded(name):
    model, b = Transformer.from_pretrained(FIXTURES / name), golden(name)["model"]["batch"]
    logits = model(torch.tensor(b["ids"]), torch.tensor(b["mask"]))
    for row, n, expected in zip(logits, b["lengths"], b["slice"]):
        ids = golden(name)["model"]["slice_ids"]
        assert torch.allclose(row[-n:, ids], torch.tensor(expected), atol=1e-4)


@pytest.mark.parametrize("name", FOLDERS)
def test_golden_continuation_and_greedy_decoding_through_the_cache(name):
    model, g = Transformer.from_pretrained(FIXTURES / name), golden(name)["model"]
    for case in g["logprobs"]:
        ids = torch.tensor([case["prompt_ids"] + case["continuation_ids"]])
        logprob = model(ids[:, :-1]).log_softmax(-1).gather(2, ids[:, 1:, None])[0, :, 0]
        expected = torch.tensor(case["logprobs"])
        assert torch.allclose(logprob[-len(expected):], expected, atol=1e-4)
    for case in g["greedy"]:
        token, found = torch.tensor([case["prompt_ids"]]), []
        cache = model.new_cache(1, len(case["prompt_ids"]) + len(case["new_ids"]))
        for _ in case["new_ids"]:
            token = model(token, cache=cache)[:, -1:].argmax(-1)
            found.append(int(token))
        assert found == case["new_ids"]


def test_golden_scores_of_a_reward_model():
    model, g = Transformer.from_pretrained(FIXTURES / "tiny-reward"), golden("tiny-reward")["reward"]
    for case in g["cases"] + g["chats"]:
        assert model(torch.tensor([case["ids"]]))[0, -1, 0].item() == pytest.approx(case["score"], abs=1e-4)
    left, right = g["batch_left"], g["batch_right"]
    scores = model(torch.tensor(left["ids"]), torch.tensor(left["mask"]))[:, -1, 0]
    assert torch.allclose(scores, torch.tensor(left["scores"]), atol=1e-4)
    mask = torch.tensor(right["mask"])
    scores = model(torch.tensor(right["ids"]), mask)[torch.arange(len(mask)), mask.sum(1) - 1, 0]
    assert torch.allclose(scores, torch.tensor(right["scores"]), atol=1e-4)


@pytest.mark.parametrize("name", FOLDERS)
def test_cached_logprobs_equal_the_full_forward(name):
    """Prompt and rest in pieces, rows left-padded, expanded, dropped and forked: always the full forward's
    numbers."""
    model = Transformer.from_pretrained(FIXTURES / name)
    tokens = torch.randint(0, 1900, (2, 30), generator=torch.Generator().manual_seed(1))
    full = model(tokens).log_softmax(-1)
    mask = torch.ones(2, 17, dtype=torch.bool)
    mask[1, :5] = False  # the second row starts five columns later
    padded = tokens[:, :17].clone()
    padded[1, 5:], padded[1, :5] = tokens[1, :12], 0
    cache = model.new_cache(2, 40)
    model.hidden(padded, mask, cache)
    cache = cache.rows(torch.tensor([1, 0, 1]))
    steps = [
        model(torch.stack((tokens[1, 12 + i], tokens[0, 17 + i], tokens[1, 12 + i]))[:, None], cache=cache)
        for i in range(8)
    ]
    found = torch.cat(steps, 1).log_softmax(-1)
    for row, expected in zip(found, (full[1, 12:20], full[0, 17:25], full[1, 12:20])):
        assert torch.allclose(row, expected, atol=1e-5)
    # forget the last five tokens of that row, say something else
    fork = cache.rows(torch.tensor([1]), room=6)
    fork.valid[:, 20:] = False
    other = model(tokens[1:, :6], cache=fork).log_softmax(-1)
    again = model(torch.cat((tokens[0, :20], tokens[1, :6]))[None]).log_softmax(-1)
    assert torch.allclose(other[0], again[0, 20:], atol=1e-5)


def test_padding_side_does_not_change_gradients():
    model = Transformer.from_pretrained(FIXTURES / "tiny-qwen3")
    rows = [torch.randint(0, 1900, (n,), generator=torch.Generator().manual_seed(n)) for n in (9, 14)]

    def gradients(left):
        tokens, mask = torch.zeros(2, 14, dtype=torch.long), torch.zeros(2, 14, dtype=torch.bool)
        for i, r in enumerate(rows):
            at = slice(14 - len(r), 14) if left else slice(0, len(r))
            tokens[i, at], mask[i, at] = r, True
        model.zero_grad()
        logprob = (
            model(tokens, mask if left else None)[:, :-1]
            .log_softmax(-1)
            .gather(2, tokens[:, 1:, None])[..., 0]
        )
        logprob[mask[:, 1:] & mask[:, :-1]].mean().backward()
        return [p.grad.clone() for p in model.parameters()]
    for a, b in zip(gradients(True), gradients(False)):
        assert (a - b).norm() <= 1e-6 * max(1.0, b.norm())
        assert not a.isnan().any()


def test_sliding_window_equals_the_plain_definition():
    raw = json.loads((FIXTURES / "tiny-qwen2/config.json").read_text()) | {
        "use_sliding_window": True,
        "max_window_layers": 1,
        "sliding_window": 4,
    }
    assert parse_config(raw).windows == [None, 4]
    assert parse_config(raw | {"use_sliding_window": False}).windows == [None, None]
    mistral = {k: v for k, v in raw.items() if k != "use_sliding_window"} | {
        "architectures": ["MistralForCausalLM"]
    }
    assert parse_config(mistral).windows == [4, 4]
    torch.manual_seed(0)
    model = Transformer(parse_config(mistral))
    tokens = torch.randint(0, 1900, (1, 20))
    windowed = model(tokens)
    model.config.windows = [None, None]
    assert not torch.allclose(windowed, model(tokens), atol=1e-3)
    # the last position reaches 3 + 3 tokens back through two windows of 4
    two_layers_back = model(tokens[:, -7:])
    model.config.windows = [4, 4]
    assert torch.allclose(windowed[:, -1], model(tokens[:, -7:])[:, -1], atol=1e-4)
    assert not torch.allclose(two_layers_back[:, -1], windowed[:, -1], atol=1e-3)
    cache = model.new_cache(1, 20)
    model.hidden(tokens[:, :12], cache=cache)
    steps = [model(tokens[:, i:i + 1], cache=cache) for i in range(12, 20)]
    assert torch.allclose(torch.cat(steps, 1), windowed[:, 12:], atol=1e-4)
    fork = cache.rows(torch.tensor([0]), room=4)  # eight columns left out: the window counts tokens, not columns
    fork.valid[:, 12:] = False
    again = model(torch.cat((tokens[:, :12], tokens[:, :4]), 1))[:, 12:]
    assert torch.allclose(model(tokens[:, :4], cache=fork), again, atol=1e-4)


@pytest.mark.parametrize("name", FOLDERS + ("tiny-reward",))
def test_save_and_load_round_trip(name, tmp_path):
    model = Transformer.from_pretrained(FIXTURES / name)
    for _ in range(2):  # a second time over the first
        model.save_pretrained(tmp_path / "saved")
    again = Transformer.from_pretrained(tmp_path / "saved")
    assert again.stop_ids == model.stop_ids == (golden(name).get("eos_token_ids") or model.stop_ids)
    for (n, a), (m, b) in zip(model.named_parameters(), again.named_parameters()):
        assert n == m and torch.equal(a, b)
    tied = model.config.tie_word_embeddings
    assert ("lm_head.weight" in load_file(tmp_path / "saved/model.safetensors")) == (
        not tied and name != "tiny-reward"
    )
    assert not tied or again.lm_head.weight is again.model.embed_tokens.weight


def test_new_config_keys_mean_the_same_as_old_ones():
    raw = json.loads((FIXTURES / "tiny-llama3/config.json").read_text())
    new = {k: v for k, v in raw.items() if k not in ("rope_theta", "rope_scaling")}
    new["rope_parameters"] = raw["rope_scaling"] | {"rope_theta": raw["rope_theta"]}
    a, b = parse_config(raw), parse_config(new)
    assert a.rope_theta == b.rope_theta == 500000.0
    assert {k: b.rope_scaling[k] for k in a.rope_scaling} == a.rope_scaling


def test_bf16_compute_is_the_same_with_weights_cast_once():
    model = Transformer.from_pretrained(FIXTURES / "tiny-qwen2", dtype=torch.bfloat16)
    assert all(p.dtype == torch.float32 for p in model.parameters())  # masters stay masters
    tokens = torch.arange(10)[None]
    plain = model(tokens)
    with model.cast_once():
        assert model.lm_head.cast.dtype == torch.bfloat16
        assert torch.equal(model(tokens), plain)
    assert plain.dtype == torch.bfloat16 and model.lm_head.cast is None


def test_loading_peaks_at_the_models_own_bytes(tmp_path):
    """An fp32 file mapped as a whole would peak at twice the model; ours may take a fifth more than the
    model."""
    write_random_folder(tmp_path, 152_000, 384, 1, 4, 2, 512, tied=False, dtype=torch.float32)
    code = f"""
import re, sys
sys.path.insert(0, {str(ROOT)!r})
from model import Transformer
def kilobytes(key): return int(re.search(key + r":\\s+(\\d+)", open("/proc/self/status").read())[1])
Transformer.from_pretrained({str(FIXTURES / "tiny-qwen2")!r})  # libraries that torch loads on first use are not the model
before = kilobytes("VmRSS")
model = Transformer.from_pretrained({str(tmp_path)!r})
own = sum(p.numel() * p.element_size() for p in model.parameters())
print((kilobytes("VmHWM") - before) * 1024 / own)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert 0.9 < float(out.stdout) <= 1.2, out


def broken(tmp_path, name="tiny-qwen2", **config):
    folder = tmp_path / "broken"
    shutil.copytree(FIXTURES / name, folder)
    raw = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


def fails(folder, *words):
    with pytest.raises(InputError) as caught:
        Transformer.from_pretrained(folder)
    assert all(word in str(caught.value) for word in words), caught.value


def test_bad_folders_are_told_apart(tmp_path):
    fails(tmp_path / "nowhere", "config.json", "No such file")
    folder = broken(tmp_path)
    (folder / "model.safetensors").unlink()
    fails(folder, "model.safetensors", "no such file")
    data = (FIXTURES / "tiny-qwen2/model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:len(data) // 2])
    fails(folder, "model.safetensors", "not a whole safetensors file")
    weights = load_file(FIXTURES / "tiny-qwen2/model.safetensors")
    save_file({k: v for k, v in weights.items() if k != "model.norm.weight"}, folder / "model.safetensors")
    fails(folder, "'model.norm.weight' is missing", "(1 of 27)")
    save_file(weights | {"model.layers.0.self_attn.o_proj.bias": torch.zeros(64)}, folder / "model.safetensors")
    fails(folder, "no place for 'model.layers.0.self_attn.o_proj.bias'")
    shutil.rmtree(folder)
    fails(broken(tmp_path, num_hidden_layers="2"), "config.json", "as transformers writes it")
    shutil.rmtree(folder)
    fails(broken(tmp_path, intermediate_size=96), "mlp", "[160, 64]", "[96, 64]")
    shutil.rmtree(folder)
    fails(
        broken(tmp_path, architectures=["MambaForCausalLM"]),
        "config.json",
        "MambaForCausalLM",
        "expected Qwen2",
    )
    shutil.rmtree(folder)
    fails(broken(tmp_path, rope_scaling={"rope_type": "yarn", "factor": 4.0}), "yarn")
    shutil.rmtree(folder)
    folder = broken(tmp_path, "tiny-llama3")
    (folder / "model-00002-of-00002.safetensors").unlink()
    fails(folder, "model-00002-of-00002.safetensors")


def test_a_full_cache_is_an_error():
    model = Transformer.from_pretrained(FIXTURES / "tiny-qwen2")
    cache = model.new_cache(1, 4)
    assert isinstance(cache, Cache)
    with pytest.raises(ValueError, match="cache of 4 columns is full"):
        model.hidden(torch.zeros(1, 5, dtype=torch.long), cache=cache)
