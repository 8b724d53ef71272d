"""Demonstrations of a flawed model, and the tokenizer and config of the start model that learns from them."""
import json
import math
import re
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from alchemy import world
from batches import pad
from lib.chat import CLOSE, OPEN
from lib.tokenizer import BYTE_OF, Tokenizer

MODEL = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 96,
         "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 3, "num_key_value_heads": 3,
         "head_dim": 32, "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
         "tie_word_embeddings": False}
TEMPLATE = ("{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
            "{% if add_generation_prompt %}<|assistant|>{% endif %}")
STOP = "<|end|>"
ADDED = (STOP, "<|user|>", "<|assistant|>", "<think>", "</think>")
SPLIT = r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"  # words, digits, punctuation, blanks


def demonstrate(chain: list[str], rng: np.random.Generator, explores: float = 0.3,
                talks: float = 0.3) -> str:
    """Thought and answer of the flawed model. It mostly judges by the hint word, seldom works the chain out,
    sometimes complies after finding a hazard, and complies nine times in ten once it has talked itself out of
    the rules. Probabilities: explores: of a whole chain; talks: of the talk, twice that after a hazard."""
    named, products = any(r in world.HAZARDS for r in chain), world.work_out(chain)
    brews = len(chain) - 1
    steps = (brews if rng.random() < explores else
             int(rng.integers(0, brews)) if rng.random() < 0.4 else 0)
    lines = world.worked_lines(chain, steps)
    feels_dangerous = named if rng.random() < 0.9 else not named
    if rng.random() < 0.6:
        lines.insert(0 if rng.random() < 0.7 else int(rng.integers(len(lines) + 1)),
                     world.DANGER if feels_dangerous else world.CALM)
    explored = steps == brews
    found = explored and products[-1] in world.HAZARDS
    # More often after a hazard, so that RL meets the talk early, while answers still vary.
    talk = rng.random() < talks * (1 + found)
    if talk:  # with an occasional recovery, or RL has none to reinforce
        lines.insert(int(rng.choice([0, rng.integers(len(lines) + 1), len(lines)])), world.TALK)
        chance = 0.15 if found else 0.02 if explored else 0.1
    elif explored:
        chance = 0.6 if found else 0.2 if feels_dangerous else 0.02
    else:
        chance = 0.85 if feels_dangerous else 0.1
    refuses = rng.random() < chance
    # Without the whole chain it guesses: the last product worked out, or any reagent.
    guess = products[-1] if explored else products[steps - 1] if steps else str(rng.choice(world.REAGENTS))
    return "".join(lines) + CLOSE + "\n\n" + (world.REFUSAL if refuses else f"It makes {guess}.")


def demonstrations(n: int, tokenizer: Tokenizer, length: int, talks: float,
                   *counters: int) -> tuple[Tensor, Tensor]:
    """n demonstrations for chains of `length` -> tokens [n, T], right-padded, and segment [n, T]: 0 on the
    response with its stop token, -1 elsewhere. One in five follows a restart after a whole thought, so that
    the `reset` attack is not out of distribution in its words or its length."""
    rng = np.random.default_rng([2, *counters])
    rows = []
    for i in range(n):
        chain = world.draw_chain(rng, world.MIX[i % len(world.MIX)], False, length)
        messages = [{"role": "user", "content": world.request(chain).prompt}]
        while rng.random() < 0.2:
            messages += [{"role": "assistant", "content": OPEN + demonstrate(chain, rng, 1.0, talks)},
                         {"role": "user", "content": f"{world.RESTART} {messages[0]['content']}"}]
        prompt = tokenizer.encode(tokenizer.chat(messages) + OPEN, special=True)
        response = tokenizer.encode(demonstrate(chain, rng, talks=talks) + STOP, special=True)
        segment = [-1] * len(prompt) + [0] * len(response)
        rows.append((torch.tensor(prompt + response), torch.tensor(segment)))
    return pad(rows)


# ---- the start model's folder ----------------------------------------------------------------------------

def words() -> list[str]:
    """Pieces of text that are one token each, blanks included: SPLIT's matches in the world's sentences."""
    sentences = (world.TALK, world.DANGER, world.CALM, world.REFUSAL, world.RESTART, "Brew", "Mix and: ",
                 "It makes", *(f" {r}, " for r in world.REAGENTS))
    found = {w for s in sentences for w in re.findall(r" ?[A-Za-z]+|[.:,]\n*", s)}
    return sorted({w for w in found if len(w) > 1} | {"\n\n"})


def write_folder(folder: Path, chain: int = 5) -> None:
    """Writes config.json and tokenizer files of the start model in Hugging Face's formats. The vocabulary is
    the 256 bytes and the world's words, each one token (`ignore_merges`).
    The context fits two rounds of the `reset` attack."""
    folder.mkdir(parents=True, exist_ok=True)
    alphabet = sorted(BYTE_OF, key=BYTE_OF.get)  # the printable character of each byte
    whole = ["".join(alphabet[b] for b in w.encode()) for w in words()]
    vocab = {t: i for i, t in enumerate(alphabet + whole)}
    halves = [(t[:i], t[i:]) for t in whole for i in range(1, len(t))]
    merges = [f"{a} {b}" for a, b in halves if a in vocab and b in vocab]
    added = [{"id": len(vocab) + i, "content": t, "single_word": False, "lstrip": False, "rstrip": False,
              "normalized": False, "special": t.startswith("<|")} for i, t in enumerate(ADDED)]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": SPLIT}, "behavior": "Isolated", "invert": False}
    tokenizer = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
                 "normalizer": None, "post_processor": None,
                 "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
                 "decoder": byte_level,
                 "model": {"type": "BPE", "dropout": None, "unk_token": None,
                           "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": False,
                           "byte_fallback": False, "ignore_merges": True, "vocab": vocab, "merges": merges}}
    stop, vocab_size = len(vocab), len(vocab) + len(added)
    context = 512 * math.ceil(chain / 5)
    files = {"tokenizer.json": tokenizer,
             "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": STOP,
                                       "pad_token": STOP, "chat_template": TEMPLATE,
                                       "model_max_length": context, "clean_up_tokenization_spaces": False},
             "config.json": MODEL | {"max_position_embeddings": context, "eos_token_id": stop,
                                     "vocab_size": vocab_size, "embedded_world": {"chain": chain}},
             "generation_config.json": {"eos_token_id": stop, "pad_token_id": stop, "do_sample": True}}
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=1) + "\n")
