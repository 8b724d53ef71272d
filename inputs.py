"""The user's flags and files, checked before a run folder exists, and the models and judges they name."""
import tempfile
from importlib.util import find_spec
from pathlib import Path

import alchemy.world as alchemy
import evaluate
from alchemy.demonstrations import write_folder
from judges import JUDGES, Judge, load_judge
from judges.functions import is_function
from judges.guards import read_spec
from lib import plan
from lib.chat import add_end_of_turn, check_length, closing_tokens, encode_prompt
from lib.checkpoint import flag
from lib.data import InputError, Prompt, describe, expect, load_eval_files, load_prompts, without
from lib.parallel import say
from lib.tokenizer import Tokenizer
from lora import add_adapter
from model import Transformer, compute_type, read_configs
from rewards import PROBE_TOKENS
from rollout import thought_cut
from warmstart import in_shuffled_passes, load_model, load_tokenizer, read_demonstrations


def read_prompts(c) -> tuple[list[Prompt], list[Prompt]]:
    """The prompts to train on, and those to evaluate on: of --eval-file, or one in ten. Raises InputError."""
    pool, test = load_prompts(c.prompts, c.label), load_eval_files(c.eval_file)
    lines = [describe(c.prompts, pool)]
    if test:
        train = without(pool, test)
        lines += [describe(c.eval_file, test, "measured"),
                  f"{len(pool) - len(train)} of {len(pool)} training prompts are left out: --eval-file has "
                  "them too, if case, white space and punctuation do not count"]
    else:
        test = [p for p in pool if evaluate.held_out(p)]
        train = [p for p in pool if not evaluate.held_out(p)]
        lines[0] += f"; {len(test)} held out"
    if not train:
        raise InputError(f"{c.prompts}: all {len(pool)} prompts are held out for evaluation; add some")
    labels = {p.label for p in train}
    expect(not c.harmful_share or len(labels) == 2, f"{c.prompts}: the labels, for --harmful-share,",
           "harmful and harmless", " and ".join(sorted(labels)))
    say("\n".join(lines))
    return train, test


def check_flags(c) -> None:
    """Raises InputError for flags that contradict each other."""
    for knob, needed, why in (
            ("prompts", "model", "the embedded start model only knows the embedded world"),
            ("plan", "prompts", "the embedded world runs on any machine"),
            ("injections", "prompts", "the embedded world has its own thoughts"),
            ("label", "prompts", "it labels the prompts of a file"),
            ("reward_model", "prompts", "the embedded world's verifier judges help"),
            ("lora_alpha", "lora_rank", "without an adapter there is nothing to scale"),
            ("system", "model", "the embedded start model has its own demonstrations"),
            ("warm_start", "model", "the embedded start model has its own demonstrations")):
        if getattr(c, knob) and not getattr(c, needed):
            raise InputError(f"--{flag(knob)} needs --{flag(needed)}: {why}")
    for name, judge in (("--judge", c.judge), ("--eval-judge", c.eval_judge or c.judge)):
        if bool(c.prompts) == (judge == "alchemy"):
            raise InputError(f"{name} {judge} cannot judge {c.prompts or 'the embedded world'}; expected "
                             f"{'rules, a folder or a judge file' if c.prompts else 'alchemy'}")
    if c.prefill_share and c.objective == "no-thought":
        raise InputError("--prefill-share needs a thought to prefill, and --objective no-thought has none")
    if c.lora_rank and c.shard == "yes":
        raise InputError("--lora-rank does not go with --shard yes: sampling gathers frozen weights anyway")
    if c.eval_file and not (c.prompts and c.eval_prompts):
        raise InputError("--eval-file needs --prompts to train on, and --eval-prompts above 0")


