"""Speculative decoding: a draft proposes gamma tokens, one target pass verifies them, a block is emitted.

Leviathan et al., 2023 (arXiv 2211.17192) and Chen et al., 2023 (arXiv 2302.01318); `p` is the target's
distribution, `q` the draft's. The emitted text has the target's distribution; greedy, it is the target's own
text.

The token at absolute position i takes its TOKEN draw wherever it comes from (proposal, plain sampling,
bonus). So a draft equal to its target emits exactly the text of plain sampling.

Without a draft and with gamma 0 a block is one token of the target's: plain decoding, of many texts at once.

Texts are decoded side by side, one a slot, and each accepts its own number of tokens. All slots are fed in step: one
without a text gets `IDLE_TOKEN` and is put back. With models that keep the contract no text notices its neighbours.
"""

import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .request import Turn
from .sampling import Draws, SamplingConfig
from .scoring import Scorer
from .verification import Greedy, Sampled, Verdict

IDLE_TOKEN = 0

Conversation = Generator[Turn, list[int], None]
"""Yields its turns; it is sent the new token ids of each one before it says what comes next."""


@dataclass(frozen=True)
class Block:
    """One target pass, as docs/architecture.md defines it in "Seam 2"; `proposed` are the gamma token ids.

    The times are this text's share of the batch's: divided by the number of texts decoded side by side.
    """

    start: int
    proposed: tuple[int, ...]
    accepted: int
    emitted: tuple[int, ...]
    kept: int
    stop: str | None
    beta: tuple[float, ...]
    margin: tuple[float, ...]
    draft_time_s: float
    verify_time_s: float


def decode_batch(
    target: Scorer,
    draft: Scorer | None,
    conversations: Iterable[Conversation],
    *,
    gamma: int,
    sampling: SamplingConfig,
    eos_token_ids: frozenset[int],
) -> Iterator[tuple[int, int, Block]]:
    """Yields (index of the conversation, index of the turn, Block) as blocks come; those of a conversation in order.

    As many conversations as the scorers have slots are decoded at once, and a free slot takes the next one. A
    conversation's blocks depend on itself alone. Whenever it yields, both scorers hold all tokens of every text but
    the last one emitted. A text that needs more room than a scorer has makes it take a new cache, and what the other
    slots held is fed again, to the same bits. `draft` is None if and only if `gamma` is 0. Raises ValueError for the
    one without the other, if the scorers have different numbers of slots, and at the first pass if the models have
    different vocabularies.
    """
    if (draft is None) != (gamma == 0):
        allowed = "0, without a draft" if draft is None else "an integer >= 1, with a draft"
        raise ValueError(f"gamma is {gamma}; allowed: {allowed}")
    if draft and target.slots != draft.slots:
        raise ValueError(f"draft has {draft.slots} slots; allowed: {target.slots}, the target's")
    batch = _Batch(target, draft, enumerate(conversations), gamma, sampling, eos_token_ids)
    while batch.refill():
        blocks = batch.decode_block()
        for slot, text in batch.texts.items():
            yield text.conversation, text.turn, blocks[slot]


def decode_blocks(
    target: Scorer,
    draft: Scorer,
    prompt_ids: Sequence[int],
    *,
    max_new_tokens: int,
    gamma: int,
    sampling: SamplingConfig,
    eos_token_ids: frozenset[int],
    draws: Draws,
) -> Iterator[Block]:
    """Yields one Block per target pass until EOS or the budget: `decode_batch` of one turn."""
    conversations = [one_turn(Turn(prompt_ids, max_new_tokens, draws))]
    blocks = decode_batch(target, draft, conversations, gamma=gamma, sampling=sampling, eos_token_ids=eos_token_ids)
    for _, _, block in blocks:
        yield block


def one_turn(turn: Turn) -> Conversation:
    """The conversation of one turn, whatever the reply."""
    yield turn


def check_widths(target_size: int, draft_size: int) -> None:
    """Raises ValueError for vocabularies of different sizes."""
    if target_size != draft_size:
        raise ValueError(f"draft has a vocabulary of {draft_size}; allowed: {target_size}, the target's")


@dataclass
class _Text:
    """A turn of a conversation while a slot decodes it: `sequence` is prompt and emitted tokens.

    `end` is the budget's until the text has ended, then the text's; `past_end` tokens later the turn stops.
    """

    conversation: int
    source: Conversation
    turn: int
    sequence: list[int]
    end: int
    draws: Draws
    past_end: int
    reply: list[int] = field(default_factory=list)
    ended: str | None = None

    @property
    def stop(self) -> str | None:
        """Why the text has ended, once the tokens past its end are there too."""
        return self.ended if len(self.sequence) >= self.end + self.past_end else None

    def extend(self, emitted: list[int], eos_token_ids: frozenset[int]) -> int:
        """Append a block's tokens and return how many of them are the text's: none past its end."""
        kept = 0 if self.ended else min(len(emitted), self.end - len(self.sequence))
        self.sequence += emitted
        self.reply += emitted[:kept]
        if not eos_token_ids.isdisjoint(emitted[:kept]):
            self.ended, self.end = "eos", len(self.sequence)
        elif len(self.sequence) >= self.end:
            self.ended = self.ended or "budget"
        return kept


