"""BPE tokenizers and chat templates of Hugging Face folders, without transformers.

`regex` cuts text into pieces, tiktoken does BPE over bytes, `merge` BPE over SentencePiece's characters, and
jinja2 renders templates. Either the result equals that of transformers or the folder is refused: a near-miss
trains on the wrong text.
"""
import heapq
import json
import re
import time
import unicodedata
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Callable

import regex
import tiktoken
from jinja2 import Template, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment as Sandbox

from lib.data import InputError, as_json, expect, read_text

# tokenizer.json writes a byte as a printable character: itself if printable, else one from U+0100 on.
PRINTS = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
OTHERS = sorted({*range(0x100)} - {*PRINTS})
BYTE_OF = {chr(b): b for b in PRINTS} | {chr(0x100 + n): b for n, b in enumerate(OTHERS)}
CHAR_OF = {byte: char for char, byte in BYTE_OF.items()}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
                   "chat_template.jinja", "vocab.json", "merges.txt")
TAGS = (("<think>", "</think>"), ("[THINK]", "[/THINK]"))  # Qwen3, R1 and most others; Mistral's
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # ByteLevel's own regex


# ---- from text to ids ------------------------------------------------------------------------------------

def compiled(file: str, pattern: str) -> regex.Pattern:
    """The pattern. Raises InputError for what HF's engine, Oniguruma, reads in another way."""
    outside = re.sub(r"\[(\\.|[^\]\\])*\]", "", pattern)  # without character classes
    other = re.search(r"\\[^\WsSdDpPrntu]|&&", pattern) or re.search(r"[$^]", outside)
    expect(not other, f"{file}: pre_tokenizer", r"free of \w, \b, ^, $ and the like", pattern)
    return regex.compile(pattern)


def splitters(file: str, spec: dict) -> list[regex.Pattern]:
    """The regexes of a pre-tokenizer. Each cuts the pieces that the one before leaves, see `cut`."""
    steps = spec["pretokenizers"] if spec["type"] == "Sequence" else [spec]
    patterns = []
    for step in steps:
        match step:  # `invert` changes nothing as long as no piece is dropped
            case {"type": "Split", "pattern": {"Regex": str(pattern)}, "behavior": "Isolated"}:
                patterns.append(compiled(file, pattern))
            case {"type": "Digits", "individual_digits": bool(single)}:
                patterns.append(regex.compile(r"\p{N}" if single else r"\p{N}+"))
            case {"type": "ByteLevel", "add_prefix_space": False} if step is steps[-1]:
                return patterns + [regex.compile(GPT2)] * step.get("use_regex", True)
            case _:
                break
    expect(False, f"{file}: pre_tokenizer", "Split (Isolated) or Digits, then ByteLevel without prefix", spec)


def cut(pattern: regex.Pattern, text: str) -> list[str]:
    """The matches and the text between them, in order."""
    pieces, end = [], 0
    for match in pattern.finditer(text):
        pieces += text[end:match.start()], match.group()
        end = match.end()
    return [piece for piece in (*pieces, text[end:]) if piece]


def merge_ranks(file: str, model: dict, vocab: dict) -> dict[tuple[str, str], int]:
    """{pair of tokens: its place among the merges}. Raises InputError for a token that is not in vocab."""
    ranks = {}
    for place, merge in enumerate(model["merges"]):
        pair = tuple(merge.split(" ") if isinstance(merge, str) else merge)
        expect(len(pair) == 2 and all(token in vocab for token in (*pair, "".join(pair))),
               f"{file}: model.merges[{place}]", "two ordinary tokens that make a third", merge)
        ranks[pair] = place  # the later of two equal pairs counts, as in HF
    return ranks


def merge(parts: list[str], ranks: dict[tuple[str, str], int]) -> list[str]:
    """Joins the pair of neighbours with the lowest rank, the leftmost first, until no pair has a rank."""
    after, before = [*range(1, len(parts) + 1)], [*range(-1, len(parts) - 1)]
    def candidates(*places):  # (rank, place, left, right)
        for i in places:
            if i >= 0 and after[i] < len(parts):
                pair = parts[i], parts[after[i]]
                if pair in ranks:
                    yield ranks[pair], i, *pair
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
    return [part for part in parts if part]


