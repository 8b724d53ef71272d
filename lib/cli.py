"""The command line: flags from a dataclass of knobs, and exit codes."""
import argparse
import functools
import math
import os
import sys
from dataclasses import fields
from pathlib import Path

from tqdm import tqdm

from lib.checkpoint import Diverged, SaveError, flag
from lib.data import InputError, read_json


def exit_code(program: str):
    """Decorator of a main that gives an exit code: 2 for bad input, 1 for a failed save or a run that cannot
    go on, each with one sentence on stderr. Letters that the terminal does not have are written as '?'."""
    def decorate(main):
        @functools.wraps(main)
        def run(*arguments) -> int:
            for stream in (sys.stdout, sys.stderr):
                if hasattr(stream, "reconfigure"):
                    stream.reconfigure(errors="replace")
            try:
                return main(*arguments)
            except (InputError, SaveError, Diverged) as error:
                for bar in list(getattr(tqdm, "_instances", ())):
                    bar.close()  # ends its line
                print(f"{program}: {error}", file=sys.stderr)
                return 2 if isinstance(error, InputError) else 1
        return run
    return decorate


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise InputError(f"{message} (see --help)")


def read_flags(arguments: list[str], config: type, description: str, with_prompts: dict, out: str) -> dict:
    """Values for the fields of `config`, a dataclass whose metadata hold help, choices, low and high.

    with_prompts: defaults with --prompts. out: pattern of the default run folder. --resume takes everything
    else from the run's config.json; "auto" (implied by `torchrun --max-restarts`) only if there is one."""
    parser = Parser(prog="sear.py", description=description, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter, argument_default=argparse.SUPPRESS)
    knobs = {f.name: f for f in fields(config)}
    for name, f in knobs.items():
        shown = "" if f.default == "" else f" [{f.default}]"
        shown += f" [{with_prompts[name]} with --prompts]" if name in with_prompts else ""
        parser.add_argument("--" + flag(name), type=type(f.default), choices=f.metadata["choices"] or None,
                            help=f.metadata["help"] + shown)
    given = vars(parser.parse_args(arguments))
    given["out"] = given.get("out") or out.format(**{k: given.get(k, f.default) for k, f in knobs.items()})
    restarts = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"
    if given.get("resume", "auto" if restarts else "") == "auto":
        given["resume"] = given["out"] if Path(given["out"], "config.json").exists() else ""
    if given.get("resume"):
        stored = read_json(Path(given["resume"]) / "config.json")
        given = {k: v for k, v in stored.items() if k in knobs} | given | {"out": given["resume"]}
    elif "prompts" in given:
        given = with_prompts | given
    for name, value in given.items():
        low, high = knobs[name].metadata["low"], knobs[name].metadata["high"]
        if isinstance(value, (int, float)) and not (low <= value <= high and math.isfinite(value)):
            expected = f"a number, at least {low:g}" if high == math.inf else f"between {low:g} and {high:g}"
            raise InputError(f"--{flag(name)} must be {expected}, got {value}")
    return given
