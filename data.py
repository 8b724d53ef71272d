"""What comes in from outside: tokenizer folders and prompt files. What is wrong with them is an InputError.

The tokenizer is tiktoken, filled from a tokenizer.json, or for the SentencePiece kind a few lines here; chat
templates are rendered by jinja2. All agree with transformers to the letter or refuse the folder: almost right
trains on text that nobody will ever send.
"""
import csv
import heapq
import io
import json
import re
import time
import unicodedata
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Callable

import tiktoken
from jinja2 import Template, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment as Sandbox


class InputError(ValueError):
    """A user's mistake, in one sentence: which file, line or key, what was expected and what was found."""


def expect(ok, where, expected, found):
    """Unless ok, raises InputError: `where` should be `expected`, found `found`."""
    if not ok:
        raise InputError(f"{where} should be {expected}, found {found!r:.400}")


def read_text(path: Path) -> str:
    """A UTF-8 file without its byte order mark; InputError names the line of the first byte that is wrong."""
    try:
        data = path.read_bytes()
        return data.decode("utf-8").removeprefix("\ufeff")
    except OSError as error:
        raise InputError(f"{path} should be a readable file, found: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}:{line} should be UTF-8, found the byte 0x{data[error.start]:02x}") from None


def as_json(path, text: str, line: int = 1) -> dict:
    """The JSON object that begins on this line of the file."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:  # not only syntax: 5,000 digits, a thousand brackets
        line, found = line + getattr(error, "lineno", 1) - 1, getattr(error, "msg", error)
        raise InputError(f"{path}:{line} should be a JSON object, found: {found}") from None
    expect(isinstance(value, dict), f"{path}:{line}", "a JSON object", value)
    return value


# ---------------------------------------------------------------------------------------------- tokenizer
# tokenizer.json writes a byte as one printable character: itself where it prints, else one from U+0100 on.
PRINTS = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
OTHERS = sorted({*range(0x100)} - {*PRINTS})
BYTE_OF = {chr(b): b for b in PRINTS} | {chr(0x100 + n): b for n, b in enumerate(OTHERS)}
# The tokenizer's part of a model folder; weights and config.json belong to model.py.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
                   "chat_template.jinja", "vocab.json", "merges.txt")


def split_pattern(file: str, spec: dict) -> str:
    """The regex that cuts text into pieces; InputError if the pre-tokenizer does anything beyond that."""
    match spec.get("pre_tokenizer"):
        case {"type": "Sequence", "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": str(regex)}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}]}:
            # A superscript 2 is a word character to HF's regex engine and none to tiktoken's.
            expect(not re.search(r"\\[wWbB]", regex), f"{file}: pre_tokenizer", r"free of \w and \b", regex)
            # Text between matches is a piece too (Isolated), and tiktoken would drop it without a word.
            return rf"(?:{regex})|(?:(?!{regex})[\s\S])+"
        case found:
            expect(False, f"{file}: pre_tokenizer", "Split (by Regex, Isolated) and a bare ByteLevel", found)


def vocabulary(file: str, model: dict, added: dict) -> dict[bytes, int]:
    """Bytes -> id of every ordinary token."""
    ids = {}
    for token, index in model["vocab"].items():
        if token in added:  # some files list these here too, but plain text must not reach them
            expect(added[token]["id"] == index, f"{file}: the id of {token!r}", index, added[token]["id"])
            continue
        expect(token and BYTE_OF.keys() >= set(token), f"{file}: model.vocab", "byte-level", token)
        ids[bytes([BYTE_OF[char] for char in token])] = index
    missing = [byte for byte in range(256) if bytes([byte]) not in ids]
    expect(not missing, f"{file}: model.vocab", "holding all 256 bytes", f"none for {missing[:9]}")
    return ids


def last_split(token: bytes, rank: dict) -> tuple[bytes, ...]:
    """The two halves from which merging makes this token in the end; more than two where it gets stuck."""
    parts, none = [token[i:i + 1] for i in range(len(token))], len(rank)
    ranks = [rank.get(left + right, none) for left, right in zip(parts, parts[1:])]
    while len(parts) > 2 and (best := min(ranks)) < none:
        at = ranks.index(best)
        parts[at:at + 2] = [parts[at] + parts[at + 1]]
        del ranks[at]
        for i in range(max(at - 1, 0), min(at + 1, len(ranks))):  # the new part has new neighbours
            ranks[i] = rank.get(parts[i] + parts[i + 1], none)
    return tuple(parts)


def merge_ranks(file: str, model: dict, ids: dict) -> dict[bytes, int]:
    """Bytes -> tiktoken rank: the bytes first, then tokens by their first merge, then tokens without any.

    HF merges pairs that are listed, tiktoken any two neighbours whose union has a rank; both take the lowest
    and leftmost first. Inside the span of a token both therefore do what they do to that token alone, so only
    its last split can ever stand there as two parts. They agree on every text if each token's last split is
    listed and ranks follow the places of those splits. All are checked: three seconds for 150,000."""
    places, first, before = {}, {}, -1
    for place, merge in enumerate(model["merges"]):
        halves = merge.split(" ") if isinstance(merge, str) else merge
        pair = tuple(bytes([BYTE_OF.get(char, 0) for char in half]) for half in halves)
        expect(len(pair) == 2 and all(token in ids for token in (*pair, b"".join(pair))),
               f"{file}: model.merges[{place}]", "two ordinary tokens that make a third", merge)
        places[pair] = place  # of a pair listed twice the later place counts, as in HF
        first.setdefault(b"".join(pair), place)
    order = sorted(ids, key=lambda token: (len(token) > 1, first.get(token, len(places)), token))
    rank = {token: n for n, token in enumerate(order)}
    for token in order[256:]:
        split = last_split(token, rank)
        if len(split) > 2:  # no merging makes it: it is only found where a whole piece is looked up first
            expect(model.get("ignore_merges"), f"{file}: model.merges", f"a way to make {token}", split)
            continue
        expect(places.get(split, -1) > before, f"{file}: model.merges",
               f"in the order of the tokens they make, {split} after {before}", places.get(split, "none"))
        before = places[split]
    return rank


def sentencepiece(file: str, spec: dict) -> Callable[[str, bool, bool], list[int]]:
    """Encoder of a BPE over characters, with byte tokens for those that the vocabulary lacks (Llama 2, and
    Mistral before Tekken). It takes a text, whether that begins a run of text and whether it begins the
    whole: there the first word gets its space."""
    vocab, bytes_of = spec["model"]["vocab"], [f"<0x{byte:02X}>" for byte in range(256)]
    mark = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    match spec.get("normalizer"), spec.get("pre_tokenizer"):
        case {"type": "Sequence", "normalizers": [{"prepend": "▁"}, replace]}, None if replace == mark:
            scheme = "each"  # before each run of text, even if that begins with a space
        case None, {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}:
            expect(scheme in ("first", "always"), f"{file}: prepend_scheme", "first or always", scheme)
        case found:
            expect(False, f"{file}: with model.byte_fallback True, normalizer and pre_tokenizer",
                   "Prepend and Replace and nothing, or nothing and Metaspace", found)
    expect(vocab.keys() >= {*bytes_of}, f"{file}: model.vocab", "holding <0x00> to <0xFF>", "less")
    expect(not spec["model"].get("ignore_merges"), f"{file}: model.ignore_merges", "false", True)
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in spec["model"]["merges"])
    rank = {tuple(pair): place for place, pair in enumerate(pairs)}  # of a pair listed twice the later counts

    def encode(text: str, run: bool, whole: bool) -> list[int]:
        text, parts = text.replace(" ", "▁"), []
        space = (whole if scheme == "first" else run) and text and (scheme == "each" or text[0] != "▁")
        for char in "▁" * bool(space) + text:
            parts += [char] if char in vocab else [bytes_of[byte] for byte in char.encode()]
        after, before = [*range(1, len(parts) + 1)], [*range(-1, len(parts) - 1)]
        def candidates(*places):  # (rank, place, left, right) of the pairs that begin at these places
            for i in places:
                if i >= 0 and after[i] < len(parts):
                    pair = parts[i], parts[after[i]]
                    if pair in rank:
                        yield rank[pair], i, *pair
        heap = [*candidates(*range(len(parts)))]
        heapq.heapify(heap)
        while heap:
            _, i, left, right = heapq.heappop(heap)
            j = after[i]
            if parts[i] == left and j < len(parts) and parts[j] == right:  # else one of them has merged since
                parts[i], parts[j], after[i] = left + right, "", after[j]
                if after[i] < len(parts):
                    before[after[i]] = i
                for item in candidates(before[i], i):
                    heapq.heappush(heap, item)
        return [vocab[part] for part in parts if part]
    return encode


class Tokenizer:
    """BPE with added tokens and a chat template, read from a Hugging Face folder.

    `added` maps the content of every added token to its id; `n_tokens` is the highest id + 1 (a model may
    have more rows). Nothing here adds a BOS: where a model wants one, its chat template writes it."""
    now: float | None = None  # the time for templates that write a date; a run sets its own first day's

    @classmethod
    def from_pretrained(cls, folder) -> "Tokenizer":
        """Reads tokenizer.json and what lies beside it; InputError where tiktoken cannot express the file."""
        # All of it stays in memory: a checkpoint saved days from now must not need this folder.
        files = {name: read_text(Path(folder) / name) for name in TOKENIZER_FILES
                 if name == "tokenizer.json" or (Path(folder) / name).exists()}
        try:
            return cls(Path(folder), files)
        except InputError:
            raise
        except (AttributeError, KeyError, TypeError, ValueError) as error:  # a list for an object, say
            raise InputError(f"{folder}: tokenizer.json and tokenizer_config.json should be laid out as "
                             f"transformers does, found {error!r}") from error

    def __init__(self, folder: Path, files: dict[str, str]):
        self.folder, self.files, file = folder, files, f"{folder}/tokenizer.json"
        self.config = as_json(f"{folder}/tokenizer_config.json", files.get("tokenizer_config.json", "{}"))
        spec = as_json(file, files["tokenizer.json"])
        model = spec["model"]
        expect(model["type"] == "BPE", f"{file}: model.type", "BPE", model["type"])
        for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
            expect(not model.get(key), f"{file}: model.{key}", "unset", model.get(key))
        characters = bool(model.get("byte_fallback"))  # SentencePiece's kind; else byte-level
        form = spec.get("normalizer") or {"type": "Sequence", "normalizers": []}
        form = [] if characters else form.get("normalizers", [form])
        expect(form in ([], [{"type": "NFC"}]), f"{file}: normalizer", "null or NFC", spec.get("normalizer"))
        self._normalize = partial(unicodedata.normalize, "NFC") if form else str
        # As in transformers, tokenizer_config.json may bring added tokens that tokenizer.json lacks.
        more, added = (self.config.get("added_tokens_decoder") or {}).items(), {}
        for token in [*(spec.get("added_tokens") or []), *({**token, "id": int(i)} for i, token in more)]:
            # These would eat or ask for neighbouring text; none of the models read here has them.
            flags = [flag for flag in ("lstrip", "rstrip", "single_word") if token.get(flag)]
            expect(token["content"] and not flags, f"{file}: an added token", f"without {flags}", token)
            added.setdefault(token["content"], token)
        if characters:
            pairs = [(bytes([int(token[3:5], 16)]) if re.fullmatch("<0x[0-9A-F]{2}>", token) else
                      token.replace("▁", " ").encode(), i) for token, i in model["vocab"].items()
                     if token not in added]
        else:
            ids = vocabulary(file, model, added)
            pairs = ids.items()
        self.added = {content: token["id"] for content, token in added.items()}
        self._special = {token["id"] for token in added.values() if token.get("special")}
        self._bytes = {}
        for token, index in (*pairs, *((content.encode(), i) for content, i in self.added.items())):
            other = self._bytes.setdefault(index, token)
            expect(other is token and index >= 0, f"{file}: id {index}", "that of one token", [other, token])
        self.n_tokens = max(self._bytes) + 1
        raw = {content: i for content, i in self.added.items() if not added[content].get("normalized")}
        late = {self._normalize(content): i for content, i in self.added.items() if content not in raw}
        # Leftmost, then longest, as HF finds them: of several alternatives re takes the first that matches.
        longest = ("|".join(map(re.escape, sorted(group, key=len, reverse=True))) for group in (raw, late))
        self._raw, self._late = ((g, re.compile(f"({p or '(?!)'})")) for g, p in zip((raw, late), longest))
        if characters:
            expect(not late, f"{file}: an added token", "without normalized", list(late))
            self._plain = sentencepiece(file, spec)
            return
        rank, pattern = merge_ranks(file, model, ids), split_pattern(file, spec)
        # tiktoken wants merge order for ids, but Mistral's begin after its special tokens: encode translates.
        self._id_of_rank = [ids[token] for token in rank]
        self._bpe = tiktoken.Encoding(folder.name, pat_str=pattern, mergeable_ranks=rank, special_tokens={})

    def _plain(self, text: str, run: bool, whole: bool) -> list[int]:
        return [self._id_of_rank[rank] for rank in self._bpe.encode_ordinary(self._normalize(text))]

    def encode(self, text: str, special: bool = False, inside: bool = False) -> list[int]:
        """Token ids. special=False: text that reads like an added token is plain text, `<think>` too, so that
        no prompt can speak for the template. special=True: every added token in the text is taken as one.
        inside: the text goes on behind other text (SentencePiece would begin it with a space)."""
        if not special:
            return self._plain(text, not inside, not inside)
        (raw, find_raw), (late, find_late), ids = self._raw, self._late, []
        # Cut before NFC, which would melt "<|im_end|>" and a combining mark behind it into other text; only
        # tokens marked "normalized" are looked for after it. The odd parts of a split are the matches.
        for i, part in enumerate(find_raw.split(text)):
            for j, piece in enumerate(find_late.split(self._normalize(part)) if i % 2 == 0 else ()):
                run = i > 0 or not inside
                ids += [late[piece]] if j % 2 else self._plain(piece, run, run and i == 0)
            ids += [raw[part]] if i % 2 else []
        return ids

    def token_bytes(self, token: int) -> bytes:
        """The bytes of a token, maybe half a character; b"" for ids no token owns (padded vocabularies)."""
        return self._bytes.get(int(token), b"")  # int(): as a dict key a tensor equals nothing

    def decode(self, ids, skip_special: bool = False) -> str:
        """Text of ids [T], invalid UTF-8 replaced. skip_special drops special: true ones, not `<think>`."""
        kept = (token for token in ids if not (skip_special and int(token) in self._special))
        return b"".join(map(self.token_bytes, kept)).decode("utf-8", "replace")

    @property
    def template(self) -> str | None:
        """The source of the folder's chat template, None where it has none."""
        source = self.config.get("chat_template")
        if isinstance(source, list):
            source = {t.get("name"): t.get("template") for t in source if isinstance(t, dict)}.get("default")
        return self.files.get("chat_template.jinja", source)

    @cached_property
    def _template(self) -> Template:
        """The compiled chat template, with the named tokens it may write; made at the first chat."""
        source = self.template
        expect(isinstance(source, str), self.folder, "a folder with a chat template", source)
        # A template is a program out of a model folder: sandboxed. Undefined stays lenient for Llama Guard's.
        environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
        # jinja's own tojson escapes <, > and & for web pages: the model would read \u003c in its tools.
        environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
        named = {f"{n}_token": self.config.get(f"{n}_token") for n in "bos eos unk sep pad cls mask".split()}
        named = {n: t["content"] if isinstance(t, dict) else t for n, t in named.items() if t is not None}
        def raise_exception(message):
            raise TemplateError(message)
        def strftime_now(form):  # Llama 3 writes today's date
            return time.strftime(form, time.localtime(self.now))
        environment.globals.update(named, raise_exception=raise_exception, strftime_now=strftime_now)
        # {% generation %} marks the assistant's words for supervised training; a scope renders the same.
        source = re.sub(r"({%[-+]?\s*)(end)?generation(\s*[-+]?%})", r"\1\2with\3", source)
        return environment.from_string(source)

    def chat(self, messages: list[dict], generation_prompt: bool = True, **variables) -> str:
        """The conversation as the model's own template writes it; encode the result with special=True.
        messages: {"role", "content", ...}, a key whose value is None counts as absent; variables are for the
        template: enable_thinking=False, tools=[...]. InputError with its own words where it refuses."""
        messages = [{k: value for k, value in message.items() if value is not None} for message in messages]
        variables = {"tools": None, "documents": None, "add_generation_prompt": generation_prompt} | variables
        try:
            return self._template.render(variables, messages=messages)
        except InputError:
            raise
        except Exception as error:  # whatever a template runs into, it or the messages brought it about
            line = f"line {error.lineno}: " if hasattr(error, "lineno") else ""
            raise InputError(f"{self.folder}: the chat template refused: {line}{error}") from error

    def save_pretrained(self, folder):
        """Writes the tokenizer's own files as they were, beside the weights as transformers expects them."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name, text in self.files.items():
            (Path(folder) / name).write_bytes(text.encode())


# ---------------------------------------------------------------------------------------------- prompt files
@dataclass(frozen=True)
class Prompt:
    """One request. label: "harmful" or "harmless"; kind: the file's own category, "" if it has none."""
    prompt: str
    label: str
    kind: str = ""


