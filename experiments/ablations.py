"""All runs that results/ is made from, several at a time.                           ./train.sh ablations

    ./train.sh ablations --only sear --seeds 3    one experiment, three seeds
    ./train.sh ablations --steps 300              flags that it does not know go to sear.py
    ./train.sh ablations --quick                  all of them, at sizes that show nothing

Runs of a seed share their start model. A run that was stopped continues; one that is finished is left alone.
"""
import argparse
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

import evaluate
import sear
from lib.checkpoint import STOP, Stopped, rows, saving, stop_signals
from lib.cli import Parser, exit_code
from lib.data import expect, read_json

ROOT = Path(__file__).resolve().parents[1]
QUICK = tuple("--prompts-per-step 2 --group-size 2 --max-new-tokens 12 --steps 2 --eval-prompts 1".split())
LONG, RARE = ("--chain", "12"), ("--talks", "0.1")
HOT = ("--eval-temperature", "1")
SEEDS = {"sear": 10, "outcome": 10, "probe": 3, "no-thought": 3}  # 5 of the others; of HOT there are more


class Experiment(NamedTuple):
    name: str  # that of its column, see tables.read_runs
    flags: tuple[str, ...]
    seeds: int
    table: str = ""  # folder of results/ that compares it with others
    start: tuple[str, ...] = ()  # flags of its start model and of its run


MAIN = ("sear", "process-once", "process-shared", "probe", "competing-outcome", "outcome")
SHARES, SWEPT = (0.1, 0.75, 0.9), ("sear", "outcome", "safe-thought")  # of harmful prompts, objectives
EXPERIMENTS = [
    *(Experiment(name, ("--objective", name), SEEDS.get(name, 5)) for name in sear.OBJECTIVES),
    Experiment("sear prefill_share=0.25", ("--prefill-share", "0.25"), 3),
    # The same training, evaluated at temperature 1, and what else docs/temperature-1.md shows.
    *(Experiment(f"{name} hot", ("--objective", name, *HOT), 10 if name in MAIN else 5, "hot")
      for name in sear.OBJECTIVES),
    Experiment("sear prefill_share=0.25 hot", ("--prefill-share", "0.25", *HOT), 5, "hot"),
    *(Experiment(f"{name} steps=25", ("--objective", name, "--steps", "25"), 3, "early")
      for name in ("sear", "competing-outcome")),
    Experiment("sear lora", HOT, 3, "lora"),
    Experiment("sear steps=400 learning_rate=0.001 lora_rank=16 lora_alpha=32",
               ("--lora-rank", "16", "--learning-rate", "1e-3", "--steps", "400", *HOT), 3, "lora"),
    *(Experiment(f"{name} long", ("--objective", name, "--steps", "300", *HOT), 3, "long", LONG)
      for name in MAIN[:3]),
    *(Experiment(f"{name} rare-talk", ("--objective", name, *HOT), 3, "rare-talk", RARE)
      for name in ("sear", "outcome")),
    *(Experiment(f"{name} shares", ("--objective", name, *HOT), 3, "shares") for name in SWEPT),
    *(Experiment(f"{name} harmful_share={share}", ("--objective", name, "--harmful-share", str(share), *HOT),
                 3, "shares") for share in SHARES for name in SWEPT)]


def finished(folder: Path) -> bool:
    """Whether the last things are there that a run writes: its model, then, if asked for, its evaluation."""
    if not (folder / "model").exists():
        return False
    asked = read_json(folder / "config.json")["eval_prompts"] if (folder / "config.json").exists() else 0
    return not asked or any(row["stage"] == "after" for row in rows(folder / "eval.jsonl"))


class Run(NamedTuple):
    folder: Path
    flags: tuple[str, ...]

    @property
    def share(self) -> float:
        """How much of it is done, in [0, 1]."""
        done = finished(self.folder)
        if done or not (self.folder / "config.json").exists():
            return float(done)
        steps = read_json(self.folder / "config.json")["steps"]
        return len(rows(self.folder / "metrics.jsonl")) / (steps + 1)


def plan(experiments: list[Experiment], out: Path,
         more: tuple[str, ...] = ()) -> tuple[list[Run], dict[str, list[Run]]]:
    """more: flags of every run. -> the runs that make start models, and those that begin from them, by table;
    seed by seed."""
    starts, tables = {}, {e.table: [] for e in experiments}
    for seed in range(1, 1 + max(e.seeds for e in experiments)):
        for name, flags, seeds, table, begin in experiments:
            if seed <= seeds:
                own, folder = ("--seed", str(seed), *begin), out / f"{re.sub('[ =]', '-', name)}-seed{seed}"
                start = out / f"start{''.join(begin).replace('--', '-')}-seed{seed}"
                starts[start] = Run(start, (*own, *more, "--steps", "0", "--eval-prompts", "0"))
                flags = (*own, *flags, *more, "--model", str(start / "start"))
                tables[table].append(Run(folder, flags))
    return list(starts.values()), tables


