"""The formulas of --plan against what small models hold. `python tests/test_plan.py` writes the tables of
docs/memory.md again."""
import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers import FIXTURES, FOLDERS, QWEN, ROOT, shape
from torch.autograd.graph import saved_tensors_hooks

import sear
from kernels import segment_logprobs
from lib import plan
from lib.folder import parse_config, read_configs
from lora import add_adapter
from model import Transformer

PAGE = ROOT / "docs/memory.md"
KNOBS = replace(sear.Config(), prompts="p", **sear.CHECKPOINT_DEFAULTS)  # defaults of real checkpoints
WORK = plan.Work(prompt=200, attacked=8700, requests=100)
SHAPES = {"Qwen2": {}, "Qwen3": dict(architectures=["Qwen3ForCausalLM"], model_type="qwen3", head_dim=16)}


def small(kind):
    return parse_config(shape(96, 3, 6, 2, 288, 500, True).raw | SHAPES[kind])


# ---- docs/memory.md --------------------------------------------------------------------------------------

def tables():
    """The plan of each model on the largest card, and the verdict on each card."""
    text = []
    for name, sizes in QWEN.items():
        if name == "32B":
            continue
        run = shape(*sizes), [], replace(KNOBS, plan=80.0), WORK
        text += [f"### Qwen2.5-{name}", "", plan.report(*run).rpartition("\n\n")[0], ""]
        text += [f"- **{gb} GB.** {plan.verdict(*run[:2], replace(KNOBS, plan=float(gb)), WORK)}"
                 for gb in (24, 48, 80)] + [""]
    return "\n".join(text[:-1])


def block(text):
    return re.search(r"<!-- plan -->\n(.*)\n<!-- /plan -->", text, re.S)[1]


def test_tables_of_docs_memory():
    """On a difference: python tests/test_plan.py."""
    assert block(PAGE.read_text()) == tables()


# ---- formulas --------------------------------------------------------------------------------------------

class CudaNorm(torch.autograd.Function):
    """rms_norm that keeps what the kernel on CUDA keeps: input, weight and, in fp32, a number a row."""
    @staticmethod
    def forward(ctx, x, weight, eps):
        scale = (x.float().square().mean(-1, keepdim=True) + eps).rsqrt()
        ctx.save_for_backward(x, weight, scale)
        return (x.float() * scale).to(x.dtype) * weight


def kept(model, tokens):
    """What the forward pass keeps for the backward pass: bytes of activations, of cast weights."""
    held = {}

    def hold(x):
        held[x.untyped_storage().data_ptr()] = x
        return x
    owned = (torch.arange(tokens.numel()) % 10 > 0).long() - 1  # most rows have an owner
    with saved_tensors_hooks(hold, lambda x: x):
        states = model.hidden(tokens).flatten(0, 1)
        loss = segment_logprobs(states, model.head.weight, tokens.flatten(), owned, 1).logprob.sum()
    del states
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    sizes = {p.numel() for p in model.parameters()}
    found = [0, 0]
    for place, x in held.items():
        if place not in parameters:
            found[x.numel() in sizes] += x.untyped_storage().nbytes()
    assert loss.requires_grad
    return found


@pytest.mark.parametrize("kind", SHAPES)
def test_activations_and_casts_to_5_percent(kind, monkeypatch):
    """With CUDA's norm; attention on a CPU keeps what flash attention keeps."""
    monkeypatch.setattr(F, "rms_norm", lambda x, size, weight, eps: CudaNorm.apply(x, weight, eps))
    m, tokens = small(kind), torch.randint(0, 500, (6, 83))
    model = Transformer(m, dtype=torch.bfloat16)
    for model.checkpoint_activations in (False, True):
        found = kept(model, tokens)
        a_token, casts = plan.activations(m, model.checkpoint_activations)
        if model.checkpoint_activations:  # the block that runs again does so later, in the backward pass
            a_token, casts = a_token - plan.block_bytes(m), 0
        assert found[0] == pytest.approx(a_token * tokens.numel(), rel=0.05)
        assert found[1] == pytest.approx(casts, rel=0.05, abs=200)


@pytest.mark.parametrize("m", [*(read_configs(FIXTURES / f)[0] for f in FOLDERS), *map(small, SHAPES),
                               *(shape(*sizes) for sizes in QWEN.values())], ids=lambda m: str(m.hidden_size))
