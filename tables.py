"""Tables of finished runs, from the rows of eval.jsonl."""
import math
from pathlib import Path
from typing import Callable

import numpy as np

from lib import checkpoint
from lib.data import InputError, read_json

HARMFUL, HARMLESS = ("harmful", "covert"), ("harmless", "ambiguous")

# Rows of the table: (title, attack, rate, classes).
LINES = (("refuses harmful", "none", "refusal", HARMFUL),
         ("unsafe answers to harmful", "none", "unsafe", HARMFUL),
         ("helps with harmless", "none", "helpful", HARMLESS),
         ("refuses harmless (over-refusal)", "none", "refusal", HARMLESS),
         ("thought explores, of harmful", "none", "explored", HARMFUL),
         ("flips to safe, of explored", "none", "flip", HARMFUL),
         ("unsafe under prefill", "prefill", "unsafe", HARMFUL),
         ("unsafe under hijack", "hijack", "unsafe", HARMFUL),
         ("unsafe under hijack-short", "hijack-short", "unsafe", HARMFUL),
         ("unsafe under reset", "reset", "unsafe", HARMFUL),
         ("helps under mirror", "mirror", "helpful", HARMLESS),
         ("answered", "none", "answered", HARMFUL + HARMLESS))
# Knobs that may differ between seeds of one experiment.
SAME = ("seed", "out", "resume", "device", "shard", "model", "eval_every", "log")
DRAWS = 4000  # of the bootstrap
STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)  # t at .975, from one degree of freedom on
EVERY = 5  # steps that a point of a saved curve is the mean of
Column = dict[int, list[dict]]  # {seed: rows of eval.jsonl of one stage}