def tiktoken_ranks(pairs: dict[tuple[str, str], int]) -> dict[str, int]:
    """{token: tiktoken's rank for it}, so that tiktoken merges as the listed pairs say.

    HF merges two neighbours if the pair is listed, tiktoken if their union has a rank. Both take the lowest
    first, then the leftmost. Two parts that together are token T can only stand in a text where all earlier
    merges inside T were the same as in T alone. So they are the last two parts of T alone, and the rank of T
    is the place of that pair. If it is not listed, HF never makes T, and T gets no rank."""
    ranks, listed = {}, {}
    for token in sorted({left + right for left, right in pairs}, key=len):
        last = tuple(merge([*token], listed))  # listed: the pairs that make shorter tokens
        if last in pairs:
            ranks[token] = listed[last] = pairs[last]
    return ranks


def byte_level(file: str, spec: dict, vocab: dict) -> Callable[[str, bool, bool], list[int]]:
    """Encoder of a BPE over bytes. vocab: id of each ordinary token."""
    model, patterns = spec["model"], splitters(file, spec.get("pre_tokenizer"))
    ranks = tiktoken_ranks(merge_ranks(file, model, vocab))
    # tiktoken needs all 256 bytes, also those that vocab lacks. They are no unions, so any free rank will do.
    ranks |= {char: len(model["merges"]) + byte for char, byte in BYTE_OF.items()}
    token_of = {rank: token for token, rank in ranks.items()}
    ranks = {bytes(BYTE_OF[char] for char in token): rank for token, rank in ranks.items()}
    # This pattern takes a piece whole: `regex` cuts, as tiktoken's engine panics on a million blanks.
    bpe = tiktoken.Encoding(file, pat_str="(?s).+", mergeable_ranks=ranks, special_tokens={})

    @lru_cache(2**16)
    def ids(piece: str) -> list[int]:
        word = "".join(CHAR_OF[byte] for byte in piece.encode())
        whole = model.get("ignore_merges") and word in vocab
        parts = [word] if whole else [token_of[rank] for rank in bpe.encode_ordinary(piece)]
        unknown = [part for part in parts if part not in vocab]  # HF leaves such bytes out
        expect(not unknown, f"{file}: model.vocab", f"a token for each byte of {piece!r:.80}", unknown)
        return [vocab[part] for part in parts]

    def encode(text: str, run: bool, whole: bool) -> list[int]:
        pieces = [text]
        for pattern in patterns:
            pieces = [part for piece in pieces for part in cut(pattern, piece)]
        return [token for piece in pieces if piece for token in ids(piece)]
    return encode


