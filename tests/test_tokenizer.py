"""lib/tokenizer.py: ids, decoded text and prompts equal transformers'; a bad folder is one sentence."""
import json
import re
import shutil

import pytest
import torch
from helpers import FIXTURES, golden, refusal

from lib.tokenizer import Tokenizer, merge, tiktoken_ranks

FOLDERS = ("tiny-qwen2", "tiny-qwen3", "tiny-llama3", "tiny-reward")
GOLDEN = json.loads((FIXTURES / "tokenizer_golden.json").read_text("utf-8"))  # inputs and recorded results
SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
         r"|\s*[\r\n]+|\s+(?!\S)|\s+")


def byte_char(byte):
    """The character for a byte in tokenizer.json, from its definition and not from the table under test."""
    prints = [b for b in range(256) if chr(b).isprintable() and not chr(b).isspace() and b != 0xAD]
    return chr(byte) if byte in prints else chr(256 + [b for b in range(256) if b not in prints].index(byte))


def spelled(text):
    return "".join(map(byte_char, text.encode()))


def added(content, index, **flags):
    return {"id": index, "content": content, "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": False, "special": True, **flags}


def make(folder, words, pairs, start=0, added_tokens=(), regex=SPLIT, normalizer=None, **model):
    """A folder with the 256 bytes as ids start.., then the words. The merges are pairs of plain text."""
    vocab = {byte_char(byte): start + byte for byte in range(256)}
    vocab |= {spelled(word): start + 256 + n for n, word in enumerate(words)}
    spec = {
        "added_tokens": list(added_tokens), "normalizer": normalizer,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}]},
        "decoder": {"type": "ByteLevel"},
        "model": {"type": "BPE", "ignore_merges": False, "vocab": vocab,
                  "merges": [[spelled(left), spelled(right)] for left, right in pairs], **model}}
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(spec), "utf-8")
    return folder


def rewrite(file, change):
    """Changes a JSON file in place."""
    spec = json.loads(file.read_text("utf-8"))
    change(spec)
    file.write_text(json.dumps(spec), "utf-8")


def copied(name, folder):
    """A copy of a fixture without its weights."""
    ignore = shutil.ignore_patterns("*.safetensors", "golden.json")
    return shutil.copytree(FIXTURES / name, folder, ignore=ignore, dirs_exist_ok=True)


def edited(tmp_path, change):
    """A copy of tiny-qwen3 whose tokenizer.json is changed in place."""
    folder = copied("tiny-qwen3", tmp_path / "edited")
    rewrite(folder / "tokenizer.json", change)
    return folder


def refused(tmp_path, change, *parts):
    message = refusal(Tokenizer.from_pretrained, edited(tmp_path, change))
    for part in ("tokenizer.json", *parts):
        assert part in message, message


# ---- golden values -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", FOLDERS)
def test_encode_agrees_with_transformers(name):
    tokenizer = Tokenizer.from_pretrained(FIXTURES / name)
    for case in golden(name)["encode"]:
        assert tokenizer.encode(case["text"]) == case["ids"], case["text"]
        assert tokenizer.encode(case["text"], special=True) == case["special_ids"], case["text"]


@pytest.mark.parametrize("name", FOLDERS)
def test_decode_agrees_with_transformers(name):
    tokenizer = Tokenizer.from_pretrained(FIXTURES / name)
    for case in golden(name)["decode"]:
        assert tokenizer.decode(case["ids"]) == case["text"]
    for case in golden(name).get("decode_unused", []):
        assert tokenizer.decode(case["ids"]) == case["text"]


@pytest.mark.parametrize("name", FOLDERS)
def test_chat_agrees_with_transformers(name):
    tokenizer, errors = Tokenizer.from_pretrained(FIXTURES / name), 0
    for case in golden(name)["chat"]:
        messages, variables = case["messages"], case["kwargs"]
        if "error" in case:
            errors += 1
            message = refusal(tokenizer.chat, messages)
            assert name in message and case["error"].removeprefix("TemplateError: ") in message
            continue
        prompt = tokenizer.chat(messages, **variables)
        assert tokenizer.chat(messages, generation_prompt=False, **variables) == case["prompt"]
        assert prompt == case["prompt_gen"]
        assert tokenizer.encode(prompt, special=True) == case["ids_gen"]
    assert errors == {"tiny-qwen2": 1, "tiny-llama3": 1}.get(name, 0)


