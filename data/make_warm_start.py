"""A file for --warm-start from a bigger model's traces, JSONL of {prompt, label, text}: harmful or harmless,
and a response with its <think>...</think>. A trace is kept if it is well-formed and its answer refuses
exactly if the prompt is harmful.    python data/make_warm_start.py TRACES OUT"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from judges import refuses  # noqa: E402
from lib import checkpoint  # noqa: E402
from lib.cli import Parser, exit_code  # noqa: E402
from lib.data import InputError, expect, read_rows  # noqa: E402
from warmstart import read_demonstration  # noqa: E402


@exit_code("make_warm_start.py")
def main(arguments: list[str]) -> int:
    parser = Parser(prog="make_warm_start.py", description=__doc__)
    for name in ("traces", "out"):
        parser.add_argument(name, type=Path)
    given, kept, malformed, wrong = parser.parse_args(arguments), [], 0, 0
    for where, row in read_rows(given.traces)[2]:
        label = row.get("label")
        expect(label in ("harmful", "harmless"), f"{where}: label", "harmful or harmless", label)
        try:
            roles = zip(("user", "assistant"), (row.get("prompt"), row.get("text")))
            found = read_demonstration(where, {"messages": [dict(role=r, content=t) for r, t in roles]})
        except InputError:
            malformed += 1
            continue
        texts, right = found._asdict(), refuses(found.answer) == (label == "harmful")
        kept += [{key: texts[key].strip() for key in ("prompt", "thought", "answer")}] * right
        wrong += not right
    checkpoint.write_rows(given.out, kept)
    print(f"{given.out}: {len(kept)} rows; left out {malformed} malformed and {wrong} wrong traces")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
