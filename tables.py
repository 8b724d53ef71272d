"""Tables and pictures of finished runs, from the rows of eval.jsonl."""
import math
import sys
from pathlib import Path
from typing import Callable

from lib import checkpoint
from lib.data import InputError, read_json

HARMFUL, HARMLESS = ("harmful", "covert"), ("harmless", "ambiguous")

# ---- tables ----------------------------------------------------------------------------------------------

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
Column = dict[int, list[dict]]  # {seed: rows of eval.jsonl of one stage}


def interval(rate: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's 95 % interval of a rate measured on n, which is valid at 0 and 1 too."""
    middle, half = rate + z * z / (2 * n), z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    return max(0.0, (middle - half) / (1 + z * z / n)), min(1.0, (middle + half) / (1 + z * z / n))


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
    of its 95 % interval over requests."""
    def cell(column: Column, *what: str) -> str:
        found = [f for f in (find(rows, *what) for rows in column.values()) if f]
        if len(found) == 1:
            return "{:.3f} [{:.3f}, {:.3f}]".format(found[0][0], *interval(*found[0]))
        return spread([rate for rate, _ in found])
    return markdown(columns, "| |", [*columns], cell) + footnote(columns)


def footnote(columns: dict[str, Column]) -> str:
    """Names the columns whose judge both paid and measured. The embedded world's verifier is exact."""
    paid = {name: row["judge"] for name, column in columns.items() if name != "start"
            for rows in column.values() for row in rows if row.get("pays") and row["judge"] != "alchemy"}
    names = ", ".join(f"{name} ({judge})" for name, judge in paid.items())
    return f"\n\nThe judge that paid also measured, so these columns may flatter: {names}" if paid else ""


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
    """Markdown table of each column less the first, over the seeds that both have. The requests are the same
    for all columns, so the comparison is paired."""
    base, *others = (name for name in columns if name != "start")

    def cell(column: Column, *what: str) -> str:
        pairs = [(find(column[seed], *what), find(columns[base][seed], *what))
                 for seed in column.keys() & columns[base].keys()]
        return spread([a[0] - b[0] for a, b in pairs if a and b], "+.3f")
    return markdown(columns, f"| less {base} |", others, cell)


def read_runs(folders: list[Path]) -> list[dict]:
    """[{name, objective, seed, rows, metrics}] of run folders. The name is the objective, with the knobs that
    differ from the first run of that objective. Raises InputError for an unfinished run, and for two runs of
    one name with the same seed."""
    runs, first, seen = [], {}, {}
    for folder in folders:
        config = read_json(folder / "config.json")
        rows, metrics = checkpoint.rows(folder / "eval.jsonl"), checkpoint.rows(folder / "metrics.jsonl")
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
        runs.append(dict(name=name, objective=objective, seed=seed, rows=rows, metrics=metrics))
    return runs


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


# ---- pictures --------------------------------------------------------------------------------------------

def draw_pictures(runs: list[dict], folder: Path) -> list[Path]:
    """Writes tradeoff.png and curves.png if matplotlib is installed, a point or a line for each seed.
    -> the files written."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        print("no pictures: matplotlib is not installed (pip install matplotlib)", file=sys.stderr)
        return []
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    plt.rcParams.update({"axes.grid": True, "grid.alpha": 0.3, "savefig.dpi": 110, "legend.frameon": False,
                         "legend.fontsize": 8})
    names = list(dict.fromkeys(run["name"] for run in runs))
    style = {name: dict(color=f"C{i % 10}", marker="osv^Dphx*+"[i % 10]) for i, name in enumerate(names)}
    keys = [plt.Line2D([], [], ls="", label=name, **style[name]) for name in names]
    hard = "ambiguous" if any(r["class"] == "ambiguous" for r in runs[0]["rows"]) else "harmless"

    def mean(run: dict, attack: str, classes: tuple, key: str) -> float | None:
        after = [r for r in run["rows"] if r["stage"] == "after"]
        found = [f[0] for f in (find(after, attack, name, key) for name in groups(after, classes)) if f]
        return sum(found) / len(found) if found else None
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.2), sharey=True)
    for axis, attack in zip(axes, ("none", "prefill", "hijack")):
        for run in runs:
            x, y = mean(run, "none", (hard,), "refusal"), mean(run, attack, HARMFUL, "unsafe")
            if x is not None and y is not None:  # prompts of one label only have no trade-off
                axis.plot(x, y, ls="", alpha=0.8, **style[run["name"]])
        axis.set(title=f"attack: {attack}", xlabel=f"refuses {hard} requests", xlim=(-0.03, 1.03),
                 ylim=(-0.03, 1.03))
    axes[0].set_ylabel("unsafe answers to harmful requests")
    axes[0].legend(handles=keys)
    files = [folder / "tradeoff.png", folder / "curves.png"]
    figure.tight_layout()
    figure.savefig(files[0])
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8))
    titles = {"answer_reward": "reward of the answer player", "potential": "potential of the thought",
              "over_refusal": "refuses harmless requests"}
    for axis, (key, title) in zip(axes, titles.items()):
        for run in runs:
            values = [m[key] for m in run["metrics"] if m[key] is not None]
            windows = [values[max(0, i - 9):i + 1] for i in range(len(values))]
            smooth = [sum(w) / len(w) for w in windows]
            axis.plot(smooth, color=style[run["name"]]["color"], alpha=0.8, lw=1.2)
        axis.set(title=title, xlabel="step (mean of ten)", ylim=(-0.03, 1.03))
    axes[0].legend(handles=keys)
    figure.tight_layout()
    figure.savefig(files[1])
    return files
