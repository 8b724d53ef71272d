"""A file for --warm-start from a bigger model's traces:    python data/make_warm_start.py TRACES OUT

TRACES is JSONL of {prompt, label, text}: harmful or harmless, and a response with its <think>...</think>. A
trace is kept if it is well-formed and its answer refuses exactly if the prompt is harmful.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from judges import refuses  # noqa: E402
from lib import checkpoint  # noqa: E402
from lib.cli import Parser, exit_code  # noqa: E402
from lib.data import InputError, expect, read_rows  # noqa: E402
from warmstart import read_demonstration  # noqa: E402


def main(arguments: list[str]) -> int:
    parser = Parser(prog="make_warm_start.py", description=__doc__.split("\n")[0])
    parser.add_argument("traces", type=Path)
    parser.add_argument("out", type=Path)
    given, kept, malformed, wrong = parser.parse_args(arguments), [], 0, 0
    for where, row in read_rows(given.traces)[2]:
        label = row.get("label")
        expect(label in ("harmful", "harmless"), f"{where}: label", "harmful or harmless", label)
        turns = [{"role": "user", "content": row.get("prompt")},
                 {"role": "assistant", "content": row.get("text")}]
        try:
            found = read_demonstration(where, {"messages": turns})
        except InputError:
            malformed += 1
            continue
        right = refuses(found.answer) == (label == "harmful")
        wrong += not right
        kept += [dict(prompt=found.prompt, thought=found.thought.strip(), answer=found.answer.strip())] * right
    checkpoint.write_rows(given.out, kept)
    print(f"{given.out}: {len(kept)} rows; left out {malformed} malformed and {wrong} wrong traces")
    return 0


if __name__ == "__main__":
    sys.exit(exit_code("make_warm_start.py", lambda: main(sys.argv[1:])))
