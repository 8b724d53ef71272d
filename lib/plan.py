"""The GPU memory of a run, from its numbers: what `--plan` prints, and the tables of docs/memory.md.

No GPU has measured any of it. Weights, KV cache and activations equal what a CPU allocates for a small model
to 5 % (tests/test_plan.py), with CUDA's rule of what attention and norm keep. The temporaries are estimates.

D width, V vocabulary, L blocks, H heads, J key heads, E head width, I inner width, P parameters, B of them in
the blocks. One GPU holds everything: nothing is sharded. GB = 10^9 bytes; a card sold as 80 GB has up to 85,
and CUDA itself and the allocator's gaps take the difference.
"""
import math
from dataclasses import replace
from typing import NamedTuple

from lib.folder import Config
from lib.parallel import rank_and_world

MASTER, COMPUTE = 4, 2  # bytes of an fp32 and of a bf16 number
MIN_ROWS = 16  # a smaller batch is padded to as many rows
STEP_BYTES = 12  # a logit of a decoding step, its log-prob and its probability, in fp32
SPLIT_BYTES = 3 * 119 * MASTER  # a token in the log-prob kernel: three numbers for each split of V
CHUNK_BYTES = 336e6  # the kernel's largest piece of logits
FORCED = 280  # columns of a forced answer and its closing tag, with --potential probe
LOWERED = ("max_rows", "tokens_per_micro_batch", "checkpoint_activations")
PHASES = ("sample", "learn", "update")


class Work(NamedTuple):
    """What a run puts through the model, in tokens."""
    prompt: int  # of the longest prompt, with an injected thought
    attacked: int  # of the longest evaluated prompt with its answers, under the longest attack
    requests: int  # evaluated prompts


def parameters(m: Config) -> tuple[int, int]:
    """-> B, and the parameters of embedding, final norm and head."""
    D, inner, q, kv = m.hidden_size, m.intermediate_size, *widths(m)
    weights = D * (2 * q + 2 * kv) + 3 * D * inner + 2 * D + 2 * m.head_dim * m.qk_norm
    biases = (q + 2 * kv) * m.qkv_bias + D * m.o_bias + (2 * inner + D) * m.mlp_bias
    heads = (m.num_labels or m.vocab_size * (not m.tie_word_embeddings)) + (m.guard_size or 0)
    return m.num_hidden_layers * (weights + biases), D * (m.vocab_size + heads + 1)


def adapter(m: Config, rank: int) -> int:
    """Parameters of a LoRA adapter: rank (in + out) of each of a block's seven projections."""
    D, inner, q, kv = m.hidden_size, m.intermediate_size, *widths(m)
    return m.num_hidden_layers * rank * (2 * (D + q) + 2 * (D + kv) + 3 * (D + inner))


def widths(m: Config) -> tuple[int, int]:
    """-> H E, J E."""
    return m.num_attention_heads * m.head_dim, m.num_key_value_heads * m.head_dim


def cache_bytes(m: Config) -> int:
    """Of a column of the KV cache: 2 L J E numbers."""
    return 2 * m.num_hidden_layers * widths(m)[1] * COMPUTE


def block_bytes(m: Config) -> int:
    """What a block keeps of a token for its backward pass: what enters its norms and what leaves them (4 D),
    queries and their result (2 H E), keys and values (2 J E), the MLP's four steps (4 I); in fp32 a number
    for each head and norm. Norms of queries and keys keep their inputs too."""
    q, kv = widths(m)
    normed, heads = (q + kv, m.num_attention_heads + m.num_key_value_heads) if m.qk_norm else (0, 0)
    numbers = 4 * m.hidden_size + 2 * q + 2 * kv + 4 * m.intermediate_size + normed
    return COMPUTE * numbers + MASTER * (m.num_attention_heads + 2 + heads)


def activations(m: Config, again: bool) -> tuple[float, float]:
    """-> bytes a token, bytes of the weights' bf16 casts. again: blocks keep their input alone, and one at a
    time keeps the rest while it runs again. The final norm's input and the rows that a player owns: 2 D."""
    L, casts = m.num_hidden_layers, COMPUTE * parameters(m)[0]
    blocks = L * COMPUTE * m.hidden_size + block_bytes(m) if again else L * block_bytes(m)
    return blocks + 2 * COMPUTE * m.hidden_size, casts / L if again else casts


