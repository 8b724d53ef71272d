"""LoRA: what the adapter computes, trains, saves and exports; PEFT reads the export as we do."""
import copy
import json

import pytest
import torch
from helpers import FIXTURES, FOLDERS, logged, made_rollouts, main, same_files, within
from rank_helpers import stop_after
from safetensors.torch import load_file

import sear
from lib import checkpoint, parallel
from lib.chat import encode_prompt
from lib.tokenizer import Tokenizer
from lora import PROJECTIONS, adapter_off, add_adapter, save_adapter
from model import Linear, Transformer
from rollout import sample

TOKENS = torch.randint(0, 1900, (3, 40), generator=torch.Generator().manual_seed(3))


def adapted(name, std=0.1, **options):
    """A fixture's model with an adapter whose B is random, as after training; std=0: as before."""
    model = Transformer.from_pretrained(FIXTURES / name, **options)
    add_adapter(model, rank=4, alpha=8, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter_name, p in parallel.tuned(model).items():
            if "lora_B" in parameter_name and std:
                p.normal_(0, std, generator=generator)
    return model


# ---- what it computes ------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", FOLDERS)
def test_a_new_adapter_and_one_that_is_off_change_no_bit(name):
    base, model = Transformer.from_pretrained(FIXTURES / name)(TOKENS), adapted(name)
    assert torch.equal(adapted(name, std=0)(TOKENS), base)
    on = model(TOKENS)
    assert (on - base).abs().max() > 1
    with pytest.raises(KeyError), adapter_off(model):
        assert torch.equal(model(TOKENS), base)
        raise KeyError
    assert torch.equal(model(TOKENS), on)


def test_all_seven_projections_have_an_adapter_that_the_seed_determines():
    a, b = (parallel.tuned(adapted("tiny-qwen2", std=0)) for _ in range(2))
    layers = {name.rpartition(".lora_")[0] for name in a}
    assert {name.rpartition(".")[2] for name in layers} == set(PROJECTIONS) and len(layers) == 14
    assert len(a) == 28 and all(torch.equal(a[k], b[k]) and a[k].dtype == torch.float32 for k in a)
    first = [p for name, p in a.items() if "lora_A" in name]
    assert len({p.sum().item() for p in first}) == 14  # no two are equal
    assert all(0.9 < p.abs().max() * p.shape[1] ** 0.5 <= 1 for p in first)


@pytest.mark.parametrize("name", FOLDERS)
def test_sampler_and_learner_agree_with_a_trained_adapter(name):
    model, tokenizer = adapted(name), Tokenizer.from_pretrained(FIXTURES / name)
    prompts = [TOKENS[0].tolist(), TOKENS[1, :5].tolist()]
    rollouts = sample(model, prompts, tokenizer, group_size=4, max_new_tokens=24)
    logs = sear.accumulate(model, model, rollouts, torch.zeros_like(rollouts.logprob), sear.Config())
    assert 0 < logs["logprob_gap"] <= 1e-5 and logs["kl"] > 0.01


def test_frozen_bf16_weights_and_weights_cast_once_have_the_bits_of_fp32_masters():
    masters = adapted("tiny-qwen2", dtype=torch.bfloat16)
    frozen = adapted("tiny-qwen2", dtype=torch.bfloat16, masters=False)
    assert frozen.lm_head.weight.dtype == frozen.model.norm.weight.dtype == torch.bfloat16
    plain = masters(TOKENS)
    assert torch.equal(frozen(TOKENS), plain)
    with frozen.cast_once():
        assert frozen.model.layers[0].mlp.up_proj.lora_A.weight.dtype == torch.bfloat16
        assert torch.equal(frozen(TOKENS), plain)


# ---- what it trains --------------------------------------------------------------------------------------

def batch(name, model):
    """Made rollouts of two prompts and their advantages."""
    tokenizer = Tokenizer.from_pretrained(FIXTURES / name)
    prompts = [encode_prompt(tokenizer, text) for text in ("one", "another one")]
    texts = [f"a {'b ' * i}\n\nIt makes</think>\n\nI cannot.$" for i in range(4)]
    rollouts = made_rollouts(tokenizer, prompts, texts, model.stop_ids[0], 2)
    generator = torch.Generator().manual_seed(0)
    return rollouts, torch.randn(rollouts.tokens.shape, generator=generator)


def test_the_reference_is_the_model_without_its_adapter():
    model, base = adapted("tiny-qwen3"), Transformer.from_pretrained(FIXTURES / "tiny-qwen3")
    found = []
    for reference in (model, base):
        model.zero_grad()
        logs = sear.accumulate(model, reference, *batch("tiny-qwen3", model), sear.Config(beta=0.5))
        found.append((logs, [p.grad for p in parallel.tuned(model).values()]))
    (logs, a), (other, b) = found
    assert logs == other and logs["kl"] > 0.01
    assert all(torch.equal(x, y) and x.any() for x, y in zip(a, b))


def test_gradient_follows_from_that_of_the_merged_weights(tmp_path):
    """W' = W + s B A, so dB = s dW' A^T and dA = s B^T dW'."""
    model = adapted("tiny-qwen2", std=0.02)
    model.save_pretrained(tmp_path)
    merged = Transformer.from_pretrained(tmp_path)
    for m in (model, merged):
        sear.accumulate(m, None, *batch("tiny-qwen2", model), sear.Config())
    for name, layer in model.named_modules():
        if isinstance(layer, Linear) and layer.lora_scale:
            dW, A, B = merged.get_submodule(name).weight.grad, layer.lora_A.weight, layer.lora_B.weight
            for found, right in ((B.grad, 2.0 * dW @ A.T), (A.grad, 2.0 * B.T @ dW)):
                assert within(found, right, 1e-4), name


def test_a_step_changes_the_adapter_and_nothing_else():
    model = adapted("tiny-qwen2", std=0)
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.0)
    for _ in range(2):  # A has no gradient as long as B is 0
        optimizer.zero_grad()
        sear.accumulate(model, model, *batch("tiny-qwen2", model), sear.Config())
        assert parallel.sum_gradients(model) > 0
        optimizer.step()
    changed = {name for name, x in model.state_dict().items() if not torch.equal(x, before[name])}
    assert changed == set(parallel.tuned(model)) and all(".lora_" in name for name in changed)
    assert set(optimizer.state) == set(parallel.tuned(model).values())


