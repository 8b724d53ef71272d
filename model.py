"""The transformer: dense Llama 3.x, Qwen2/2.5, Qwen3 and Mistral from Hugging Face folders, with a KV cache.

Modules have the names of Hugging Face checkpoints (`model.layers.0.self_attn.q_proj.weight`), so loading and
saving need no table of keys. Weights are fp32 masters. Every Linear casts its weight to the activation's type
(bf16 on CUDA, fp32 on CPU), so there is no autocast, and sampler and learner compute identically.

Shapes: B rows, T tokens, D width, V vocabulary, H heads, J key/value heads, E head width, S cache columns.
"""
import contextlib
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib.data import InputError, expect
from lib.folder import Config, copy_weight, notice, parse_config, read_configs, stop_ids, tied, weight_files
from lib.parallel import rank_and_world, write_tensors

__all__ = ["Cache", "Config", "Linear", "RMSNorm", "Transformer", "add_end_of_turn", "parse_config",
           "read_configs"]

INIT_STD = 0.05  # of a model from scratch, which is always the embedded world's: 96 wide


@dataclass
class Cache:
    """Static KV cache of S columns, filled from the left. All rows write the same column.

    `valid` marks the columns that belong to a row; left padding and the part of a thought that a fork drops
    do not. Positions are counted over valid columns, so a fork need not rotate its keys again."""
    k: Tensor  # [layers, B, J, S, E]
    v: Tensor  # [layers, B, J, S, E]
    valid: Tensor  # [B, S] bool
    length: int  # columns filled so far

    def rows(self, index: Tensor, room: int | None = None) -> "Cache":
        """A new cache of the chosen rows, repeats allowed: expands a prompt to its group, drops finished
        rows, forks a thought. room: its free columns (default: as many as here)."""
        n, columns = self.length, self.valid.shape[1] if room is None else self.length + room
        shape = (self.k.shape[0], len(index), self.k.shape[2], columns, self.k.shape[4])
        k, v = self.k.new_empty(shape), self.v.new_empty(shape)
        k[:, :, :, :n], v[:, :, :, :n] = self.k[:, index, :, :n], self.v[:, index, :, :n]
        valid = self.valid.new_zeros(len(index), columns)
        valid[:, :n] = self.valid[index, :n]
        return Cache(k, v, valid, n)