def start(run: Run, threads: int) -> subprocess.Popen:
    """Starts or continues a run; what it prints goes to <folder>.log. Other flags than before are refused."""
    begun = (run.folder / "config.json").exists()
    flags = (*run.flags, "--resume" if begun else "--out", str(run.folder))
    with open(f"{run.folder}.log", "a") as log:
        return subprocess.Popen([sys.executable, str(ROOT / "sear.py"), *flags], stdin=subprocess.DEVNULL,
                                stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": str(threads)})


def work_through(runs: list[Run], jobs: int, name: str) -> list[Run]:
    """Runs what is not done, `jobs` at a time, under one bar. -> the runs that are still not done. Raises
    Stopped after a signal, when all have ended."""
    waiting, running = [run for run in runs if not finished(run.folder)], {}
    with tqdm(total=len(runs), desc=name, dynamic_ncols=True,
              bar_format="{l_bar}{bar}| {n:.1f}/{total} [{elapsed}<{remaining}{postfix}]") as bar:
        try:
            while running or waiting and not STOP:
                while waiting and len(running) < jobs and not STOP:
                    run = waiting.pop(0)
                    running[run] = start(run, max(1, (os.cpu_count() or 1) // jobs))
                for run in [run for run, process in running.items() if process.poll() is not None]:
                    del running[run]
                for process in running.values() if STOP else ():
                    process.send_signal(signal.SIGTERM)  # it ends its step and saves
                bar.update(sum(run.share for run in runs) - bar.n)
                bar.set_postfix_str(" ".join(run.folder.name for run in running))
                time.sleep(0.5)
        finally:
            for process in running.values():  # none but after an error
                process.terminate()
                process.wait()
    if STOP:
        raise Stopped
    return [run for run in runs if not finished(run.folder)]


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line. Raises InputError."""
    names = {e.name: e for e in EXPERIMENTS}
    parser = Parser(prog="ablations", description=__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--only", nargs="+", default=[*names], help="experiments [all]:\n" + "\n".join(names))
    add("--seeds", type=int, default=10, help="at most so many seeds of each [10]")
    add("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time [one for a core]")
    add("--out", type=Path, help="run folders [runs/ablations, with --quick runs/quick]")
    add("--results", type=Path, help="folder for tables and rows [in --out]")
    add("--quick", action="store_true", help="one seed, two small steps a run, which show nothing")
    given, rest = parser.parse_known_args(arguments)
    expect({*given.only} <= names.keys(), "--only", "experiments that --help lists", given.only)
    for name in ("seeds", "jobs"):
        expect(getattr(given, name) > 0, f"--{name}", "above 0", getattr(given, name))
    grid = {"--seed", "--objective", "--model", "--resume"} & {flag.partition("=")[0] for flag in rest}
    expect(not grid, "flags for all runs", "none that the experiments set themselves", " ".join(sorted(grid)))
    given.more = (*rest, *QUICK * given.quick)
    sear.parse([*given.more])
    given.out = given.out or Path("runs/quick" if given.quick else "runs/ablations")
    expect(not given.out.is_file(), f"--out {given.out}", "a folder", "a file")
    given.seeds = 1 if given.quick else given.seeds
    given.experiments = [names[name]._replace(seeds=min(given.seeds, names[name].seeds))
                         for name in dict.fromkeys(given.only)]
    return given


@exit_code("ablations")
def main(arguments: list[str]) -> int:
    """-> exit code: 0 done or SIGTERM, 1 a run failed, 2 bad input, 130 Ctrl-C."""
    given = parse(arguments)
    with saving(given.out):
        given.out.mkdir(parents=True, exist_ok=True)
    starts, tables = plan(given.experiments, given.out, given.more)
    with stop_signals() as received:
        try:
            missing = work_through(starts, given.jobs, "start models")
            lost = {str(run.folder / "start") for run in missing}
            runs = [run for runs in tables.values() for run in runs if not lost & {*run.flags}]
            missing += work_through(runs, given.jobs, "ablations")
        except Stopped:
            print("stopped and saved; the same command continues", file=sys.stderr)
            return 130 if signal.SIGINT in received else 0
    codes = [1] * bool(missing)
    tables.pop("early", None)  # measure.py reads these
    for table, runs in tables.items():
        if folders := [run.folder for run in runs if finished(run.folder)]:
            print(f"\n{table or 'default world'}")
            results = (given.results or given.out / "results") / table
            codes.append(evaluate.main([*map(str, folders), "--out", str(results)]))
    for one in missing:
        print(f"ablations: {one.folder} failed, see {one.folder}.log", file=sys.stderr)
    return max(codes, default=0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