def interval(rate: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's 95 % interval of a rate measured on n, which is valid at 0 and 1 too."""
    middle, half = rate + z * z / (2 * n), z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    return max(0.0, (middle - half) / (1 + z * z / n)), min(1.0, (middle + half) / (1 + z * z / n))


def bootstrap(seeds: list[tuple[float, int]],
              base: list[tuple[float, int]] | None = None) -> tuple[float, float]:
    """Hierarchical 95 % interval of a mean over seeds, each (rate, n): seeds are drawn with replacement, then
    the rate of each from Beta(hits + 1/2, misses + 1/2), which has a width at 0 and 1 too. base: rates of the
    same seeds, which are taken off; seeds are drawn in pairs. For few seeds the draws are too narrow (three:
    an 80 % interval), so they are widened as Student's t widens a normal interval."""
    rng, S = np.random.default_rng(0), len(seeds)
    chosen = rng.integers(S, size=(DRAWS, S))

    def means(rates: list[tuple[float, int]]) -> np.ndarray:  # [DRAWS]
        hits, n = np.array([(rate * n, n) for rate, n in rates]).T[:, chosen]
        return rng.beta(hits + 0.5, n - hits + 0.5).mean(1)
    drawn = means(seeds) - (means(base) if base else 0.0)
    middle = sum(rate for rate, _ in seeds) / S - (sum(rate for rate, _ in base) / S if base else 0.0)
    wide = STUDENT[min(S - 2, len(STUDENT) - 1)] / 1.96 * math.sqrt(S / (S - 1)) if S > 1 else 1.0
    low, high = middle + wide * (np.quantile(drawn, (0.025, 0.975)) - drawn.mean())
    return max(low, -1.0 if base else 0.0), min(high, 1.0)


def group(row: dict) -> str:
    """Class of a row, and its --eval-file if it has one."""
    return ", ".join((row["class"], row["file"])) if "file" in row else row["class"]


def groups(rows: list[dict], classes: tuple) -> list[str]:
    """Groups of these classes, in the order of the classes."""
    return [*dict.fromkeys(group(row) for name in classes for row in rows if row["class"] == name)]


def find(rows: list[dict], attack: str, name: str, key: str) -> tuple[float, int] | None:
    """(rate, n) of one group under one attack, None without a rate. n: the rollouts that the rate is over."""
    row = next((r for r in rows if r["attack"] == attack and group(r) == name), None)
    if row is None or row[key] is None:
        return None
    share = {"answered": 1.0, "explored": 1.0, "flip": (row["explored"] or 0.0) * row["answered"]}
    return row[key], max(1, round(row["n"] * share.get(key, row["answered"])))


def mean_rate(rows: list[dict], attack: str, classes: tuple, key: str) -> tuple[float, int] | None:
    """(mean of a rate over the classes and files that have one, their n in all), None without any."""
    found = [f for f in (find(rows, attack, name, key) for name in groups(rows, classes)) if f]
    return (sum(rate for rate, _ in found) / len(found), sum(n for _, n in found)) if found else None


def spread(values: list[float], form: str = ".3f") -> str:
    """Mean [min, max] over seeds, "–" without a value."""
    if not values:
        return "–"
    return f"{sum(values) / len(values):{form}} [{min(values):{form}}, {max(values):{form}}]"


def markdown(columns: dict[str, Column], corner: str, names: list[str], cell: Callable[..., str]) -> str:
    """Markdown table of LINES for the named columns. cell(column, attack, group, rate) -> text; a line of
    dashes is left out."""
    lines = [f"{corner} class | " + " | ".join(names) + " |", "|---" * (2 + len(names)) + "|"]
    everything = [row for column in columns.values() for rows in column.values() for row in rows]
    for title, attack, key, classes in LINES:
        for name in groups(everything, classes):
            cells = [cell(columns[column], attack, name, key) for column in names]
            if set(cells) != {"–"}:
                lines.append(f"| {title} | {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def table(columns: dict[str, Column]) -> str:
    """Markdown table. Seeds are the unit: mean [min, max] over seeds; of a single seed the rate and the ends
    of its 95 % interval over requests. A note names the columns whose judge both paid and measured; the
    embedded world's verifier is exact."""
    def cell(column: Column, *what: str) -> str:
        found = [f for f in (find(rows, *what) for rows in column.values()) if f]
        if len(found) == 1:
            return "{:.3f} [{:.3f}, {:.3f}]".format(found[0][0], *interval(*found[0]))
        return spread([rate for rate, _ in found])
    paid = {name: row["judge"] for name, column in columns.items() if name != "start"
            for rows in column.values() for row in rows if row.get("pays") and row["judge"] != "alchemy"}
    names = ", ".join(f"{name} ({judge})" for name, judge in paid.items())
    note = f"\n\nThe judge that paid also measured, so these columns may flatter: {names}" * bool(paid)
    return markdown(columns, "| |", [*columns], cell) + note


def best_stage(rows: list[dict]) -> str | None:
    """The first stage after the start with the least unsafe + over-refusal on plain requests, each the mean
    over its classes and files. A stage without one of the two is none."""
    plain, scores = [row for row in rows if row["attack"] == "none" and row["stage"] != "before"], {}
    for stage in dict.fromkeys(row["stage"] for row in plain):
        sides = [[row[key] for row in plain if row["stage"] == stage and row["class"] in classes]
                 for key, classes in (("unsafe", HARMFUL), ("refusal", HARMLESS))]
        if all(side and None not in side for side in sides):
            scores[stage] = sum(sum(side) / len(side) for side in sides)
    return min(scores, key=scores.get, default=None)


def differences(columns: dict[str, Column]) -> str:
    """Markdown table of each column less the first, over the seeds that both have: the mean and its 95 %
    interval (bootstrap). Start models and requests are the same for both, so seeds are paired."""
    base, *others = [name for name in columns if name != "start"] or [""]

    def cell(column: Column, *what: str) -> str:
        pairs = [(find(column[seed], *what), find(columns[base][seed], *what))
                 for seed in sorted(column.keys() & columns[base].keys())]
        ours, theirs = [a for a, b in pairs if a and b], [b for a, b in pairs if a and b]
        if not ours:
            return "–"
        mean = sum(a[0] - b[0] for a, b in zip(ours, theirs)) / len(ours)
        return "{:+.3f} [{:+.3f}, {:+.3f}]".format(mean, *bootstrap(ours, theirs))
    return markdown(columns, f"| less {base} |", others, cell)


def read_runs(folders: list[Path]) -> list[dict]:
    """[{name, objective, seed, rows, curve}] of run folders. The name is the objective, with the knobs that
    differ from the first run of that objective. Raises InputError for an unfinished run, and for two runs of
    one name with the same seed."""
    runs, first, seen = [], {}, {}
    for folder in folders:
        config = read_json(folder / "config.json")
        rows = checkpoint.rows(folder / "eval.jsonl")
        if not any(row["stage"] == "after" for row in rows):
            raise InputError(f"{folder} was run with --eval-prompts 0, so there is nothing to compare"
                             if config.get("eval_prompts") == 0 and (folder / "model").exists() else
                             f"{folder}/eval.jsonl holds no row of stage 'after': the run is not finished")
        objective, seed, knobs = config["objective"], config["seed"], experiment(folder, config)
        base = first.setdefault(objective, knobs)
        name = " ".join([objective, *(f"{k}={v}" for k, v in knobs.items() if base.get(k) != v)])
        if (name, seed) in seen:
            raise InputError(f"{seen[name, seed]} and {folder} are one experiment with the same seed")
        seen[name, seed] = folder
        rewards = [m["answer_reward"] for m in checkpoint.rows(folder / "metrics.jsonl")]
        windows = [rewards[i:i + EVERY] for i in range(0, len(rewards), EVERY)]
        curve = [round(sum(w) / len(w), 4) for w in windows]
        runs.append(dict(name=name, objective=objective, seed=seed, rows=rows, curve=curve))
    return runs


def write_results(runs: list[dict], folder: Path) -> None:
    """Writes rows.jsonl, the rows of eval.jsonl, and curves.jsonl: answer reward over steps."""
    named = [(dict(name=run["name"], seed=run["seed"]), run) for run in runs]
    checkpoint.write_rows(folder / "rows.jsonl", [key | row for key, run in named for row in run["rows"]])
    checkpoint.write_rows(folder / "curves.jsonl", [
        key | dict(answer_reward=run["curve"]) for key, run in named])


def read_results(folder: Path) -> list[dict]:
    """What read_runs gave, from the files of write_results."""
    curves = {(row["name"], row["seed"]): row["answer_reward"]
              for row in checkpoint.rows(folder / "curves.jsonl")}
    runs: dict[tuple, dict] = {}
    for row in checkpoint.rows(folder / "rows.jsonl"):
        key = name, seed = row.pop("name"), row.pop("seed")
        run = dict(name=name, objective=name.split()[0], seed=seed, rows=[], curve=curves.get(key, []))
        runs.setdefault(key, run)["rows"].append(row)
    return list(runs.values())


def experiment(folder: Path, config: dict) -> dict:
    """What two runs must share to be seeds of one experiment: all knobs but SAME, and the start model's
    folder unless the embedded world's warm start made it, which depends on the seed."""
    file = folder / "start/config.json"
    embedded = read_json(file).get("embedded_world") if file.exists() else None
    model = "" if embedded else config.get("model", "")
    return {k: v for k, v in config.items() if k not in SAME} | {"model": model}


def columns_of(runs: list[dict]) -> dict[str, Column]:
    """Columns of the comparison: the start models, then each experiment, as {name: {seed: rows}}."""
    columns = {"start": {}}
    for run in runs:
        if run["objective"] != "no-thought" or len(runs) == 1:
            columns["start"].setdefault(run["seed"], [r for r in run["rows"] if r["stage"] == "before"])
        columns.setdefault(run["name"], {})[run["seed"]] = [r for r in run["rows"] if r["stage"] == "after"]
    return columns
