"""Metrics for a watcher: --log tensorboard, trackio or wandb. None is imported unless asked for."""
import importlib
from pathlib import Path
from typing import Callable

from lib.checkpoint import read_environment

WATCHERS = ("tensorboard", "trackio", "wandb")


def flat(row: dict, prefix: str = "") -> dict[str, float]:
    """The numbers of a row of metrics.jsonl without its step; of an inner object as outer/inner."""
    found = {}
    for key, value in row.items():
        if isinstance(value, dict):
            found |= flat(value, f"{key}/")
        elif value is not None and key != "step":
            found[prefix + key] = float(value)
    return found


def watcher(name: str, run: Path, config: dict, first: int) -> Callable[[dict], None]:
    """A function that sends a row of metrics.jsonl on. A resumed run takes the steps from `first` on again;
    tensorboard drops the old ones. Only rank 0 calls."""
    if not name:
        return lambda row: None
    if name == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter
        writer = SummaryWriter(run / "tensorboard", purge_step=first)

        def send(row: dict) -> None:
            for key, value in flat(row).items():
                writer.add_scalar(key, value, row["step"])
            writer.flush()
        return send
    library = importlib.import_module(name)  # trackio has wandb's calls
    unique = f"{run.resolve().name}-{int(read_environment(run)['time'])}"  # the same when the run is resumed
    more = {"id": unique, "dir": str(run)} if name == "wandb" else {}
    library.init(project="sear", name=unique, config=config, resume="allow", **more)
    return lambda row: library.log(flat(row), step=row["step"])