@pytest.mark.parametrize("name", FOLDERS)
def test_added_tokens_and_size(name):
    tokenizer, expected = Tokenizer.from_pretrained(FIXTURES / name), golden(name)
    assert tokenizer.added == {content: index for content, (index, _) in expected["added_tokens"].items()}
    assert tokenizer.n_tokens == expected["tokens"]
    for content, (index, _) in expected["added_tokens"].items():
        assert tokenizer.token_bytes(index) == content.encode()


@pytest.mark.parametrize("case", GOLDEN["pre_tokenizers"], ids=lambda case: case["name"])
def test_pre_tokenizers_agree_with_tokenizers(case, tmp_path):
    folder = edited(tmp_path, lambda spec: spec.update(pre_tokenizer=case["pre_tokenizer"]))
    tokenizer = Tokenizer.from_pretrained(folder)
    for text, ids in zip(GOLDEN["texts"], case["ids"], strict=True):
        assert tokenizer.encode(text, special=True) == ids, text


@pytest.mark.parametrize("case", GOLDEN["special_tokens"])
def test_special_tokens_of_the_other_files_agree_with_transformers(case, tmp_path):
    folder = make(tmp_path, [], [], added_tokens=[added("<old>", 256)])
    config = {"chat_template": GOLDEN["special_template"], **case.get("config", {})}
    for name, content in (("tokenizer_config", config), ("special_tokens_map", case.get("map")),
                          ("added_tokens", case.get("added"))):
        if content is not None:
            (folder / f"{name}.json").write_text(json.dumps(content), "utf-8")
    tokenizer = Tokenizer.from_pretrained(folder)
    assert tokenizer.encode(GOLDEN["special_text"], special=True) == case["ids"]
    assert tokenizer.chat([]) == case["chat"]


@pytest.mark.parametrize("case", GOLDEN["sentencepiece"]["layouts"])
def test_sentencepiece_agrees_with_tokenizers(case, tmp_path):
    golden = GOLDEN["sentencepiece"]
    tokens = [*(token["content"] for token in golden["added_tokens"]),
              *(f"<0x{byte:02X}>" for byte in range(256)), *golden["tokens"]]
    model = {"type": "BPE", "byte_fallback": True, "merges": golden["merges"],
             "vocab": {token: index for index, token in enumerate(tokens)}}
    (tmp_path / "tokenizer.json").write_text(json.dumps({**golden, **case, "model": model}), "utf-8")
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    for text, ids, decoded in zip(golden["texts"], case["ids"], case["decoded"], strict=True):
        assert tokenizer.encode(text, special=True) == ids, text
        assert tokenizer.decode(ids) in (decoded, " " + decoded)  # some layouts drop the first space
    assert tokenizer.encode("a", inside=True) == [tokens.index("a")] and 1 not in tokenizer.encode("<s>")


# ---- encoding and decoding ---------------------------------------------------------------------------------

@pytest.mark.parametrize("name", FOLDERS[:3])
def test_token_bytes_add_up_to_the_text(name):
    tokenizer = Tokenizer.from_pretrained(FIXTURES / name)
    for case in golden(name)["decode"]:
        whole = b"".join(tokenizer.token_bytes(index) for index in case["ids"])
        assert whole.decode("utf-8", "replace") == case["text"]
    rare = tokenizer.encode("𓀀")
    assert len(rare) > 1 and b"".join(map(tokenizer.token_bytes, rare)) == "𓀀".encode()
    assert tokenizer.token_bytes(tokenizer.n_tokens) == b""


