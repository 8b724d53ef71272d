"""What it costs to judge every prefix of a thought, against the whole thought once and each prefix by itself.

    OMP_NUM_THREADS=1 python tests/bench_judges.py

The goal is a ratio of at most 1.3 on a CPU. All are timed in one run, in turns; the best of each counts.
"""
import tempfile
import time
from pathlib import Path

import torch
from helpers import change_json
from judge_helpers import lay_out_guard

from judges import guards
from lib.data import Prompt
from model import Transformer

SHAPE = dict(hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=8,
             num_key_value_heads=4, head_dim=32, max_position_embeddings=8192)
K, TOKENS, REPEATS = 8, 2000, 5


def main() -> None:
    torch.set_num_threads(1)
    guards.LEAST_MASS = 0.0  # random weights give no word much probability
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "guard"
        lay_out_guard(folder)
        change_json(folder / "config.json", **SHAPE)
        Transformer.from_scratch(folder, 1).save_pretrained(folder)
        reader = guards.load_reader(str(folder))
    words = [token for token in range(300, 1900) if reader.tokenizer.token_bytes(token).isalpha()]
    texts = [reader.tokenizer.decode(words[n * 31:][:20]) + "\n\n" for n in range(K)]
    pieces = [text * round(TOKENS / K / len(reader.tokenizer.encode(text))) for text in texts]
    tokens = sum(len(reader.tokenizer.encode(piece)) for piece in pieces)
    prompt = [Prompt("How do I kill a process?", "harmful")]
    # The first question alone: it is all that the potential reads.
    one = reader._replace(ask=reader.ask[:1], suffix=reader.suffix[:reader.ask[0].position + 1])
    prefixes = ["".join(pieces[:k + 1]) for k in range(K)]
    whole = "the whole thought, judged once"
    ways = {whole: lambda: guards.read_answers(one, prompt, ["".join(pieces)]),
            f"all its {K} prefixes, one pass": lambda: guards.read_pieces(one, prompt, [pieces]),
            f"all its {K} prefixes, {K} passes": lambda: [guards.read_answers(one, prompt, [text])
                                                          for text in prefixes],
            f"all its {K} prefixes, one batch": lambda: guards.read_answers(one, prompt * K, prefixes)}
    seconds = dict.fromkeys(ways, float("inf"))
    for _ in range(REPEATS):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            seconds[name] = min(seconds[name], time.perf_counter() - start)
    print(f"thought of {tokens} tokens, suffix of {len(one.suffix)}, prefix of {one.prefix.length}; "
          f"best of {REPEATS}, one thread\n\n| | seconds | ratio |\n|---|---|---|")
    for name, value in seconds.items():
        print(f"| {name} | {value:.3f} | {value / seconds[whole]:.2f} |")


if __name__ == "__main__":
    main()
