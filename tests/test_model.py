import json
import shutil
import subprocess
import sys

import pytest
import torch
from helpers import FIXTURES, FOLDERS, ROOT, change_json, golden, refusal, write_random_folder
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from attention import Cache, Packed, rope_frequencies
from kernels import segment_logprobs
from lib.chat import add_end_of_turn
from lib.data import InputError
from lib.folder import parse_config
from lib.tokenizer import Tokenizer
from model import Transformer, compute_type

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
MISTRAL = {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}


# ---- the forward pass ------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", FOLDERS)
def test_logits_equal_transformers(name):
    model, g = Transformer.from_pretrained(FIXTURES / name), golden(name)["model"]
    for case in g["cases"]:
        logits = model(torch.tensor([case["ids"]]))[0]
        assert torch.allclose(logits[:, g["slice_ids"]], torch.tensor(case["slice"]), atol=1e-4)
        assert torch.allclose(logits.logsumexp(-1), torch.tensor(case["logsumexp"]), atol=1e-4)
        if "last" in case:
            assert torch.allclose(logits[-1], torch.tensor(case["last"]), atol=1e-4)


@pytest.mark.parametrize("name", FOLDERS)
def test_logits_of_left_padded_rows_equal_transformers(name):
    model, b = Transformer.from_pretrained(FIXTURES / name), golden(name)["model"]["batch"]
    logits = model(torch.tensor(b["ids"]), torch.tensor(b["mask"]))
    for row, n, expected in zip(logits, b["lengths"], b["slice"]):
        ids = golden(name)["model"]["slice_ids"]
        assert torch.allclose(row[-n:, ids], torch.tensor(expected), atol=1e-4)


@pytest.mark.parametrize("name", FOLDERS)
def test_logprobs_and_greedy_decoding_equal_transformers(name):
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


def test_scores_of_a_reward_model_equal_transformers():
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
def test_logprobs_through_the_cache_equal_the_full_forward(name):
    """The text comes in pieces; rows are left-padded, repeated, dropped and forked."""
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
    # A fork drops the last five tokens of the second row and continues with others.
    fork = cache.rows(torch.tensor([1]), room=6)
    fork.valid[:, 20:] = False
    other = model(tokens[1:, :6], cache=fork).log_softmax(-1)
    again = model(torch.cat((tokens[0, :20], tokens[1, :6]))[None]).log_softmax(-1)
    assert torch.allclose(other[0], again[0, 20:], atol=1e-5)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("name", FOLDERS)
def test_packed_rows_equal_whole_rows(name, window):
    """Two prompts of different lengths, four rows in two blocks: the states and gradients of whole rows."""
    model = Transformer.from_pretrained(FIXTURES / name)
    model.config.windows = [window] * len(model.config.windows)
    generator = torch.Generator().manual_seed(1)
    prompts, owners, sizes = torch.randint(0, 1900, (2, 9), generator=generator), [1, 0, 0, 1], [4, 4, 7, 7]
    rows = [torch.randint(0, 1900, (n,), generator=generator) for n in sizes]
    length = torch.tensor([9, 6])
    packed = Packed(prompts, length, [torch.stack(rows[:2]), torch.stack(rows[2:])],
                    [torch.tensor([1, 0]), torch.tensor([0, 1])])
    found = model.hidden_packed(packed)
    found.square().sum().backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    whole = [model.hidden(torch.cat((prompts[i, :length[i]], row))[None])[0, length[i]:]
             for i, row in zip(owners, rows)]
    assert torch.allclose(found, torch.cat(whole), atol=1e-5)
    torch.cat(whole).square().sum().backward()
    for g, p in zip(gradients, (p for p in model.parameters() if p.grad is not None)):
        assert (g - p.grad).norm() <= 2e-6 * p.grad.norm()