# ---- what it exports -------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", FOLDERS)
def test_the_merged_folder_computes_what_the_adapter_computes(name, tmp_path):
    """Computed in fp64, since in fp32 the logits of these fixtures are off by up to 1.5e-5 anyway."""
    model, base = adapted(name, dtype=torch.float64), Transformer.from_pretrained(FIXTURES / name)
    model.save_pretrained(tmp_path)
    merged = Transformer.from_pretrained(tmp_path, dtype=torch.float64)
    assert (merged(TOKENS) - model(TOKENS)).abs().max() <= 5e-6
    assert (merged(TOKENS) - base(TOKENS)).abs().max() > 1
    for (key, a), b in zip(merged.named_parameters(), base.parameters()):
        assert torch.equal(a, b) == (not key.endswith(tuple(f"{p}.weight" for p in PROJECTIONS))), key


def test_peft_computes_the_same_from_the_exported_adapter(tmp_path):
    """PEFT has read the fixture's files, and they are what is exported."""
    fixture = FIXTURES / "tiny-qwen2-lora"
    config, right = (json.loads((fixture / f"{n}.json").read_text()) for n in ("adapter_config", "golden"))
    model = Transformer.from_pretrained(FIXTURES / "tiny-qwen2")
    add_adapter(model, config["r"], config["lora_alpha"], seed=9)
    stored = load_file(fixture / "adapter_model.safetensors")
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in stored
    with torch.no_grad():
        for name, p in parallel.tuned(model).items():
            p.copy_(stored[f"base_model.model.{name}"])
    logits = model(torch.tensor(right["ids"])[None])[0]
    assert torch.allclose(logits[:, right["columns"]], torch.tensor(right["logits"]), atol=3e-5)
    assert torch.allclose(logits.logsumexp(-1), torch.tensor(right["logsumexp"]), atol=3e-5)
    save_adapter(tmp_path / "adapter", model, FIXTURES / "tiny-qwen2")
    written = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert written.pop("base_model_name_or_path") == str(FIXTURES / "tiny-qwen2")
    assert config.pop("base_model_name_or_path") and written == config
    name = "adapter_model.safetensors"
    assert (tmp_path / "adapter" / name).read_bytes() == (fixture / name).read_bytes()