LABELS = {"harmful": "harmful", "unsafe": "harmful", "harmless": "harmless", "safe": "harmless"}


def read_row(where: str, row: dict[str, str], file_name: str) -> tuple[str, str, dict, str]:
    """(prompt, the cell its label is read from, what such a cell may say and means, kind), by the columns."""
    match row:
        case {"prompt": prompt, "label": label}:  # XSTest of today, JSONL, a table of your own
            return prompt, label, LABELS, row.get("kind") or row.get("type") or row.get("category") or ""
        case {"prompt": prompt, "type": kind}:  # XSTest v2, before it had labels
            return prompt, "unsafe" if kind.startswith("contrast_") else "safe", LABELS, kind
        case {"prompt": prompt, "category": kind}:  # OR-Bench: the label is the name of the file
            return prompt, "harmful" if "toxic" in file_name.lower() else "harmless", LABELS, kind
        case {"Behavior": prompt, "ContextString": context}:  # HarmBench; the context alone is no prompt
            prompt = f"{context}\n\n---\n\n{prompt}" if context and prompt else prompt
            return prompt, "harmful", LABELS, row.get("SemanticCategory", "")
        case {"vanilla": plain, "adversarial": disguised, "data_type": kind}:  # WildJailbreak, training
            meaning = {"vanilla_harmful": "harmful", "adversarial_harmful": "harmful",
                       "vanilla_benign": "harmless", "adversarial_benign": "harmless"}
            return disguised or plain, kind, meaning, kind
        case {"adversarial": prompt, "label": label, "data_type": kind}:  # WildJailbreak, evaluation
            return prompt, label, {"1": "harmful", "0": "harmless"}, kind
        case {"goal": prompt, "target": _} | {"forbidden_prompt": prompt, "source": _}:  # and StrongREJECT
            return prompt, "harmful", LABELS, row.get("category", "")
    expect(False, where, "a header of a known format, at the least prompt and label", list(row))