@torch.no_grad()
def test_a_cache_drops_rows_and_grows_in_place():
    model = Transformer.from_pretrained(FIXTURES / "tiny-qwen2")
    tokens = torch.randint(0, 1900, (4, 9), generator=torch.Generator().manual_seed(1))
    cache, index = model.new_cache(4, 8), torch.tensor([3, 0])
    model.hidden(tokens[:, :8], cache=cache)
    other, memory = cache.rows(index, room=1), [x.data_ptr() for x in cache.k]
    cache.keep(index)
    assert [x.data_ptr() for x in cache.k] == memory and cache.valid.shape == (2, 8)
    cache.resize(9, torch.arange(2))
    found = model(tokens[index, 8:], cache=cache)
    assert torch.equal(found, model(tokens[index, 8:], cache=other))
    assert torch.allclose(found[:, 0], model(tokens[index])[:, -1], atol=1e-4)


def test_a_full_cache_is_an_error():
    model = Transformer.from_pretrained(FIXTURES / "tiny-qwen2")
    cache = model.new_cache(1, 4)
    assert isinstance(cache, Cache)
    with pytest.raises(ValueError, match="cache of 4 columns is full"):
        model.hidden(torch.zeros(1, 5, dtype=torch.long), cache=cache)


def test_padding_side_does_not_change_gradients():
    model = Transformer.from_pretrained(FIXTURES / "tiny-qwen3")
    rows = [torch.randint(0, 1900, (n,), generator=torch.Generator().manual_seed(n)) for n in (9, 14)]

    def gradients(left):
        tokens, mask = torch.zeros(2, 14, dtype=torch.long), torch.zeros(2, 14, dtype=torch.bool)
        for i, r in enumerate(rows):
            at = slice(14 - len(r), 14) if left else slice(0, len(r))
            tokens[i, at], mask[i, at] = r, True
        model.zero_grad()
        logprob = model(tokens, mask if left else None)[:, :-1].log_softmax(-1)
        logprob = logprob.gather(2, tokens[:, 1:, None])[..., 0]
        logprob[mask[:, 1:] & mask[:, :-1]].mean().backward()
        return [p.grad.clone() for p in model.parameters()]
    for a, b in zip(gradients(True), gradients(False)):
        assert (a - b).norm() <= 1e-6 * max(1.0, b.norm())
        assert not a.isnan().any()


def test_a_sliding_window_limits_how_far_a_token_sees():
    raw = config_of("tiny-qwen2", **MISTRAL, sliding_window=4)
    torch.manual_seed(0)
    model = Transformer(parse_config(raw))
    assert model.config.windows == [4, 4]
    tokens = torch.randint(0, 1900, (1, 20))
    windowed = model(tokens)
    model.config.windows = [None, None]
    assert not torch.allclose(windowed, model(tokens), atol=1e-3)
    # Through two windows of 4 the last position sees 3 + 3 tokens back.
    unlimited = model(tokens[:, -7:])
    model.config.windows = [4, 4]
    assert torch.allclose(windowed[:, -1], model(tokens[:, -7:])[:, -1], atol=1e-4)
    assert not torch.allclose(unlimited[:, -1], windowed[:, -1], atol=1e-3)
    cache = model.new_cache(1, 20)
    model.hidden(tokens[:, :12], cache=cache)
    steps = [model(tokens[:, i:i + 1], cache=cache) for i in range(12, 20)]
    assert torch.allclose(torch.cat(steps, 1), windowed[:, 12:], atol=1e-4)
    fork = cache.rows(torch.tensor([0]), room=4)  # drops eight columns: the window counts tokens, not columns
    fork.valid[:, 12:] = False
    again = model(torch.cat((tokens[:, :12], tokens[:, :4]), 1))[:, 12:]
    assert torch.allclose(model(tokens[:, :4], cache=fork), again, atol=1e-4)


class Casts(TorchDispatchMode):
    """Counts the casts of fp32 tensors of one or two dimensions to bf16, as parameters have."""
    of_parameters = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if "_to_copy" in str(func) and kwargs.get("dtype") == torch.bfloat16 and args[0].ndim <= 2:
            self.of_parameters += 1
        return func(*args, **kwargs)


def test_policy_and_reference_compute_in_one_type():
    """Weights of the reference are held in it, so another rule there would be another model (mps: fp32)."""
    assert compute_type("cpu") == compute_type("mps") == torch.float32 != compute_type("cuda:1")
    assert Transformer.from_pretrained(FIXTURES / "tiny-qwen2").compute_dtype == compute_type("cpu")