@dataclass
class _Batch:
    """What `decode_batch` works on; `texts` maps each slot in use to its text."""

    target: Scorer
    draft: Scorer | None
    waiting: Iterator[tuple[int, Conversation]]
    gamma: int
    sampling: SamplingConfig
    eos_token_ids: frozenset[int]
    texts: dict[int, _Text] = field(default_factory=dict)

    @property
    def scorers(self) -> list[Scorer]:
        return [self.target] if self.draft is None else [self.target, self.draft]

    def refill(self) -> bool:
        """Give each free slot its conversation's next turn or another conversation; whether any text is left."""
        for slot in range(self.target.slots):
            if slot not in self.texts or self.texts[slot].stop:
                text = _next_text(self.texts.pop(slot, None), self.waiting)
                for scorer in self.scorers:
                    self._admit(scorer, slot, text)
                if text:
                    self.texts[slot] = text
        return bool(self.texts)

    def decode_block(self) -> dict[int, Block]:
        """The block of each slot in use, after one pass over all slots; texts extended, scorers rolled back to them."""
        places = {slot: (len(text.sequence), text.draws) for slot, text in self.texts.items()}
        rule = (Sampled if self.sampling.do_sample else Greedy)(places, self.sampling)
        began_s, drafting = time.perf_counter(), _Stopwatch(self.scorers[-1].device)
        ids, width = self._propose(rule)
        drafting.stop()
        logits = self.target.feed(ids, self.gamma + 1)
        check_widths(logits.shape[-1], width or logits.shape[-1])
        verdicts = rule.verify(logits)
        verified_s = time.perf_counter()
        emitted = {slot: _until_eos(verdict.emitted, self.eos_token_ids) for slot, verdict in verdicts.items()}
        full = [slot for slot, tokens in emitted.items() if len(tokens) > self.gamma]
        if full and self.draft:  # the bonus position has a beta too, and q there asks for the last proposal
            rule.add_bonus(self.draft.feed(ids[:, -1:], 1)[:, 0], full)
        ingesting_s, drafting_s = time.perf_counter() - verified_s, drafting.elapsed_s()
        times_s = drafting_s + ingesting_s, verified_s - began_s - drafting_s
        blocks = {slot: self._block(slot, verdicts[slot], emitted[slot], rule, times_s) for slot in self.texts}
        self._roll_back()
        return blocks

    def _admit(self, scorer: Scorer, slot: int, text: _Text | None) -> None:
        """Make a slot hold all of a text but its last token; without a text, nothing."""
        if text and scorer.reserve(text.end + text.past_end + self.gamma):
            for other, held in self.texts.items():
                scorer.prefill(other, held.sequence[:-1])
        scorer.prefill(slot, text.sequence[:-1] if text else [])

    def _propose(self, rule: Greedy | Sampled) -> tuple[torch.Tensor, int | None]:
        """Each slot's last token and its proposals, int64 (slots, gamma + 1), and the size of a draft's vocabulary."""
        draft = self.scorers[-1]  # the target where there is none: then gamma is 0, and nothing is asked of it
        slots, device, width = range(self.target.slots), draft.device, None
        last = [self.texts[slot].sequence[-1] if slot in self.texts else IDLE_TOKEN for slot in slots]
        ids = [torch.tensor(last, device=device)[:, None]]
        for _ in range(self.gamma):
            logits = draft.feed(ids[-1], 1)[:, 0]
            width = logits.shape[-1]
            ids.append(rule.propose(logits).to(device))
        return torch.cat(ids, 1), width

    def _block(
        self, slot: int, verdict: Verdict, emitted: list[int], rule: Greedy | Sampled, times_s: tuple[float, float]
    ) -> Block:
        text = self.texts[slot]
        start = len(text.sequence)
        kept = text.extend(emitted, self.eos_token_ids)
        return Block(
            start=start,
            proposed=tuple(verdict.proposed),
            accepted=verdict.accepted,
            emitted=tuple(emitted),
            kept=kept,
            stop=text.stop,
            beta=tuple(rule.beta(p, q) for p, q, _ in zip(verdict.p, verdict.q, emitted, strict=False)),
            margin=tuple(verdict.margin[: len(emitted)]),
            draft_time_s=times_s[0] / len(self.texts),
            verify_time_s=times_s[1] / len(self.texts),
        )

    def _roll_back(self) -> None:
        for slot in range(self.target.slots):
            held = len(self.texts[slot].sequence) - 1 if slot in self.texts else 0
            for scorer in self.scorers:
                scorer.rollback(slot, held)


class _Stopwatch:
    """How long the work takes that is given to `device` from now until `stop`.

    A CUDA device measures it itself, because the host only queues the work; then `elapsed_s` may be asked once the
    host has waited for something queued after `stop`.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.began = self._now()

    def stop(self) -> None:
        self.ended = self._now()

    def elapsed_s(self) -> float:
        if self.device.type == "cuda":
            return float(self.began.elapsed_time(self.ended)) / 1e3
        return float(self.ended - self.began)

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event


def _next_text(previous: _Text | None, waiting: Iterator[tuple[int, Conversation]]) -> _Text | None:
    """The next turn of the conversation of `previous`, else the first of the next conversation that has any."""
    text = previous and _ask(previous.conversation, previous.source, previous.turn + 1, previous.reply)
    while text is None:
        upcoming = next(waiting, None)
        if upcoming is None:
            return None
        text = _ask(*upcoming, 0, None)
    return text


def _ask(conversation: int, source: Conversation, turn: int, reply: list[int] | None) -> _Text | None:
    try:
        asked = next(source) if reply is None else source.send(reply)
    except StopIteration:
        return None
    sequence = list(asked.prompt_ids)
    end = len(sequence) + asked.max_new_tokens
    return _Text(conversation, source, turn, sequence, end, asked.draws, asked.past_end)


def _until_eos(emitted: list[int], eos_token_ids: frozenset[int]) -> list[int]:
    """`emitted` up to and including its first EOS."""
    for i, token in enumerate(emitted):
        if token in eos_token_ids:
            return emitted[: i + 1]
    return emitted
