"""Pictures of finished runs, as tables.read_runs gives them. They can be read without colour."""
import sys
from pathlib import Path
from statistics import mean as average

from tables import EVERY, HARMFUL, Column, columns_of, mean_rate

STYLES = [("o", "-"), ("s", "--"), ("^", ":"), ("D", "-."), ("v", (0, (5, 1))), ("P", (0, (1, 1))),
          ("X", (0, (3, 1, 1, 1))), ("*", (0, (8, 2))), ("<", (0, (2, 2))), (">", (0, (6, 1, 1, 1)))]
ATTACKS = ("none", "prefill", "hijack", "hijack-short", "reset")


def pyplot():
    """matplotlib's pyplot, None with a sentence if it is not installed."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        print("no pictures: matplotlib is not installed (pip install matplotlib)", file=sys.stderr)
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    plt.rcParams.update({"axes.grid": True, "grid.alpha": 0.3, "savefig.dpi": 130, "legend.frameon": False,
                         "font.size": 11, "axes.titlesize": 11, "legend.fontsize": 10, "lines.markersize": 6})
    return plt


def styles(names: list[str]) -> dict[str, dict]:
    """Colour, marker and dash of each name."""
    return {name: dict(color=f"C{i % 10}", marker=marker, ls=dash)
            for i, (name, (marker, dash)) in enumerate(zip(names, STYLES * len(names)))}


def mean(*what) -> float | None:
    """tables.mean_rate without its n."""
    found = mean_rate(*what)
    return found and found[0]


def finish(plt, figure, file: Path, title: str, bottom: float, **legend) -> None:
    """Writes the picture, its title above and its legend in the lowest part, up to `bottom` in [0, 1]."""
    figure.suptitle(title, fontsize=12)
    figure.legend(loc="lower center", **legend)
    figure.tight_layout(rect=(0, bottom, 1, 1))
    figure.savefig(file)
    plt.close(figure)


def tradeoff(plt, columns: dict[str, Column], file: Path, title: str, swept: dict[str, list[Column]]) -> None:
    """Unsafe answers against over-refusal, without an attack and under hijack, a point for each seed. swept:
    for a name, columns along a line, without an attack; its points are means over seeds."""
    rows = [row for column in columns.values() for rows in column.values() for row in rows]
    hard = "ambiguous" if any(row["class"] == "ambiguous" for row in rows) else "harmless"
    look = styles([*dict.fromkeys([*columns, *swept])])

    def place(rows: list[dict], attack: str) -> tuple:
        return mean(rows, "none", (hard,), "refusal"), mean(rows, attack, HARMFUL, "unsafe")
    figure, axes = plt.subplots(1, 2, figsize=(8.4, 4.4), sharey=True)
    for axis, attack in zip(axes, ("none", "hijack")):
        for name, column in columns.items():
            points = [place(rows, attack) for rows in column.values()]
            points = [p for p in points if None not in p]  # prompts of one label only have no trade-off
            axis.plot(*zip(*points or [((), ())]), **look[name] | dict(ls=""), alpha=0.8, fillstyle="none")
        for name, along in swept.items() if attack == "none" else ():
            means = [[sum(v) / len(v) for v in zip(*(place(rows, attack) for rows in column.values()))]
                     for column in along if column]
            axis.plot(*zip(*means), **look[name] | dict(marker="."), lw=1.2)
        lines = " (lines: share of harmful prompts)" * bool(swept and attack == "none")
        axis.set(title=f"attack: {attack}{lines}", xlabel=f"refuses {hard} requests", xlim=(-0.03, 1.03),
                 ylim=(-0.03, 1.03))
    axes[0].set_ylabel("unsafe answers to harmful requests")
    keys = [plt.Line2D([], [], label=name, **style, fillstyle="none") for name, style in look.items()]
    finish(plt, figure, file, title, 0.04 + 0.05 * -(-len(keys) // 4), handles=keys, ncols=4)


def curves(plt, runs: list[dict], file: Path, title: str) -> None:
    """The answer player's reward over steps: the mean over seeds, and a band from the worst to the best."""
    figure, axis = plt.subplots(figsize=(7.5, 5.4))
    look = styles([*dict.fromkeys(["start", *(run["name"] for run in runs)])])  # those of the other picture
    for name, style in list(look.items())[1:]:
        points = list(zip(*(run["curve"] for run in runs if run["name"] == name)))  # seeds of each window
        x = [EVERY * (i + 0.5) for i in range(len(points))]
        axis.plot(x, [sum(p) / len(p) for p in points], label=name, **style | dict(marker=""), lw=1.6)
        low, high = ([end(p) for p in points] for end in (min, max))
        axis.fill_between(x, low, high, color=style["color"], alpha=0.15, lw=0)
    axis.set(xlabel=f"step (means of {EVERY})", ylabel="reward of the answer player")
    finish(plt, figure, file, title, 0.02 + 0.045 * -(-len(look) // 3), ncols=3)


def attacks(plt, columns: dict[str, Column], file: Path, title: str) -> None:
    """Unsafe answers under each attack: the mean over seeds, and a line from the lowest to the highest."""
    figure, axis = plt.subplots(figsize=(7.5, 2 + 0.55 * len(columns)))
    for i, (attack, style) in enumerate(styles([*ATTACKS]).items()):
        for y, column in enumerate(columns.values()):
            rates = [mean(rows, attack, HARMFUL, "unsafe") for rows in column.values()]
            if rates := [rate for rate in rates if rate is not None]:
                x, height = sum(rates) / len(rates), y + 0.15 * (i - 2)
                axis.plot((min(rates), max(rates)), (height, height), color=style["color"], lw=1.2)
                named = attack in axis.get_legend_handles_labels()[1]
                axis.plot(x, height, **style | dict(ls=""), label=None if named else attack)
    axis.set(xlabel="unsafe answers to harmful requests", xlim=(-0.02, 1.02), yticks=range(len(columns)),
             yticklabels=[*columns])
    axis.invert_yaxis()
    finish(plt, figure, file, title, 0.5 / (2 + 0.55 * len(columns)), ncols=5, columnspacing=1)


def credit(plt, rows: list[dict], file: Path, title: str) -> None:
    """Advantages of the segments of one rollout under each credit; rows of results/credit.jsonl."""
    figure, axis = plt.subplots(figsize=(7.5, 1.2 + 0.62 * len(rows)))
    for i, (name, hatch) in enumerate((("dense", ""), ("once", "///"), ("shared", "..."))):
        axis.barh([y + 0.27 * (i - 1) for y in range(len(rows))], [row[name] for row in rows], height=0.25,
                  label=name, color=f"C{i}", hatch=hatch, edgecolor="black", lw=0.5)
    texts = [f"{row['text']}  Φ {row['potential']:.2f}" for row in rows]
    axis.set(xlabel="advantage", yticks=range(len(rows)), yticklabels=texts)
    axis.invert_yaxis()
    finish(plt, figure, file, title, 0.06, ncols=3)


def budget(plt, rows: list[dict], file: Path, title: str) -> None:
    """Unsafe answers against the budget of each search: the mean over seeds, and a band from the lowest to
    the highest; rows of results/attacks.jsonl."""
    searches, look = ([*dict.fromkeys(row[key] for row in rows)] for key in ("attack", "name"))
    figure, axes = plt.subplots(1, len(searches), figsize=(8.4, 4.4), sharey=True, squeeze=False)
    for axis, search in zip(axes[0], searches):
        for name, style in styles(look).items():
            steps: dict[int, list[dict]] = {}
            for row in rows:
                if (row["attack"], row["name"]) == (search, name) and row["n"]:
                    steps.setdefault(row["step"], []).append(row)
            x, *y = ([f([row[key] for row in group]) for group in steps.values()] for key, f in (
                ("budget", average), ("unsafe", average), ("unsafe", min), ("unsafe", max)))
            axis.plot(x, y[0], label=name if search == searches[0] else None, **style, lw=1.4)
            axis.fill_between(x, *y[1:], color=style["color"], alpha=0.12, lw=0)
        axis.set(title=search, xscale="log", xlabel="sequences evaluated for a request", ylim=(-0.03, 1.03))
    axes[0][0].set_ylabel("unsafe answers to harmful requests")
    finish(plt, figure, file, title, 0.04 + 0.05 * -(-len(look) // 4), ncols=4)


def draw(runs: list[dict], folder: Path, titles: dict[str, str] = {}, swept: dict = {}) -> list[Path]:
    """Writes tradeoff.png, curves.png and attacks.png, if matplotlib is installed. -> the files written."""
    plt, columns = pyplot(), columns_of(runs)
    if plt is None:
        return []
    titles = {"tradeoff": "unsafe answers against over-refusal", "curves": "learning curves",
              "attacks": "attacks on the thought"} | titles
    files = {name: folder / f"{name}.png" for name in ("tradeoff", "curves", "attacks")}
    tradeoff(plt, columns, files["tradeoff"], titles["tradeoff"], swept)
    curves(plt, runs, files["curves"], titles["curves"])
    attacks(plt, columns, files["attacks"], titles["attacks"])
    return [*files.values()]
