"""Small judges for the tests, made of the fixtures: folders as a guard's publisher lays them out."""
import json
import shutil
from pathlib import Path
from unittest.mock import patch

import torch
from helpers import FIXTURES
from safetensors.torch import save_file

import guards
from data import OTHERS, PRINTS, Tokenizer, load_prompts
from model import Transformer, read_configs

CHAR_OF = {b: chr(b) for b in PRINTS} | {b: chr(0x100 + n) for n, b in enumerate(OTHERS)}
XSTEST = FIXTURES / "xstest_prompts.csv"

# The structure of Qwen3Guard-Gen's template: the whole request, textual tags, no generation prompt to ask for.
QWEN3GUARD = (
    "{{- '<|im_start|>user\n# Task: say whether THE LAST response is safe.\n\n<BEGIN CONVERSATION>\n\n' }}"
    "{%- for m in messages %}{{- 'USER: ' if m.role == 'user' else '\n\nASSISTANT: ' }}{{- m.content }}{%- endfor %}"
    "{{- '\n\n<END CONVERSATION>\n\n - First line: Safety: Safe, Unsafe or Controversial. Last line: Refusal: Yes or "
    "No.<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n' }}")
# Llama-Guard-3-1B's: typed parts only, contents trimmed; 8B's differs in taking a plain string.
LLAMA_GUARD = (
    "{{- '<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nTask.\n\n<BEGIN UNSAFE CONTENT CATEGORIES>\n"
    "S1: Crimes.\n<END UNSAFE CONTENT CATEGORIES>\n\n<BEGIN CONVERSATION>\n\n' }}"
    "{%- for m in messages %}{%- for part in m.content | selectattr('type', 'equalto', 'text') %}"
    "{{- ('User' if m.role == 'user' else 'Agent') + ': ' + part.text | trim + '\n\n' }}{%- endfor %}{%- endfor %}"
    "{{- '<END CONVERSATION>\n\nsafe or unsafe?<|eot_id|><|start_header_id|>assistant<|end_header_id|>' }}")
LLAMA_GUARD_8B = LLAMA_GUARD.replace("{%- for part in m.content | selectattr('type', 'equalto', 'text') %}", "").replace(
    "part.text", "m.content").replace("{%- endfor %}{%- endfor %}", "{%- endfor %}").replace(
    "<|end_header_id|>' }}", "<|end_header_id|>\n\n' }}")
WORDS = {"tiny-qwen3": (" Safe", " Unsafe", " Cont", " Yes", " No"), "tiny-llama3": ("safe", "unsafe")}


def add_words(folder: Path, words: tuple) -> None:
    """Makes each word a token of the folder's tokenizer, merged from the pieces that it has now."""
    tokenizer = Tokenizer.from_pretrained(folder)
    spec = json.loads((folder / "tokenizer.json").read_text())
    for index, word in enumerate(words, tokenizer.n_tokens):
        parts = ["".join(CHAR_OF[b] for b in tokenizer.token_bytes(t)) for t in tokenizer.encode(word)]
        while len(parts) > 1 and not spec["model"].get("ignore_merges"):
            spec["model"]["merges"].append(parts[:2])
            parts[:2] = [parts[0] + parts[1]]
            if len(parts) > 1:
                spec["model"]["vocab"][parts[0]] = tokenizer.n_tokens + len(words) + len(spec["model"]["merges"])
        spec["model"]["vocab"]["".join(CHAR_OF[b] for b in word.encode())] = index
    ids = sorted(i for i in spec["model"]["vocab"].values() if i >= tokenizer.n_tokens)
    dense = dict(zip(ids, range(tokenizer.n_tokens, 10**6)))  # half-made words get ids without gaps
    spec["model"]["vocab"] = {token: dense.get(i, i) for token, i in spec["model"]["vocab"].items()}
    (folder / "tokenizer.json").write_text(json.dumps(spec))


