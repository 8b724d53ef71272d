"""The transformer: Llama 3.x, Qwen2/2.5, Qwen3, Mistral, dense; Hugging Face folders; static KV cache.

Modules carry the names of the Hugging Face checkpoints (`model.layers.0.self_attn.q_proj.weight`), so loading
and saving need no table of keys. Weights are fp32 masters; every Linear casts its own to the activation's
type (bf16 on CUDA, fp32 on CPU), so there is no autocast and sampler and learner compute alike.

Shapes: B rows, T tokens, D width, V vocabulary, H heads, J key/value heads, E head width, S cache columns.
"""
import contextlib
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from data import InputError, as_json, read_text
from parallel import own_rows, rank_and_world, write_tensors

COPY_BYTES = 32 << 20  # of one piece of a weight: what loading needs beyond the model's own bytes
INIT_STD = 0.05  # of a model made from scratch; the embedded world's 96-wide start model is the only one


@dataclass
class Config:
    """What config.json says of the network. `raw` is the file itself, written back on saving."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: dict | None
    max_position_embeddings: int
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    windows: list[int | None]  # sliding window of each layer in tokens, None = full attention
    num_labels: int | None  # a reward model has a `score` head of this many rows instead of lm_head
    raw: dict


def parse_config(raw: dict, where: str = "config.json") -> Config:
    """Config from the parsed config.json. Old (`rope_theta`, `rope_scaling`) and new (`rope_parameters`) keys
    both load. Raises InputError that names the key where the network is not one of ours."""
    def need(key, default=None):
        value = raw.get(key, default)
        if value is None:
            raise InputError(f"{where}: key '{key}' is missing")
        return value

    architecture = (raw.get("architectures") or ["none"])[0]
    family, _, task = architecture.partition("For")
    known = family in ("Qwen2", "Qwen3", "Llama", "Mistral")
    if not known or task not in ("CausalLM", "SequenceClassification"):
        raise InputError(f"{where}: architecture '{architecture}' is unknown; expected Qwen2, Qwen3, Llama "
                         "or Mistral, followed by ForCausalLM or ForSequenceClassification")
    if need("hidden_act", "silu") != "silu":
        raise InputError(f"{where}: hidden_act '{raw['hidden_act']}' is not supported, expected 'silu'")
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    scaled = {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
    if kind not in ("default", "llama3") or kind == "llama3" and scaled - rope.keys():
        raise InputError(f"{where}: rope type '{kind}' is not supported, or lacks one of {sorted(scaled)}")
    layers, heads = need("num_hidden_layers"), need("num_attention_heads")
    kv_heads = raw.get("num_key_value_heads") or heads
    if heads % kv_heads:
        raise InputError(f"{where}: num_attention_heads {heads} is no multiple of "
                         f"num_key_value_heads {kv_heads}")
    bias = bool(raw.get("attention_bias", False))
    labels = None
    if task == "SequenceClassification":  # id2label alone may imply num_labels; two are the default
        labels = raw.get("num_labels") or len(raw.get("id2label") or {0: 0, 1: 1})
    return Config(
        vocab_size=need("vocab_size"), hidden_size=need("hidden_size"),
        intermediate_size=need("intermediate_size"), num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads,
        head_dim=raw.get("head_dim") or need("hidden_size") // heads,
        rms_norm_eps=raw.get("rms_norm_eps", 1e-6),
        rope_theta=float(rope.get("rope_theta") or raw.get("rope_theta") or 10000.0),
        rope_scaling=rope if kind == "llama3" else None,
        max_position_embeddings=need("max_position_embeddings"),
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)) and labels is None,
        qkv_bias=family == "Qwen2" or bias, o_bias=family != "Qwen2" and bias,
        mlp_bias=family == "Llama" and bool(raw.get("mlp_bias", False)), qk_norm=family == "Qwen3",
        windows=attention_windows(raw, family, layers), num_labels=labels, raw=raw)


def read_configs(folder: Path) -> tuple[Config, dict]:
    """config.json parsed; generation_config.json as it is, {} where there is none."""
    file, generation = folder / "config.json", folder / "generation_config.json"
    raw = as_json(file, read_text(file))
    try:
        config = parse_config(raw, str(file))
    except (TypeError, AttributeError, KeyError, ZeroDivisionError) as error:  # "2" for 2, say
        raise InputError(f"{file} should be as transformers writes it, found {error!r}") from None
    return config, as_json(generation, read_text(generation)) if generation.exists() else {}


def attention_windows(raw: dict, family: str, layers: int) -> list[int | None]:
    """Sliding window of each layer. Qwen may set one and have `use_sliding_window` false."""
    window = raw.get("sliding_window")
    used = family == "Mistral" or family != "Llama" and raw.get("use_sliding_window", False)
    if window is None or not used:
        return [None] * layers
    kinds = raw.get("layer_types")
    if kinds is None:
        first = 0 if family == "Mistral" else raw.get("max_window_layers", layers)
        kinds = ["full_attention"] * first + ["sliding_attention"] * (layers - first)
    return [window if kind == "sliding_attention" else None for kind in kinds]


@dataclass
class Cache:
    """Static KV cache: buffers of S columns, filled from the left; all rows write the same column.

    A row is a set of valid columns: left padding, and what of a thought a fork leaves behind, are columns
    marked invalid. Positions are counted over valid columns, so a fork needs no re-rotation of its keys."""
    k: Tensor  # [layers, B, J, S, E]
    v: Tensor  # [layers, B, J, S, E]
    valid: Tensor  # [B, S] bool
    length: int  # columns filled so far

    def rows(self, index: Tensor, room: int | None = None) -> "Cache":
        """The chosen rows, repeats allowed, as a cache of their own: expands a prompt to its group, drops
        finished rows, forks a thought. `room`: free columns it shall have (default: as many as here)."""
        n, columns = self.length, self.valid.shape[1] if room is None else self.length + room
        shape = (self.k.shape[0], len(index), self.k.shape[2], columns, self.k.shape[4])
        k, v = self.k.new_empty(shape), self.v.new_empty(shape)
        k[:, :, :, :n], v[:, :, :, :n] = self.k[:, index, :, :n], self.v[:, index, :, :n]
        valid = self.valid.new_zeros(len(index), columns)
        valid[:, :n] = self.valid[index, :n]
        return Cache(k, v, valid, n)


class Linear(nn.Linear):
    """fp32 master weight, cast to the activation's type on use."""
    cast: Tensor | None = None  # a copy in the compute type while sampling (see Transformer.cast_once)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.to(x.dtype) if self.cast is None else self.cast
        return F.linear(x, weight, None if self.bias is None else self.bias.to(x.dtype))


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding, halves convention, of x [B, heads, T, E]; sin has its first half negated already."""
    return x * cos + x.roll(x.shape[-1] // 2, -1) * sin


def attention_dtype(x: Tensor) -> torch.dtype:
    """fp64 on the CPU. Attention is the one place where decoding a token and the full forward add in other
    orders; in fp32 that alone moves a log-prob by up to 2e-5, here both round to the same fp32 result."""
    return torch.float64 if x.device.type == "cpu" and x.dtype == torch.float32 else x.dtype


class Attention(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        self.head_dim = c.head_dim
        self.q_proj = Linear(c.hidden_size, q, bias=c.qkv_bias)
        self.k_proj = Linear(c.hidden_size, kv, bias=c.qkv_bias)
        self.v_proj = Linear(c.hidden_size, kv, bias=c.qkv_bias)
        self.o_proj = Linear(q, c.hidden_size, bias=c.o_bias)
        self.q_norm = RMSNorm(c.head_dim, c.rms_norm_eps) if c.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(c.head_dim, c.rms_norm_eps) if c.qk_norm else nn.Identity()

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: Cache | None, layer):
        B, T, _ = x.shape
        q = self.q_norm(self.q_proj(x).view(B, T, -1, self.head_dim)).transpose(1, 2)  # [B, H, T, E]
        k = self.k_norm(self.k_proj(x).view(B, T, -1, self.head_dim)).transpose(1, 2)  # [B, J, T, E]
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)
        wide = attention_dtype(x)
        q, k, v = rotate(q, cos, sin).to(wide), rotate(k, cos, sin).to(wide), v.to(wide)
        if cache is not None:
            end = cache.length + T
            cache.k[layer, :, :, cache.length:end], cache.v[layer, :, :, cache.length:end] = k, v
            k, v = cache.k[layer, :, :, :end], cache.v[layer, :, :, :end]  # [B, J, S, E] views
        if T == 1 and q.shape[1] != k.shape[1]:
            # One query a row: the H/J query heads that share a key head stand in for query positions, so that
            # the key cache is never expanded (from 4,096 columns on that copy costs more than the model).
            q = q.reshape(B, k.shape[1], -1, self.head_dim)  # [B, J, H / J, E]
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        else:
            causal, grouped = mask is None and T > 1, q.shape[1] != k.shape[1]
            out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=grouped)
        out = out.reshape(B, -1, T, self.head_dim).transpose(1, 2).reshape(B, T, -1)  # [B, T, H * E]
        return self.o_proj(out.to(x.dtype))


class MLP(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.gate_proj = Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.up_proj = Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.down_proj = Linear(c.intermediate_size, c.hidden_size, bias=c.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = MLP(c)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: Cache | None, layer):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, cache, layer)
        return x + self.mlp(self.post_attention_layernorm(x))


class Body(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)


class Transformer(nn.Module):
    """`model(tokens [B, T])` gives logits [B, T, V]; `model.hidden` stops before the head, for the kernel."""

    def __init__(self, config: Config, generation: dict | None = None, dtype: torch.dtype | None = None):
        super().__init__()
        self.config, self.generation, self.dtype = config, generation or {}, dtype
        self.model = Body(config)
        head = Linear(config.hidden_size, config.num_labels or config.vocab_size, bias=False)
        if config.num_labels:
            self.score = head
        else:
            self.lm_head = head
            if config.tie_word_embeddings:
                self.lm_head.weight = self.model.embed_tokens.weight
        stop = self.generation.get("eos_token_id", config.raw.get("eos_token_id"))
        self.stop_ids: list[int] = [] if stop is None else [stop] if isinstance(stop, int) else list(stop)

    @property
    def head(self) -> Linear:
        return self.score if self.config.num_labels else self.lm_head

    @property
    def device(self) -> torch.device:
        return self.model.norm.weight.device

    @property
    def compute_dtype(self) -> torch.dtype:
        return self.dtype or (torch.bfloat16 if self.device.type == "cuda" else torch.float32)

    def forward(self, tokens, attention_mask: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """tokens [B, T], attention_mask [B, T] (0 on padding of either side) -> logits [B, T, V]; of a reward
        model scores [B, T, num_labels], where the last real token's counts."""
        return self.head(self.hidden(tokens, attention_mask, cache))

    def hidden(self, tokens, attention_mask: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """Final normed states [B, T, D]. Without mask and cache attention is plainly causal, the fast path:
        right padding is harmless then, unseen by real tokens. A cache has the T tokens appended to it."""
        B, T = tokens.shape
        if cache is not None:
            if cache.length + T > cache.valid.shape[1]:
                raise ValueError(f"cache of {cache.valid.shape[1]} columns is full ({cache.length} + {T})")
            valid = cache.valid[:, :cache.length + T]  # [B, S]
            valid[:, -T:] = True if attention_mask is None else attention_mask.bool()
        else:
            valid = None if attention_mask is None else attention_mask.bool()
        if valid is None:
            position = torch.arange(T, device=tokens.device)[None]  # [1, T]
            masks = {None: None}
        else:
            position = (valid.cumsum(1)[:, -T:] - 1).clamp(min=0)  # [B, T], counted over valid columns only
            masks = {None: causal_mask(valid, T)}
        for window in set(self.config.windows) - {None}:
            everything = torch.ones(1, T, dtype=torch.bool, device=tokens.device)
            masks[window] = causal_mask(everything if valid is None else valid, T, window)
        cos, sin = rope_tables(self.config, position)  # [B, 1, T, E] fp32
        x = self.model.embed_tokens(tokens).to(self.compute_dtype)  # [B, T, D]
        cos, sin = cos.to(x.dtype), sin.to(x.dtype)
        for i, block in enumerate(self.model.layers):
            run = block if cache is None else block.forward  # sampling: all is gathered, hooks only cost
            x = run(x, cos, sin, masks[self.config.windows[i]], cache, i)
        if cache is not None:
            cache.length += T
        return self.model.norm(x)

    def new_cache(self, rows: int, columns: int) -> Cache:
        """Empty cache. Bytes: 2 x layers x rows x J x columns x E x size; 28 KB a token of Qwen2.5-1.5B."""
        c = self.config
        shape = (c.num_hidden_layers, rows, c.num_key_value_heads, columns, c.head_dim)
        dtype = attention_dtype(torch.empty(0, dtype=self.compute_dtype, device=self.device))
        # Zeros, as a masked column still meets the softmax: 0 x NaN of recycled memory would be NaN.
        k, v = (torch.zeros(shape, dtype=dtype, device=self.device) for _ in range(2))
        return Cache(k, v, torch.zeros(rows, columns, dtype=torch.bool, device=self.device), 0)

    @contextlib.contextmanager
    def cast_once(self):
        """Within the block every Linear uses one copy of its weight in the compute type, the same bits:
        decoding would otherwise read the fp32 masters and write the cast for each token. No-op in fp32."""
        wide = self.compute_dtype == torch.float32
        linears = [m for m in self.modules() if isinstance(m, Linear) and not wide]
        try:
            for m in linears:
                m.cast = m.weight.detach().to(self.compute_dtype)
            yield
        finally:
            for m in linears:
                m.cast = None

    @classmethod
    def from_scratch(cls, folder: str | Path, seed: int, device: str | torch.device = "cpu") -> "Transformer":
        """A random model of the folder's config.json: normal weights, with the two layers of each block that
        write to the residual stream scaled down by depth (GPT-2)."""
        config, generation = read_configs(Path(folder))
        model = cls(config, generation)
        generator = torch.Generator().manual_seed(seed)
        for name, p in model.named_parameters():
            if p.ndim == 2:
                deep = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(p, std=INIT_STD / math.sqrt(2 * config.num_hidden_layers if deep else 1),
                                generator=generator)
        return model.to(device)

    @classmethod
    def from_pretrained(cls, folder: str | Path, device: str | torch.device = "cpu",
                        dtype: torch.dtype | None = None, arrange=lambda model: None,
                        masters: bool = True) -> "Transformer":
        """Loads a Hugging Face folder into fp32 masters, or without them (nothing to train) into `dtype`, the
        compute type (default bf16 on CUDA, fp32 on CPU). Peak memory: the model's bytes plus COPY_BYTES; on
        "meta" files are only checked. `arrange` may shard before it takes room. InputError on a bad one."""
        folder = Path(folder)
        config, generation = read_configs(folder)
        with torch.device("meta"):
            model = cls(config, generation, dtype).to(torch.float32 if masters else dtype)
        arrange(model)
        model.to_empty(device=device)
        if config.tie_word_embeddings:  # to_empty allocates afresh and parts them
            model.lm_head.weight = model.model.embed_tokens.weight
        model.load_weights(folder)
        return model

    @torch.no_grad()
    def load_weights(self, folder: Path) -> None:
        """Fills the parameters from the folder's safetensors files, in place."""
        targets = dict(self.named_parameters())  # a tied head is named once, as embed_tokens
        found = weight_files(folder)
        unused = {name for name in set(found) - set(targets) if "rotary_emb" not in name} - {"lm_head.weight"}
        if unused:  # a bias or a norm that config.json does not know of: some other network's weights
            raise InputError(f"{folder}: config.json has no place for '{min(unused)}' ({len(unused)} such)")
        missing = sorted(set(targets) - set(found))
        if missing:
            raise InputError(f"{folder}: weight '{missing[0]}' is missing ({len(missing)} of {len(targets)})")
        for name, target in targets.items():
            copy_weight(found[name], name, target)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes config.json, generation_config.json and model.safetensors (fp32) as `transformers` does. Of
        a sharded model every rank calls, and rank 0 writes."""
        folder = Path(folder)
        write_tensors({folder / "model.safetensors": dict(self.named_parameters())})
        raw = {k: v for k, v in self.config.raw.items() if k != "torch_dtype"} | {"dtype": "float32"}
        for name, content in (("config.json", raw), ("generation_config.json", self.generation)):
            if content and rank_and_world()[0] == 0:
                (folder / name).write_text(json.dumps(content, indent=2) + "\n")


def causal_mask(valid: Tensor, T: int, window: int | None = None) -> Tensor:
    """valid [B, S] -> [B, 1, T, S] bool for the last T of S columns; True = may look. Each query may look at
    itself even where it is padding: a softmax over nothing would be NaN and spread through dW."""
    S = valid.shape[1]
    column = torch.arange(S, device=valid.device)
    query = column[S - T:, None]  # [T, 1]
    look = column <= query  # [T, S]
    if window is not None:  # counted in positions, not columns: a fork leaves columns out
        position = valid.cumsum(1)  # [B, S]
        look = look & (position[:, -T:, None] - position[:, None, :] < window)  # [B, T, S]
    if T == 1:  # the decoding step: its own column is valid, nothing comes after it
        return (valid[:, None, :] & look)[:, None]
    return (look & valid[:, None, :] | (column == query))[:, None]


def rope_tables(c: Config, position: Tensor) -> tuple[Tensor, Tensor]:
    """cos, sin [B, 1, T, E] for position [B, T], the first half of sin negated (see rotate). In fp32: a bf16
    table is off by whole radians at position 4096."""
    half = torch.arange(0, c.head_dim, 2, device=position.device, dtype=torch.float32)
    frequency = 1.0 / c.rope_theta ** (half / c.head_dim)  # [E / 2]
    if c.rope_scaling:  # Llama 3.1: long waves are stretched by `factor`, those in between are blended
        s = c.rope_scaling
        turns = s["original_max_position_embeddings"] * frequency / (2 * math.pi)
        low, high = s["low_freq_factor"], s["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        frequency = keep * frequency + (1 - keep) * frequency / s["factor"]
    angle = (position[..., None].float() * frequency)[:, None]  # [B, 1, T, E / 2]
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


def weight_files(folder: Path) -> dict[str, Path]:
    """{weight name: file that holds it}, from the index where there is one."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        weights = as_json(index, read_text(index)).get("weight_map")
        if not isinstance(weights, dict) or not all(isinstance(file, str) for file in weights.values()):
            raise InputError(f"{index}: key 'weight_map' should map weights to files")
        return {name: folder / file for name, file in weights.items()}
    file = folder / "model.safetensors"
    with open_weights(file) as f:
        return {name: file for name in f.keys()}


@contextlib.contextmanager
def open_weights(file: Path):
    try:
        with safe_open(file, framework="pt") as f:
            yield f
    except FileNotFoundError:
        raise InputError(f"{file}: no such file; expected a safetensors file of weights") from None
    except (SafetensorError, OSError) as e:
        raise InputError(f"{file}: not a whole safetensors file ({e})") from None


def copy_weight(file: Path, name: str, target: Tensor) -> None:
    """Copies one weight in pieces. The file is opened anew for each: pages, once read, count as ours until
    the mapping is closed, and with one mapping an fp32 checkpoint would peak at twice its bytes."""
    with open_weights(file) as f:
        shape = f.get_slice(name).get_shape()
    if list(target.shape) != shape:
        raise InputError(f"{file}: weight '{name}' has shape {shape}, by config.json {list(target.shape)}")
    mine, first = own_rows(target)
    step = max(1, COPY_BYTES // (4 * max(1, target.shape[1:].numel())))  # rows a piece
    for i in range(0, 0 if target.is_meta else len(mine), step):
        with open_weights(file) as f:
            mine[i:i + step].copy_(f.get_slice(name)[first + i:first + min(i + step, len(mine))])
