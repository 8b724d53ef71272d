"""The run folder: what a run was told, what it logs, and checkpoints to continue it from, exact to the bit.

    config.json       the knobs, one flat object
    environment.json  hash of the source, versions, machine, command
    metrics.jsonl     one row a step
    transcripts.jsonl some rollouts, segment by segment
    eval.jsonl        one row a stage, attack and class
    start/ model/     Hugging Face folders, before and after
    checkpoint/N/     weights and optimizer state after N steps; only the newest is kept
    warm/             the same while the start model is trained

Every random number of a run is a function of counters (seed, step, prompt, rollout, position), so the step is
all the randomness there is to save. Weights are safetensors, the rest is JSON; nothing is ever unpickled.
"""
import argparse
import contextlib
import hashlib
import json
import math
import platform
import shutil
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from data import InputError, as_json, read_text
from parallel import rank_and_world, total

LOGS = ("metrics.jsonl", "transcripts.jsonl")  # cut back to the checkpoint when a run is continued
NOT_COMPARED = ("resume", "out", "device")  # where a run lives and runs is no part of what it is
STOP: list[int] = []  # signals received; looked at between steps and between attacks


class Stopped(Exception):
    """A signal asked the run to end, and all is saved."""


def stopping() -> bool:
    """Whether any rank was asked to stop: all of them have to leave at the same place."""
    return bool(total(torch.tensor(len(STOP))))


class SaveError(OSError):
    """The disk did not take what was to be saved. What was saved before is untouched."""


@contextlib.contextmanager
def whole_folder(folder: Path):
    """Yields a temporary folder that takes the place of `folder` if the block ends well, else vanishes."""
    temporary = folder.with_name(f".{folder.name}.tmp")  # what a killed process left of it goes first
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        if folder.exists():
            shutil.rmtree(folder)
        temporary.rename(folder)
    except (OSError, SafetensorError) as error:
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


def open_run(folder: Path, config: dict, resume: bool) -> None:
    """Makes the run folder, or raises InputError, on every rank, where the one there is not this run to be
    continued."""
    error = None
    if rank_and_world()[0] == 0:
        try:
            make_run(folder, config, resume)
        except InputError as e:
            error = e
    if total(torch.tensor(int(error is not None))):
        raise error or InputError(f"rank 0 could not open {folder}")


def make_run(folder: Path, config: dict, resume: bool) -> None:
    file = folder / "config.json"
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
        return
    if resume:
        raise InputError(f"--resume {folder}: there is no config.json in it, so it is no run folder")
    write(folder / "environment.json", json.dumps(environment(), indent=2) + "\n")
    write(file, json.dumps(config, indent=2) + "\n")


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise InputError(f"{message} (see --help)")


def read_flags(arguments: list[str], config: type, description: str, presets: dict[str, dict]) -> dict:
    """Values for the fields of `config`, a dataclass whose metadata hold help, choices, low and high, from
    flags of the same names. Giving the flag that a preset is named after moves the defaults to the preset's;
    --resume takes all that is not given from the run's config.json. Raises InputError."""
    parser = Parser(prog="sear.py", description=description, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter, argument_default=argparse.SUPPRESS)
    knobs = {f.name: f for f in fields(config)}
    for name, f in knobs.items():
        shown = "" if f.default == "" else f" [{f.default}]"
        shown += "".join(f" [{p[name]} with --{flag}]" for flag, p in presets.items() if name in p)
        parser.add_argument("--" + name.replace("_", "-"), type=type(f.default),
                            choices=f.metadata["choices"] or None, help=f.metadata["help"] + shown)
    given = vars(parser.parse_args(arguments))
    if "resume" in given:
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
            "processor": platform.machine(), "threads": torch.get_num_threads(),
            "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]}


def latest(run: Path) -> Path | None:
    """The newest checkpoint's folder."""
    found = [f for f in (run / "checkpoint").glob("*") if f.name.isdigit()]
    return max(found, key=lambda f: int(f.name), default=None)


def save(run: Path, step: int, model: nn.Module, optimizer: torch.optim.AdamW,
         scale: Tensor | None = None) -> None:
    """Writes checkpoint/<step>/, with the running scale of the judge, then drops older ones."""
    names = {p: name for name, p in model.named_parameters()}
    moments = {f"{names[p]}.{key}": value.cpu() for p, state in optimizer.state.items()
               for key, value in state.items() if key != "step"}
    updates = {int(state["step"]) for state in optimizer.state.values()}
    folder = run / "checkpoint" / str(step)
    with whole_folder(folder) as temporary:
        save_file({name: p.detach().cpu() for p, name in names.items()}, temporary / "weights.safetensors")
        save_file(moments, temporary / "optimizer.safetensors")
        state = {"step": step, "updates": max(updates, default=0)}
        state |= {} if scale is None else {"scale": scale.tolist()}  # JSON writes a double to its last bit
        (temporary / "state.json").write_text(json.dumps(state))
    for old in folder.parent.iterdir():
        if old != folder:
            shutil.rmtree(old)


def load(folder: Path, model: nn.Module, optimizer: torch.optim.AdamW, scale: Tensor | None = None) -> int:
    """Puts the checkpoint's weights, optimizer state and scale in place. -> the steps it was taken after."""
    state = as_json(folder / "state.json", read_text(folder / "state.json"))
    try:
        weights = load_file(folder / "weights.safetensors")
        moments = load_file(folder / "optimizer.safetensors")
        if scale is not None:
            scale.copy_(torch.tensor(state["scale"], dtype=scale.dtype))
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(weights[name])
                if state["updates"]:
                    optimizer.state[p] = {"step": torch.tensor(float(state["updates"]))} | {
                        key: moments[f"{name}.{key}"].to(p.device) for key in ("exp_avg", "exp_avg_sq")}
    except (SafetensorError, KeyError, OSError) as error:
        raise InputError(f"{folder} is no whole checkpoint: {error}") from None
    return state["step"]


def cut_logs(run: Path, steps: int) -> None:
    """Drops the logs' rows from after the checkpoint: those steps will be taken again."""
    for name in LOGS:
        kept = [row for row in rows(run / name) if row["step"] < steps]
        write(run / name, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept))


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
        said = paint(34 if s["player"] == "reasoning" else 32, s["text"].strip())
        worth = [f"{key} {s[key]:+.2f}" for key in ("return", "advantage") if s[key] is not None]
        lines.append(f"  {s['player']:9s} {said} " + paint(2, f"  [{', '.join(worth)}]"))
    return "\n".join(lines)