def test_ids_may_be_a_tensor():
    tokenizer = Tokenizer.from_pretrained(FIXTURES / "tiny-qwen3")
    ids = torch.tensor(tokenizer.encode("Hi<|im_end|>", special=True))
    assert tokenizer.decode(ids) == "Hi<|im_end|>"
    assert tokenizer.token_bytes(ids[-1]) == b"<|im_end|>"


def test_merge_equals_a_search_for_the_lowest_pair():
    def slow(parts, ranks):
        while pairs := [(ranks[pair], i) for i, pair in enumerate(zip(parts, parts[1:])) if pair in ranks]:
            i = min(pairs)[1]
            parts = parts[:i] + [parts[i] + parts[i + 1]] + parts[i + 2:]
        return parts

    generator = torch.Generator().manual_seed(3)
    words = ["a", "b", "c", "aa", "ab", "bc", "aab", "abc", "ca", "bb"]
    pairs = [(left, right) for left in words for right in words]
    for _ in range(200):
        chosen = torch.randperm(len(pairs), generator=generator)[:30].tolist()
        ranks = {pairs[i]: n for n, i in enumerate(chosen)}
        parts = ["abc"[i] for i in torch.randint(3, (40,), generator=generator).tolist()]
        assert merge([*parts], ranks) == slow(parts, ranks)


def test_byte_level_ids_follow_the_listed_pairs(tmp_path):
    # tiktoken merges by union. Here many unions have several pairs, and some pairs never meet.
    generator = torch.Generator().manual_seed(5)
    words = ["a", "b", "c", "aa", "ab", "bc", "ca", "aab", "abc", "bca", "abab", "abca", "bcaab"]
    every = [(left, right) for left in words for right in words if left + right in words]
    unmade = 0
    for _ in range(30):
        pairs = [every[i] for i in torch.randperm(len(every), generator=generator)[:11].tolist()]
        tokenizer = Tokenizer.from_pretrained(make(tmp_path, words[3:], pairs))
        ranks = {pair: place for place, pair in enumerate(pairs)}
        ids = {char: ord(char) for char in "abc"} | {word: 256 + n for n, word in enumerate(words[3:])}
        for size in (2, 5, 12, 99, 100, 101, 400):  # long ones too: tiktoken may merge those with a heap
            text = "".join("abc"[i] for i in torch.randint(3, (size,), generator=generator).tolist())
            assert tokenizer.encode(text) == [ids[part] for part in merge([*text], ranks)]
        unmade += len({left + right for left, right in pairs} - tiktoken_ranks(ranks).keys())
    assert unmade > 0


def test_a_million_blanks_are_encoded(tmp_path):
    # tiktoken's regex engine panics at a million steps back.
    tokenizer = Tokenizer.from_pretrained(make(tmp_path, ["  ", "    "], [(" ", " "), ("  ", "  ")]))
    assert tokenizer.encode("x" + "\t" * 1_000_000) == [ord("x")] + [ord("\t")] * 1_000_000
    assert tokenizer.encode("x" + " " * 1_000_003) == [ord("x")] + [257] * 250_000 + [256, ord(" ")]


def test_words_without_merges_are_found_whole(tmp_path):
    # transformers looks " salts" up, finds nothing and merges " s", then "al".
    merges = [(" ", "s"), ("a", "l"), ("a", "t")]
    tokenizer = Tokenizer.from_pretrained(make(
        tmp_path, [" s", "al", "at", " salt", " sulphur"], merges, ignore_merges=True,
        added_tokens=[added("<think>", 261, special=False)]))
    assert tokenizer.encode(" salt sulphur") == [259, 260]
    assert tokenizer.encode(" salts") == [256, 257, ord("t"), ord("s")]
    assert tokenizer.encode("x salt<think>", special=True) == [ord("x"), 259, 261]
    assert tokenizer.encode("<think>") == list(b"<think>")
    assert tokenizer.decode([259, 260, 300, 261]) == " salt sulphur<think>"


