"""LoRA (arXiv 2106.09685): projections compute x W^T + alpha / r (x A^T) B^T, and only A and B are trained.

Sampler and learner both compute it in this form, since a merged weight rounds differently. With the adapter
off the model is its own reference. Shapes: A [r, in], B [out, r], r the rank.
"""
import contextlib
import json
from pathlib import Path

import torch
from torch import nn

from lib.checkpoint import atomic_folder
from lib.parallel import rank_and_world, tuned, write_tensors
from model import Linear, Transformer

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def add_adapter(model: Transformer, rank: int, alpha: float, seed: int) -> None:
    """Freezes the model and gives each projection an adapter of fp32 masters. A is uniform, as in PEFT, and
    the same on every rank; B is 0, so the model computes what it did before."""
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, layer in list(model.named_modules()):
        if name.endswith(PROJECTIONS):
            A, B = (Linear(*shape, bias=False, device="cpu") for shape in
                    ((layer.in_features, rank), (rank, layer.out_features)))
            bound = layer.in_features ** -0.5
            nn.init.uniform_(A.weight, -bound, bound, generator=generator)
            nn.init.zeros_(B.weight)
            layer.lora_A, layer.lora_B = A.to(model.device), B.to(model.device)
            layer.lora_scale = alpha / rank


@contextlib.contextmanager
def adapter_off(model: Transformer):
    """Within the block the model computes what it did before its adapter was added, to the bit."""
    scales = {layer: layer.lora_scale for layer in model.modules() if isinstance(layer, Linear)}
    try:
        for layer in scales:
            layer.lora_scale = 0.0
        yield
    finally:
        for layer, scale in scales.items():
            layer.lora_scale = scale


def save_adapter(folder: Path, model: Transformer, base: Path) -> None:
    """Writes the adapter alone in PEFT's layout, for the model in the folder `base`. Rank 0 writes."""
    layer = model.model.layers[0].self_attn.q_proj
    r = layer.lora_A.out_features
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base.resolve()),
              "r": r, "lora_alpha": round(layer.lora_scale * r), "target_modules": [*PROJECTIONS],
              "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False, "use_rslora": False,
              "inference_mode": True}
    with atomic_folder(folder) as temporary:
        tensors = {f"base_model.model.{name}": p for name, p in tuned(model).items()}
        write_tensors({temporary / "adapter_model.safetensors": tensors})
        if rank_and_world()[0] == 0:
            (temporary / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
