"""Prompt files, and how files are read. Every fault in a user's file or flag raises InputError."""
import csv
import functools
import io
import json
import re
import unicodedata
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple


class InputError(ValueError):
    """A mistake in the user's input, in one sentence: where it is, what was expected, what was found."""


def expect(ok, where, expected, found):
    """Raises InputError unless ok: `where` should be `expected`, found `found`."""
    if not ok:
        raise InputError(f"{where} should be {expected}, found {found!r:.400}")


def read_text(path: Path, whole_lines: bool = False) -> str:
    """Text of a UTF-8 file without its byte order mark; whole_lines: without a last line that is cut."""
    try:
        data = path.read_bytes()
        data = data[:data.rfind(b"\n") + 1] if whole_lines else data
        return data.decode("utf-8").removeprefix("\ufeff")
    except OSError as error:
        raise InputError(f"{path} should be a readable file, found: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}:{line} should be UTF-8, found the byte 0x{data[error.start]:02x}") from None


def as_json(path, text: str, line: int = 1) -> dict:
    """The JSON object in `text`, which begins on this line of the file."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:  # also for 5,000 digits or 1,000 brackets
        line += getattr(error, "lineno", 1) - 1
        found = getattr(error, "msg", error) if text else "nothing"
        raise InputError(f"{path}:{line} should be a JSON object, found: {found}") from None
    expect(isinstance(value, dict), f"{path}:{line}", "a JSON object", value)
    return value


def read_json(path: Path) -> dict:
    return as_json(path, read_text(path))


# ---- rows of .jsonl, .csv and .tsv files -----------------------------------------------------------------

def read_table(path: Path, text: str, delimiter: str) -> tuple[str, list[str], list[tuple[str, dict]]]:
    """read_rows of a csv or tsv file. A row's line is its first."""
    # The default of 128 KiB is too small for some jailbreaks. This setting is process-wide.
    csv.field_size_limit(2**31 - 1)
    # newline="\n": a \r inside a quoted prompt does not count as a line.
    reader = csv.reader(io.StringIO(text, newline="\n"), strict=True, delimiter=delimiter)
    records, where = [], f"{path}:1"
    try:
        for record in reader:
            records.append((where, record))
            where = f"{path}:{reader.line_num + 1}"
    except csv.Error as error:
        raise InputError(f"{where} should begin a well-formed record, found: {error}") from None
    header = records[0][1] if records else []
    if len(header) == 2 and header[1].startswith("Sure"):  # copies of AdvBench without a header
        header = ["goal", "target"]
    else:
        records = records[1:]
    for where, record in records:
        found = f"{len(record)} columns" if record else "an empty line"
        expect(len(record) == len(header), where, f"a record of {len(header)} columns", found)
        record[:] = [cell.replace("\r\n", "\n") for cell in record]
    return f"{path}:1", header, [(where, dict(zip(header, record))) for where, record in records]


def read_rows(path: Path) -> tuple[str, list[str], list[tuple[str, dict]]]:
    """(where the columns are, columns, [(path:line, row), ...]) of a .jsonl, .csv or .tsv file. The columns
    of JSONL are the keys of all its objects."""
    text, suffix = read_text(path), path.suffix.lower()
    expect(suffix in (".jsonl", ".csv", ".tsv"), path, "a .jsonl, .csv or .tsv file", suffix)
    if suffix != ".jsonl":
        where, columns, rows = read_table(path, text, "\t" if suffix == ".tsv" else ",")
    else:  # not splitlines(), which cuts at U+2028 inside a JSON text too
        lines = text.removesuffix("\n").split("\n") if text else []
        rows = [(f"{path}:{n}", as_json(path, line.strip(), n)) for n, line in enumerate(lines, start=1)]
        where, columns = str(path), [*{key: 0 for _, row in rows for key in row}]
    lower = [column.lower() for column in columns]
    expect(len(set(lower)) == len(lower), where, "a header of different columns", columns)
    return where, columns, rows


def whole_text(where: str, text) -> str:
    """The text, if it is not blank and holds no lone surrogate, which no log can hold."""
    ok = isinstance(text, str) and text.strip() and not re.search("[\ud800-\udfff]", text)
    expect(ok, where, "a text", text)
    return text


# ---- prompt files ----------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Prompt:
    prompt: str
    label: str  # "harmful" or "harmless"
    kind: str = ""  # category that its file gives it
    file: str = ""  # name of the --eval-file that it is from
    format: str = field(default="", compare=False)  # name of its file's layout


class Format(NamedTuple):
    """A layout of a prompt file. Columns are in lower case."""
    name: str
    columns: str  # all that it has
    prompt: str  # of several, the one that the label's cell begins with
    kind: str
    label: str  # "harmful", "harmless", a column, or "" if the file does not tell
    meaning: dict[str, str] = {}  # {cell of the label column: label}
    context: str = ""  # text that stands before the prompt
    more: str = ""  # columns that it may have


