"""Hugging Face folders: what config.json says about the network, which file holds a weight, copying weights.

Files and keys that must agree are compared: they are resolved as transformers does, or refused.
"""
import contextlib
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lib.data import InputError, expect, read_json
from lib.parallel import local_rows, say

PIECE_BYTES = 32 << 20  # of a weight are read at once: what loading needs beside the model's own bytes
DTYPES = ("F64", "F32", "F16", "BF16")  # integers and fp8 need scales that no dense model has a place for
# What transformers takes for a key that config.json lacks; a key that is null is not absent.
DEFAULTS = {"Llama": {}, "Mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
            "Qwen2": {"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28}}
DEFAULTS["Qwen3"] = DEFAULTS["Qwen2"] | {"head_dim": 128}
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
         "num_key_value_heads", "head_dim", "max_position_embeddings")
notice = functools.cache(say)  # once in a process: a run loads the same folder several times


# ---- config.json -----------------------------------------------------------------------------------------

@dataclass
class Config:
    """What config.json says about the network. `raw` is the file itself, written back on saving."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: dict | None  # Llama 3.1's
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    windows: list[int | None]  # sliding window of each layer in tokens, None = full attention
    num_labels: int | None  # a reward model has a `score` head of this many rows instead of lm_head
    guard_size: int | None  # width of Qwen3Guard-Stream's head, which gives each token num_labels risks
    raw: dict


def parse_config(raw: dict, where: str = "config.json") -> Config:
    """Config from the parsed config.json, read as transformers reads it."""
    architecture = (raw.get("architectures") or ["none"])[0]
    family, _, task = architecture.partition("For")
    guard = architecture == "Qwen3ForGuardModel"
    expect(family in DEFAULTS and (guard or task in ("CausalLM", "SequenceClassification")),
           f"{where}: architecture", f"one of {', '.join(DEFAULTS)} with ForCausalLM or "
           "ForSequenceClassification, or Qwen3ForGuardModel", architecture)
    kind = raw.get("model_type", family.lower())
    expect(kind == family.lower(), f"{where}: model_type", f"'{family.lower()}' for {architecture}", kind)
    keys = DEFAULTS[family] | raw
    if keys.get("num_key_value_heads") is None:
        keys["num_key_value_heads"] = keys.get("num_attention_heads")
    if keys.get("head_dim") is None:
        keys["head_dim"] = keys["hidden_size"] // keys["num_attention_heads"]
    for key in (*SIZES, *("num_risk_level", "guard_inner_size") * guard):
        expect(isinstance(keys.get(key), int), f"{where}: {key}", "a whole number", keys.get(key))
    heads, kv_heads = keys["num_attention_heads"], keys["num_key_value_heads"]
    expect(heads % kv_heads == 0, f"{where}: num_attention_heads",
           f"a multiple of num_key_value_heads {kv_heads}", heads)
    activation = keys.get("hidden_act", "silu")
    expect(activation == "silu", f"{where}: hidden_act", "'silu'", activation)
    rope = rope_parameters(keys, where)
    bias = family in ("Llama", "Qwen3") and bool(keys.get("attention_bias"))
    labels = keys["num_risk_level"] if guard else None
    if task == "SequenceClassification":  # transformers' default is two labels
        labels = keys.get("num_labels") or len(keys.get("id2label") or {0: 0, 1: 1})
    return Config(
        **{key: keys[key] for key in SIZES}, rms_norm_eps=float(keys.get("rms_norm_eps", 1e-6)),
        rope_theta=float(rope["rope_theta"]), rope_scaling=rope if rope["rope_type"] == "llama3" else None,
        tie_word_embeddings=bool(keys.get("tie_word_embeddings")) and labels is None, o_bias=bias,
        qkv_bias=family == "Qwen2" or bias, mlp_bias=family == "Llama" and bool(keys.get("mlp_bias")),
        qk_norm=family == "Qwen3", windows=attention_windows(keys, family, where), num_labels=labels,
        guard_size=keys["guard_inner_size"] if guard else None, raw=raw)


def rope_parameters(keys: dict, where: str) -> dict:
    """rope_scaling (the old name, which wins in transformers) or rope_parameters, with all their keys."""
    rope = keys.get("rope_scaling") or keys.get("rope_parameters") or {}
    rope = {"rope_type": rope.get("type", "default"), "rope_theta": keys.get("rope_theta", 10000.0),
            "partial_rotary_factor": keys.get("partial_rotary_factor"),
            "original_max_position_embeddings": keys["max_position_embeddings"]} | rope
    if "original_max_position_embeddings" in keys:
        rope["original_max_position_embeddings"] = keys["original_max_position_embeddings"]
    needed = {"default": {"rope_theta"},
              "llama3": {"rope_theta", "factor", "low_freq_factor", "high_freq_factor"}}
    numbers = {key for key, value in rope.items() if isinstance(value, (int, float))}
    per_layer_type = any(isinstance(value, dict) for value in rope.values())
    expect(needed.get(rope["rope_type"], {None}) <= numbers and not per_layer_type and
           rope["partial_rotary_factor"] in (None, 1), f"{where}: rope_parameters",
           "the default ones, or llama3 with factor, low_freq_factor and high_freq_factor", rope)
    return rope


def attention_windows(keys: dict, family: str, where: str) -> list[int | None]:
    """Sliding window of each layer. Qwen's configs may give a window and switch it off."""
    layers, window = keys["num_hidden_layers"], keys.get("sliding_window")
    if family in ("Llama", "Mistral"):
        return [window if family == "Mistral" else None] * layers
    window = window if keys.get("use_sliding_window") else None
    full, sliding = "full_attention", "sliding_attention"
    first = layers if window is None else keys["max_window_layers"]
    kinds = keys.get("layer_types") or [full if i < first else sliding for i in range(layers)]
    expect(len(kinds) == layers and {*kinds} <= ({full} if window is None else {full, sliding}),
           f"{where}: layer_types", f"{layers} times {full}" + f" or {sliding}" * (window is not None), kinds)
    return [window if kind == sliding else None for kind in kinds]


def read_configs(folder: Path) -> tuple[Config, dict]:
    """Parsed config.json, and generation_config.json as it is, {} without one."""
    file, generation = folder / "config.json", folder / "generation_config.json"
    try:
        config = parse_config(read_json(file), str(file))
    except (TypeError, ValueError, AttributeError, KeyError, ArithmeticError) as error:  # "2" instead of 2
        raise error if isinstance(error, InputError) else InputError(
            f"{file} should be as transformers writes it, found {error!r}") from None
    return config, read_json(generation) if generation.exists() else {}


def stop_ids(raw: dict, generation: dict) -> list[int]:
    """Ids that end an answer: eos_token_id of generation_config.json or, without one there, config.json."""
    stop = generation.get("eos_token_id")
    stop = raw.get("eos_token_id") if stop is None else stop
    ids = [] if stop is None else stop if isinstance(stop, list) else [stop]
    where = "eos_token_id of generation_config.json or config.json"
    expect(all(isinstance(token, int) for token in ids), where, "a token id or a list of them", stop)
    return [*ids]


# ---- weights ---------------------------------------------------------------------------------------------

@contextlib.contextmanager
def open_weights(file: Path):
    """An open safetensors file."""
    try:
        with safe_open(file, framework="pt") as f:
            yield f
    except FileNotFoundError:
        raise InputError(f"{file}: no such file; expected a safetensors file of weights") from None
    except (SafetensorError, OSError) as e:
        raise InputError(f"{file}: not a whole safetensors file ({e})") from None


def names_in(files: list[Path]) -> dict[str, Path]:
    """{weight name: file that holds it}"""
    found = {}
    for file in files:
        with open_weights(file) as f:
            found |= dict.fromkeys(f.keys(), file)
    return found


def header(file: Path, name: str) -> tuple[list[int], str]:
    """Shape and type of a weight."""
    with open_weights(file) as f:
        return f.get_slice(name).get_shape(), f.get_slice(name).get_dtype()


def pieces(file: Path, name: str, first: int, rows: int) -> Iterator[tuple[int, Tensor]]:
    """Yields (row, piece) for `rows` rows of a weight from row `first` on; row counts from 0. The file is
    opened anew for each piece: pages once read count as ours until the mapping is closed, so with one mapping
    an fp32 checkpoint would peak at twice its bytes."""
    width = torch.Size(header(file, name)[0][1:]).numel()
    step = max(1, PIECE_BYTES // (4 * max(1, width)))
    for row in range(0, rows, step):
        with open_weights(file) as f:
            yield row, f.get_slice(name)[first + row:first + min(row + step, rows)]


def copy_weight(file: Path, name: str, target: Tensor) -> None:
    """Copies a weight into `target`, of a sharded one the rows of this rank, of one on "meta" nothing."""
    shape, dtype = header(file, name)
    if list(target.shape) != shape:
        raise InputError(f"{file}: weight '{name}' has shape {shape}, config.json asks for "
                         f"{list(target.shape)}")
    if dtype not in DTYPES:
        raise InputError(f"{file}: weight '{name}' should be stored as one of {', '.join(DTYPES)}, found "
                         f"{dtype}; quantized weights cannot be trained")
    mine, first = local_rows(target)
    for row, piece in pieces(file, name, first, 0 if target.is_meta else len(mine)):
        mine[row:row + len(piece)].copy_(piece)


def tied(files: dict[str, Path]) -> bool:
    """Whether lm_head, if it is stored at all, equals the embedding. It does not where it was trained."""
    names = "lm_head.weight", "model.embed_tokens.weight"
    if not {*names} <= files.keys():
        return True
    shapes = [header(files[name], name)[0] for name in names]
    pairs = zip(*(pieces(files[name], name, 0, shapes[0][0]) for name in names))
    return shapes[0] == shapes[1] and all(torch.equal(x.float(), y.float()) for (_, x), (_, y) in pairs)


def weight_files(folder: Path) -> dict[str, Path]:
    """{weight name: file that holds it}. As in transformers, model.safetensors counts and not an index beside
    it, since saving a model as one file may leave an old index."""
    adapter = folder / "adapter_config.json"
    if adapter.exists():  # transformers would add it to the weights
        raise InputError(f"{adapter}: adapters are not read; merge this one into the model, with peft's "
                         "merge_and_unload")
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.exists() or not index.exists():
        return names_in([whole])
    weights = read_json(index).get("weight_map")
    if not isinstance(weights, dict) or not all(isinstance(file, str) for file in weights.values()):
        raise InputError(f"{index}: key 'weight_map' should map weights to files")
    found = names_in([folder / file for file in sorted({*weights.values()})])
    odd = [name for name, file in weights.items() if found.get(name) != folder / file]
    if odd:
        raise InputError(f"{index}: weight '{odd[0]}' should be in {weights[odd[0]]} and in no other file")
    return found