def test_ids_may_start_after_the_special_tokens(tmp_path):
    # As in Mistral's Tekken files, which list the special tokens in the vocabulary too.
    folder = make(tmp_path, ["ab", "abc"], [("a", "b"), ("ab", "c")], start=3, ignore_merges=True,
                  added_tokens=[added("<s>", 0), added("</s>", 1), added("[x]", 2)])
    specials = {"<s>": 0, "</s>": 1, "[x]": 2}
    rewrite(folder / "tokenizer.json", lambda spec: spec["model"]["vocab"].update(specials))
    tokenizer = Tokenizer.from_pretrained(folder)
    assert tokenizer.encode("abcab") == [260, 259] and tokenizer.n_tokens == 261
    assert tokenizer.encode("<s>abc", special=True) == [0, 260]
    assert tokenizer.encode("<s>") == [3 + byte for byte in b"<s>"]
    assert tokenizer.decode([0, 260, 259]) == "<s>abcab"


def test_text_between_the_matches_of_the_regex_is_kept(tmp_path):
    folder = make(tmp_path, ["ab", "--"], [("a", "b"), ("-", "-")], regex="[a-z]+")
    tokenizer = Tokenizer.from_pretrained(folder)
    assert tokenizer.encode("ab--ab-") == [256, 257, 256, ord("-")]


def test_merges_may_be_strings_or_pairs(tmp_path):
    for merges in ([["a", "b"], ["Ġ", "ab"]], ["a b", "Ġ ab"]):
        tokenizer = Tokenizer.from_pretrained(make(tmp_path, ["ab", " ab"], [], merges=merges))
        assert tokenizer.encode("ab ab") == [256, 257]


def test_merges_follow_the_file_even_where_a_token_cannot_be_made(tmp_path):
    # "bc" is merged first, so "ab" + "c" never meets; "ab" + "cd" is not listed.
    tokenizer = Tokenizer.from_pretrained(make(
        tmp_path, ["ab", "bc", "abc", "cd", "abcd"], [("b", "c"), ("a", "b"), ("ab", "c"), ("c", "d")]))
    assert tokenizer.encode("abc") == [ord("a"), 257] and tokenizer.encode("abd") == [256, ord("d")]
    assert tokenizer.encode("cdab") == [259, 256] and tokenizer.encode("abcd") == [ord("a"), 257, ord("d")]


def test_the_leftmost_added_token_wins_and_then_the_longest(tmp_path):
    tokens = [added("<a>", 256), added("<a>b", 257), added("b<", 258), added("a>b<c", 259)]
    tokenizer = Tokenizer.from_pretrained(make(tmp_path, [], [], added_tokens=tokens))
    assert tokenizer.encode("<a>b<a>", special=True) == [257, 256]
    assert tokenizer.encode("xb<a>", special=True) == [ord("x"), 258, *b"a>"]


def test_added_tokens_are_found_before_nfc_unless_normalized(tmp_path):
    # The last character of <x> and a combining stroke compose, so NFC first would hide the token.
    composed = "≯"
    tokens = [added("<x>", 256), added("e\u0301!", 257, normalized=True), added("öö", 258)]
    folder = make(tmp_path, [], [], added_tokens=tokens, normalizer={"type": "NFC"})
    tokenizer = Tokenizer.from_pretrained(folder)
    assert tokenizer.encode("<x>\u0338", special=True) == [256, *"\u0338".encode()]
    assert tokenizer.encode("<x>\u0338") == list(f"<x{composed}".encode())
    assert tokenizer.encode("e\u0301!<x>é!", special=True) == [257, 256, 257]
    assert tokenizer.encode("öo\u0308", special=True) == list("öö".encode())


def test_without_a_normalizer_text_stays_as_it_is(tmp_path):
    for normalizer in (None, {"type": "Sequence", "normalizers": []}):
        tokenizer = Tokenizer.from_pretrained(make(tmp_path, [], [], normalizer=normalizer))
        assert tokenizer.encode("e\u0301") == list("e\u0301".encode())
    nfc = make(tmp_path, [], [], normalizer={"type": "Sequence", "normalizers": [{"type": "NFC"}]})
    assert Tokenizer.from_pretrained(nfc).encode("e\u0301") == list("é".encode())


