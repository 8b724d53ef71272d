"""A judge in Python: functions of a user's file (docs/judges.md), whose every number is checked."""
import sys
import traceback
from numbers import Real
from pathlib import Path
from types import ModuleType
from typing import Callable

from judges.guards import READS
from lib.data import InputError, expect, read_text


def is_function(name: str) -> bool:
    return name.endswith(".py") or ".py:" in name


def guarded(where: str, task: Callable, *arguments):
    """task(*arguments). Its errors become an InputError that names the line, since they end the run."""
    try:
        return task(*arguments)
    except Exception as error:
        at = error if isinstance(error, SyntaxError) else traceback.extract_tb(error.__traceback__)[-1]
        found = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise InputError(f"{where} should not fail, found {found} ({at.filename}:{at.lineno})") from error


def load_functions(name: str) -> tuple[Callable, Callable]:
    """name: path/file.py:function. -> (prompts, thoughts, answers) -> rows [unsafe, refusal, helpful], and
    (prompts, thoughts) -> potentials; lists of N texts in, of N rows out."""
    file, _, function = name.rpartition(":")
    expect(file.endswith(".py"), f"judge {name}", "a file and its function, such as words.py:judge", name)
    module = sys.modules[file] = ModuleType(file)  # the path is a name that no other module has
    module.__file__ = file
    code = guarded(file, compile, read_text(Path(file)), file, "exec", 0, True)
    guarded(file, exec, code, vars(module))
    found = {key: value for key, value in vars(module).items() if callable(value)}
    expect(function in found, name, f"a function of {file}", sorted(found))

    def verdicts(*texts: list[str]) -> list[list[float]]:
        rows = rows_of(found[function], name, texts)
        for i, row in enumerate(rows):
            expect(isinstance(row, dict) and row.keys() >= {*READS}, f"{name}: row {i}",
                   "a dict with the keys unsafe, refusal and helpful", row)
        return [[probability(f"{name}: row {i}: {read}", row[read]) for read in READS]
                for i, row in enumerate(rows)]

    def potentials(prompts: list[str], thoughts: list[str]) -> list[float]:
        if "potential" not in found:
            return [unsafe for unsafe, *_ in verdicts(prompts, [""] * len(prompts), thoughts)]
        rows = rows_of(found["potential"], f"{file}:potential", (prompts, thoughts))
        return [probability(f"{file}:potential: row {i}", row) for i, row in enumerate(rows)]
    return verdicts, potentials


def rows_of(function: Callable, name: str, texts: tuple[list[str], ...]) -> list:
    """What the function returns, one row for each text. It is not called without a text."""
    n = len(texts[0])
    rows = guarded(name, function, *map(list, texts)) if n else []
    expect(isinstance(rows, (list, tuple)), f"{name}: its result", f"a list of {n} rows", rows)
    expect(len(rows) == n, f"{name}: its result", f"a list of {n} rows", f"{len(rows)} rows")
    return rows


def probability(where: str, value) -> float:
    expect(isinstance(value, Real) and 0 <= value <= 1, where, "a number in [0, 1]", value)  # NaN fails too
    return float(value)
