"""Speed of sampling and of an RL step, beside their matrix products alone, transformers and TRL.

Prints one Markdown table; docs/speed.md explains its rows. What is compared takes turns in this process, and
a number is the median of the rounds. Weights are random and stay, since the learning rate is 0: each round
samples the same rollouts.
"""
import argparse
import contextlib
import io
import json
import os
import platform
import re
import resource
import sys
import tempfile
import time
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Callable

import sear  # isort: skip  # first: it sets variables that torch reads
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import alchemy.world as alchemy
from alchemy.demonstrations import write_folder
from batches import micro_batch, pack
from inputs import load_start
from judges import load_judge
from lib import checkpoint, cli
from lib.chat import encode_prompt
from lib.parallel import rank_device
from lib.tokenizer import Tokenizer
from model import Transformer, read_configs
from rollout import sample

PAGE = Path(__file__).parent / "docs/speed.md"
QWEN2 = dict(architectures=["Qwen2ForCausalLM"], model_type="qwen2", vocab_size=64_000, hidden_size=512,
             intermediate_size=2048, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=2,
             max_position_embeddings=4096, tie_word_embeddings=True, eos_token_id=0)  # 63 M parameters
STOPS = 11  # ids that count as stop tokens for early stops: the mean of 48 tokens is then 22
MATMULS = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)


class Products(TorchDispatchMode):
    """Collects the factors of the matrix products that run inside it: weights, else blanks of equal shape."""
    def __init__(self, models: list[Transformer]):
        super().__init__()
        self.weights = {p.data_ptr() for model in models for p in model.parameters()}
        self.blanks, self.found = {}, []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation.overloadpacket in MATMULS:
            self.found.append([self.kept(x) for x in args if isinstance(x, Tensor)][-2:])
        return operation(*args, **(kwargs or {}))

    def kept(self, x: Tensor) -> Tensor:
        key = x.shape, x.stride(), x.dtype
        return x if x.data_ptr() in self.weights else self.blanks.setdefault(key, torch.ones_like(x))

    @torch.no_grad()
    def run(self) -> None:
        for a, b in self.found:
            torch.mm(a, b)


# ---- what is timed: runs once, and is then ready for `measure` --------------------------------------------

def sampling(folder: Path, model: Transformer, tokenizer: Tokenizer, prompts: list, group: int,
             new: int, rounds: int) -> Callable:
    """`group` rollouts of `new` tokens for each prompt, none of which stops early."""
    model.stop_ids, rows = [model.config.vocab_size], group * len(prompts)
    run = partial(sample, model, prompts, tokenizer, group_size=group, max_new_tokens=new, max_rows=rows)
    run()
    size = sum(p.numel() for p in model.parameters()) / 1e6
    return partial(measure, f"sample {rows} x {new} tokens, {size:.2g} M parameters", [model], run,
                   partial(generate, folder, model, prompts, group, new), rounds, [peak()], rows * new)


def rl_step(folder: Path, c: sear.Config, stops: list[int], device: str, rounds: int) -> Callable:
    """A step of sear.py in the embedded world."""
    tokenizer, model, reference = load_start(c, folder, device)
    judge, optimizer = load_judge(c.judge), torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    model.stop_ids = stops
    rollouts = sear.rollout_step(c, model, tokenizer, judge, [], 0)[1]
    batches = [micro_batch(rollouts, rollouts.logprob, blocks, device)
               for blocks in pack(rollouts, c.tokens_per_micro_batch)]
    computed, owned = sum(sum(b.packed.sizes) for b in batches), sum(len(b.advantage) for b in batches)
    texts = [tokenizer.decode(ids[:n]) for ids, n in zip(rollouts.tokens.tolist(), rollouts.start.tolist())]

    def run() -> dict[str, float]:
        return sear.train_step(c, model, reference, optimizer, tokenizer, judge, [], 0)[0]["seconds"]
    run()
    title = f"RL step, {len(texts)} rollouts of {owned / len(texts):.0f} tokens, at most {c.max_new_tokens}"
    return partial(measure, title, [model, reference], run, partial(grpo, folder, model, texts, c), rounds,
                   [f"| – computed tokens / owned tokens | {computed / owned:.2f} | |", peak()])


# ---- peers -----------------------------------------------------------------------------------------------

def generate(folder: Path, model: Transformer, prompts: list, group: int, new: int) -> dict[str, Callable]:
    """transformers' generate, with a cache that grows and with a static one."""
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
    peer = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=model.compute_dtype)
    tokens = torch.tensor(prompts, device=model.device).repeat_interleave(group, 0)

    def run(peer, cache: str | None) -> None:
        settings = GenerationConfig(do_sample=True, top_k=0, max_new_tokens=new, cache_implementation=cache,
                                    eos_token_id=model.stop_ids, pad_token_id=0)
        out = peer.generate(tokens, attention_mask=torch.ones_like(tokens), generation_config=settings)
        assert out.shape[1] == tokens.shape[1] + new
    peer, name = peer.to(model.device).eval(), f"transformers {version('transformers')}"
    return {name: partial(run, peer, None), f"{name}, static cache": partial(run, peer, "static")}