def test_a_byte_without_a_token_is_an_error_only_in_a_text_that_has_it(tmp_path):
    folder = make(tmp_path, [], [])
    rewrite(folder / "tokenizer.json", lambda spec: [spec["model"]["vocab"].pop(byte_char(byte))
                                                     for byte in b"\x04z"])
    tokenizer = Tokenizer.from_pretrained(folder)
    assert tokenizer.encode("abc") == [*b"abc"] and tokenizer.decode([97, 4]) == "a"
    assert "a token for each byte of ' lazy', found ['z']" in refusal(tokenizer.encode, "so lazy")
    assert "found ['Ą']" in refusal(tokenizer.encode, "a\x04b")


@pytest.mark.parametrize("name", FOLDERS[:3])
def test_a_saved_tokenizer_is_the_same_one(name, tmp_path):
    source = copied(name, tmp_path / "source")
    tokenizer = Tokenizer.from_pretrained(source)
    shutil.rmtree(source)  # a run saves long after it has read
    tokenizer.save_pretrained(tmp_path / "a" / "b")
    saved = {path.name for path in (tmp_path / "a" / "b").iterdir()}
    assert saved == {path.name for path in (FIXTURES / name).iterdir()} & {
        "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"}
    for file in saved:
        assert (tmp_path / "a" / "b" / file).read_bytes() == (FIXTURES / name / file).read_bytes()
    case = golden(name)["chat"][0]
    assert Tokenizer.from_pretrained(tmp_path / "a" / "b").chat(case["messages"]) == case["prompt_gen"]


# ---- folders that are refused ------------------------------------------------------------------------------

def test_missing_and_broken_tokenizer_files(tmp_path):
    assert "none/tokenizer.json should be a readable file, found: No such file" in refusal(
        Tokenizer.from_pretrained, tmp_path / "none")
    file = tmp_path / "tokenizer.json"
    whole = (FIXTURES / "tiny-qwen3" / "tokenizer.json").read_bytes()
    for data, line in ((b'{"model":\n {"type": "BPE"', 2), (whole[:5000], None), (b"", 1), (b"[1]", 1),
                       (b"[" * 100_000, 1), (b'{"a": ' + b"9" * 5000 + b"}", 1)):
        file.write_bytes(data)
        assert re.search(rf"{file}(:{line}|:\d+) should be", refusal(Tokenizer.from_pretrained, tmp_path))
    file.write_bytes(b'{\n\n"a": "\xff"}')
    assert f"{file}:3 should be UTF-8, found the byte 0xff" in refusal(Tokenizer.from_pretrained, tmp_path)
    file.write_bytes(whole)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": \n', "utf-8")
    assert f"{tmp_path}/tokenizer_config.json:2 should be a JSON object" in refusal(
        Tokenizer.from_pretrained, tmp_path)


@pytest.mark.parametrize("name", ["tekken.json", "tokenizer.model"])
def test_a_folder_with_another_kind_of_file_says_how_to_convert_it(name, tmp_path):
    (tmp_path / name).write_bytes(b"x")
    message = refusal(Tokenizer.from_pretrained, tmp_path)
    assert f"found only {name}" in message
    assert "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)" in message


@pytest.mark.parametrize("value", [None, 3, "x", [], [3], {"a": 3}, {"a": None}])
@pytest.mark.parametrize("key", ["model", "added_tokens", "pre_tokenizer", "normalizer", "vocab", "merges"])
def test_wrong_types_inside_are_one_sentence(tmp_path, key, value):
    def change(spec):
        (spec["model"] if key in ("vocab", "merges") else spec)[key] = value

    folder = edited(tmp_path, change)
    if key in ("added_tokens", "normalizer") and value in (None, []) or (key, value) == ("merges", []):
        Tokenizer.from_pretrained(folder)  # as good as absent
    else:
        assert "tokenizer.json" in refusal(Tokenizer.from_pretrained, folder)