def test_bf16_results_are_the_same_with_weights_cast_once():
    model = Transformer.from_pretrained(FIXTURES / "tiny-qwen2", dtype=torch.bfloat16)
    with torch.no_grad():
        for p in model.parameters():  # numbers that bf16 does not hold
            p += torch.rand_like(p) / 300
    assert all(p.dtype == torch.float32 for p in model.parameters())  # masters stay fp32
    tokens, masters = torch.arange(10)[None], [p.clone() for p in model.parameters()]
    plain = model(tokens)
    with model.cast_once():
        assert model.lm_head.weight.dtype == torch.bfloat16
        with Casts() as casts:
            assert torch.equal(model(tokens), plain)
    assert casts.of_parameters == 0  # biases and norms included
    assert plain.dtype == torch.bfloat16
    with pytest.raises(ValueError), model.cast_once():
        raise ValueError
    assert all(torch.equal(p, master) for p, master in zip(model.parameters(), masters, strict=True))


@pytest.mark.parametrize("name", FOLDERS)
def test_gradients_have_the_same_bits_if_blocks_run_again(name):
    """tests/test_plan.py counts what is kept for the backward pass."""
    model, found = Transformer.from_pretrained(FIXTURES / name), []
    tokens = torch.randint(0, 300, (6, 40), generator=torch.Generator().manual_seed(0))
    for model.checkpoint_activations in (False, True):
        model.zero_grad()
        model.hidden(tokens).square().sum().backward()
        found.append([p.grad.clone() for n, p in model.named_parameters() if n != HEAD])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True)) and found[0][0].norm() > 0
    with torch.no_grad():  # a sampler with a cache is left alone
        model.hidden(tokens, cache=model.new_cache(6, 40))


@pytest.mark.parametrize("name", FOLDERS)
def test_weights_stored_in_bf16_give_the_bits_of_fp32_masters(name):
    """The frozen reference on CUDA holds bf16 weights; norms, biases and the head's log-probs included."""
    masters, stored = (Transformer.from_pretrained(FIXTURES / name, dtype=torch.bfloat16, masters=m)
                       for m in (True, False))
    with torch.no_grad():
        for p in masters.parameters():  # numbers that bf16 does not hold
            p += torch.rand_like(p) * p.abs() / 300
        for p, q in zip(stored.parameters(), masters.parameters(), strict=True):
            assert p.dtype == torch.bfloat16 and not torch.equal(q.bfloat16().float(), q)
            p.copy_(q)
    tokens = torch.randint(0, 300, (3, 17), generator=torch.Generator().manual_seed(0))
    states = [m.hidden(tokens) for m in (masters, stored)]
    assert states[0].dtype == torch.bfloat16 and torch.equal(*states)
    owned = torch.zeros(51, dtype=torch.long)
    found = [segment_logprobs(states[0].flatten(0, 1), m.head.weight, tokens.flatten(), owned, 1).logprob
             for m in (masters, stored)]
    assert torch.equal(*found)


# ---- config.json -----------------------------------------------------------------------------------------

def config_of(name, *without, **changes):
    raw = json.loads((FIXTURES / name / "config.json").read_text()) | changes
    return {key: value for key, value in raw.items() if key not in without}


ROPE = json.loads((FIXTURES / "rope_golden.json").read_text())


@pytest.mark.parametrize("case", ROPE["cases"], ids=lambda case: case["case"])
def test_rope_frequencies_equal_transformers_to_the_bit(case):
    config = parse_config(ROPE["base"] | case["config"])
    assert rope_frequencies(config, torch.device("cpu")).tolist() == case["inv_freq"]


