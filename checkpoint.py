"""The run folder: what a run was told, what it logs, and checkpoints to continue it from, exact to the bit.

    config.json       the knobs, one flat object
    environment.json  hash of the source, versions, machine, command
    metrics.jsonl     one row a step
    bad_steps.jsonl   prompts of steps that came to no finite number, where there was one
    transcripts.jsonl some rollouts, segment by segment
    eval.jsonl        one row a stage, attack and class
    start/ model/     Hugging Face folders, before and after
    checkpoint/N/     weights and optimizer state after N steps; only the newest is kept
    warm/             the same while the start model is trained

Every random number of a run is a function of counters (seed, step, prompt, rollout, position), so the step is
all the randomness there is to save. Weights are safetensors, the rest is JSON; no file is ever unpickled.
With several ranks rank 0 writes, and all of them have to see the folder.
"""
import argparse
import contextlib
import hashlib
import json
import math
import os
import platform
import shutil
import sys
import time
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from tqdm import tqdm

from data import InputError, as_json, read_text
from parallel import gathered, own_rows, patient_group, rank_and_world, total, write_tensors

LOGS = ("metrics.jsonl", "transcripts.jsonl", "bad_steps.jsonl")  # cut back when a run is continued
# Where a run lives, where it runs and when it gives up is no part of what it is.
NOT_COMPARED = ("resume", "out", "device", "shard", "timeout", "max_bad_steps")
INPUTS = ("model", "prompts", "judge", "reward_model")  # knobs that may name a file or a folder
EDGE = 1 << 20  # bytes
STOP: list[int] = []  # signals received; looked at between steps and between attacks


class Stopped(Exception):
    """A signal asked the run to end, and all is saved."""


def stopping() -> bool:
    """Whether any rank was asked to stop: all of them have to leave at the same place."""
    return bool(total(torch.tensor(len(STOP))))


class Diverged(Exception):
    """Too many steps came to no finite loss or gradient."""


class SaveError(OSError):
    """The disk did not take what was to be saved. What was saved before is untouched."""


def together(task, patient: bool = False):
    """Every rank runs the task, in many of which only rank 0 has anything to do. Where one fails all raise
    its error: nobody waits for who has left. patient: however long it takes. -> the result on this rank."""
    group, result, error = patient_group() if patient else None, None, None
    try:
        result = task()
    except (InputError, SaveError, Stopped, Diverged) as e:
        error = e
    if errors := gathered([error] if error else [], group):
        raise error or errors[0]
    return result


