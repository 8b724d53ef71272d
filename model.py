"""The transformer: dense Llama 3.x, Qwen2/2.5, Qwen3 and Mistral from Hugging Face folders, with a KV cache.

Modules have the names of Hugging Face checkpoints (`model.layers.0.self_attn.q_proj.weight`), so loading and
saving need no table of keys. Weights are fp32 masters. Every Linear casts its weight to the activation's type
(bf16 on CUDA, fp32 on CPU), so there is no autocast, and sampler and learner compute identically.

Shapes: B rows, T tokens, D width, V vocabulary, H heads, J key/value heads, E head width, S cache columns.
"""
import contextlib
import json
import math
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from attention import Cache, Packed, attend, attention_dtype, causal_mask, rope_tables, rotate
from lib.data import InputError
from lib.folder import Config, copy_weight, notice, read_configs, stop_ids, tied, weight_files
from lib.parallel import rank_and_world, write_tensors

INIT_STD = 0.05  # of a model from scratch, which is always the embedded world's: 96 wide


def compute_type(device: str | torch.device) -> torch.dtype:
    return torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32


class Linear(nn.Linear):
    """fp32 master weight, cast to the activation's type in forward. lora.py adds adapters."""
    lora_scale = 0.0  # 0: no adapter, or one that is off

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        out = F.linear(x, self.weight.to(x.dtype), bias)
        return out + self.lora_B(self.lora_A(x) * self.lora_scale) if self.lora_scale else out


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


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

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask, cache: Cache | None, layer, packed):
        B, T, _ = x.shape
        q = self.q_norm(self.q_proj(x).view(B, T, -1, self.head_dim)).transpose(1, 2)  # [B, H, T, E]
        k = self.k_norm(self.k_proj(x).view(B, T, -1, self.head_dim)).transpose(1, 2)  # [B, J, T, E]
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # [B, J, T, E]
        dtype = attention_dtype(x)
        q, k, v = rotate(q, cos, sin).to(dtype), rotate(k, cos, sin).to(dtype), v.to(dtype)
        if cache is not None:
            end = cache.length + T
            cache.k[layer][:, :, cache.length:end], cache.v[layer][:, :, cache.length:end] = k, v
            k, v = cache.k[layer][:, :, :end], cache.v[layer][:, :, :end]  # [B, J, S, E] views
        if packed is not None:
            return self.o_proj(packed.attend(q, k, v, mask).to(x.dtype))
        if T == 1 and q.shape[1] != k.shape[1]:
            # The H / J query heads of a key head are passed as query positions, so SDPA does not copy the
            # keys for each; from 4,096 columns on that copy costs more than the model.
            q = q.reshape(B, k.shape[1], -1, self.head_dim)  # [B, J, H / J, E]
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        else:
            out = attend(q, k, v, mask)
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

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask, cache: Cache | None, layer, packed):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, cache, layer, packed)
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
        self.checkpoint_activations = False  # True: blocks keep their input alone and run again in backward
        self.model = Body(config)
        D, wide = config.hidden_size, config.guard_size
        if wide:
            self.risk_level_category_pre = Linear(D, wide, bias=False)
            self.risk_level_category_layernorm = RMSNorm(wide, config.rms_norm_eps)
        self.head_name = "risk_level_head" if wide else "score" if config.num_labels else "lm_head"
        setattr(self, self.head_name, Linear(wide or D, config.num_labels or config.vocab_size, bias=False))
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.stop_ids = stop_ids(config.raw, self.generation)

    @property
    def head(self) -> Linear:
        return getattr(self, self.head_name)

    @property
    def device(self) -> torch.device:
        return self.model.norm.weight.device

    @property
    def compute_dtype(self) -> torch.dtype:
        return self.dtype or compute_type(self.device)

    def forward(self, tokens, attention_mask: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """tokens [B, T], attention_mask [B, T] (0 = padding, on either side) -> logits [B, T, V]. A reward
        model gives scores [B, T, num_labels]; the one of the last real token counts."""
        return self.head(self.hidden(tokens, attention_mask, cache))

    def exact_logits(self, states: Tensor) -> Tensor:
        """Logits [N, V] of states [N, D] in fp32. Rounded to bf16 they would be another distribution. Of
        Qwen3Guard-Stream those of the risk levels, [N, num_labels]."""
        if self.config.guard_size:
            states = self.risk_level_category_layernorm(self.risk_level_category_pre(states))
        weight = self.head.weight.to(states.dtype)
        if states.is_cuda and states.dtype != torch.float32:
            return torch.mm(states, weight.T, out_dtype=torch.float32)
        return F.linear(states, weight).float()

    def hidden(self, tokens, attention_mask: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """Final normed states [B, T, D]. Without mask and cache attention is plainly causal, which is fast;
        right padding then does no harm, since real tokens do not see it. A cache is extended by the T tokens.
        Raises ValueError if it is full."""
        T, plain = tokens.shape[1], attention_mask is None and cache is None
        valid = torch.ones(1, T, dtype=torch.bool, device=tokens.device)  # or [B, T]
        valid = valid if attention_mask is None else attention_mask.bool()
        if cache is not None:
            if cache.length + T > cache.valid.shape[1]:
                raise ValueError(f"cache of {cache.valid.shape[1]} columns is full ({cache.length} + {T})")
            cache.valid[:, cache.length:cache.length + T] = valid
            valid = cache.valid[:, :cache.length + T]  # [B, S]
        position = (valid.cumsum(1)[:, -T:] - 1).clamp(min=0)  # [B, T], counted over valid columns only
        masks = {w: None if plain and w is None else causal_mask(valid, T, w)
                 for w in set(self.config.windows)}
        states = self.blocks(tokens, position, masks, cache)
        if cache is not None:
            cache.length += T
        return states

    def hidden_packed(self, packed: Packed) -> Tensor:
        """Final normed states of the tokens of the blocks [sum of b * T, D]: what `hidden` gives for whole
        rows, without their prompts."""
        tokens, position, masks = packed.layout(set(self.config.windows))
        return self.blocks(tokens, position, masks, packed=packed)[0, packed.prompts.numel():]

    def blocks(self, tokens: Tensor, position: Tensor, masks: dict, cache: Cache | None = None,
               packed: Packed | None = None) -> Tensor:
        """tokens [B, T], position [B, T] or [1, T], a mask for each window -> normed states [B, T, D]."""
        cos, sin = rope_tables(self.config, position)  # [B, 1, T, E] fp32
        x = self.model.embed_tokens(tokens).to(self.compute_dtype)  # [B, T, D]
        cos, sin = cos.to(x.dtype), sin.to(x.dtype)
        for i, block in enumerate(self.model.layers):
            run = block if cache is None else block.forward  # a sampler's weights are gathered: no FSDP hooks
            if self.checkpoint_activations and torch.is_grad_enabled():
                run = partial(checkpoint, run, use_reentrant=False, preserve_rng_state=False)
            x = run(x, cos, sin, masks[self.config.windows[i]], cache, i, packed)
        return self.model.norm(x)

    def new_cache(self, rows: int, columns: int) -> Cache:
        """Empty cache of 2 x layers x rows x J x columns x E numbers; 28 KB a token for Qwen2.5-1.5B."""
        c = self.config
        dtype = attention_dtype(torch.empty(0, dtype=self.compute_dtype, device=self.device))
        # Zeros, since a masked column still gets weight 0 in the softmax and 0 x NaN is NaN.
        shape = (rows, c.num_key_value_heads, columns, c.head_dim)
        k, v = ([torch.zeros(shape, dtype=dtype, device=self.device) for _ in range(c.num_hidden_layers)]
                for _ in range(2))
        return Cache(k, v, torch.zeros(rows, columns, dtype=torch.bool, device=self.device), 0)

    @contextlib.contextmanager
    def cast_once(self):
        """Within the block layers hold their weights in the compute type, with the same results. Without it,
        decoding casts the fp32 masters again for each token. Does nothing in fp32."""
        layers = [m for m in self.modules() if isinstance(m, (Linear, RMSNorm))]
        masters = {p: p.data for m in layers for p in m.parameters(recurse=False)}
        try:
            for p, master in masters.items():
                p.data = master.to(self.compute_dtype)
            yield
        finally:
            for p, master in masters.items():
                p.data = master

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
        if self.config.guard_size:  # it has more heads, which are not read
            unused = {name for name in unused if not name.startswith(("query_", "category_head."))}
        if unused:  # a bias or a norm that config.json does not mention: another network's weights
            raise InputError(f"{folder}: config.json has no place for '{min(unused)}' ({len(unused)} such)")
        missing = sorted(set(targets) - set(files))
        if missing:
            raise InputError(f"{folder}: weight '{missing[0]}' is missing ({len(missing)} of {len(targets)})")
        for name, target in targets.items():
            copy_weight(files[name], name, target)

    def merged(self, name: str, weight: Tensor) -> Tensor:
        """The weight of this name, with its adapter merged in if it has one."""
        layer = self.get_submodule(name.rpartition(".")[0])
        if name.endswith("bias") or not getattr(layer, "lora_scale", 0.0):
            return weight
        return weight.float() + layer.lora_scale * layer.lora_B.weight @ layer.lora_A.weight

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes config.json, generation_config.json and model.safetensors (fp32, adapters merged) as
        transformers does. Every rank calls if the model is sharded; rank 0 writes."""
        folder = Path(folder)
        weights = {name: p for name, p in self.named_parameters() if ".lora_" not in name}
        write_tensors({folder / "model.safetensors": weights}, self.merged)
        raw = {k: v for k, v in self.config.raw.items() if k != "torch_dtype"} | {"dtype": "float32"}
        for name, content in (("config.json", raw), ("generation_config.json", self.generation)):
            if content and rank_and_world()[0] == 0:
                (folder / name).write_text(json.dumps(content, indent=2) + "\n")