class Linear(nn.Linear):
    """fp32 master weight, cast to the activation's type in forward."""
    cast: Tensor | None = None  # a copy in the compute type, see Transformer.cast_once

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
    """Rotary embedding of x [B, heads, T, E], halves convention; rope_tables has negated sin's first half."""
    return x * cos + x.roll(x.shape[-1] // 2, -1) * sin


def attention_dtype(x: Tensor) -> torch.dtype:
    """fp64 on the CPU. Decoding and the full forward sum attention in different orders; in fp32 that alone
    moves a log-prob by up to 2e-5, in fp64 both round to the same fp32 result."""
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
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # [B, J, T, E]
        dtype = attention_dtype(x)
        q, k, v = rotate(q, cos, sin).to(dtype), rotate(k, cos, sin).to(dtype), v.to(dtype)
        if cache is not None:
            end = cache.length + T
            cache.k[layer, :, :, cache.length:end], cache.v[layer, :, :, cache.length:end] = k, v
            k, v = cache.k[layer, :, :, :end], cache.v[layer, :, :, :end]  # [B, J, S, E] views
        if T == 1 and q.shape[1] != k.shape[1]:
            # The H / J query heads of a key head are passed as query positions, so SDPA does not copy the
            # keys for each; from 4,096 columns on that copy costs more than the model.
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
        self.stop_ids = stop_ids(config.raw, self.generation)

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
        """tokens [B, T], attention_mask [B, T] (0 = padding, on either side) -> logits [B, T, V]. A reward
        model gives scores [B, T, num_labels]; the one of the last real token counts."""
        return self.head(self.hidden(tokens, attention_mask, cache))

    def hidden(self, tokens, attention_mask: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """Final normed states [B, T, D]. Without mask and cache attention is plainly causal, which is fast;
        right padding then does no harm, since real tokens do not see it. A cache is extended by the T tokens.
        Raises ValueError if it is full."""
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
            run = block if cache is None else block.forward  # a sampler's weights are gathered: no FSDP hooks
            x = run(x, cos, sin, masks[self.config.windows[i]], cache, i)
        if cache is not None:
            cache.length += T
        return self.model.norm(x)

    def new_cache(self, rows: int, columns: int) -> Cache:
        """Empty cache of 2 x layers x rows x J x columns x E numbers; 28 KB a token for Qwen2.5-1.5B."""
        c = self.config
        shape = (c.num_hidden_layers, rows, c.num_key_value_heads, columns, c.head_dim)
        dtype = attention_dtype(torch.empty(0, dtype=self.compute_dtype, device=self.device))
        # Zeros, since a masked column still gets weight 0 in the softmax and 0 x NaN is NaN.
        k, v = (torch.zeros(shape, dtype=dtype, device=self.device) for _ in range(2))
        return Cache(k, v, torch.zeros(rows, columns, dtype=torch.bool, device=self.device), 0)

    @contextlib.contextmanager
    def cast_once(self):
        """Within the block every Linear uses one copy of its weight in the compute type, with the same
        results. Without it, decoding casts the fp32 masters again for each token. Does nothing in fp32."""
        cast = self.compute_dtype != torch.float32
        linears = [m for m in self.modules() if isinstance(m, Linear) and cast]
        try:
            for m in linears:
                m.cast = m.weight.detach().to(self.compute_dtype)
            yield
        finally:
            for m in linears:
                m.cast = None

    @classmethod
    def from_scratch(cls, folder: str | Path, seed: int, device: str | torch.device = "cpu") -> "Transformer":
        """A random model of the folder's config.json. Weights are normal; the two layers of each block that
        write to the residual stream are scaled down by depth, as in GPT-2."""
        model = cls(*read_configs(Path(folder)))
        generator = torch.Generator().manual_seed(seed)
        for name, p in model.named_parameters():
            if p.ndim == 2:
                deep = name.endswith(("o_proj.weight", "down_proj.weight"))
                scale = math.sqrt(2 * model.config.num_hidden_layers if deep else 1)
                nn.init.normal_(p, std=INIT_STD / scale, generator=generator)
        return model.to(device)

    @classmethod
    def from_pretrained(cls, folder: str | Path, device: str | torch.device = "cpu",
                        dtype: torch.dtype | None = None, arrange=lambda model: None,
                        masters: bool = True) -> "Transformer":
        """Loads a Hugging Face folder. dtype: the compute type (default bf16 on CUDA, fp32 on CPU). Weights
        are fp32 masters, or of `dtype` if masters=False. `arrange` may shard the model before memory is
        allocated. On "meta" the files are checked and not read. Peak memory: the model's own bytes and one
        piece of a weight. Raises InputError for a bad folder."""
        folder = Path(folder)
        config, generation = read_configs(folder)
        files = weight_files(folder)
        if config.tie_word_embeddings and not tied(files):
            notice(f"{folder.resolve()}: lm_head differs from the embedding, so they are not tied; "
                   "tie_word_embeddings in config.json should be false")
            config.tie_word_embeddings = False
            config.raw = config.raw | {"tie_word_embeddings": False}
        with torch.device("meta"):
            model = cls(config, generation, dtype).to(torch.float32 if masters else dtype)
        arrange(model)
        model.to_empty(device=device)
        if config.tie_word_embeddings:  # to_empty allocates both
            model.lm_head.weight = model.model.embed_tokens.weight
        model.load_weights(folder, files)
        return model

    @torch.no_grad()
    def load_weights(self, folder: Path, files: dict[str, Path]) -> None:
        """Fills the parameters in place. files: {weight name: file that holds it}. Raises InputError."""
        targets = dict(self.named_parameters())  # a tied head appears once, as embed_tokens
        unused = {name for name in set(files) - set(targets) if "rotary_emb" not in name} - {"lm_head.weight"}
        if unused:  # a bias or a norm that config.json does not mention: another network's weights
            raise InputError(f"{folder}: config.json has no place for '{min(unused)}' ({len(unused)} such)")
        missing = sorted(set(targets) - set(files))
        if missing:
            raise InputError(f"{folder}: weight '{missing[0]}' is missing ({len(missing)} of {len(targets)})")
        for name, target in targets.items():
            copy_weight(files[name], name, target)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes config.json, generation_config.json and model.safetensors (fp32) as transformers does. Every
        rank calls if the model is sharded; rank 0 writes."""
        folder = Path(folder)
        write_tensors({folder / "model.safetensors": dict(self.named_parameters())})
        raw = {k: v for k, v in self.config.raw.items() if k != "torch_dtype"} | {"dtype": "float32"}
        for name, content in (("config.json", raw), ("generation_config.json", self.generation)):
            if content and rank_and_world()[0] == 0:
                (folder / name).write_text(json.dumps(content, indent=2) + "\n")


def causal_mask(valid: Tensor, T: int, window: int | None = None) -> Tensor:
    """valid [B, S] -> [B, 1, T, S] bool for the last T of S columns; True = attend. A padding query attends
    to itself: a softmax over nothing is NaN, which would spread through the weight gradients."""
    S = valid.shape[1]
    column = torch.arange(S, device=valid.device)
    query = column[S - T:, None]  # [T, 1]
    look = column <= query  # [T, S]
    if window is not None:  # in positions, not columns: a fork skips columns
        position = valid.cumsum(1)  # [B, S]
        look = look & (position[:, -T:, None] - position[:, None, :] < window)  # [B, T, S]
    if T == 1:  # decoding: the query's own column is valid and the last one
        return (valid[:, None, :] & look)[:, None]
    return (look & valid[:, None, :] | (column == query))[:, None]


def rope_frequencies(c: Config, device: torch.device) -> Tensor:
    """Radians that a position turns each pair of dimensions, [E / 2] fp32: the bits of transformers."""
    pair = torch.arange(0, c.head_dim, 2, device=device, dtype=torch.float32)
    frequency = 1.0 / c.rope_theta ** (pair / c.head_dim)  # [E / 2]
    if s := c.rope_scaling:  # Llama 3.1: long waves are stretched, medium ones are blended
        context = s["original_max_position_embeddings"]
        low, high = s["low_freq_factor"], s["high_freq_factor"]
        wave = 2 * math.pi / frequency  # in tokens; another order of operations rounds differently
        keep = (context / wave - low) / (high - low)
        blend = (1 - keep) * frequency / s["factor"] + keep * frequency
        frequency = torch.where(wave > context / low, frequency / s["factor"],
                                torch.where(wave < context / high, frequency, blend))
    return frequency


def rope_tables(c: Config, position: Tensor) -> tuple[Tensor, Tensor]:
    """cos, sin [B, 1, T, E] for position [B, T], the first half of sin negated (see rotate). In fp32: bf16
    angles are off by whole radians at position 4096."""
    angle = position[..., None].float() * rope_frequencies(c, position.device)  # [B, T, E / 2]
    cos, sin = angle[:, None].cos(), angle[:, None].sin()  # [B, 1, T, E / 2]
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


def end_of_turn(tokenizer) -> int | None:
    """The added token that the chat template writes behind an answer, None without one. Raises InputError if
    the template drops the answer."""
    answer = "answer 40917"
    messages = [{"role": "user", "content": "question"}, {"role": "assistant", "content": answer}]
    text = tokenizer.chat(messages, generation_prompt=False)
    expect(answer in text, f"{tokenizer.folder}: the chat template", "one that renders answers", text)
    behind = tokenizer.encode(text.rpartition(answer)[2].lstrip(), special=True)
    return behind[0] if behind and behind[0] in tokenizer.added.values() else None


def add_end_of_turn(model: Transformer, tokenizer) -> None:
    """Adds end_of_turn to model.stop_ids. A base model that was fine-tuned to chat often keeps the old
    eos_token_id, and would then never stop."""
    token = end_of_turn(tokenizer)
    if token is None or token in model.stop_ids:
        return
    model.stop_ids.append(token)
    model.generation["eos_token_id"] = [*model.stop_ids]  # saved with the trained model
    notice(f"{tokenizer.folder.resolve()}: the chat template ends an answer with "
           f"{tokenizer.decode([token])!r}, which is now a stop token; eos_token_id does not name it")