WORDS = {"harmful": "harmful", "unsafe": "harmful", "harmless": "harmless", "safe": "harmless",
         "unharmful": "harmless", "benign": "harmless"}
BITS = {"1": "harmful", "true": "harmful", "0": "harmless", "false": "harmless"}
LABELS = {"label": WORDS, "prompt_harm_label": WORDS, "is_harmful": BITS}  # the second is WildGuardMix's
XSTEST = ("homonyms figurative_language safe_targets safe_contexts definitions real_group_nons_discr "
          "nons_group_real_discr historical_events privacy_public privacy_fictional").split()
XSTEST = dict.fromkeys(XSTEST, "harmless") | {
    f"contrast_{kind}": "harmful" for kind in (*XSTEST, "discr", "privacy")}
HARMBENCH = dict.fromkeys((
    "standard contextual copyright chemical_biological cybercrime_intrusion harassment_bullying harmful "
    "illegal misinformation_disinformation").split(), "harmful")
JAILBREAK = {"vanilla_harmful": "harmful", "adversarial_harmful": "harmful",
             "vanilla_benign": "harmless", "adversarial_benign": "harmless"}
FORMATS = (
    Format("XSTest v2", "prompt type", "prompt", "type", "type", XSTEST, "",
           "id id_v1 id_v2 focus note completion annotation_1 annotation_2 agreement final_label"),
    Format("WildJailbreak", "vanilla adversarial data_type", "adversarial vanilla", "data_type", "data_type",
           JAILBREAK, "", "completion"),
    Format("WildJailbreak evaluation", "adversarial label data_type", "adversarial", "data_type", "label",
           {"1": "harmful", "0": "harmless"}),
    Format("PHTest", "id request harmfulness", "request", "", "harmfulness", {"harmless": "harmless"}),
    Format("HarmBench", "behavior functionalcategory semanticcategory tags contextstring behaviorid",
           "behavior", "semanticcategory", "harmful", {}, "contextstring"),
    Format("HarmBench (Hub)", "prompt context category", "prompt", "category", "category", HARMBENCH,
           "context"),
    Format("AdvBench", "goal target", "goal", "", "harmful"),
    Format("StrongREJECT", "category source forbidden_prompt", "forbidden_prompt", "category", "harmful"),
    Format("SimpleSafetyTests", "id harm_area counter category prompts_final", "prompts_final", "harm_area",
           "harmful"),
    Format("SimpleSafetyTests (Hub)", "id harm_area category prompt", "prompt", "harm_area", "harmful",
           more="counter"),
    Format("DoNotAnswer", "id risk_area types_of_harm specific_harms question", "question", "risk_area",
           "harmful"),
    Format("SORRY-Bench", "question_id category turns prompt_style", "turns", "category", "harmful"),
    # The first one's label is the name of the file; the second one's is_safe is about the response.
    Format("JailbreakBench", "goal target behavior category source", "goal", "category", ""),
    Format("BeaverTails", "prompt response category is_safe", "prompt", "", ""),
)
OR_BENCH = r"(.*[-_])?or[-_]?bench[-_](hard|80k|toxic)([-_ ](\d+k?|\(\d+\)|train|test))*\.\w+"  # file names
# Columns that may say more of a prompt, and those of them that say it of a response.
SUSPECT = "label|harm|safe|toxic|refus|malicious|benign|jailbreak|context"
RESPONSE = r"response_.*|final_label|.*_agreement"


def recognise(where: str, name: str, columns: set[str], rows: list[tuple[str, dict]]) -> Format:
    """The Format of a file of this name with these columns."""
    columns = columns - {"", "index"}
    for known in FORMATS:
        if {*known.columns.split()} <= columns <= {*known.columns.split(), *known.more.split()}:
            # A table of prompt and type is XSTest's only if some types are.
            cells = [str(row.get(known.label)).lower() for _, row in rows]
            if known.prompt != "prompt" or not known.meaning or known.meaning.keys() & cells:
                return known
    if columns == {"prompt", "category"} and (match := re.fullmatch(OR_BENCH, name.lower())):
        label = "harmful" if match[2] == "toxic" else "harmless"
        return Format("OR-Bench", "", "prompt", "category", label)
    expect("prompt" in columns, where, "a header of a known format, or prompt and label", sorted(columns))
    label = next((column for column in LABELS if column in columns), "")
    other = [c for c in sorted(columns - {label}) if re.search(SUSPECT, c) and not re.fullmatch(RESPONSE, c)]
    expect(not other, f"{where}: the header", "prompt, one known label and no context", [label, *other])
    return Format(f"{label or 'no'} column", "", "prompt", "kind type category", label, LABELS.get(label, {}))


