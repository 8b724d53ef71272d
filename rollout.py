"""KV-cached sampling, cut into the segments of the two players.

`sample` returns `Rollouts`, the only contract between sampling and learning. Its array `segment` says which
player owns a token; masks, advantages, the kernel's skip list and the transcript are derived from it.

Shapes: B rollouts, T tokens, V vocabulary, K thought segments, P prompts, G rollouts of one prompt.
"""
import re
from dataclasses import dataclass, field, fields
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from attention import Cache
from lib.chat import check_length, closing_tokens
from lib.data import InputError
from lib.tokenizer import Tokenizer
from model import Transformer

BLANK_LINE = re.compile(rb"\n(?:[ \t\r]*\n)+")
BLOCK = 512  # tokens whose probabilities are summed first
MIN_ROWS = 16  # smaller matmuls round differently, and a rollout must not depend on the size of its batch
LIVE_SHARE = 0.75  # below it finished rows are dropped from the batch
LOOK_EVERY = {"cpu": 1, "cuda": 16, "mps": 16}  # tokens between looks at what has ended: a GPU waits
CACHE_BLOCK = 512  # columns by which a cache grows, since few rollouts use all their tokens
EDGE = 8  # newlines that belong to the closing tag, and blanks around an answer; templates write two newlines


def owned_length(segment: Tensor) -> Tensor:
    """[B] columns of segment [B, T] up to and with the last one that is not -1."""
    return (torch.arange(segment.shape[1]) * (segment >= 0)).amax(1) + 1


@dataclass
class Rollouts:
    """`segment` is -1 on prompt, padding, prefilled thought and a closing tag that was forced, 0..K-1 on the
    thought, K on the answer."""
    tokens: Tensor  # [B, T] int64: prompt, prefilled thought, what was sampled, padding (0) on the right
    segment: Tensor  # [B, T] int64
    logprob: Tensor  # [B, T] fp32 of the sampled token at the sampling temperature; 0 where segment is -1
    finished: Tensor  # [B] bool: sampled a stop token (it belongs to the last segment, and is trained)
    closed: Tensor  # [B] bool: the thought was closed, so that the last segment is the answer
    prompt: Tensor  # [B] int64: index into the prompts given
    text: list[list[str]]  # text of each segment, without closing tag and stop token
    prefill: list[str]  # [B] prefilled thought text, without closing tag
    row_steps: int = 0  # rows x decoding steps
    prefilled_tokens: int = 0  # tokens of the distinct prompts, each run once
    # With keep_cache, of each part of the rows: keys and values to fork, column of the first sampled token.
    caches: list[tuple[Cache, int]] = field(default_factory=list)

    @property
    def start(self) -> Tensor:
        """[B] column of each rollout's first sampled token."""
        return (self.segment >= 0).long().argmax(1)

    @property
    def length(self) -> Tensor:
        """[B] columns up to and with the last sampled token."""
        return owned_length(self.segment)

    @property
    def answered(self) -> Tensor:
        """[B] bool: well-formed, that is, a closed thought and a finished answer that is not blank and has at
        most EDGE blanks and newlines around it. They change no verdict, so without a limit they multiply."""
        written = [bool(x.strip()) and len(x) - len(x.strip()) <= EDGE for *_, x in self.text]
        return self.closed & self.finished & torch.tensor(written, dtype=torch.bool)

    @property
    def owners(self) -> tuple[Tensor, Tensor]:
        """(thought, answer), [B, T] bool: the tokens of each player."""
        K = torch.tensor([len(t) for t in self.thoughts])[:, None]  # [B, 1]
        answer = self.closed[:, None] & (self.segment == K)
        return (self.segment >= 0) & ~answer, answer

    @property
    def cut(self) -> Tensor:
        """[B] bool: the closing tag was forced, so what was sampled has a gap."""
        owned = self.segment >= 0
        return (owned[:, 1:] & ~owned[:, :-1]).sum(1) > 1

    @property
    def thoughts(self) -> list[list[str]]:
        """Thought segments of each rollout, without the prefilled text."""
        return [t[:-1] if closed else t for t, closed in zip(self.text, self.closed.tolist())]

    @property
    def answers(self) -> list[str]:
        """Answer of each rollout, '' if it has none."""
        return [t[-1].strip("\n") if ok else "" for t, ok in zip(self.text, self.answered.tolist())]


def mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's finalizer (Steele et al. 2014): 64 bits in, 64 well-mixed bits out."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def uniforms(*counters) -> np.ndarray:
    """One float64 in [0, 1) for each tuple of broadcast integer counters, the same on every machine. The
    randomness of a rollout depends only on its indices, not on batch, rank or order."""
    h = np.zeros((1,), np.uint64)
    for c in counters:  # 0 is a fixed point of `mix`, hence the golden-ratio step
        h = mix((h ^ np.asarray(c, np.int64).astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15))
    return (h >> np.uint64(11)).astype(np.float64) * 2.0 ** -53


@torch.no_grad()
def sample_token(logits: Tensor, u: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Inverse CDF. logits [B, V], u [B] float64 -> token [B], its log-prob [B] fp32.

    First a block of the vocabulary, then a token in it, so that the cumulative sums are short and float64 is
    cheap: one fp32 sum over V = 152k stalls in its tail, and u can select a token of probability zero."""
    if logits.device.type == "mps":  # it has no float64
        return tuple(x.to(logits.device) for x in sample_token(logits.cpu(), u, temperature))
    logprob = torch.log_softmax(logits.float() / temperature, -1)  # [B, V]
    (B, V), first = logprob.shape, 0
    p = logprob.new_zeros(B, -(-V // BLOCK) * BLOCK) if V > BLOCK else torch.empty_like(logprob)
    torch.exp(logprob, out=p[:, :V])
    if V > BLOCK:
        blocks = p.view(B, -1, BLOCK)
        block, u = invert_cdf(blocks.sum(-1), u)
        p, first = blocks[torch.arange(B, device=block.device), block], block * BLOCK
    token = (first + invert_cdf(p, u)[0]).clamp_(max=V - 1)  # NaN gives any index
    return token, logprob.gather(1, token[:, None])[:, 0]


def invert_cdf(p: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """p [B, n] >= 0, not all 0, u [B] float64 in [0, 1) -> index [B] of the interval that holds u times their
    sum, never one of length 0, and where in it, as a share. After a NaN any index; such a step is skipped."""
    cdf = p.double().cumsum(-1)  # [B, n]
    x = torch.minimum(u * cdf[:, -1], cdf[:, -1].nextafter(u.new_zeros(())))[:, None]  # below the last sum
    index = torch.searchsorted(cdf, x, right=True).clamp_(max=p.shape[1] - 1)  # [B, 1]
    width = p.gather(1, index).double()
    return index[:, 0], (1 - (cdf.gather(1, index) - x) / width).clamp(0, 1)[:, 0]


class Cut(NamedTuple):
    """Thoughts that are open after `after` sampled tokens get the tokens `tag`."""
    after: int
    tag: list[int]
    tokenizer: Tokenizer
    closed: list[bool] = []  # [B]: before anything is sampled

    def rows(self, tokens: Tensor) -> Tensor:
        """[B] bool: whose thought is open in the first of the sampled tokens [B, N]."""
        close = self.tokenizer.tags[1].encode()
        texts = [b"".join(map(self.tokenizer.token_bytes, row)) for row in tokens[:, :self.after].tolist()]
        return torch.tensor([not c and close not in text for c, text in zip(self.closed, texts)])


def thought_cut(tokenizer: Tokenizer, thought_tokens: int, max_new_tokens: int) -> Cut | None:
    """The Cut of --thought-tokens, None for 0. Raises InputError if no token of an answer fits after it."""
    tag = closing_tokens(tokenizer)
    if thought_tokens and thought_tokens + len(tag) >= max_new_tokens:
        raise InputError(f"--thought-tokens {thought_tokens} and the {len(tag)} tokens of the closing tag "
                         f"leave no room for an answer in --max-new-tokens {max_new_tokens}")
    return Cut(thought_tokens, tag, tokenizer) if thought_tokens else None


@torch.no_grad()
def sample(model: Transformer, prompts: list[list[int]], tokenizer: Tokenizer, *, group_size: int = 1,
           max_new_tokens: int = 128, temperature: float = 1.0, seed: int = 0, step: int = 0,
           prompt_ids: list[int] | None = None, prefill: list[str] | None = None, in_answer: bool = False,
           thought_tokens: int = 0, max_rows: int = 512, keep_cache: bool = False) -> Rollouts:
    """Samples group_size rollouts of each prompt (token ids, up to and with the opening tag).

    prompt_ids: a number for each prompt that seeds its randomness (default: its index). prefill: text at the
    start of each thought; if it closes the thought, only the answer is sampled. in_answer: the prompt itself
    has closed the thought. thought_tokens: a thought that is open after so many is closed by force; 0: none.
    max_rows bounds the rows decoded at once (memory, not results). Raises InputError for a prompt that does
    not fit into the model's context."""
    prefill = [""] * len(prompts) if prefill is None else prefill
    prompt_ids = list(range(len(prompts))) if prompt_ids is None else prompt_ids
    full = [p + tokenizer.encode(text, special=True, inside=True) for p, text in zip(prompts, prefill)]
    for i, p in enumerate(full):
        check_length(model.config.max_position_embeddings, len(p), max_new_tokens, f"prompt {i}")
    parts, cut = [], thought_cut(tokenizer, thought_tokens, max_new_tokens)
    per_part = max(1, max_rows // group_size)  # prompts decoded at once
    with model.cast_once():
        for i in range(0, len(full), per_part):
            part = slice(i, i + per_part)
            u = uniforms(seed, step, np.asarray(prompt_ids[part])[:, None, None],
                         np.arange(group_size)[:, None], np.arange(max_new_tokens))  # [P, G, N]
            cache, states, ran = prefill_group(model, full[part], group_size)
            first = cache.length  # column of the first sampled token
            archive = model.new_cache(len(states), first) if keep_cache else None
            closed = [in_answer or tokenizer.tags[1] in t for t in prefill[part] for _ in range(group_size)]
            part_cut = cut and cut._replace(closed=closed)
            sampled = decode(model, cache, states, torch.from_numpy(u).flatten(0, 1), temperature, archive,
                             part_cut)
            parts.append(assemble(sampled, full[part], i, prefill[part], in_answer, group_size, tokenizer,
                                  model.stop_ids, part_cut))
            parts[-1].prefilled_tokens, parts[-1].caches = ran, [(archive, first)] * keep_cache
    return join(parts)


def left_pad(rows: list, device) -> tuple[Tensor, Tensor]:
    """Token rows padded on the left, [n, T], and which tokens are real, [n, T] bool."""
    tokens = pad_sequence([torch.tensor(row) for row in rows], True, -1, "left").to(device)
    return tokens.clamp(min=0), tokens >= 0


def prefill_group(model: Transformer, prompts: list[list[int]], G: int) -> tuple[Cache, Tensor, int]:
    """Runs each distinct prompt through the model once, left-padded, and copies its cache row for its G
    rollouts. -> cache of B rows, last states [B, D], tokens run."""
    distinct = {p: i for i, p in enumerate(dict.fromkeys(map(tuple, prompts)))}
    tokens, real = left_pad([*distinct], model.device)  # [U, T]
    cache = model.new_cache(*tokens.shape)
    states = model.hidden(tokens, real, cache)[:, -1]  # [U, D]
    row = torch.tensor([distinct[tuple(p)] for p in prompts]).repeat_interleave(G).to(model.device)  # [B]
    return cache.rows(row), states[row], sum(map(len, distinct))


def decode(model: Transformer, cache: Cache, states: Tensor, u: Tensor, temperature: float,
           archive: Cache | None = None, cut: Cut | None = None) -> tuple[Tensor, Tensor, Tensor, int]:
    """Samples at most N tokens for each of B rows, from u [B, N] float64. Finished rows leave the batch.
    -> tokens [B, N], log-probs [B, N] (0 for a forced tag), length [B] (stop token included), row-steps."""
    (B, N), device, every = u.shape, model.device, LOOK_EVERY[model.device.type]
    u = u.to("cpu" if device.type == "mps" else device)
    out = torch.zeros(B, N, dtype=torch.long, device=device)
    logprob = torch.zeros(B, N, device=device)
    length = torch.zeros(B, dtype=torch.long, device=device)
    stop = torch.tensor(model.stop_ids, device=device)
    live = torch.arange(max(B, MIN_ROWS), device=device) % B  # [rows] rollout of each row; repeats agree
    running = torch.ones_like(live, dtype=torch.bool)  # [rows]
    if B < MIN_ROWS:
        cache, states = cache.rows(live), states[live]
    row_steps, is_cut = 0, None
    for t in range(N):
        token, lp = sample_token(model.exact_logits(states), u[live.to(u.device), t], temperature)  # [rows]
        stops = (token[:, None] == stop).any(1)
        if cut is not None and 0 <= t - cut.after < len(cut.tag):
            is_cut = cut.rows(out).to(device) if t == cut.after else is_cut  # [B]
            forced, tag = is_cut[live], cut.tag[t - cut.after]
            token, lp, stops = token.masked_fill(forced, tag), lp.masked_fill(forced, 0.0), stops & ~forced
        out[live, t], logprob[live, t] = token.where(running, 0), lp.where(running, 0.0)
        length[live] += running
        running = running & ~stops
        last = t == N - 1
        if last or t % every == every - 1:
            count = int(running.sum())
            last, shrink = last or count == 0, max(count, MIN_ROWS) < LIVE_SHARE * len(live)
            if archive is not None and (last or shrink):
                archive_rows(archive, cache, live)  # before rows leave; forks ignore what is past a row's end
            if last:
                break
            if shrink:
                keep = running.argsort(descending=True, stable=True)[:max(count, MIN_ROWS)]
                cache.keep(keep)
                live, token, running = live[keep], token[keep], running[keep]
        row_steps += len(live)
        if cache.length == cache.valid.shape[1]:
            cache.resize(cache.length + min(N - t, CACHE_BLOCK), torch.arange(len(live), device=device))
        states = model.hidden(token[:, None], cache=cache)[:, 0]  # [rows, D]
    return out.cpu(), logprob.cpu(), length.cpu(), row_steps


def archive_rows(archive: Cache, cache: Cache, live: Tensor) -> None:
    """Copies the batch's rows to their places in the archive."""
    n, before = cache.length, archive.valid.shape[1]
    if n > before:
        archive.resize(n, torch.arange(len(archive.valid), device=live.device))
    for kept, tensors in ((archive.k, cache.k), (archive.v, cache.v)):
        for x, new in zip(kept, tensors):
            x[:, :, before:] = 0  # rows that have left; a masked NaN would still spread
            x[live, :, :n] = new[:, :, :n]
    archive.valid[live, :n] = cache.valid[:, :n]
    archive.length = n


def assemble(sampled: tuple, prompts: list[list[int]], first: int, prefill: list[str], in_answer: bool,
             G: int, tokenizer: Tokenizer, stop_ids: list[int], cut: Cut | None = None) -> Rollouts:
    """Rollouts from prompts and what `decode` sampled, cut into segments."""
    (out, sampled_logprob, length, row_steps), close = sampled, tokenizer.tags[1]
    B, lengths = len(out), length.tolist()
    T = max(len(prompts[b // G]) + lengths[b] for b in range(B))
    tokens, segment = torch.zeros(B, T, dtype=torch.long), torch.full((B, T), -1)
    logprob, closed, texts = torch.zeros(B, T), torch.zeros(B, dtype=torch.bool), []
    cut_rows = cut.rows(out) & (length > cut.after) if cut else torch.zeros(B, dtype=torch.bool)
    for b, n in enumerate(lengths):
        p, new, before = len(prompts[b // G]), out[b, :n], prefill[b // G]
        tokens[b, :p], tokens[b, p:p + n] = torch.tensor(prompts[b // G]), new
        logprob[b, p:p + n] = sampled_logprob[b, :n]
        ids, text, closed[b] = split_segments(new.tolist(), in_answer or close in before, tokenizer, stop_ids)
        segment[b, p:p + n] = torch.tensor(ids)
        if cut_rows[b]:  # the tag is nobody's, and newlines after it are the answer's
            segment[b, p + cut.after:p + cut.after + len(cut.tag)] = -1
            segment[b, p + cut.after + len(cut.tag):p + n] = len(text) - 1
        texts.append(text)
    finished = torch.isin(out.gather(1, length[:, None] - 1)[:, 0], torch.tensor(stop_ids))
    begun = [prefill[b // G].partition(close)[0] for b in range(B)]
    prompt = torch.arange(B) // G + first
    return Rollouts(tokens, segment, logprob, finished, closed, prompt, texts, begun, row_steps)


def split_segments(tokens: list[int], closed: bool, tokenizer: Tokenizer, stop_ids: list[int]):
    """-> segment of each token, text of each segment, whether the thought is closed.

    Boundaries are found on the text, because the closing tag and blank lines are tokenised differently from
    place to place. A token belongs to the segment that holds its first byte."""
    pieces = [b"" if t in stop_ids else tokenizer.token_bytes(t) for t in tokens]
    whole = b"".join(pieces)
    # With the newlines after the tag, since some tokens hold both.
    tag = None if closed else re.search(re.escape(tokenizer.tags[1]).encode() + rb"\n{0,%d}" % EDGE, whole)
    closed = closed or tag is not None
    thought = tag.start() if tag else 0 if closed else len(whole)  # bytes of thought before the tag
    # A blank line ends a segment if the thought has text on both sides of it: no segment is empty, and the
    # closing tag joins the last one.
    starts = [0] + [m.end() for m in BLANK_LINE.finditer(whole, 0, thought)
                    if whole[:m.start()].strip() and whole[m.end():thought].strip()]
    if tag:
        starts.append(tag.end())
    first_byte = np.cumsum([0] + [len(p) for p in pieces])[:-1]  # [N]
    ids = np.searchsorted(starts, first_byte, side="right") - 1
    if len(pieces) and tokens[-1] in stop_ids:
        ids[-1] = len(starts) - 1  # the stop token has no bytes; it ends the last segment
    ends = [*starts[1:], len(whole)]
    if tag:
        ends[-2] = thought  # a judge of the thought does not read the tag
    return ids.tolist(), [whole[a:b].decode("utf-8", "replace") for a, b in zip(starts, ends)], closed


def join(parts: list[Rollouts]) -> Rollouts:
    """One Rollouts from several parts; an empty one from none, for a rank without a prompt."""
    if not parts:
        ids, flags = torch.zeros(0, 1, dtype=torch.long), torch.zeros(0, dtype=torch.bool)
        return Rollouts(ids, ids, ids.float(), flags, flags, ids[:, 0], [], [])
    T = max(p.tokens.shape[1] for p in parts)
    fill = {"tokens": 0, "segment": -1, "logprob": 0.0}
    joined = {}
    for f in fields(Rollouts):
        values = [getattr(p, f.name) for p in parts]
        if f.name in fill:
            values = [torch.nn.functional.pad(v, (0, T - v.shape[1]), value=fill[f.name]) for v in values]
        if isinstance(values[0], Tensor):
            joined[f.name] = torch.cat(values)
        else:  # lists are chained, counts summed
            joined[f.name] = sum(values, [] if isinstance(values[0], list) else 0)
    return Rollouts(**joined)


@torch.no_grad()
def force_answers(model: Transformer, rollouts: Rollouts, tokenizer: Tokenizer, points: list[tuple[int, int]],
                  *, samples: int, max_new_tokens: int, temperature: float, seed: int, step: int,
                  prompt_ids: list[int], max_rows: int = 512) -> tuple[list[list[str]], int]:
    """Closes thoughts early and samples answers: `samples` for each point (rollout, number of its thought
    tokens kept; sorted by rollout), '' for one without an end. The cache of keep_cache is forked at each
    point, so only the closing tag is prefilled. -> answers, extra tokens sampled."""
    closing = closing_tokens(tokenizer)
    sizes = np.cumsum([0] + [len(cache.valid) for cache, _ in rollouts.caches])  # first row of each part
    answers, extra = [], 0
    per_part = max(1, max_rows // samples)
    group = len(rollouts.prompt) // max(1, len(prompt_ids))
    with model.cast_once():
        for number, (cache, first) in enumerate(rollouts.caches):
            mine = [p for p in points if sizes[number] <= p[0] < sizes[number + 1]]
            for i in range(0, len(mine), per_part):
                row, kept = (torch.tensor(x) for x in zip(*mine[i:i + per_part]))  # [F]
                fork = cache.rows((row - sizes[number]).to(model.device), len(closing) + max_new_tokens)
                column = torch.arange(fork.valid.shape[1])
                fork.valid &= (column < first + kept[:, None]).to(model.device)  # [F, S]
                tag = torch.tensor([closing] * len(row), device=model.device)
                states = model.hidden(tag, cache=fork)[:, -1]  # [F, D]
                again = torch.arange(len(row), device=model.device).repeat_interleave(samples)
                u = uniforms(seed, step, np.asarray(prompt_ids)[(row // group).numpy()][:, None, None],
                             (row % group).numpy()[:, None, None], kept.numpy()[:, None, None],
                             np.arange(samples)[:, None], np.arange(max_new_tokens))  # [F, samples, N]
                out, _, length, _ = decode(model, fork.rows(again), states[again],
                                           torch.from_numpy(u).flatten(0, 1), temperature)
                whole = [o[:n].tolist() for o, n in zip(out, length.tolist())]
                texts = [tokenizer.decode(o[:-1]) if o[-1] in model.stop_ids else "" for o in whole]
                answers += [texts[j:j + samples] for j in range(0, len(texts), samples)]
                extra += int(length.sum())
    return answers, extra
