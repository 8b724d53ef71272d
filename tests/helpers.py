"""Helpers that several test files share."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import rollout  # noqa: E402
from lib import checkpoint  # noqa: E402
from lib.data import InputError  # noqa: E402
from lib.folder import parse_config  # noqa: E402
from model import Transformer  # noqa: E402

FIXTURES = ROOT / "tests" / "fixtures"
FOLDERS = ("tiny-qwen2", "tiny-qwen3", "tiny-llama3")


def golden(name):
    return json.loads((FIXTURES / name / "golden.json").read_text("utf-8"))


def refusal(call, *arguments):
    """The message of the InputError that the call must raise: one line, so one sentence."""
    with pytest.raises(InputError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def close(a, b, atol=1e-6):
    """Equal numbers; b may be a list, and nan equals nan."""
    return torch.allclose(a, torch.as_tensor(b, dtype=a.dtype), atol=atol, equal_nan=True)


def within(a, b, tolerance):
    """The norm of the difference is at most this share of that of b, which is not 0."""
    return (a - b).norm() <= tolerance * b.norm() and b.norm() > 0


def change_json(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def made_rollouts(tokenizer, prompts, texts, stop_id, G):
    """Rollouts with these texts, laid out as the sampler does. '$' at the end of a text is the stop token."""
    rows = [tokenizer.encode(t.removesuffix("$"), special=True) + [stop_id] * t.endswith("$") for t in texts]
    N = max(map(len, rows))
    out = torch.tensor([r + [0] * (N - len(r)) for r in rows])  # [B, N]
    length = torch.tensor([len(r) for r in rows])
    sampled = (out, torch.full(out.shape, -1.0), length, 0)
    return rollout.assemble(sampled, prompts, 0, [""] * len(prompts), False, G, tokenizer, [stop_id])


def write_random_folder(folder, vocab, hidden, layers, heads, kv_heads, intermediate, tied=True,
                        dtype=torch.bfloat16):
    """Writes a Hugging Face folder of random weights in Qwen2's shape, with tiny-qwen2's tokenizer."""
    folder, source = Path(folder), FIXTURES / "tiny-qwen2"
    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads((source / "config.json").read_text())
    config |= dict(vocab_size=vocab, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
                   num_key_value_heads=kv_heads, intermediate_size=intermediate, tie_word_embeddings=tied)
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((source / name).read_bytes())
    with torch.device("meta"):
        shapes = {n: p.shape for n, p in Transformer(parse_config(config)).named_parameters()}
    generator = torch.Generator().manual_seed(0)
    save_file({n: (torch.randn(s, generator=generator) * 0.02 + n.endswith("norm.weight")).to(dtype)
               for n, s in shapes.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    return config


def main(*flags):
    """Exit code of sear.py, run in this process."""
    import sear
    return sear.main([str(flag) for flag in flags])


def run_sear(*flags, before="", **options):
    """sear.py in its own process, with one thread. `before`: Python code that runs first, for example
    "import warmstart; warmstart.STEPS = 12"."""
    code = f"{before}\nimport sear, sys\nsys.exit(sear.main(sys.argv[1:]))"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    return subprocess.run([sys.executable, "-c", code, *map(str, flags)], capture_output=True, text=True,
                          timeout=150, env=environment, **options)


def signalling(function, call, number):
    """The function, whose nth call sends this process a signal before it begins."""
    calls = iter(range(1, 1000))

    def signalled(*args, **options):
        if next(calls) == call:
            os.kill(os.getpid(), number)
        return function(*args, **options)
    return signalled


def logged(run):
    """The rows of metrics.jsonl without the times."""
    return [row | {"seconds": None} for row in checkpoint.rows(run / "metrics.jsonl")]


def same_files(a, b, *names):
    for name in names:
        assert (a / name).read_bytes() == (b / name).read_bytes(), name


# ---- what a rank holds and sends -------------------------------------------------------------------------

# Width, layers, heads, key heads, inner width, vocabulary, tied; from huggingface.co/Qwen/Qwen2.5-*
QWEN = {
    "0.5B": (896, 24, 14, 2, 4864, 151_936, True),
    "1.5B": (1536, 28, 12, 2, 8960, 151_936, True),
    "7B": (3584, 28, 28, 4, 18_944, 152_064, False),
    "32B": (5120, 64, 40, 8, 27_648, 152_064, False)}


def shape(D, L, heads, kv_heads, inner, V, tied):
    """The config of a model of Qwen2's kind."""
    return parse_config(dict(
        architectures=["Qwen2ForCausalLM"], hidden_size=D, num_hidden_layers=L, vocab_size=V,
        num_attention_heads=heads, num_key_value_heads=kv_heads, intermediate_size=inner,
        tie_word_embeddings=tied, max_position_embeddings=32_768))


def replicated(P, N):
    """Bytes that a GPU holds and that it sends in a step: P parameters on N ranks."""
    return 20 * P, (N - 1) / N * 8 * P


def sharded(B, R, H, L, N, M, cast=2):
    """The same with sharded parameters: B in the L blocks, R in the root group, H of those in the head; M
    micro-batches; cast: bytes of the compute type."""
    holds = (16 + cast) * (B + R) / N + max(cast * B + 4 * R + 2 * H, (8 + cast) * (R + B / L))
    return holds, (N - 1) / N * (cast * (B + R) + 4 * R + M * (3 * cast * B + 4 * R + 4 * (B + R)))


def ranks_table():
    """Markdown: GB held and GB sent in a step of two micro-batches, for three models on 1, 8 and 64 GPUs."""
    lines = ["| model | GPUs | held, replicated | held, sharded | sent, replicated | sent, sharded |",
             "|" + "---|" * 6]
    for name in ("1.5B", "7B", "32B"):
        D, L, *_, V, _ = QWEN[name]
        with torch.device("meta"):
            model = Transformer(shape(*QWEN[name]))
        B, P = (sum(p.numel() for p in m.parameters()) for m in (model.model.layers, model))
        for N in (1, 8, 64):
            pairs = zip(replicated(P, N), sharded(B, P - B, V * D, L, N, 2))
            cells = [f"{x / 1e9:,.0f} GB" for pair in pairs for x in pair]
            lines.append(f"| {name} | {N} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":  # python tests/helpers.py FOLDER: random weights in the shape of Qwen2.5-0.5B
    write_random_folder(sys.argv[1], 151_936, 896, 24, 14, 2, 4864)