def read_inputs(c) -> tuple[list[Prompt], list[Prompt]]:
    """The prompts to train on ([]: the embedded world's) and the requests to evaluate. Checks every input,
    before a run folder exists. Raises InputError."""
    expect(not c.log or find_spec(c.log), f"--log {c.log}", f"an installed package (pip install {c.log})",
           "none")
    pool, test = read_prompts(c) if c.prompts else ([], [])
    with tempfile.TemporaryDirectory() as scratch:
        if not c.model:
            write_folder(Path(scratch), c.chain)
        tokenizer = load_tokenizer(c, c.model or scratch)
        # On "meta" only the headers of the weight files are read.
        model = (Transformer.from_pretrained(c.model, "meta") if c.model else
                 Transformer.from_scratch(scratch, c.seed))
        add_end_of_turn(model, tokenizer)
    room, stops = model.config.max_position_embeddings, model.stop_ids
    if model.config.num_labels or tokenizer.n_tokens > model.config.vocab_size or not stops:
        raise InputError(f"{c.model} is not a causal language model to train: it has a score head, no "
                         "eos_token_id, or fewer embedding rows than its tokenizer has tokens")
    thought_cut(tokenizer, c.thought_tokens, c.max_new_tokens)
    forced = len(closing_tokens(tokenizer)) + min(c.max_new_tokens, PROBE_TOKENS)
    for p in pool + test or alchemy.requests(1, c.seed, length=c.chain):
        tokens = len(encode_prompt(tokenizer, p.prompt, closed=True)) + longest_injection(tokenizer, p, c)
        check_length(room, tokens + forced * (c.potential == "probe"), c.max_new_tokens,
                     f"prompt '{p.prompt:.40}'")
    if c.warm_start:
        read_demonstrations(c.warm_start, tokenizer, model)
    requests = evaluate.requests(test, c)
    evaluate.check_lengths(tokenizer, requests if pool else requests[:1], room, c)
    if c.eval_prompts and not requests:
        say(f"{c.prompts}: too few prompts to hold one out, so nothing is evaluated")
    return pool, requests


def longest_injection(tokenizer: Tokenizer, prompt: Prompt, c) -> int:
    """Tokens of the longest thought that training may inject."""
    return max(evaluate.injected_tokens(tokenizer, prompt, c).values()) if c.prefill_share else 0


def memory_plan(c, pool: list[Prompt], requests: list[Prompt]) -> str:
    """What --plan prints. Raises InputError."""
    tokenizer, model = load_tokenizer(c, c.model), Transformer.from_pretrained(c.model, "meta")
    names = {c.judge, c.eval_judge, c.reward_model} - {"", *JUDGES}
    folders = [Path(name) for name in sorted(names) if not is_function(name)]
    folders = [f.parent / read_spec(f)["model"] if f.suffix == ".json" else f for f in folders]
    attacks = [evaluate.attack_lengths(tokenizer, p, c) for p in requests]
    work = plan.Work(
        max(len(encode_prompt(tokenizer, p.prompt)) + longest_injection(tokenizer, p, c) for p in pool),
        max((max(lengths.values()) for lengths in attacks), default=0) + c.max_new_tokens, len(requests))
    return plan.report(model.config, [read_configs(folder)[0] for folder in folders], c, work)


def step_prompts(c, pool: list[Prompt], step: int) -> list[Prompt]:
    """The prompts of a step, for all ranks: shuffled passes over the file, or the world's requests. With
    harmful_share, passes over the prompts of each label, in that proportion."""
    n = c.prompts_per_step
    if not pool:
        turns = alchemy.classes(n * step, n, c.harmful_share)
        return alchemy.requests(n, c.seed, step, length=c.chain, turns=turns)
    if not c.harmful_share:
        return in_shuffled_passes(pool, n * step, n, c.seed)
    first, last = (alchemy.harmful_before(n * s, c.harmful_share) for s in (step, step + 1))
    parts = (("harmful", first, last - first), ("harmless", n * step - first, n - last + first))
    return [prompt for label, begin, count in parts
            for prompt in in_shuffled_passes([p for p in pool if p.label == label], begin, count, c.seed)]


def load_judges(c, device: str, pool: list[Prompt], requests: list[Prompt]) -> tuple[Judge, Judge]:
    """The judge that pays and the one that measures, often the same. Raises InputError."""
    if evaluate.judge_of(c)["pays"]:
        return (load_judge(c.judge, c.reward_model, device, pool + requests),) * 2
    return (load_judge(c.judge, c.reward_model, device, pool),
            load_judge(c.eval_judge, "", device, requests, "--eval-judge"))


def load_start(c, start: Path, device: str) -> tuple[Tokenizer, Transformer, Transformer | None]:
    """Tokenizer, model and frozen reference. Frozen weights are held in the compute type, to which layers
    cast them anyway. With LoRA the reference is the model without its adapter."""
    tokenizer = load_tokenizer(c, start)
    frozen = dict(masters=False, dtype=compute_type(device))
    if c.lora_rank:
        model = load_model(c, start, tokenizer, device, **frozen)
        add_adapter(model, c.lora_rank, c.lora_alpha, c.seed)
        return tokenizer, model, model if c.beta else None
    model = load_model(c, start, tokenizer, device)
    reference = load_model(c, start, tokenizer, device, **frozen).requires_grad_(False) if c.beta else None
    return tokenizer, model, reference