def grpo(folder: Path, model: Transformer, texts: list[str], c: sear.Config) -> dict[str, Callable]:
    """A step of TRL's GRPOTrainer, timed without what train() sets up. Its reward costs nothing."""
    from trl import GRPOConfig, GRPOTrainer  # isort: skip  # first: the sentence names it if it is missing
    from datasets import Dataset
    from transformers import TrainerCallback
    times, cpu = [], model.device.type == "cpu"
    arguments = GRPOConfig(
        str(folder / "trl"), per_device_train_batch_size=len(texts), max_steps=1, use_cpu=cpu, bf16=not cpu,
        num_generations=c.group_size, max_completion_length=c.max_new_tokens, beta=c.beta,
        learning_rate=c.learning_rate, gradient_checkpointing=False, report_to="none", save_strategy="no",
        disable_tqdm=True, generation_kwargs=dict(eos_token_id=model.stop_ids))

    def mark(*_, **__) -> None:
        times.append(now())
    clock = type("Clock", (TrainerCallback,), dict(on_step_begin=mark, on_step_end=mark))
    trainer = GRPOTrainer(str(folder), lambda completions, **_: [float(len(text)) for text in completions],
                          arguments, Dataset.from_dict(dict(prompt=texts[::c.group_size])), callbacks=[clock])
    trainer.eos_token_ids = model.stop_ids  # it masks what follows one

    def run() -> dict[str, float]:
        trainer.train()
        return {"all": times[-1] - times[-2]}
    return {f"TRL {version('trl')}": run}


# ---- the table -------------------------------------------------------------------------------------------

def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def measure(title: str, models: list[Transformer], run: Callable, peers: Callable, rounds: int,
            extra: list[str], tokens: int = 0) -> list[str]:
    """Rows of the table, and why a peer is missing. extra: more rows. tokens: that are sampled, to time them
    and not the whole."""
    with Products(models) as products:
        run()
    gflop = sum(2 * len(a) * b.numel() for a, b in products.found) / 1e9
    runs = {title: run, f"– its products alone, {gflop:.3g} GFLOP": products.run}
    try:
        for name, peer in peers().items():
            peer()
            runs[f"– {name}"] = peer
    except Exception as error:  # a peer may fail in any way
        extra = [*extra, str(error).partition("\n")[0] or type(error).__name__]
    seconds, rows = {name: [] for name in runs}, []
    for _ in range(rounds):
        for name, task in runs.items():
            begin, parts = now(), task()
            seconds[name].append({"all": now() - begin} | (parts if isinstance(parts, dict) else {}))
    own = median(x["all"] for x in seconds[title])
    for name, found in seconds.items():
        for part in found[0]:
            s = median(x[part] for x in found)
            value = f"{tokens / s:,.0f} tokens/s" if tokens else f"{s:.3f} s"
            rows.append(f"| {name if part == 'all' else '– ' + part} | {value} | {s / own:.2f} |")
    return rows + extra


def peak() -> str:
    """A row: memory of this process, or on the GPU, so far."""
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    used = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else used
    return f"| – peak memory so far, without peers | {used / 2**20:,.0f} MB | |"


def machine() -> str:
    file, name = Path("/proc/cpuinfo"), platform.machine()
    name = re.search(r"model name\s*: (.*)|$", file.read_text())[1] or name if file.exists() else name
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else name
    return (f"{time.strftime('%Y-%m-%d')}, {name}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, "
            f"{torch.get_num_threads()} threads, torch {torch.__version__}")


def table(given: argparse.Namespace, scratch: Path) -> str:
    """The machine, the table, and which peers are missing in it."""
    about, device = machine(), rank_device("auto")
    c = sear.Config(prompts_per_step=32, max_new_tokens=48, learning_rate=0.0)
    new, rounds, few = (8, 2, 2) if given.quick else (128, 9, 3)
    shape = read_configs(given.model)[0].raw if given.model else QWEN2
    if given.quick:
        c.prompts_per_step, c.group_size, c.max_new_tokens = 4, 2, 8
        shape = shape | dict(vocab_size=400, hidden_size=64, num_hidden_layers=2, num_attention_heads=8,
                             num_key_value_heads=2, head_dim=8, layer_types=None)
    small, large = scratch / "embedded", scratch / "larger"
    for folder in (small, large):
        write_folder(folder)
    (large / "config.json").write_text(json.dumps(shape))
    tokenizer, model = Tokenizer.from_pretrained(small), Transformer.from_scratch(small, c.seed, device)
    model.save_pretrained(small)
    prompts = [encode_prompt(tokenizer, p.prompt) for p in alchemy.requests(2 * c.prompts_per_step, c.seed)]
    larger = Transformer.from_scratch(large, c.seed, device)
    longer = [[*range(i, i + 64)] for i in range(c.prompts_per_step // 4)]
    ready = [sampling(small, model, tokenizer, prompts, c.group_size, new, rounds),
             rl_step(small, c, [model.config.vocab_size], device, rounds),
             rl_step(small, c, [*range(STOPS)], device, rounds),
             sampling(large, larger, tokenizer, longer, c.group_size, new, few)]
    lines = [line for work in ready for line in work()]  # only now, or memory would be that of peers
    rows = [line for line in lines if line[0] == "|"]
    missing = "; ".join(sorted({*lines} - {*rows}))
    return "\n".join([about, "", "| work | median | time, SEAR = 1 |", "|---|---|---|", *rows,
                      *[f"\nNot compared: {missing}."] * bool(missing)])


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line. Raises InputError."""
    parser = cli.Parser(prog="bench.py", description=__doc__)
    parser.add_argument("--model", type=Path, help="folder whose shape is sampled [Qwen2's, 63 M parameters]")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--write", action="store_true", help="put the table into docs/speed.md")
    return parser.parse_args(arguments)


@cli.exit_code("bench.py")
def main(arguments: list[str]) -> int:
    """-> exit code: 0 done, 2 bad input."""
    given = parse(arguments)
    with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stdout(io.StringIO()):
        text = table(given, Path(scratch))
    print(text)
    if given.write:
        checkpoint.write(PAGE, re.sub("(<!-- bench -->\n).*(<!-- /bench -->)",
                                      lambda m: f"{m[1]}{text}\n{m[2]}", PAGE.read_text(), flags=re.S))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