def sentencepiece(file: str, spec: dict) -> Callable[[str, bool, bool], list[int]]:
    """Encoder of a BPE over characters with byte tokens for unknown ones (Llama 2, Mistral before Tekken).
    Its arguments: a text, whether a run of text begins with it, and whether the whole input does."""
    vocab, bytes_of = spec["model"]["vocab"], [f"<0x{byte:02X}>" for byte in range(256)]
    mark = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    twice = {"type": "Replace", "pattern": {"Regex": "\\A▁"}, "content": "▁▁"}
    match spec.get("normalizer"), spec.get("pre_tokenizer"):
        case {"normalizers": [{"prepend": "▁"}, replace]}, None if replace == mark:
            scheme = "each"  # a space before each run of text, even before a space
        case {"normalizers": parts}, {"pretokenizers": [
                {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": False}]
                } if parts == [mark, twice]:  # transformers 5 writes the same in this way
            scheme = "each"
        case None, {"type": "Metaspace", "replacement": "▁", "split": False,
                    "prepend_scheme": "first" | "always" as scheme}:
            pass
        case found:
            expect(False, f"{file}: with model.byte_fallback True, normalizer and pre_tokenizer",
                   "Prepend and Replace and nothing, or nothing and Metaspace (first or always)", found)
    expect(vocab.keys() >= {*bytes_of}, f"{file}: model.vocab", "holding <0x00> to <0xFF>", "less")
    expect(not spec["model"].get("ignore_merges"), f"{file}: model.ignore_merges", "false", True)
    ranks = merge_ranks(file, spec["model"], vocab)

    def encode(text: str, run: bool, whole: bool) -> list[int]:
        text, parts = text.replace(" ", "▁"), []
        space = (whole if scheme == "first" else run) and text and (scheme == "each" or text[0] != "▁")
        for char in "▁" * bool(space) + text:
            parts += [char] if char in vocab else [bytes_of[byte] for byte in char.encode()]
        return [vocab[part] for part in merge(parts, ranks)]
    return encode


# ---- the files of a folder -------------------------------------------------------------------------------

def named_tokens(config: dict, more: dict) -> tuple[dict, list]:
    """({"bos_token": token, ...}, other special tokens) of tokenizer_config.json and special_tokens_map.json.
    A token is a text or {"content": text}. In transformers, added_tokens_decoder hides the second file."""
    more = more if config.get("added_tokens_decoder") is None else {}
    key, old = "extra_special_tokens", "additional_special_tokens"
    extra = config.get(key) or config.get(old) or more.get(key) or more.get(old) or []
    if isinstance(extra, list):
        extra = extra + [token for token in more.get(key) or [] if token not in extra]
    names = {n: t for n, t in (config | more).items() if n.endswith("_token") and isinstance(t, (str, dict))}
    if isinstance(extra, dict):  # {"image_token": "<img>"}
        names, extra = names | extra, []
    order = [f"{name}_token" for name in "bos eos unk sep pad cls mask".split()]
    return {name: names[name] for name in (*order, *names) if name in names}, extra


def added_tokens(file: str, spec: dict, config: dict, old: dict, special: list) -> dict[str, dict]:
    """{content: {"id", ...}} of all added tokens. old: added_tokens.json; special: named_tokens'.
    Tokens that tokenizer.json lacks get the next free ids, as in transformers."""
    vocab, added = spec["model"]["vocab"], {t["content"]: t for t in spec.get("added_tokens") or []}
    decoder = config.get("added_tokens_decoder")
    if decoder is None:
        names = [token if isinstance(token, str) else token["content"] for token in special]
        decoder = {i: {"content": c, "normalized": c not in names} for c, i in old.items() if c not in added}
    late = [(int(index), decoder[index]) for index in sorted(decoder, key=int)]
    for index, token in late + [(None, token) for token in special]:
        token = {"content": token} if isinstance(token, str) else token
        known = added.get(token["content"], {})
        if index is None and known:
            continue
        free = max(len(vocab), 1 + max((t["id"] for t in added.values()), default=0))
        free = known["id"] if known else vocab.get(token["content"], free)
        expect(index in (None, free), f"{file}: the id of {token['content']!r} elsewhere", free, index)
        added[token["content"]] = known | token | {"id": free}
    for token in added.values():
        flags = [flag for flag in ("lstrip", "rstrip", "single_word") if token.get(flag)]
        expect(token["content"] and not flags, f"{file}: an added token", f"without {flags}", token)
    return added


class Tokenizer:
    """BPE with added tokens and a chat template, read from a Hugging Face folder.

    `added` maps the content of each added token to its id. `n_tokens` is the highest id + 1; a model may have
    more rows. `encode` adds no BOS: the chat template writes it. `tags` open and close a thought."""
    now: float | None = None  # time for templates that write a date: a run keeps that of its start

    @classmethod
    def from_pretrained(cls, folder) -> "Tokenizer":
        """Reads tokenizer.json and the files beside it. Raises InputError if ids would differ from HF's."""
        folder = Path(folder)
        other = [name for name in ("tekken.json", "tokenizer.model") if (folder / name).exists()]
        if other and not (folder / "tokenizer.json").exists():
            raise InputError(f"{folder} should hold tokenizer.json, found only {other[0]}; transformers makes"
                             " one: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)")
        # Kept in memory: saving a checkpoint must not need this folder.
        files = {name: read_text(folder / name) for name in TOKENIZER_FILES
                 if name == "tokenizer.json" or (folder / name).exists()}
        try:
            return cls(folder, files)
        except InputError:
            raise
        except (AttributeError, KeyError, TypeError, ValueError, regex.error) as error:
            raise InputError(f"{folder}: tokenizer.json and tokenizer_config.json should be laid out as "
                             f"transformers does, found {error!r}") from error

    def __init__(self, folder: Path, files: dict[str, str]):
        self.folder, self.files, file = folder, files, f"{folder}/tokenizer.json"
        self.template_args = {}  # variables for the chat template of the model's own prompts
        self.system = ""  # their system prompt
        self.config, more, old = (as_json(f"{folder}/{name}", files.get(name, "{}")) for name in (
            "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"))
        spec = as_json(file, files["tokenizer.json"])
        model = spec["model"]
        expect(model["type"] == "BPE", f"{file}: model.type", "BPE", model["type"])
        for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
            expect(not model.get(key), f"{file}: model.{key}", "unset", model.get(key))
        characters = bool(model.get("byte_fallback"))  # SentencePiece; else byte-level
        form = spec.get("normalizer") or {"type": "Sequence", "normalizers": []}
        form = [] if characters else form.get("normalizers", [form])
        expect(form in ([], [{"type": "NFC"}]), f"{file}: normalizer", "null or NFC", spec.get("normalizer"))
        self._normalize = partial(unicodedata.normalize, "NFC") if form else str
        self._named, extra = named_tokens(self.config, more)
        added = added_tokens(file, spec, self.config, old, [*filter(None, self._named.values()), *extra])
        self.added = {content: token["id"] for content, token in added.items()}
        known = {*self.added, *(tag for pair in TAGS for tag in pair if tag in str(self.template))}
        self.tags = next((pair for pair in TAGS if known.issuperset(pair)), TAGS[0])
        # Plain text must not reach an added token, but for a pad token like "!".
        ordinary = {token: i for token, i in model["vocab"].items() if token not in added or len(token) == 1}
        self._bytes = {}
        for token, index in (ordinary | self.added).items():
            expect(token and index >= 0 and index not in self._bytes, f"{file}: id {index}",
                   "that of one token", [token, self._bytes.get(index)])
            if token in added:
                expect(model["vocab"].get(token, index) == index, f"{file}: the id of {token!r}",
                       model["vocab"].get(token), index)
                self._bytes[index] = token.encode()
            elif characters:
                byte = re.fullmatch("<0x([0-9A-F]{2})>", token)
                self._bytes[index] = bytes.fromhex(byte[1]) if byte else token.replace("▁", " ").encode()
            else:
                expect(BYTE_OF.keys() >= set(token), f"{file}: model.vocab", "byte-level", token)
                self._bytes[index] = bytes(BYTE_OF[char] for char in token)
        self.n_tokens = max(self._bytes) + 1
        raw = {content: i for content, i in self.added.items() if not added[content].get("normalized")}
        late = {self._normalize(content): i for content, i in self.added.items() if content not in raw}
        # HF takes the leftmost, then the longest token; re takes the first alternative that matches.
        longest = ("|".join(map(re.escape, sorted(group, key=len, reverse=True))) for group in (raw, late))
        self._raw, self._late = ((g, re.compile(f"({p or '(?!)'})")) for g, p in zip((raw, late), longest))
        expect(not (characters and late), f"{file}: an added token", "without normalized", list(late))
        self._plain = sentencepiece(file, spec) if characters else byte_level(file, spec, ordinary)

    def encode(self, text: str, special: bool = False, inside: bool = False,
               hidden_by: str = "") -> list[int]:
        """Token ids of a text. special=False encodes the names of added tokens as plain text, `<think>` too,
        so that no prompt can inject template tokens; special=True encodes them as added tokens. inside: the
        text follows other text, so SentencePiece puts no space before it. hidden_by: the mark of
        `hide_added`, left out. Raises InputError for a byte without a token."""
        if not special:
            return self._plain(self._normalize(text), not inside, not inside)
        (raw, find_raw), (late, find_late), ids = self._raw, self._late, []
        # NFC may join ">" and a combining mark: added tokens are found before it, those marked "normalized"
        # after it. The odd parts of a split are the matches.
        for i, part in enumerate(find_raw.split(text)):
            for j, piece in enumerate(find_late.split(self._normalize(part)) if i % 2 == 0 else ()):
                run = i > 0 or not inside
                piece = self._normalize(piece.replace(hidden_by, "")) if hidden_by else piece
                ids += [late[piece]] if j % 2 else self._plain(piece, run, run and i == 0)
            ids += [raw[part]] if i % 2 else []
        return ids

    def hide_added(self, text: str, mark: str) -> str:
        """The text with a mark in each name of an added token, so that `encode` takes it for plain text."""
        text = self._normalize(text)  # encoding does it anyway, and it can complete a name
        for token in sorted(self.added, key=len, reverse=True):
            while len(token) > 1 and token in text:
                text = text.replace(token, token[0] + mark + token[1:])
        return text

    def token_bytes(self, token: int) -> bytes:
        """Bytes of a token, maybe part of a character; b"" for an id without one (padded vocabularies)."""
        return self._bytes.get(int(token), b"")  # int(): a tensor is not equal to a dict key

    def decode(self, ids) -> str:
        """Text of ids [T]; invalid UTF-8 is replaced. The space that SentencePiece puts first is kept."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")

    @property
    def template(self) -> str | None:
        """Source of the folder's chat template, or None."""
        source = self.config.get("chat_template")
        if isinstance(source, list):
            source = {t.get("name"): t.get("template") for t in source if isinstance(t, dict)}.get("default")
        return self.files.get("chat_template.jinja", source)

    @cached_property
    def _template(self) -> Template:
        """The compiled chat template."""
        source = self.template
        expect(isinstance(source, str), self.folder, "a folder with a chat template", source)
        # Sandboxed: a template is a program. Undefined names render as "", as Llama Guard's template needs.
        environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
        # jinja's own tojson writes < as \u003c, for web pages.
        environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
        named = {name: t["content"] if isinstance(t, dict) else t for name, t in self._named.items()}
        def raise_exception(message):
            raise TemplateError(message)
        def strftime_now(form):
            return time.strftime(form, time.localtime(self.now))
        environment.globals.update(named, raise_exception=raise_exception, strftime_now=strftime_now)
        # {% generation %} marks the assistant's text for SFT; jinja's `with` block renders the same.
        source = re.sub(r"({%[-+]?\s*)(end)?generation(\s*[-+]?%})", r"\1\2with\3", source)
        return environment.from_string(source)

    def chat(self, messages: list[dict], generation_prompt: bool = True, **variables) -> str:
        """The conversation rendered by the template; encode the result with special=True. messages: {"role",
        "content", ...}, keys with value None are dropped. variables: of the template, such as tools=[...]."""
        messages = [{k: value for k, value in message.items() if value is not None} for message in messages]
        variables = {"tools": None, "documents": None, "add_generation_prompt": generation_prompt} | variables
        try:
            return self._template.render(variables, messages=messages)
        except InputError:
            raise
        except Exception as error:  # any template failure is an input error
            line = f"line {error.lineno}: " if hasattr(error, "lineno") else ""
            raise InputError(f"{self.folder}: the chat template refused: {line}{error}") from error

    def save_pretrained(self, folder):
        """Writes the files that were read, unchanged."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name, text in self.files.items():
            (Path(folder) / name).write_bytes(text.encode())