@contextlib.contextmanager
def whole_folder(folder: Path):
    """Yields a temporary folder that takes the place of `folder` if the block ends well, else vanishes. Of
    several ranks that come here only rank 0 touches the disk."""
    temporary = folder.with_name(f".{folder.name}.tmp")  # what a killed process left of it goes first
    if rank_and_world()[0] > 0:
        yield temporary
        return
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        with contextlib.suppress(OSError):  # the block will fail too, once it has gathered what others send
            temporary.mkdir(parents=True)
        yield temporary
        for file in temporary.iterdir():  # a folder that is there is whole, even if the power fails now
            with open(file, "rb") as f:
                os.fsync(f.fileno())
        if folder.exists():
            shutil.rmtree(folder)
        temporary.rename(folder)
    except OSError as error:
        raise SaveError(f"{folder} could not be saved: {error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def saving(file: Path):
    try:
        yield
    except OSError as error:
        raise SaveError(f"{file} could not be written: {error}") from None


def append(file: Path, row: dict) -> None:
    with saving(file), open(file, "a", encoding="utf-8") as f:
        f.write(json.dumps(row, ensure_ascii=False) + "\n")


def write(file: Path, text: str) -> None:
    """Writes the whole file or, on a full disk, leaves what was there."""
    with saving(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(f".{file.name}.tmp")
        temporary.write_text(text, encoding="utf-8")
        temporary.rename(file)


def rows(file: Path) -> list[dict]:
    """Rows of a JSONL log, [] where there is none. A last line that was cut off in the writing is no row."""
    lines = read_text(file).split("\n")[:-1] if file.exists() else []
    try:
        return [json.loads(line) for line in lines]
    except json.JSONDecodeError as error:
        raise InputError(f"{file} is no log of a run: {error}") from None


def same_on_all(config: dict) -> None:
    """Raises InputError, on every rank, where the ranks do not run the same code with the same knobs."""
    config = {k: v for k, v in config.items() if k != "resume"}  # rank 0 alone goes by it
    mine = {"code": environment()["source_sha256"], "torch version": torch.__version__} | config
    ranks = gathered([mine])
    other = {i: [k if k not in config else f"config (--{k.replace('_', '-')})" for k in mine if
                 them.get(k) != ranks[0].get(k)] for i, them in enumerate(ranks)}
    if found := [f"rank {i} differs from rank 0 in {', '.join(keys)}" for i, keys in other.items() if keys]:
        raise InputError(f"all ranks need the same code, config and torch version, but {'; '.join(found)}")


def open_run(folder: Path, config: dict, resume: bool) -> None:
    """Makes the run folder. Raises InputError where the one there is not this run to be continued."""
    file = folder / "config.json"
    named = {k: Path(config[k]) for k in INPUTS if config.get(k) and Path(config[k]).exists()}
    inputs = {k: fingerprint(path) for k, path in named.items()}
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--out {folder} is no folder")
    if file.exists():
        stored = as_json(file, read_text(file))
        other = [k for k in config if k not in NOT_COMPARED and stored.get(k) != config[k]]
        if other:
            k = other[0]
            raise InputError(f"{folder} holds a run with another config: {k} is {stored.get(k)!r} there and "
                             f"{config[k]!r} here; choose another --out")
        if not resume:
            raise InputError(f"{folder} holds this run already; continue it with --resume {folder}, "
                             "or choose another --out")
        changed = [k for k, value in begun(folder)["inputs"].items() if inputs.get(k) != value]
        if changed:
            raise InputError(f"--{changed[0].replace('_', '-')} {config[changed[0]]} is not what it was when "
                             f"{folder} began; the run cannot go on with it")
        return
    if resume:
        raise InputError(f"--resume {folder}: there is no config.json in it, so it is no run folder")
    write(folder / "environment.json", json.dumps(environment() | {"inputs": inputs}, indent=2) + "\n")
    write(file, json.dumps(config, indent=2) + "\n")


def fingerprint(path: Path) -> str:
    """SHA-256 of names, sizes, first and last megabyte of a file or of a folder's files: a moment for 64 GB
    too, and training, which moves all of a file, does not escape it."""
    digest = hashlib.sha256()
    for file in sorted(f for f in (path.iterdir() if path.is_dir() else [path]) if f.is_file()):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        with open(file, "rb") as f:
            digest.update(f.read(EDGE))
            f.seek(max(0, size - EDGE))
            digest.update(f.read())
    return digest.hexdigest()


def begun(run: Path) -> dict:
    """environment.json of a run: `time` of its beginning in seconds, fingerprints of its `inputs`, ..."""
    return as_json(run / "environment.json", read_text(run / "environment.json"))


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise InputError(f"{message} (see --help)")


def read_flags(arguments: list[str], config: type, description: str, presets: dict[str, dict],
               out: str) -> dict:
    """Values for the fields of `config`, a dataclass whose metadata hold help, choices, low and high, from
    flags of the same names. Giving the flag that a preset is named after moves the defaults to the preset's;
    --resume takes all that is not given from the run's config.json; "auto", which `torchrun --max-restarts`
    means too, only if there is one. out: pattern of the default run folder. Raises InputError."""
    parser = Parser(prog="sear.py", description=description, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter, argument_default=argparse.SUPPRESS)
    knobs = {f.name: f for f in fields(config)}
    for name, f in knobs.items():
        shown = "" if f.default == "" else f" [{f.default}]"
        shown += "".join(f" [{p[name]} with --{flag}]" for flag, p in presets.items() if name in p)
        parser.add_argument("--" + name.replace("_", "-"), type=type(f.default),
                            choices=f.metadata["choices"] or None, help=f.metadata["help"] + shown)
    given = vars(parser.parse_args(arguments))
    given["out"] = given.get("out") or out.format(**{k: given.get(k, f.default) for k, f in knobs.items()})
    restarts = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"  # its count differs between machines
    if given.get("resume", "auto" if restarts else "") == "auto":
        given["resume"] = given["out"] if Path(given["out"], "config.json").exists() else ""
    if given.get("resume"):
        file = Path(given["resume"]) / "config.json"
        stored = as_json(file, read_text(file))
        given = {k: v for k, v in stored.items() if k in knobs} | given | {"out": given["resume"]}
    else:
        for flag in presets.keys() & given.keys():
            given = presets[flag] | given
    for name, value in given.items():
        low, high = knobs[name].metadata["low"], knobs[name].metadata["high"]
        if isinstance(value, (int, float)) and not (low <= value <= high and math.isfinite(value)):
            expected = f"a number, at least {low:g}" if high == math.inf else f"between {low:g} and {high:g}"
            raise InputError(f"--{name.replace('_', '-')} must be {expected}, got {value}")
    return given


def environment() -> dict:
    source = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("**/*.py")):
        if not {"tests", ".venv"} & set(file.relative_to(Path(__file__).parent).parts):
            source.update(file.read_bytes())
    return {"source_sha256": source.hexdigest(), "command": sys.argv, "python": platform.python_version(),
            "torch": torch.__version__, "numpy": np.__version__, "machine": platform.platform(),
            "processor": platform.machine(), "time": time.time(), "threads": torch.get_num_threads(),
            "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]}


def latest(run: Path) -> Path | None:
    """The newest checkpoint's folder."""
    found = [f for f in (run / "checkpoint").glob("*") if f.name.isdigit()]
    return max(found, key=lambda f: int(f.name), default=None)


def save(run: Path, step: int, model: nn.Module, optimizer: torch.optim.AdamW,
         scale: Tensor | None = None) -> None:
    """Writes checkpoint/<step>/, with the running scale of the judge, then drops older ones. Every rank calls
    if the model is sharded; rank 0 writes."""
    names = {p: name for name, p in model.named_parameters()}
    moments = {f"{names[p]}.{key}": value for p, state in optimizer.state.items()
               for key, value in state.items() if key != "step"}
    updates = {int(state["step"]) for state in optimizer.state.values()}
    folder = run / "checkpoint" / str(step)
    with whole_folder(folder) as temporary:
        write_tensors({temporary / "weights.safetensors": {name: p for p, name in names.items()},
                       temporary / "optimizer.safetensors": moments})
        if rank_and_world()[0] > 0:
            return
        state = {"step": step, "updates": max(updates, default=0)}
        state |= {} if scale is None else {"scale": scale.tolist()}  # JSON writes a double to its last bit
        (temporary / "state.json").write_text(json.dumps(state))
    for old in folder.parent.iterdir():
        if old != folder:
            shutil.rmtree(old, ignore_errors=True)


@torch.no_grad()
def load(folder: Path, model: nn.Module, optimizer: torch.optim.AdamW, scale: Tensor | None = None) -> int:
    """Puts the checkpoint's weights, optimizer state and scale in place; a rank reads the rows that it holds,
    so any number of ranks will do. -> the steps it was taken after."""
    state = as_json(folder / "state.json", read_text(folder / "state.json"))

    def fill(target: Tensor, file, name: str) -> Tensor:
        mine, first = own_rows(target)
        stored = file.get_slice(name)
        if list(target.shape) != stored.get_shape():
            raise InputError(f"{folder}: '{name}' has shape {stored.get_shape()}, not {list(target.shape)}")
        if len(mine):  # with more ranks than rows some hold nothing
            mine.copy_(stored[first:first + len(mine)])
        return target
    try:
        if scale is not None:
            scale.copy_(torch.tensor(state["scale"], dtype=scale.dtype))
        with (safe_open(folder / "weights.safetensors", "pt") as weights,
              safe_open(folder / "optimizer.safetensors", "pt") as moments):
            for name, p in model.named_parameters():
                fill(p, weights, name)
                if state["updates"]:
                    optimizer.state[p] = {"step": torch.tensor(float(state["updates"]))} | {
                        key: fill(torch.zeros_like(p), moments, f"{name}.{key}")
                        for key in ("exp_avg", "exp_avg_sq")}
    except (SafetensorError, KeyError, OSError) as error:
        raise InputError(f"{folder} is no whole checkpoint: {error}") from None
    return state["step"]


def cut_logs(run: Path, steps: int) -> None:
    """Drops the logs' rows from after the checkpoint: those steps will be taken again."""
    for name in filter(lambda name: (run / name).exists(), LOGS):
        kept = [row for row in rows(run / name) if row["step"] < steps]
        write(run / name, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept))


def log_step(run: Path, row: dict, shown: list[dict], bad: list[dict], limit: int) -> None:
    """Writes a step down; of all ranks' transcripts the first of each label. Raises Diverged where it is the
    last bad step that was allowed."""
    append(run / "metrics.jsonl", row)
    for t in [t for i, t in enumerate(shown) if t["label"] not in [s["label"] for s in shown[:i]]]:
        append(run / "transcripts.jsonl", t)
        tqdm.write(coloured(t))
    for prompt in bad:
        append(run / "bad_steps.jsonl", prompt)
    if bad:
        count = sum(row["skipped"] for row in rows(run / "metrics.jsonl"))
        said = (f"step {row['step']}: loss or gradient was not finite and nothing learned from it; "
                f"its prompts are in {run}/bad_steps.jsonl ({count} such steps, {limit} end the run)")
        if count >= limit:
            raise Diverged(said)
        tqdm.write(said, file=sys.stderr)


def export(folder: Path, model: nn.Module, tokenizer) -> None:
    """The Hugging Face folder of model and tokenizer. Of a sharded model every rank calls; rank 0 writes."""
    with whole_folder(folder) as temporary:
        model.save_pretrained(temporary)
        if rank_and_world()[0] == 0:
            tokenizer.save_pretrained(temporary)


def offenders(step: int, prompts: list, rollouts, finite_alone) -> list[dict]:
    """Rows of bad_steps.jsonl, from all ranks: the prompts of a step whose loss or gradient is not finite
    with nobody else's in it either or, if there is none, all. prompts: the one of each of this rank's
    rollouts. finite_alone(rollouts) tells, and all ranks have to ask it about every prompt."""
    rank, world = rank_and_world()
    groups = [(rollouts.prompt == i).nonzero()[:, 0].tolist() for i in rollouts.prompt.unique().tolist()]
    many, found = gathered([len(groups)]), []
    for owner in range(world):
        for i in range(many[owner]):
            alone = not finite_alone(groups[i] if rank == owner else [])
            if rank == owner:
                prompt, texts = prompts[groups[i][0]], ["".join(rollouts.text[b]) for b in groups[i]]
                found.append(dict(step=step, prompt=prompt.prompt, label=prompt.label, alone=alone,
                                  rollouts=texts))
    everyone = gathered(found)
    return [row for row in everyone if row["alone"]] or everyone


def transcript(step: int, prompt, b: int, rollouts, scores, returns: Tensor, thought: Tensor, answer: Tensor):
    """One rollout, segment by segment, with what each was worth."""
    def number(x):  # NaN is no JSON
        return None if math.isnan(x) else round(float(x), 4)
    K = len(rollouts.thoughts[b])
    segments = [{"player": "reasoning", "text": text, "potential": number(scores.potential[b, k + 1]),
                 "return": number(returns[b, min(k, returns.shape[1] - 1)]),
                 "advantage": number(thought[b, min(k, thought.shape[1] - 1)])}
                for k, text in enumerate(rollouts.thoughts[b])]
    segments += [{"player": "answer", "text": text, "return": number(scores.answer[b]),
                  "advantage": number(answer[b, 0])} for text in rollouts.text[b][K:]]
    return dict(step=step, prompt=prompt.prompt, label=prompt.label, kind=prompt.kind, segments=segments)


def coloured(t: dict) -> str:
    """A transcript for the terminal: thought in blue, answer in green, what each segment earned behind it."""
    paint = (lambda code, s: f"\033[{code}m{s}\033[0m") if sys.stdout.isatty() else (lambda code, s: s)
    lines = [paint(1, f"step {t['step']}, {t['kind'] or t['label']}: {t['prompt']}")]
    for s in t["segments"]:
        text = s["text"].strip().replace("\n\n</think>", " </think>")
        said = paint(34 if s["player"] == "reasoning" else 32, text)
        worth = [f"{key} {s[key]:+.2f}" for key in ("return", "advantage") if s[key] is not None]
        lines.append(f"  {s['player']:9s} {said} " + paint(2, f"  [{', '.join(worth)}]"))
    return "\n".join(lines)
