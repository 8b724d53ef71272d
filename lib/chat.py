"""Messages in a folder's chat template, as tokens: what comes before a thought, and what ends a turn."""
import re

from lib.data import InputError, expect
from lib.folder import notice
from lib.tokenizer import Tokenizer

OPEN, CLOSE = "<think>\n", "</think>"  # of most models, and of the embedded world; see Tokenizer.tags
BEFORE, MESSAGE = "\ue000answer\ue000", "\ue000message\ue000"  # private-use marks to find text in a template


def render_prompt(tokenizer: Tokenizer, text: str, after_answer: bool) -> str:
    """A user message in the chat template. after_answer: only what follows the model's answer before
    it. The template is asked to think, in the two usual ways, unless template_args says otherwise."""
    system = [{"role": "system", "content": tokenizer.system}] * bool(tokenizer.system)
    turns = [{"role": "user", "content": "."}, {"role": "assistant", "content": BEFORE}] * after_answer
    variables = {"enable_thinking": True, "thinking": True} | tokenizer.template_args
    whole = tokenizer.chat([*system, *turns, {"role": "user", "content": text}], **variables)
    if tokenizer.system.strip() not in whole:
        raise InputError(f"{tokenizer.folder}: the chat template drops the system prompt of --system")
    _, found, rest = whole.partition(BEFORE)
    if after_answer and not found:
        raise InputError(f"{tokenizer.folder}: the chat template drops the answer before a user's message")
    return rest if after_answer else whole


def unused_mark(text: str) -> str:
    """A private-use character that is not in the text, for Tokenizer.hide_added."""
    return next(char for char in map(chr, range(0xE001, 0xF900)) if char not in text)


def encode_prompt(tokenizer: Tokenizer, text: str, closed: bool = False,
                  after_answer: bool = False) -> list[int]:
    """Tokens of a user message in the folder's chat template, up to and with the opening tag.

    closed: followed by an empty thought. after_answer: the tokens that continue a conversation after the
    model's answer, whose stop token is missing. Special tokens in the message are encoded as plain text, so
    that a prompt cannot inject template tokens. Raises InputError if the template drops the message, changes
    its special tokens, or does not leave exactly one thought open."""
    (opening, closing), mark = tokenizer.tags, unused_mark(text)
    hidden = tokenizer.hide_added(text, mark)
    whole = render_prompt(tokenizer, hidden, after_answer)
    _, found, end = render_prompt(tokenizer, MESSAGE, after_answer).rpartition(MESSAGE)
    if not found:
        raise InputError(f"{tokenizer.folder}: the chat template drops the user's message")
    unopened = re.sub(re.escape(opening) + r"\s*\Z", "", end)
    if not whole.endswith(end) or opening in unopened or closing in unopened:
        raise InputError(f"{tokenizer.folder}: the chat template should open one thought after the message "
                         f"(see --template-args), found a prompt that ends in {whole[-60:]!r}")
    plain = hidden.replace(mark, "")
    if plain != hidden and render_prompt(tokenizer, plain, after_answer) != whole.replace(mark, ""):
        raise InputError(f"{tokenizer.folder}: the chat template changes special tokens in a message, found "
                         f"the message {text[:200]!r}")
    whole += f"{opening}\n" * (unopened == end)
    whole = whole.rstrip() + f"\n\n{closing}\n\n" if closed else whole
    return tokenizer.encode(whole, special=True, inside=after_answer, hidden_by=mark)


def check_length(room: int, tokens: int, max_new_tokens: int, name: str) -> None:
    """Raises InputError if a prompt and its new tokens exceed a context of `room` tokens."""
    if tokens + max_new_tokens > room:
        raise InputError(f"{name} has {tokens} tokens and {max_new_tokens} more may follow "
                         f"(--max-new-tokens), but the model's context holds {room}")


def closing_tokens(tokenizer: Tokenizer) -> list[int]:
    """Tokens of a closing tag that is forced."""
    return tokenizer.encode(tokenizer.tags[1] + "\n\n", special=True, inside=True)


def end_of_turn(tokenizer: Tokenizer) -> int | None:
    """The added token that the chat template writes after an answer, None without one. Raises InputError if
    the template drops the answer."""
    answer = "answer 40917"
    messages = [{"role": "user", "content": "question"}, {"role": "assistant", "content": answer}]
    text = tokenizer.chat(messages, generation_prompt=False)
    expect(answer in text, f"{tokenizer.folder}: the chat template", "one that renders answers", text)
    after = tokenizer.encode(text.rpartition(answer)[2].lstrip(), special=True)
    return after[0] if after and after[0] in tokenizer.added.values() else None


def add_end_of_turn(model, tokenizer: Tokenizer) -> None:
    """Adds end_of_turn to model.stop_ids. A base model that was fine-tuned to chat often keeps the old
    eos_token_id, and would then never stop."""
    token = end_of_turn(tokenizer)
    if token is None or token in model.stop_ids:
        return
    model.stop_ids.append(token)
    model.generation["eos_token_id"] = [*model.stop_ids]  # saved with the trained model
    notice(f"{tokenizer.folder.resolve()}: the chat template ends an answer with "
           f"{tokenizer.decode([token])!r}, which is now a stop token; eos_token_id does not name it")
