"""What a run begins from: the prompts and models that the user brought, checked before anything is made of
them, and the start model.
"""
import sys
import tempfile
from pathlib import Path

import alchemy
import evaluate
from data import InputError, Prompt, Tokenizer, load_prompts
from model import Transformer
from parallel import rank_and_world, shard, wants_shards
from rollout import CLOSE, check_length, encode_chat


def read_inputs(c) -> list[Prompt]:
    """The prompts. What is wrong with anything the user brought shows here, before a run folder is made."""
    everything = load_prompts(c.prompts) if c.prompts else []
    if everything and all(map(evaluate.held_out, everything)):
        raise InputError(f"{c.prompts}: all {len(everything)} prompts are held out for evaluation; add some")
    with tempfile.TemporaryDirectory() as scratch:
        if not c.model:
            alchemy.write_folder(Path(scratch))
        tokenizer = Tokenizer.from_pretrained(c.model or scratch)
        # Of a checkpoint the files' headers are read, not its weights.
        model = (Transformer.from_pretrained(c.model, "meta") if c.model else
                 Transformer.from_scratch(scratch, c.seed))
    room, stops = model.config.max_position_embeddings, model.stop_ids
    if model.config.num_labels or tokenizer.n_tokens > model.config.vocab_size or not stops:
        raise InputError(f"{c.model} is no policy: score head, no eos_token_id, or more tokens than rows")
    forced = len(tokenizer.encode(CLOSE + "\n\n", special=True)) + c.probe_tokens
    for p in everything or alchemy.requests(1, c.seed):
        tokens = encode_chat(tokenizer, p.prompt, closed=True)
        check_length(room, len(tokens) + forced * (c.potential == "probe"), c.max_new_tokens,
                     f"prompt '{p.prompt:.40}'")
    requests = evaluate.requests(everything, c.eval_prompts)
    evaluate.check_lengths(tokenizer, requests if everything else requests[:1], room, c)
    if c.eval_prompts and not requests and rank_and_world()[0] == 0:
        print(f"{c.prompts}: too few prompts to hold one out, so nothing is evaluated", file=sys.stderr)
    return everything


def prepare_start(c, run: Path, device: str, bar) -> None:
    """The run's start/ folder: trained here, or a link to --model, whose gigabytes nobody wants twice."""
    start = run / "start"
    if not start.exists() and not start.is_symlink():
        if c.model:
            start.symlink_to(Path(c.model).resolve())
        else:
            alchemy.warm_start(c, run, device, bar)


def load_start(c, start: Path, device: str) -> tuple[Tokenizer, Transformer, Transformer | None]:
    """Tokenizer, model and frozen reference. A parameter is 16 bytes with its gradient and AdamW's moments, 4
    in the reference, 2 in the copy that samples."""
    def arrange(model: Transformer) -> None:
        size = sum(p.numel() for p in model.parameters())
        if wants_shards(c.shard, size, 22 if c.beta else 18, device):
            shard(model, device)
    tokenizer = Tokenizer.from_pretrained(start)
    model = Transformer.from_pretrained(start, device, arrange=arrange)
    reference = Transformer.from_pretrained(start, device, arrange=arrange) if c.beta else None
    return tokenizer, model, reference and reference.requires_grad_(False)