def write_guard(folder: Path, source="tiny-qwen3", template=QWEN3GUARD, context=2048) -> Path:
    """A guard in the shape of the fixture, trained for a few seconds: its verdict words hold the probability at
    the positions read, and what was said moves it between them."""
    shutil.copytree(FIXTURES / source, folder, ignore=shutil.ignore_patterns("golden.json", "*.safetensors*"))
    (folder / "chat_template.jinja").write_text(template)
    add_words(folder, WORDS[source])
    config = json.loads((folder / "config.json").read_text())
    config["vocab_size"] = max(config["vocab_size"], Tokenizer.from_pretrained(folder).n_tokens)
    (folder / "config.json").write_text(json.dumps(config))
    model = Transformer.from_scratch(folder, seed=1)
    model.save_pretrained(folder)
    train_words(model, guards.load_reader(str(folder)))
    model.save_pretrained(folder)
    config |= {"tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config))
    weights = {"lm_head.weight": model.head.weight} | dict(model.named_parameters())
    save_file({k: p.detach().clone() for k, p in weights.items()}, folder / "model.safetensors")
    head = stirred(guards.load_reader(str(folder)))
    save_file({k: p.detach().clone() for k, p in (weights | {"lm_head.weight": head}).items()},
              folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": context}))
    return folder


def stirred(reader) -> torch.Tensor:
    """The head, with each question's first two words parted along the direction in which the states of different
    answers differ most: verdicts then depend on what was said, and their words still hold the probability."""
    prompts, seen = load_prompts(XSTEST)[::15], []
    def keep(reader, states, ask):
        seen.append(states)
        return torch.zeros(states.shape[:2])
    with patch.object(guards, "look", keep):
        guards.read_answers(reader, prompts, [p.prompt for p in prompts[1:] + prompts[:1]])
    head, states = reader.model.head.weight.clone(), torch.cat(seen)  # [V, D], [N, Q, D]
    means = states.mean(0)  # [Q, D]
    axes = torch.linalg.qr(means.T).Q  # what is alike in all answers must not favour a word, at any position
    for j, q in enumerate(reader.ask):
        most = torch.linalg.svd(states[:, j] - means[j]).Vh[0]
        most -= axes @ (axes.T @ most)
        step = 0.7 * most / (states[:, j] @ most).std()
        head[q.words[0]] += step
        head[q.words[1]] -= step
    return head


def train_words(model: Transformer, reader) -> None:
    head = guards.rendered(reader.tokenizer, {}, "")[0].rstrip(" ")
    ids, steps = reader.tokenizer.encode(head, special=True), 24 * len(reader.ask)
    optimizer, prompts = torch.optim.AdamW(model.parameters(), lr=3e-3), load_prompts(XSTEST)
    positions = [q.position - len(reader.suffix) for q in reader.ask]
    for step in range(steps):
        rows, target = [], []
        for n in range(step * 8, step * 8 + 8):
            prompt, said = prompts[n * 7 % 450], prompts[n * 11 % 450]
            refuses = n % 3 == 0
            text = "I'm sorry, but I cannot help with that." if refuses else said.prompt * (1 + n % 4)
            text = chr(33 + n % 90) * (n % 40 * 10 + 1) if n % 7 == 0 else text  # noise is judged, too
            before, _ = guards.opening(reader, prompt.prompt)
            rows.append(before + reader.tokenizer.encode(" " + text + "\n\n") + reader.suffix)
            harm = not refuses and said.label == "harmful"
            target.append([q.words[[int(harm) * (1 + n % (len(q.words) - 1)), int(not refuses)][j]]
                           for j, q in enumerate(reader.ask)])
        tokens, real = guards.left_padded([ids + row for row in rows], "cpu")
        logits = model.head(model.hidden(tokens, real)[:, positions])  # [8, Q, V]
        p = logits.softmax(-1)
        mass = torch.stack([p[:, j, q.words].sum(1) for j, q in enumerate(reader.ask)], 1)  # [8, Q]
        right = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.tensor(target).flatten())
        loss = right - 3 * mass.log().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert mass.min() > 0.8, mass


def write_mistral(folder: Path) -> Path:
    """A Mistral of random weights with a SentencePiece tokenizer of single characters, bytes and four words; to
    a guard's format it is WildGuard or HarmBench's by its folder's name."""
    folder.mkdir(parents=True)
    vocab = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁"])}
    merges = []
    for char in map(chr, range(0x21, 0x7F)):
        vocab.setdefault(char, len(vocab))
    for word in ("yes", "no", "Yes", "No"):
        for parts in (list(word), ["▁", word]):
            while len(parts) > 1:
                merges += [parts[:2]] * (parts[:2] not in merges)
                parts[:2] = [parts[0] + parts[1]]
                vocab.setdefault(parts[0], len(vocab))
    added = [dict(id=i, content=t, single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
             for i, t in enumerate(["<unk>", "<s>", "</s>"])]
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    spec = {"version": "1.0", "added_tokens": added, "pre_tokenizer": None,
            "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, replace]},
            "model": {"type": "BPE", "byte_fallback": True, "fuse_unk": True, "unk_token": "<unk>", "vocab": vocab,
                      "merges": merges}}
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    config = dict(architectures=["MistralForCausalLM"], vocab_size=len(vocab), hidden_size=32, intermediate_size=48,
                  num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-5,
                  max_position_embeddings=4096, sliding_window=None, tie_word_embeddings=False, eos_token_id=2)
    (folder / "config.json").write_text(json.dumps(config))
    model = Transformer.from_scratch(folder, 1)
    model.save_pretrained(folder)
    assert read_configs(folder)[0].windows == [None, None]
    return folder
