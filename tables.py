"""Tables and pictures of finished runs, from the rows of eval.jsonl."""
import math
import sys
from pathlib import Path

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


def groups(column: Column, classes: tuple) -> list[str]:
    """Groups of these classes, in the order of the classes."""
    rows = [row for seed in column.values() for row in seed]
    return [*dict.fromkeys(group(row) for name in classes for row in rows if row["class"] == name)]


def find(rows: list[dict], attack: str, name: str, key: str) -> tuple[float, int] | None:
    """(rate, n) of one group under one attack, None without a rate. n: the rollouts that the rate is over."""
    row = next((r for r in rows if r["attack"] == attack and group(r) == name), None)
    if row is None or row[key] is None:
        return None
    share = {"answered": 1.0, "explored": 1.0, "flip": (row["explored"] or 0.0) * row["answered"]}
    return row[key], max(1, round(row["n"] * share.get(key, row["answered"])))


def spread(values: list[float], form: str = ".3f") -> str:
    """Mean [min, max] over seeds."""
    return f"{sum(values) / len(values):{form}} [{min(values):{form}}, {max(values):{form}}]"


def table(columns: dict[str, Column]) -> str:
    """Markdown table. Seeds are the unit: mean [min, max] over seeds; of a single seed the rate and the ends
    of its 95 % interval over requests."""
    lines = ["| | class | " + " | ".join(columns) + " |", "|---|---|" + "---|" * len(columns)]
    everything = dict(enumerate(rows for column in columns.values() for rows in column.values()))
    for title, attack, key, classes in LINES:
        for name in groups(everything, classes):
            cells = []
            for column in columns.values():
                found = [f for f in (find(rows, attack, name, key) for rows in column.values()) if f]
                if len(found) == 1:
                    cells.append("{:.3f} [{:.3f}, {:.3f}]".format(found[0][0], *interval(*found[0])))
                else:
                    cells.append(spread([rate for rate, _ in found]) if found else "–")
            if set(cells) != {"–"}:
                lines.append(f"| {title} | {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + footnote(columns)


def footnote(columns: dict[str, Column]) -> str:
    """Names the columns whose judge both paid and measured. The embedded world's verifier is exact."""
    paid = {name: row["judge"] for name, column in columns.items() if name != "start"
            for rows in column.values() for row in rows if row.get("pays") and row["judge"] != "alchemy"}
    return paid and ("\n\nThe judge that paid also measured, so these columns may flatter: "
                     + ", ".join(f"{name} ({judge})" for name, judge in paid.items())) or ""


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
    lines = [f"| less {base} | class | " + " | ".join(others) + " |", "|---|---|" + "---|" * len(others)]
    everything = dict(enumerate(rows for column in columns.values() for rows in column.values()))
    for title, attack, key, classes in LINES:
        for name in groups(everything, classes):
            cells = []
            for other in others:
                pairs = [[find(columns[c][seed], attack, name, key) for c in (other, base)]
                         for seed in columns[other].keys() & columns[base].keys()]
                values = [a[0] - b[0] for a, b in pairs if a and b]
                cells.append(spread(values, "+.3f") if values else "–")
            if set(cells) != {"–"}:
                lines.append(f"| {title} | {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def read_runs(folders: list[Path]) -> list[dict]:
    """[{name, objective, seed, config, rows, metrics}] of run folders. Raises InputError for an unfinished
    run, and for two runs of one experiment with the same seed."""
    runs = []
    for folder in folders:
        config = read_json(folder / "config.json")
        rows, metrics = checkpoint.rows(folder / "eval.jsonl"), checkpoint.rows(folder / "metrics.jsonl")
        if not any(row["stage"] == "after" for row in rows):
            raise InputError(f"{folder} was run with --eval-prompts 0, so there is nothing to compare"
                             if config.get("eval_prompts") == 0 and (folder / "model").exists() else
                             f"{folder}/eval.jsonl holds no row of stage 'after': the run is not finished")
        runs.append(dict(folder=folder, objective=config["objective"], seed=config["seed"], rows=rows,
                         metrics=metrics, config=experiment(folder, config)))
    name_experiments(runs)
    seen = {}
    for run in runs:
        other = seen.setdefault((run["name"], run["seed"]), run)
        if other is not run:
            raise InputError(f"{other['folder']} and {run['folder']} are one experiment with the same seed")
    return runs


def experiment(folder: Path, config: dict) -> dict:
    """What two runs must share to be seeds of one experiment: all knobs but SAME, and the start model's
    folder unless the embedded world's warm start made it, which depends on the seed."""
    file = folder / "start/config.json"
    embedded = read_json(file).get("embedded_world") if file.exists() else None
    model = "" if embedded else config.get("model", "")
    return {k: v for k, v in config.items() if k not in SAME} | {"model": model}


def name_experiments(runs: list[dict]) -> None:
    """Sets run["name"]: the objective, with the knobs that differ from the first run of that objective."""
    first = {}
    for run in runs:
        base = first.setdefault(run["objective"], run["config"])
        differing = [f"{k}={v}" for k, v in run["config"].items() if base.get(k) != v]
        run["name"] = " ".join([run["objective"], *differing])


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
    names = list(dict.fromkeys(run["name"] for run in runs))
    style = {name: dict(color=f"C{i % 10}", marker="osv^Dphx*+"[i % 10]) for i, name in enumerate(names)}
    keys = [plt.Line2D([], [], ls="", label=name, **style[name]) for name in names]
    hard = "ambiguous" if any(r["class"] == "ambiguous" for r in runs[0]["rows"]) else "harmless"

    def mean(run: dict, attack: str, classes: tuple, key: str) -> float | None:
        after = [r for r in run["rows"] if r["stage"] == "after"]
        found = [f[0] for f in (find(after, attack, name, key) for name in groups({0: after}, classes)) if f]
        return sum(found) / len(found) if found else None
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.2), sharey=True)
    for axis, attack in zip(axes, ("none", "prefill", "hijack")):
        for run in runs:
            x, y = mean(run, "none", (hard,), "refusal"), mean(run, attack, HARMFUL, "unsafe")
            if x is not None and y is not None:  # prompts of one label only have no trade-off
                axis.plot(x, y, ls="", alpha=0.8, **style[run["name"]])
        axis.set(title=f"attack: {attack}", xlabel=f"refuses {hard} requests", xlim=(-0.03, 1.03),
                 ylim=(-0.03, 1.03))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("unsafe answers to harmful requests")
    axes[0].legend(handles=keys, frameon=False, fontsize=8)
    files = [folder / "tradeoff.png", folder / "curves.png"]
    figure.tight_layout()
    figure.savefig(files[0], dpi=110)
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
        axis.grid(alpha=0.3)
    axes[0].legend(handles=keys, frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(files[1], dpi=110)
    return files