def test_an_absent_key_means_what_it_means_in_transformers():
    """Absent is not null. The defaults are those of transformers 5.24's configuration classes."""
    mistral = config_of("tiny-qwen2", "sliding_window", "num_key_value_heads", **MISTRAL)
    mistral["num_attention_heads"] = 16
    assert parse_config(mistral).windows == [4096, 4096]
    assert parse_config(mistral).num_key_value_heads == 8
    null = parse_config(mistral | {"sliding_window": None, "num_key_value_heads": None})
    assert null.windows == [None, None] and null.num_key_value_heads == 16
    qwen = config_of("tiny-qwen2", "sliding_window", "max_window_layers", "head_dim", use_sliding_window=True,
                     num_hidden_layers=30)
    assert parse_config(qwen).windows == [None] * 28 + [4096] * 2
    assert parse_config(qwen).head_dim == 16
    assert parse_config(qwen | {"use_sliding_window": False}).windows == [None] * 30
    qwen |= {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
    assert parse_config(qwen).head_dim == 128
    assert parse_config(qwen | {"head_dim": None}).head_dim == 16


def test_layer_types_say_which_layers_of_qwen_have_a_window():
    qwen = config_of("tiny-qwen2", use_sliding_window=True, sliding_window=4, max_window_layers=1)
    assert parse_config(qwen).windows == [None, 4]
    kinds = ["sliding_attention", "full_attention"]
    assert parse_config(qwen | {"layer_types": kinds}).windows == [4, None]
    # transformers ignores layer_types in Mistral and all of these keys in Llama.
    assert parse_config(qwen | MISTRAL | {"layer_types": kinds}).windows == [4, 4]
    llama = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    assert parse_config(qwen | llama | {"layer_types": kinds}).windows == [None, None]


@pytest.mark.parametrize("changes, words", [
    ({"architectures": ["MambaForCausalLM"]}, ("MambaForCausalLM", "one of Llama, Mistral, Qwen2, Qwen3")),
    ({"model_type": "qwen3"}, ("model_type", "'qwen2' for Qwen2ForCausalLM", "'qwen3'")),
    ({"num_hidden_layers": "2"}, ("num_hidden_layers should be a whole number, found '2'",)),
    ({"vocab_size": None}, ("vocab_size should be a whole number, found None",)),
    ({"hidden_size": "64"}, ("as transformers writes it", "TypeError")),
    ({"rms_norm_eps": "x"}, ("as transformers writes it", "could not convert string to float: 'x'")),
    ({"rms_norm_eps": 10 ** 400}, ("as transformers writes it", "OverflowError")),
    ({"num_key_value_heads": 3}, ("num_attention_heads", "a multiple of num_key_value_heads 3", "4")),
    ({"hidden_act": "gelu"}, ("hidden_act should be 'silu', found 'gelu'",)),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, ("rope_parameters", "yarn")),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, ("rope_parameters", "low_freq_factor")),
    ({"rope_parameters": {"full_attention": {"rope_theta": 5.0}}}, ("rope_parameters", "full_attention")),
    ({"partial_rotary_factor": 0.5}, ("rope_parameters", "0.5")),
    ({"layer_types": ["full_attention"]}, ("layer_types", "2 times full_attention")),
    ({"layer_types": ["sliding_attention"] * 2, "use_sliding_window": False}, ("layer_types", "sliding")),
    ({"eos_token_id": "1960"}, ("config.json should be a token id", "found '1960'")),
    ({"intermediate_size": 96}, ("mlp", "[160, 64]", "[96, 64]")),
    ({"num_key_value_heads": 4}, ("k_proj", "[32, 64]", "[64, 64]")),
    ({"vocab_size": 2000}, ("embed_tokens", "[2000, 64]")),
], ids=str)
def test_a_config_that_does_not_fit_is_refused_in_one_sentence(tmp_path, changes, words):
    shutil.copytree(FIXTURES / "tiny-qwen2", tmp_path, dirs_exist_ok=True)
    (tmp_path / "generation_config.json").unlink()
    change_json(tmp_path / "config.json", **changes)
    fails(tmp_path, *words)


def fails(folder, *words):
    message = refusal(Transformer.from_pretrained, folder)
    assert all(word in message for word in words), message


# ---- weights ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", FOLDERS + ("tiny-reward",))
def test_save_and_load_round_trip(name, tmp_path):
    model = Transformer.from_pretrained(FIXTURES / name)
    for _ in range(2):  # the second time over existing files
        model.save_pretrained(tmp_path / "saved")
    again = Transformer.from_pretrained(tmp_path / "saved")
    assert again.stop_ids == model.stop_ids == (golden(name).get("eos_token_ids") or model.stop_ids)
    for (n, a), (m, b) in zip(model.named_parameters(), again.named_parameters()):
        assert n == m and torch.equal(a, b)
    tied = model.config.tie_word_embeddings
    assert (HEAD in load_file(tmp_path / "saved/model.safetensors")) == (not tied and name != "tiny-reward")
    assert not tied or again.lm_head.weight is again.model.embed_tokens.weight


