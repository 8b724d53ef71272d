"""The run folder: configuration, logs, and checkpoints that continue a run to the same bits.

    config.json       the knobs, one flat object
    environment.json  hash of the source, versions, machine, command
    warm_start.jsonl  one row a supervised step
    metrics.jsonl     one row a step
    bad_steps.jsonl   rollouts of steps whose loss or gradient was not finite
    transcripts.jsonl some rollouts, segment by segment
    eval.jsonl        one row a stage, attack and class (and file)
    responses.jsonl   the answers that eval.jsonl counts, with verdicts
    attacks.jsonl     what attacks.py found, a row a request and budget
    start/ model/     Hugging Face folders, before and after; an adapter is merged
    best/             the same of the best stage, with --eval-every
    adapter/          the adapter alone, as PEFT stores it (--lora-rank)
    checkpoint/N/     trained weights and optimizer state after N steps; only the newest is kept
    warm/             the same while the start model is trained

Every random number is a function of counters (seed, step, prompt, rollout, position), so the step is the only
random state to save. Weights are safetensors, the rest is JSON; nothing is pickled. Rank 0 writes, and every
rank must see the folder.
"""
import contextlib
import hashlib
import json
import math
import os
import platform
import re
import shutil
import signal
import sys
import time
from pathlib import Path
from signal import SIGINT, SIGTERM

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from lib.data import INJECTIONS, InputError, as_json, expect, file_list, read_json, read_text
from lib.folder import copy_weight
from lib.parallel import all_gather, all_sum, rank_and_world, tuned, write_tensors

LOGS = ("metrics.jsonl", "transcripts.jsonl", "bad_steps.jsonl")  # truncated when a run continues
NOT_COMPARED = ("resume", "out", "device", "shard", "log")  # may change when a run continues
INPUTS = ("model", "prompts", "warm_start", "eval_file", "judge", "eval_judge", "reward_model")  # files
NOT_FILES = ("alchemy", "rules")  # built-in judges, even where a folder of that name exists
EDGE = 1 << 20  # bytes of each end of a file that enter its fingerprint
MAX_BAD_STEPS = 3  # steps without a finite loss and gradient that end a run
MIN_ANSWERED, MAX_DEAD_STEPS = 0.05, 5  # that many steps in a row with a lower share of answers end a run
STOP: list[int] = []  # signals received; checked between steps and between attacks


class Stopped(Exception):
    """A signal asked the run to end, and everything is saved."""


class Diverged(Exception):
    """Too many steps had no finite loss or gradient, or hardly an answer."""


class SaveError(OSError):
    """Writing failed, for example on a full disk. What was saved before is untouched."""


# ---- signals and ranks ------------------------------------------------------------------------------------

@contextlib.contextmanager
def stop_signals():
    """Within the block SIGTERM and SIGINT only ask the run to stop. Yields the list of signals received."""
    STOP.clear()
    before = {number: signal.signal(number, lambda received, frame: STOP.append(received))
              for number in (SIGTERM, SIGINT)}
    try:
        yield STOP
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def stop_requested() -> bool:
    """Whether any rank was asked to stop. Every rank calls, so all leave at the same place."""
    return bool(all_sum(torch.tensor(len(STOP))))


def on_all_ranks(task):
    """Every rank runs the task. If one fails, all raise its error. -> the result on this rank."""
    result, error = None, None
    try:
        result = task()
    except (InputError, SaveError, Stopped, Diverged) as e:
        error = e
    if errors := all_gather([error] if error else []):
        raise error or errors[0]
    return result


def on_rank_0(task) -> None:
    """Only rank 0 runs the task. If it fails, all ranks raise its error."""
    on_all_ranks(lambda: rank_and_world()[0] == 0 and task())


def progress_bar(items, **options) -> tqdm:
    """A tqdm bar, shown on rank 0 only."""
    return tqdm(items, disable=rank_and_world()[0] > 0, dynamic_ncols=True, **options)


# ---- files -----------------------------------------------------------------------------------------------

@contextlib.contextmanager
def saving(path: Path):
    """Turns an OSError of the block into a SaveError."""
    try:
        yield
    except OSError as error:
        raise SaveError(f"{path} could not be saved: {error}") from None