@pytest.mark.parametrize("key, value", [("type", "WordPiece"), ("type", "Unigram"), ("byte_fallback", True),
                                        ("dropout", 0.1), ("end_of_word_suffix", "</w>"),
                                        ("continuing_subword_prefix", "##")])
def test_other_models_are_refused(tmp_path, key, value):
    refused(tmp_path, lambda spec: spec["model"].update({key: value}), f"model.{key}", repr(value))


def test_other_pre_tokenizers_are_refused(tmp_path):
    split = {"type": "Split", "pattern": {"Regex": SPLIT}, "behavior": "Isolated", "invert": False}
    end = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}

    def sequence(*steps):
        return {"type": "Sequence", "pretokenizers": list(steps)}

    bad = [{"type": "Metaspace"}, sequence(split), sequence(end, split), sequence(),
           sequence(split | {"behavior": "Removed"}, end), sequence({"type": "Punctuation"}, end),
           sequence(split, end | {"add_prefix_space": True}), sequence(sequence(split), end)]
    for pre_tokenizer in bad:
        refused(tmp_path, lambda spec: spec.update(pre_tokenizer=pre_tokenizer),
                "pre_tokenizer should be Split (Isolated) or Digits, then ByteLevel", "'type'")
    for regex in (r"\w+", r"a\b", "^a", "a$", r"\h", "[a-z&&[^b]]", "("):
        spec = sequence(split | {"pattern": {"Regex": regex}}, end)
        refused(tmp_path, lambda whole: whole.update(pre_tokenizer=spec),
                "laid out as transformers" if regex == "(" else r"free of \w, \b, ^, $")