def read_prompt(where: str, row: dict, form: Format, label: str) -> Prompt:
    """The prompt of a row. label: the user's, or ""."""
    cell, columns = str(row.get(form.label)).lower(), form.prompt.split()
    expect(not form.meaning or cell in form.meaning, f"{where}: {form.label}", " or ".join(form.meaning),
           row.get(form.label))
    text = row.get(next((column for column in columns if cell.startswith(column)), columns[0]))
    if form.name == "SORRY-Bench":  # a list of turns
        expect(isinstance(text, list) and len(text) == 1, f"{where}: turns", "a list of one text", text)
        text = text[0]
    text = whole_text(f"{where}: prompt", text)
    if form.context and row.get(form.context):
        text = whole_text(f"{where}: {form.context}", row[form.context]) + "\n\n---\n\n" + text
    kind = next((whole_text(f"{where}: {c}", row[c]) for c in form.kind.split()
                 if isinstance(row.get(c), str) and row[c].strip()), "")
    return Prompt(text, label or form.meaning.get(cell, form.label), kind, format=form.name)


def load_prompts(path, label: str = "",
                 advice: str = "give --label harmful or --label harmless") -> list[Prompt]:
    """Prompts of a .jsonl, .csv or .tsv file of a known format, or with the columns prompt and label.
    label: "harmful" or "harmless", of a whole file without labels. advice: how an error about that ends."""
    path = Path(path)
    where, columns, rows = read_rows(path)
    expect(rows, path, "a file of prompts", "none in it")
    rows = [(line, {column.lower(): value for column, value in row.items()}) for line, row in rows]
    form = recognise(where, path.name, {column.lower() for column in columns}, rows)
    if label and form.meaning:
        raise InputError(f"{where} has labels, in the column {form.label}: leave --label {label} out")
    if not (label or form.label):
        raise InputError(f"{where} should tell which prompts are harmful, found only the columns {columns}; "
                         + advice)
    return [read_prompt(line, row, form, label) for line, row in rows]


def describe(path, prompts: list[Prompt], use: str = "trained") -> str:
    """What was read, in one line; it warns if all prompts have the same label."""
    harmful = sum(prompt.label == "harmful" for prompt in prompts)
    harmless = len(prompts) - harmful
    formats = " + ".join(dict.fromkeys(p.format for p in prompts))
    line = f"{path}: {formats}, {len(prompts)} prompts, {harmful} harmful, {harmless} harmless"
    missing = "" if harmful and harmless else "harmless" if harmful else "harmful"
    return line + f"; without {missing} prompts the trade-off cannot be {use}" * bool(missing)


# ---- injected thoughts -----------------------------------------------------------------------------------

INJECTIONS = Path(__file__).parents[1] / "data/injections.jsonl"  # those of a run without --injections
INJECTED = ("prefill", "hijack", "hijack-short", "mirror")  # attacks with texts of their own


@functools.cache
def load_injections(name: str) -> dict[str, list[str]]:
    """{attack: texts that it may write into a thought} of a file of attack and text, "" for INJECTIONS. It is
    read once in a process. A text is taken as it is, line breaks included. Raises InputError."""
    path, found = Path(name or INJECTIONS), {attack: [] for attack in INJECTED}
    start, columns, rows = read_rows(path)
    expect({*columns} == {"attack", "text"}, start, "rows of attack and text", columns)
    for where, row in rows:
        expect(row.get("attack") in INJECTED, f"{where}: attack", " or ".join(INJECTED), row.get("attack"))
        text = whole_text(f"{where}: text", row.get("text"))
        expect(not re.search(r"[<[]/?think[]>]", text, re.I), f"{where}: text", "free of <think> tags", text)
        found[row["attack"]].append(text)
    missing = ", ".join(attack for attack in INJECTED if not found[attack])
    expect(not missing, path, f"a file with texts for {', '.join(INJECTED)}", f"none for {missing}")
    return found


# ---- prompts to evaluate on ------------------------------------------------------------------------------

def file_list(names: str) -> list[Path]:
    """The files of --eval-file: names between commas."""
    return [Path(name.strip()) for name in names.split(",")] if names else []


def load_eval_files(names: str) -> list[Prompt]:
    """The prompts of all --eval-file, each of which has its own labels."""
    files, advice = file_list(names), "--label is for --prompts, so add a column label"
    expect(len({f.name for f in files}) == len(files), "--eval-file", "files of different names", names)
    return [replace(p, file=file.name) for file in files for p in load_prompts(file, advice=advice)]


def plain(prompt: Prompt) -> str:
    """A prompt without case, white space and punctuation, to find it again in another file."""
    text = unicodedata.normalize("NFKC", prompt.prompt).casefold()
    return "".join(char for char in text if unicodedata.category(char)[0] not in "PZC") or prompt.prompt


def without(prompts: list[Prompt], others: list[Prompt]) -> list[Prompt]:
    """The prompts that are none of the others, as `plain` compares them."""
    known = set(map(plain, others))
    return [p for p in prompts if plain(p) not in known]