def table_rows(path: Path, text: str, known: Callable):
    """(path:line, {column: cell}) of a csv or tsv file. The line of a record of several is its first. known:
    called with the header, raises InputError for columns of no known format."""
    # The default, 128 KiB a field, is less than some jailbreaks. It holds for the whole process.
    csv.field_size_limit(2**31 - 1)
    # newline="\n": lines are counted as an editor counts them, not at every \r inside a quoted prompt.
    reader = csv.reader(io.StringIO(text, newline="\n"), strict=True,
                        delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
    header, where = None, f"{path}:1"
    try:
        for record in reader:
            # Copies of AdvBench come without a header; its targets all begin with "Sure".
            bare = header is None and len(record) == 2 and record[1].startswith("Sure")
            if header is None:
                header = ["goal", "target"] if bare else record
                expect(len(set(header)) == len(header), where, "a header of different columns", header)
                known(where, dict.fromkeys(header, ""))
            if header is not record:
                found = f"{len(record)} columns" if record else "an empty line"
                expect(len(record) == len(header), where, f"a record of {len(header)} columns", found)
                yield where, dict(zip(header, record))
            where = f"{path}:{reader.line_num + 1}"
    except csv.Error as error:
        raise InputError(f"{where} should begin a well-formed record, found: {error}") from None


def json_rows(path: Path, text: str, keys: tuple, optional: tuple = ()):
    """(path:line, {key: text}) of a JSONL file with at least these keys; of keys not named, what is not text
    is left out."""
    # Not splitlines(): that also cuts at U+2028, which JSON allows inside a text.
    for line, source in enumerate(text.removesuffix("\n").split("\n") if text else [], start=1):
        expect(source.strip(), f"{path}:{line}", "a JSON object", "an empty line")
        row = as_json(path, source, line)
        for key in (*keys, *(row.keys() & optional)):
            expect(isinstance(row.get(key), str), f"{path}:{line}: {key}", "a text", row.get(key))
        yield f"{path}:{line}", {key: value for key, value in row.items() if isinstance(value, str)}


def rows_of(path: Path, known: Callable, keys: tuple, optional: tuple = ()):
    """(path:line, row) of a file known by its extension: .jsonl, .csv or .tsv."""
    text, suffix = read_text(path), path.suffix.lower()
    expect(suffix in (".jsonl", ".csv", ".tsv"), path, "a .jsonl, .csv or .tsv file", suffix)
    return json_rows(path, text, keys, optional) if suffix == ".jsonl" else table_rows(path, text, known)


def whole_text(where: str, text: str) -> str:
    """The text. InputError for a blank one, and for half a character (JSON can write a lone surrogate), which
    would crash the first log that it reaches."""
    expect(text.strip() and not re.search("[\ud800-\udfff]", text), where, "a text", text)
    return text


def load_prompts(path) -> list[Prompt]:
    """Reads a prompt file, known by its extension (.jsonl, .csv, .tsv) and its columns (see read_row)."""
    path, prompts = Path(path), []
    def known(where, row):
        return read_row(where, row, path.name)
    for where, row in rows_of(path, known, ("prompt", "label")):
        prompt, label, meaning, kind = known(where, row)
        expect(label.lower() in meaning, f"{where}: label", " or ".join(meaning), label)
        prompts.append(Prompt(whole_text(f"{where}: prompt", prompt), meaning[label.lower()], kind))
    expect(prompts, path, "a file of prompts", "none in it")
    return prompts