def test_loading_peaks_at_the_models_own_bytes(tmp_path):
    """Mapping an fp32 file as a whole would peak at twice the model; 1.2 times the model is allowed."""
    write_random_folder(tmp_path, 76_000, 384, 1, 4, 2, 512, tied=False, dtype=torch.float32)
    code = f"""
import re, sys
sys.path.insert(0, {str(ROOT)!r})
from model import Transformer
def kilobytes(key): return int(re.search(key + r":\\s+(\\d+)", open("/proc/self/status").read())[1])
Transformer.from_pretrained({str(FIXTURES / "tiny-qwen2")!r})  # libraries that torch loads on first use
before = kilobytes("VmRSS")
model = Transformer.from_pretrained({str(tmp_path)!r})
own = sum(p.numel() * p.element_size() for p in model.parameters())
print((kilobytes("VmHWM") - before) * 1024 / own)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert 0.9 < float(out.stdout) <= 1.2, out


def folder_with(folder, weights, name="tiny-qwen2"):
    """A copy of a fixture with these weights as model.safetensors."""
    shutil.copytree(FIXTURES / name, folder, dirs_exist_ok=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_trained_head_beside_tie_word_embeddings_is_kept(tmp_path, capsys):
    weights = load_file(FIXTURES / "tiny-qwen3/model.safetensors")
    head = weights[EMBEDDING].flip(0).contiguous()
    folder = folder_with(tmp_path / "other", weights | {HEAD: head}, "tiny-qwen3")
    model, tokens = Transformer.from_pretrained(folder), torch.arange(20)[None]
    Transformer.from_pretrained(folder, "meta")
    notice = capsys.readouterr().err
    assert notice.startswith(f"{folder}: lm_head differs from the embedding") and notice.count("\n") == 1
    assert torch.allclose(model(tokens), model.hidden(tokens) @ head.float().T, atol=1e-5)
    assert torch.equal(model.model.embed_tokens.weight, weights[EMBEDDING].float())
    model.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved/config.json").read_text())["tie_word_embeddings"] is False
    assert torch.equal(load_file(tmp_path / "saved/model.safetensors")[HEAD], head.float())


def test_an_equal_head_beside_tie_word_embeddings_stays_tied(tmp_path, capsys):
    weights = load_file(FIXTURES / "tiny-qwen3/model.safetensors")
    folder = folder_with(tmp_path / "same", weights | {HEAD: weights[EMBEDDING].clone()}, "tiny-qwen3")
    model = Transformer.from_pretrained(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.raw["tie_word_embeddings"] is True and not capsys.readouterr().err
    save_file(weights, folder / "model.safetensors")
    change_json(folder / "config.json", tie_word_embeddings=False)
    fails(folder, "'lm_head.weight' is missing")


def test_one_file_of_weights_beside_the_index_of_another_save(tmp_path):
    """model.safetensors counts, as in transformers, whatever the index and its files hold."""
    source = FIXTURES / "tiny-llama3"
    shards = [load_file(file) for file in sorted(source.glob("model-*.safetensors"))]
    weights = shards[0] | shards[1]
    same = folder_with(tmp_path / "same", weights, "tiny-llama3")
    assert torch.equal(Transformer.from_pretrained(same).lm_head.weight, weights[HEAD].float())
    (same / "model.safetensors").unlink()
    assert torch.equal(Transformer.from_pretrained(same).lm_head.weight, weights[HEAD].float())
    changed = weights | {"model.norm.weight": weights["model.norm.weight"] + 1}
    other = folder_with(tmp_path / "other", changed, "tiny-llama3")
    norm = Transformer.from_pretrained(other).model.norm.weight
    assert torch.equal(norm, changed["model.norm.weight"].float())
    (other / "model-00002-of-00002.safetensors").unlink()
    assert torch.equal(Transformer.from_pretrained(other).model.norm.weight, norm)


def test_an_index_that_does_not_fit_its_files_is_refused(tmp_path):
    folder = tmp_path / "folder"
    shutil.copytree(FIXTURES / "tiny-llama3", folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.norm.weight"] = "model-00001-of-00002.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    fails(folder, "'model.norm.weight' should be in model-00001-of-00002.safetensors")
    (folder / "model-00002-of-00002.safetensors").unlink()
    fails(folder, "model-00002-of-00002.safetensors: no such file")
    (folder / "model.safetensors.index.json").write_text("{}")
    fails(folder, "index.json: key 'weight_map' should map weights to files")


def test_weights_that_do_not_fit_are_refused_in_one_sentence(tmp_path):
    fails(tmp_path / "nowhere", "config.json", "No such file")
    weights = load_file(FIXTURES / "tiny-qwen2/model.safetensors")
    folder = folder_with(tmp_path / "broken", weights)
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").unlink()
    fails(folder, "model.safetensors", "no such file")
    (folder / "model.safetensors").write_bytes(data[:len(data) // 2])
    fails(folder, "model.safetensors", "not a whole safetensors file")
    folder_with(folder, {k: v for k, v in weights.items() if k != "model.norm.weight"})
    fails(folder, "'model.norm.weight' is missing", "(1 of 27)")
    folder_with(folder, weights | {"model.layers.0.self_attn.o_proj.bias": torch.zeros(64)})
    fails(folder, "no place for 'model.layers.0.self_attn.o_proj.bias'")
    folder_with(folder, weights | {"model.norm.weight": torch.ones(64, dtype=torch.int8)})
    fails(folder, "'model.norm.weight' should be stored as one of F64, F32, F16, BF16, found I8")
    (folder / "adapter_config.json").write_text("{}")
    fails(folder, "adapter_config.json: adapters are not read")


# ---- stop tokens -----------------------------------------------------------------------------------------

def chat_folder(folder, template=None, **generation):
    """tiny-qwen2, whose template ends a turn with <|im_end|> (1962), with another eos_token_id."""
    shutil.copytree(FIXTURES / "tiny-qwen2", folder)
    change_json(folder / "config.json", eos_token_id=1960)
    (folder / "generation_config.json").write_text(json.dumps(generation))
    if template:
        (folder / "chat_template.jinja").write_text(template)
    return folder


TURNS = "{{% for m in messages %}}<|im_start|>{{{{ m.content }}}}{}{{% endfor %}}"


@pytest.mark.parametrize("template, eos, expected", [
    (None, 1960, [1960, 1962]),  # a base model that was fine-tuned to chat
    (None, [1962, 1960], [1962, 1960]),
    (TURNS.format(" <|im_end|>\n"), [1960], [1960, 1962]),
    (TURNS.format("\n### End"), [1960], [1960]),  # plain text
    (TURNS.format(""), [1960], [1960]),
    (TURNS.format("<|endoftext|>"), 1960, [1960]),
])
def test_the_end_of_a_turn_is_a_stop_token(tmp_path, capsys, template, eos, expected):
    folder = chat_folder(tmp_path / "chat", template, eos_token_id=eos)
    model, tokenizer = Transformer.from_pretrained(folder), Tokenizer.from_pretrained(folder)
    for _ in range(2):
        add_end_of_turn(model, tokenizer)
    assert model.stop_ids == expected
    notices, added = capsys.readouterr().err.splitlines(), expected == [1960, 1962]
    assert ["'<|im_end|>', which is now a stop token" in line for line in notices] == [True] * added
    model.save_pretrained(tmp_path / "saved")
    assert Transformer.from_pretrained(tmp_path / "saved").stop_ids == expected


def test_a_template_without_answers_is_refused(tmp_path):
    folder = chat_folder(tmp_path / "chat", "{{ messages[0].content }}")
    with pytest.raises(InputError, match="the chat template should be one that renders answers"):
        add_end_of_turn(Transformer.from_pretrained(folder), Tokenizer.from_pretrained(folder))


def test_generation_config_says_the_stop_tokens_before_config(tmp_path):
    assert Transformer.from_pretrained(chat_folder(tmp_path / "a", eos_token_id=[5, 7])).stop_ids == [5, 7]
    assert Transformer.from_pretrained(chat_folder(tmp_path / "b", do_sample=True)).stop_ids == [1960]
    assert Transformer.from_pretrained(chat_folder(tmp_path / "c", eos_token_id=None)).stop_ids == [1960]