@contextlib.contextmanager
def atomic_folder(folder: Path):
    """Yields a temporary folder that replaces `folder` if the block succeeds and is removed if it fails. Only
    rank 0 touches the disk."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    if rank_and_world()[0] > 0:
        yield temporary
        return
    shutil.rmtree(temporary, ignore_errors=True)  # left by a killed process
    with contextlib.suppress(OSError):  # the block fails too, after the gathers that other ranks wait for
        temporary.mkdir(parents=True)
    try:
        with saving(folder):
            yield temporary
            for path in (*temporary.iterdir(), temporary):
                sync(path)
            if folder.exists():
                shutil.rmtree(folder)
            temporary.rename(folder)
            sync(folder.parent)  # before the caller deletes an older checkpoint
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def sync(path: Path) -> None:
    """Flushes a file or a directory to the disk, so that it survives a power cut."""
    if path.is_dir() and os.name == "nt":  # Windows cannot open a directory
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def append(file: Path, row: dict) -> None:
    with saving(file), open(file, "a", encoding="utf-8") as f:
        f.write(json.dumps(row, ensure_ascii=False) + "\n")


def write(file: Path, text: str) -> None:
    """Writes the whole file, or leaves the old one if that fails."""
    with saving(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(f".{file.name}.tmp")
        temporary.write_text(text, encoding="utf-8")
        sync(temporary)
        temporary.replace(file)


def write_rows(file: Path, rows: list[dict]) -> None:
    write(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def rows(file: Path) -> list[dict]:
    """Rows of a JSONL log, [] if there is none. A last line that was cut off is dropped."""
    lines = read_text(file, whole_lines=True).split("\n")[:-1] if file.exists() else []
    return [as_json(file, line, n) for n, line in enumerate(lines, start=1)]


# ---- the run folder --------------------------------------------------------------------------------------

def flag(knob: str) -> str:
    return knob.replace("_", "-")


def same_on_all(config: dict) -> None:
    """Refuses, on every rank, ranks that differ in code, knobs, torch version or input files."""
    own = {"code": environment()["source_sha256"], "torch version": torch.__version__}
    own |= {f"the content of --{flag(k)}": v for k, v in fingerprints(config).items()}
    # Of --resume only rank 0's value is used.
    own |= {f"config (--{flag(k)})": v for k, v in config.items() if k != "resume"}
    first, *others = all_gather([own])
    found = [f"rank {rank} differs from rank 0 in {', '.join(keys)}" for rank, other in enumerate(others, 1)
             if (keys := [k for k in first | other if other.get(k) != first.get(k)])]
    if found:
        raise InputError("all ranks need the same code, torch version, config and input files, but "
                         + "; ".join(found))


def open_run(folder: Path, config: dict, resume: bool) -> None:
    """Creates the run folder, or checks that the one there is this run."""
    file, inputs = folder / "config.json", fingerprints(config)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--out {folder} should be a folder, found a file")
    if not file.exists():
        if resume:
            raise InputError(f"--resume {folder}: there is no config.json in it, so it is not a run folder")
        write(folder / "environment.json", json.dumps(environment() | {"inputs": inputs}, indent=2) + "\n")
        write(file, json.dumps(config, indent=2) + "\n")
        return
    stored = read_json(file)
    for k in config:
        if k not in NOT_COMPARED and stored.get(k) != config[k]:
            raise InputError(f"{folder} holds a run with another config: {k} is {stored.get(k)!r} there and "
                             f"{config[k]!r} here; choose another --out")
    if not resume:
        raise InputError(f"{folder} holds this run already; continue it with --resume {folder}, "
                         "or choose another --out")
    for k, value in read_environment(folder)["inputs"].items():
        if not inputs.get(k, "").startswith(value):  # an older run stored no fingerprint of a judge's model
            model = " or its model" * config.get(k, "").endswith(".json")
            raise InputError(f"--{flag(k)} {config[k] or INJECTIONS}{model} changed since {folder} began; "
                             "the run cannot continue")


def fingerprints(config: dict) -> dict[str, str]:
    """{knob: fingerprints} of the files and folders that the config names."""
    named = {k: [Path(re.sub(r"\.py:\w*$", ".py", config[k]))] for k in INPUTS
             if config.get(k) and config[k] not in NOT_FILES}
    named |= {"eval_file": file_list(config.get("eval_file", ""))}
    named |= {"injections": [Path(config.get("injections") or INJECTIONS)] * bool(config.get("prompts"))}
    for k in named.keys() & {"judge", "eval_judge"}:  # a judge file names a folder
        named[k] += [f.parent / str(read_json(f).get("model")) for f in named[k]
                     if f.suffix == ".json" and os.path.exists(f)]
    named = {k: list(filter(os.path.exists, paths)) for k, paths in named.items()}  # False for a long name
    return {k: " ".join(map(fingerprint, paths)) for k, paths in named.items() if paths}


def fingerprint(path: Path) -> str:
    """SHA-256 of names, sizes, first and last megabyte of a file or of a folder's files: quick for 64 GB too,
    and training changes every part of a weight file. Raises InputError for one that cannot be read."""
    digest = hashlib.sha256()
    try:
        for file in sorted(f for f in (path.iterdir() if path.is_dir() else [path]) if f.is_file()):
            size = file.stat().st_size
            digest.update(f"{file.name if path.is_dir() else ''} {size}\n".encode())
            with open(file, "rb") as f:
                digest.update(f.read(EDGE))
                f.seek(max(0, size - EDGE))
                digest.update(f.read())
    except OSError as error:
        expect(False, error.filename or path, "a readable file", error.strerror or str(error))
    return digest.hexdigest()


def environment() -> dict:
    source, root = hashlib.sha256(), Path(__file__).parents[1]
    for file in sorted({*root.glob("[!.]*.py"), *root.glob("[!.]*/[!.]*.py")} - {*root.glob("tests/*")}):
        source.update(file.read_bytes())  # not Emacs's links .#sear.py, which lead nowhere
    return {"source_sha256": source.hexdigest(), "command": sys.argv, "python": platform.python_version(),
            "torch": torch.__version__, "numpy": np.__version__, "machine": platform.platform(),
            "processor": platform.machine(), "time": time.time(), "threads": torch.get_num_threads(),
            "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]}


def read_environment(run: Path) -> dict:
    """environment.json of a run: `time` of its start in seconds, fingerprints of its `inputs`, ..."""
    return read_json(run / "environment.json")


# ---- checkpoints -----------------------------------------------------------------------------------------

def latest(run: Path) -> Path | None:
    """Folder of the newest checkpoint."""
    found = [f for f in (run / "checkpoint").glob("*") if f.name.isdigit()]
    return max(found, key=lambda f: int(f.name), default=None)


def save(run: Path, step: int, model: nn.Module, optimizer: torch.optim.AdamW,
         scale: Tensor | None = None) -> None:
    """Writes checkpoint/<step>/ with the running scale of the judge, then deletes older ones. Frozen weights
    are left out. Every rank calls if the model is sharded; rank 0 writes."""
    names = {p: name for name, p in tuned(model).items()}
    moments = {f"{names[p]}.{key}": value for p, state in optimizer.state.items()
               for key, value in state.items() if key != "step"}
    updates = {int(state["step"]) for state in optimizer.state.values()}
    folder = run / "checkpoint" / str(step)
    with atomic_folder(folder) as temporary:
        write_tensors({temporary / "weights.safetensors": {name: p for p, name in names.items()},
                       temporary / "optimizer.safetensors": moments})
        if rank_and_world()[0] > 0:
            return
        state = {"step": step, "updates": max(updates, default=0)}
        state |= {} if scale is None else {"scale": scale.tolist()}  # JSON keeps a double to its last bit
        (temporary / "state.json").write_text(json.dumps(state))
    for old in folder.parent.iterdir():
        if old != folder:
            shutil.rmtree(old, ignore_errors=True)


@torch.no_grad()
def load(folder: Path, model: nn.Module, optimizer: torch.optim.AdamW, scale: Tensor | None = None) -> int:
    """Restores weights, optimizer state and scale. Each rank reads the rows that it holds, so the number of
    ranks may change. -> the steps the checkpoint was taken after."""
    try:
        state = read_json(folder / "state.json")
        if scale is not None:
            scale.copy_(torch.tensor(state["scale"], dtype=scale.dtype))
        for name, p in tuned(model).items():
            copy_weight(folder / "weights.safetensors", name, p)
            if state["updates"]:
                moments = {key: torch.zeros_like(p) for key in ("exp_avg", "exp_avg_sq")}
                for key, moment in moments.items():
                    copy_weight(folder / "optimizer.safetensors", f"{name}.{key}", moment)
                optimizer.state[p] = {"step": torch.tensor(float(state["updates"]))} | moments
        return state["step"]
    except (InputError, KeyError) as error:
        raise InputError(f"{folder} is an incomplete checkpoint: {error}") from None


def export(folder: Path, model: nn.Module, tokenizer) -> None:
    """Writes model and tokenizer as a Hugging Face folder. Every rank calls if sharded; rank 0 writes."""
    with atomic_folder(folder) as temporary:
        model.save_pretrained(temporary)
        if rank_and_world()[0] == 0:
            tokenizer.save_pretrained(temporary)


# ---- logs ------------------------------------------------------------------------------------------------

def truncate_logs(run: Path, steps: int) -> None:
    """Drops log rows from after the checkpoint, since those steps are taken again."""
    for file in (run / name for name in LOGS):
        if file.exists():
            write_rows(file, [row for row in rows(file) if row["step"] < steps])


def log_step(run: Path, row: dict, shown: list[dict], bad: list[dict]) -> None:
    """Appends a step to the logs; of all ranks' transcripts the first of each label. Raises Diverged at the
    last bad step that is allowed, and if the last steps have hardly an answer."""
    append(run / "metrics.jsonl", row)
    first = {}
    for t in shown:
        first.setdefault(t["label"], t)
    for t in first.values():
        append(run / "transcripts.jsonl", t)
        tqdm.write(format_transcript(t))
    for rollout in bad:
        append(run / "bad_steps.jsonl", rollout)
    if row["skipped"]:
        count = sum(r["skipped"] for r in rows(run / "metrics.jsonl"))
        message = (f"step {row['step']}: loss or gradient is not finite, so the update is skipped; its "
                   f"rollouts are in {run}/bad_steps.jsonl ({count} such steps, {MAX_BAD_STEPS} end the run)")
        if count >= MAX_BAD_STEPS:
            raise Diverged(message)
        tqdm.write(message, file=sys.stderr)
    if row["answered"] < MIN_ANSWERED:
        check_answers([r["answered"] for r in rows(run / "metrics.jsonl")])


def check_answers(shares: list[float]) -> None:
    """shares: of rollouts with an answer in all steps so far, hardly one in the last. Warns at the first such
    step, raises Diverged at the last in a row that is allowed: without answers there is nothing to learn."""
    dead, count = [share < MIN_ANSWERED for share in shares], MAX_DEAD_STEPS
    few = f"fewer than {MIN_ANSWERED:.0%} of the rollouts close their thought and end an answer"
    if all(dead[-count:]) and len(dead) >= count:
        raise Diverged(f"{count} steps in a row, up to step {len(dead) - 1}: {few}, so there is nothing to "
                       "learn from; teach the format with --warm-start, ask for it with --system, cut long "
                       "thoughts with --thought-tokens, or raise --max-new-tokens")
    if sum(dead) == 1:
        tqdm.write(f"step {len(dead) - 1}: {few}; {count} such steps in a row end the run", file=sys.stderr)


def transcript(step: int, prompt, b: int, rollouts, scores, pay: Tensor, thought: Tensor,
               answer: Tensor) -> dict:
    """One rollout, segment by segment, with its potential, return and advantage, and the thought's pay."""
    def number(x):  # JSON has no NaN
        return None if math.isnan(x) else round(float(x), 4)
    texts = rollouts.text[b]
    K = len(texts) - int(rollouts.closed[b])  # segments of the thought
    segments = [{"player": "reasoning", "text": text, "potential": number(scores.potential[b, k + 1]),
                 "return": number(scores.returns[b, k]), "advantage": number(thought[b, k])}
                for k, text in enumerate(texts[:K])]
    segments += [{"player": "answer", "text": text, "return": number(scores.answer[b]),
                  "advantage": number(answer[b])} for text in texts[K:]]
    return dict(step=step, prompt=prompt.prompt, label=prompt.label, kind=prompt.kind,
                prefill=rollouts.prefill[b], thought_reward=number(pay[b]), segments=segments)


def format_transcript(t: dict) -> str:
    """A transcript for the terminal: thought in blue, answer in green, then return and advantage."""
    paint = (lambda code, s: f"\033[{code}m{s}\033[0m") if sys.stdout.isatty() else (lambda code, s: s)
    lines = [paint(1, f"step {t['step']}, {t['kind'] or t['label']}: {t['prompt']}")]
    for s in t["segments"]:
        text = s["text"].strip()
        values = [f"{key} {s[key]:+.2f}" for key in ("return", "advantage") if s[key] is not None]
        lines.append(f"  {s['player']:9s} {paint(34 if s['player'] == 'reasoning' else 32, text)} "
                     + paint(2, f"  [{', '.join(values)}]"))
    return "\n".join(lines)