def parts(m: Config, judges: list[Config], c, work: Work) -> list[tuple[str, float, tuple[str, ...]]]:
    """(name, bytes, phases in which it is held) of everything. c: the knobs."""
    D, V, columns, world = m.hidden_size, m.vocab_size, work.prompt + c.max_new_tokens, rank_and_world()[1]
    P, a_column, again = sum(parameters(m)), cache_bytes(m), c.checkpoint_activations == "yes"
    full = not c.lora_rank
    trained = P if full else adapter(m, c.lora_rank)  # of an adapter; the model is frozen in bf16
    prompts = math.ceil(c.prompts_per_step / world)
    rows = max(MIN_ROWS, c.group_size * min(prompts, max(1, c.max_rows // c.group_size)))
    evaluated = max(MIN_ROWS, min(c.max_rows, math.ceil(work.requests / world))) * work.attacked
    probe = c.potential == "probe"  # forks: rows at the points, and each copied for its samples
    forks = probe * math.ceil(c.max_rows * (1 + 1 / c.probe_samples)) * (columns + FORCED)
    cache = a_column * max(rows * columns, evaluated * (work.requests > 0), forks)
    tokens = min(max(c.tokens_per_micro_batch, columns), prompts * c.group_size * columns)
    a_token, casts = activations(m, again)
    a_token += COMPUTE * 7 * c.lora_rank * (1 if again else m.num_hidden_layers)
    pieces = min(CHUNK_BYTES, COMPUTE * V * tokens)
    head = COMPUTE * V * D + tokens * (MASTER * D + SPLIT_BYTES) + pieces
    sample, learn, update = ((phase,) for phase in PHASES)
    return [
        ("trained weights, fp32", MASTER * trained, PHASES),
        ("frozen weights, bf16", COMPUTE * P * (not full), PHASES),
        ("AdamW's two moments, fp32", 2 * MASTER * trained, PHASES),
        ("reference, bf16", COMPUTE * P * (c.beta > 0 and full), PHASES),
        ("judges, bf16", COMPUTE * sum(sum(parameters(j)) for j in judges), PHASES),
        ("gradients, fp32", MASTER * trained, learn + update),
        ("bf16 copy of the weights", COMPUTE * (P - V * D * (not m.tie_word_embeddings)) * full, sample),
        ("KV cache", cache, sample),
        ("archive of --potential probe", probe * a_column * prompts * c.group_size * columns, sample),
        ("a layer of the cache, while rows leave", cache / m.num_hidden_layers, sample),
        ("logits of a decoding step", rows * V * STEP_BYTES, sample),
        ("activations", tokens * a_token, learn),
        ("bf16 casts kept for the backward pass", casts * full, learn),
        ("gradient of the head, until it is added", MASTER * V * D * full, learn),
        ("temporaries of the head or of a block", max(head, tokens * 8 * m.intermediate_size), learn),
        ("temporaries of AdamW", MASTER * trained, update)]


def sums(*run) -> dict[str, float]:
    """{phase: bytes}; takes what `parts` takes."""
    return {phase: sum(size for _, size, phases in parts(*run) if phase in phases) for phase in PHASES}


def fitting(m: Config, judges: list[Config], c, work: Work, room: float):
    """The knobs, some of them lowered until the run needs at most `room` bytes; or as low as they go."""
    def needs(phase):
        return sums(m, judges, c, work)[phase] > room
    longest = work.prompt + c.max_new_tokens  # a row is not split
    if needs("learn"):
        c = replace(c, checkpoint_activations="yes")
    while needs("learn") and c.tokens_per_micro_batch > longest:
        c = replace(c, tokens_per_micro_batch=max(longest, c.tokens_per_micro_batch // 2))
    while needs("sample") and c.max_rows > MIN_ROWS:
        c = replace(c, max_rows=max(MIN_ROWS, c.max_rows // 2))
    return c


def report(m: Config, judges: list[Config], c, work: Work) -> str:
    """Markdown: bytes of each part and phase, whether they fit into c.plan GB, and what to change if not."""
    lines = [f"| GB, computed for a GPU of {c.plan:g} | " + " | ".join(PHASES) + " |", "|---" * 4 + "|"]
    for name, size, phases in parts(m, judges, c, work):
        if size:
            cells = (f"{size / 1e9:.2f}" if phase in phases else "" for phase in PHASES)
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    cells = (f"{size / 1e9:.2f}" for size in sums(m, judges, c, work).values())
    return "\n".join([*lines, "| **all** | " + " | ".join(cells) + " |", "", verdict(m, judges, c, work)])


def verdict(m: Config, judges: list[Config], c, work: Work) -> str:
    """One sentence: whether the run fits, and the knobs to lower if it does not."""
    better = fitting(m, judges, c, work, c.plan * 1e9)
    phase, need = max(sums(m, judges, better, work).items(), key=lambda item: item[1])
    if need > c.plan * 1e9:
        return (f"Does not fit: '{phase}' needs {need / 1e9:.1f} GB even with the fewest rows and tokens at "
                "a time. Take a smaller model, fewer --max-new-tokens, or --shard yes on several GPUs.")
    changed = [k for k in LOWERED if getattr(better, k) != getattr(c, k)]
    flags = ", ".join(f"--{k.replace('_', '-')} {getattr(better, k)} (now {getattr(c, k)})" for k in changed)
    return f"Fits in {need / 1e9:.1f} GB{' only with ' + flags if flags else ''}."