def test_other_normalizers_are_refused(tmp_path):
    both = {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Prepend", "prepend": "_"}]}
    for normalizer in ({"type": "Lowercase"}, {"type": "NFKC"}, both):
        refused(tmp_path, lambda spec: spec.update(normalizer=normalizer),
                f"normalizer should be null or NFC, found {normalizer}")


def test_a_vocabulary_with_strangers_is_refused(tmp_path):
    for token, index, part in [
            ("▁the", 9999, "byte-level"), ("", 9999, "id 9999"), ("zq", 300, "id 300"), ("zq", -1, "id -1"),
            ("zq", "7", "TypeError"), ("<|im_end|>", 5, "the id of '<|im_end|>' should be 5, found 1962")]:
        refused(tmp_path, lambda spec: spec["model"]["vocab"].update({token: index}), part)


def test_merges_of_unknown_tokens_are_refused(tmp_path):
    def message(words, pairs, **model):
        return refusal(Tokenizer.from_pretrained, make(tmp_path, words, pairs, **model))

    assert "model.merges[0]" in message(["ab"], [("a", "q")])
    assert "model.merges[1]" in message(["ab"], [("a", "b"), ("ab", "zz")])
    assert "model.merges[0]" in message(["ab"], [("a", "b")], added_tokens=[added("ab", 256)])
    for wrong in ("a b c", "ab", ["a"]):
        assert f"model.merges[0] should be two ordinary tokens that make a third, found {wrong!r}" in message(
            ["ab"], [], merges=[wrong])
    for wrong in (["a", 3], 3, None):
        assert "laid out as transformers does" in message(["ab"], [], merges=[wrong])


def test_added_tokens_that_depend_on_the_text_around_them_are_refused(tmp_path):
    def message(*tokens):
        return refusal(Tokenizer.from_pretrained, make(tmp_path, [], [], added_tokens=tokens))

    for flag in ("lstrip", "rstrip", "single_word"):
        assert f"an added token should be without ['{flag}']" in message(added("<x>", 256, **{flag: True}))
    assert "an added token" in message(added("", 256))
    assert "id 256 should be that of one token" in message(added("<x>", 256), added("<y>", 256))


def test_an_id_that_the_files_give_twice_differently_is_refused(tmp_path):
    # transformers gives <new> the next free id, whatever the config says.
    folder = make(tmp_path, [], [], added_tokens=[added("<old>", 256)])
    for index, token in (("300", "<new>"), ("257", "<old>")):
        config = {"added_tokens_decoder": {index: added(token, 0)}}
        (folder / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
        own = 257 if token == "<new>" else 256
        message = refusal(Tokenizer.from_pretrained, folder)
        assert f"the id of '{token}' elsewhere should be {own}, found {index}" in message


# ---- chat templates ----------------------------------------------------------------------------------------

def chatting(tmp_path, template=None, **config):
    folder = make(tmp_path / "chat", [], [])
    (folder / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    if template is not None:
        (folder / "chat_template.jinja").write_bytes(template.encode())
    return Tokenizer.from_pretrained(folder)


def test_the_template_file_comes_before_the_config_and_default_before_others(tmp_path):
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "default"}]
    assert chatting(tmp_path, chat_template="config").chat([]) == "config"
    assert chatting(tmp_path, "file", chat_template="config").chat([]) == "file"
    assert chatting(tmp_path, chat_template=named).chat([], tools=[{}]) == "default"


def test_a_folder_without_a_template_is_refused(tmp_path):
    for template in (None, [], [{"name": "tool_use", "template": "x"}], {"a": 1}, 3):
        tokenizer = chatting(tmp_path, chat_template=template)
        assert re.search(f"{tmp_path}/chat should be .* with a chat template", refusal(tokenizer.chat, []))


def test_a_template_that_fails_is_an_input_error(tmp_path):
    for template, part in (("{{ raise_exception('roles ' ~ 3) }}", "roles 3"), ("\n{% if %}", "line 2"),
                           ("{{ nothing.more }}", "'nothing' is undefined"), ("{{ 'a' + 1 }}", "concatenate"),
                           ("{{ messages.append(1) }}", "unsafe"), ("{{ ''.__class__.__mro__ }}", "unsafe")):
        message = refusal(chatting(tmp_path, template).chat, [{"role": "user", "content": "x"}])
        assert part in message and str(tmp_path / "chat") in message


def test_what_a_template_can_use(tmp_path):
    def render(template, messages=(), **variables):
        config = {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}, "pad_token": None}
        return chatting(tmp_path, template, **config).chat(messages, **variables)

    assert render("{{ bos_token }}{{ eos_token }}{{ pad_token is defined }}") == "<s></s>False"
    assert render("{{ bos_token }}", bos_token="<x>") == "<x>"
    assert render("{{ tools is none and documents is none }}|{{ nothing }}|") == "True||"
    assert render("{{ add_generation_prompt }}", generation_prompt=False) == "False"
    assert render("{{ x | tojson }}", x={"b": "<é&'>", "a": 1}) == "{\"b\": \"<é&'>\", \"a\": 1}"
    assert render("{{ x | tojson(indent=1) }}", x=[1]) == "[\n 1\n]"
    assert render("{% for i in [1, 2] %}{% if i == 1 %}{% continue %}{% endif %}{{ i }}{% endfor %}") == "2"
    assert render("{% if true %}\n    {% set a = 1 %}\n{{ a }}\n{% endif %}\nb\n") == "1\nb"
    scope = "{% set a = 1 %}{% generation %}\n{% set a = 2 %}{{ a }} {%- endgeneration %}{{ a }}"
    assert render(scope) == "21"
    dated = chatting(tmp_path, "{{ strftime_now('%d %b %Y') }}")
    assert re.fullmatch(r"\d\d \w{3} 20\d\d", dated.chat([]))
    dated.now = 86400 * (365 * 30 + 0.5)  # set to the start of a run, and kept
    assert dated.chat([]) == "25 Dec 1999"
    assert render("{{ '<' ~ x }}", x="&") == "<&"


def test_keys_whose_value_is_null_are_dropped(tmp_path):
    tokenizer = chatting(tmp_path, "{% for m in messages %}{{ m.keys() | list }}{% endfor %}")
    message = {"role": "assistant", "content": None, "name": "", "tool_calls": None}
    assert tokenizer.chat([message]) == "['role', 'name']" and message["content"] is None