# ---- whole runs ------------------------------------------------------------------------------------------

RUN = ("--steps 3 --prompts-per-step 3 --group-size 2 --eval-prompts 0 --max-new-tokens 24 --save-every 2 "
       "--seed 3 --lora-rank 4 --lora-alpha 12 --learning-rate 0.01").split()


@pytest.fixture(scope="module")
def run(tmp_path_factory, start):
    out = tmp_path_factory.mktemp("lora") / "run"
    assert main(*RUN, "--model", start, "--out", out) == 0
    return out


def test_contents_of_a_run_with_an_adapter(run, start):
    stored = load_file(run / "adapter/adapter_model.safetensors")
    saved = load_file(run / "checkpoint/3/weights.safetensors")
    moments = load_file(run / "checkpoint/3/optimizer.safetensors")
    assert saved and all(".lora_" in name for name in saved)  # and not the frozen weights
    assert stored.keys() == {f"base_model.model.{name}" for name in saved}
    assert moments.keys() == {f"{name}.{key}" for name in saved for key in ("exp_avg", "exp_avg_sq")}
    config = json.loads((run / "adapter/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 12)
    assert config["base_model_name_or_path"] == str(start.resolve())
    model = Transformer.from_pretrained(start)  # base and adapter give the exported model
    add_adapter(model, 4, 12, seed=7)
    checkpoint.load(run / "checkpoint/3", model, torch.optim.AdamW(model.parameters()))
    tokens, exported = TOKENS % 300, Transformer.from_pretrained(run / "model")
    assert (model(tokens) - exported(tokens)).abs().max() <= 1e-5
    metrics = logged(run)
    assert all(row["grad_norm"] > 0 and row["logprob_gap"] <= 1e-5 for row in metrics)
    assert metrics[0]["kl"] == 0 < metrics[-1]["kl"]


def test_a_stopped_run_resumes_to_the_same_bits(run, start, tmp_path, monkeypatch):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "stop_requested", checkpoint.stop_requested)  # put back afterwards
        stop_after(1, 0)
        assert main(*RUN, "--model", start, "--out", out) == 0
    assert checkpoint.latest(out).name == "1" and not (out / "adapter").exists()
    assert main("--resume", out) == 0
    same_files(out, run, "model/model.safetensors", "adapter/adapter_model.safetensors",
               "checkpoint/3/weights.safetensors", "checkpoint/3/optimizer.safetensors")
    assert logged(out) == logged(run)


@pytest.mark.parametrize("flags, message", [
    ("--lora-rank 8", "lora_rank is 4 there and 8 here"), ("--lora-rank 0 --lora-alpha 0", "lora_rank is 4"),
    ("--lora-alpha 4", "lora_alpha is 12 there and 4 here"), ("--shard yes", "--lora-rank does not go with")])
def test_another_adapter_cannot_continue_a_run(run, capsys, flags, message):
    before = (run / "config.json").read_text()
    assert main("--resume", run, *flags.split()) == 2
    assert message in capsys.readouterr().err and (run / "config.json").read_text() == before