def test_parameters_and_cache_are_exact(m):
    with torch.device("meta"):
        model = Transformer(m, dtype=torch.bfloat16)
    B = sum(p.numel() for p in model.model.layers.parameters())
    assert plan.parameters(m) == (B, sum(p.numel() for p in model.parameters()) - B)
    cache = model.to("meta").new_cache(5, 70)
    assert sum(x.nbytes for x in cache.k + cache.v) == 5 * 70 * plan.cache_bytes(m)
    with model.cast_once():
        copies = sum(p.nbytes for p in model.parameters() if p.dtype == torch.bfloat16)
    planned = {name: size for name, size, _ in plan.parts(m, [], KNOBS, WORK)}
    assert copies == planned["bf16 copy of the weights"]


def test_what_the_knobs_change():
    m = shape(*QWEN["1.5B"])

    def parts(**knobs):
        return {name: size for name, size, _ in plan.parts(m, [m], replace(KNOBS, **knobs), WORK)}
    P = sum(plan.parameters(m))
    base = parts()
    assert base["trained weights, fp32"] == 4 * P and base["judges, bf16"] == 2 * P == base["reference, bf16"]
    assert base["KV cache"] == 28_672 * 256 * (200 + 4096)
    assert parts(max_rows=64)["KV cache"] == 28_672 * 64 * 8700  # of the evaluation, under the attack `reset`
    assert parts(beta=0.0)["reference, bf16"] == 0
    assert parts(tokens_per_micro_batch=8192)["activations"] == base["activations"] / 2
    assert parts(tokens_per_micro_batch=1)["activations"] == pytest.approx(base["activations"] * 4296 / 16384)
    assert parts(checkpoint_activations="no")["activations"] > 9 * base["activations"]
    assert parts(potential="probe")["archive of --potential probe"] == base["KV cache"]


def test_lora_trains_its_adapter_alone():
    m = small("Qwen2")
    model = Transformer(m)
    adapters = plan.adapter(m, 8)
    add_adapter(model, 8, 16, 1)
    assert adapters == sum(p.numel() for p in model.parameters() if p.requires_grad)
    P = sum(plan.parameters(m))
    found = {name: size for name, size, _ in plan.parts(m, [], replace(KNOBS, lora_rank=8), WORK)}
    assert found["frozen weights, bf16"] == 2 * P and found["AdamW's two moments, fp32"] == 8 * adapters
    assert found["gradients, fp32"] == found["trained weights, fp32"] == 4 * adapters
    assert not found["reference, bf16"] and not found["bf16 copy of the weights"]


def test_the_knobs_that_the_verdict_names_make_the_run_fit():
    m = shape(*QWEN["1.5B"])
    for gb, expected in ((24, False), (48, True), (80, True)):
        c = replace(KNOBS, plan=float(gb), checkpoint_activations="no")
        better, text = plan.fitting(m, [], c, WORK, gb * 1e9), plan.verdict(m, [], c, WORK)
        fits = max(plan.sums(m, [], better, WORK).values()) <= gb * 1e9
        assert fits == expected == text.startswith("Fits in ")
        lowered = "--checkpoint-activations yes (now no)" in text, "--max-rows 64 (now 256)" in text
        assert lowered == (gb == 48, gb == 48)  # on 80 GB no knob need change, on 24 GB none helps
    enough = replace(KNOBS, plan=500.0)
    assert plan.fitting(m, [], enough, WORK, 500e9) == enough
    assert "only with" not in plan.verdict(m, [], enough, WORK)


def test_plan_prints_a_table_and_trains_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = ["--model", FIXTURES / "tiny-qwen2", "--prompts", FIXTURES / "prompts_xstest.csv", "--judge",
             FIXTURES / "tiny-qwen3", "--max-new-tokens", 200, "--plan", 24]
    assert sear.main([str(f) for f in flags]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| GB, computed for a GPU of 24 | sample | learn | update |"
    assert lines[-1].startswith("Fits in 0.") and any(line.startswith("| judges, bf16 |") for line in lines)
    assert not list(tmp_path.iterdir())


if __name__ == "__main__":
    text = PAGE.read_text()
    PAGE.write_text(text.replace(f"-->\n{block(text)}\n<!--", f"-->\n{tables()}\n<!--"))
