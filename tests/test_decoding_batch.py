"""A ragged batch: what comes of a prompt is the same alone and beside any others, bit for bit."""

import itertools
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fake_models import FakeLM
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_model

from scspec.decoding import (
    CachedScorer,
    CacheFreeScorer,
    Draws,
    SamplingConfig,
    Turn,
    decode_batch,
    decode_blocks,
    decode_tokens,
    sampling,
    speculative,
)
from scspec.decoding.sampling import COIN, RESIDUAL, TOKEN
from scspec.decoding.verification import Greedy, greedy_ids, largest, verify
from scspec.patching import patch_model
from scspec.sc.knobs import PRESETS

GREEDY = SamplingConfig()
SAMPLED = SamplingConfig(do_sample=True, temperature=0.9, top_k=10, top_p=0.95)
EOS = frozenset({7})

# Prompt lengths and budgets differ, so slots are at different positions and become free at different times.
PROMPTS = [[3, 1, 4, 1, 5], [9], [2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2], [8, 4], [6, 2, 6], [4, 3, 3, 8, 3, 2, 7], [9, 5]]
TURNS = [Turn(ids, 4 + 5 * i % 17, Draws(100 + i)) for i, ids in enumerate(PROMPTS)]


def target_model():
    return FakeLM(seed=1)


def draft_model(noise=0.4):
    return FakeLM(seed=1, noise=noise, noise_seed=2)


def untimed(block):
    return replace(block, draft_time_s=0, verify_time_s=0)


def single(turn):
    """The conversation of one turn."""
    yield turn


def decode_together(models, turns, slots, capacity=64, **arguments):
    """The blocks of each turn, all of them decoded in one batch of `slots`."""
    scorers = [CachedScorer(model, capacity, slots) for model in models]
    found = [[] for _ in turns]
    for index, turn, block in decode_batch(*scorers, map(single, turns), **arguments):
        assert turn == 0
        found[index].append(untimed(block))
    return found


def decode_alone(models, turn, capacity=64, **arguments):
    scorers = [CachedScorer(model, capacity) for model in models]
    own = {"max_new_tokens": turn.max_new_tokens, "draws": turn.draws}
    return [untimed(block) for block in decode_blocks(*scorers, turn.prompt_ids, **own, **arguments)]


@pytest.mark.parametrize("rule", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("eos", [EOS, frozenset()], ids=["eos", "budget"])
def test_a_batch_of_any_size_is_its_prompts_alone(rule, eos):
    models, arguments = (target_model(), draft_model()), {"gamma": 3, "sampling": rule, "eos_token_ids": eos}
    alone = [decode_alone(models, turn, **arguments) for turn in TURNS]
    assert len({len(blocks) for blocks in alone}) > 2
    assert {blocks[-1].stop for blocks in alone} == ({"eos", "budget"} if eos else {"budget"})
    for slots, capacity in itertools.product((1, 2, 3, 5, 9), (64, 512)):
        assert decode_together(models, TURNS, slots, capacity, **arguments) == alone
        assert decode_together(models, TURNS[::-1], slots, capacity, **arguments) == alone[::-1]


@settings(max_examples=60)
@given(
    st.lists(
        st.tuples(st.lists(st.integers(0, 11), min_size=1, max_size=9), st.integers(1, 12), st.integers(0, 9)),
        min_size=1,
        max_size=7,
    ),
    st.integers(1, 5),
    st.integers(1, 5),
    st.sampled_from([0.0, 0.3, 5.0]),
    st.booleans(),
    st.sets(st.integers(0, 11), max_size=3),
    st.integers(1, 40),
)
def test_any_schedule_is_its_prompts_alone(prompts, slots, gamma, noise, do_sample, eos, capacity):
    """A small capacity makes the caches grow in the middle of it."""
    models = target_model(), draft_model(noise)
    turns = [Turn(ids, budget, Draws(key)) for ids, budget, key in prompts]
    arguments = {"gamma": gamma, "sampling": SamplingConfig(do_sample), "eos_token_ids": frozenset(eos)}
    alone = [decode_alone(models, turn, **arguments) for turn in turns]
    assert decode_together(models, turns, slots, capacity, **arguments) == alone


@pytest.mark.parametrize("slots", [1, 3])
@pytest.mark.parametrize("past_end", [0, 5])
@pytest.mark.parametrize("rule", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_without_a_draft_a_batch_is_plain_decoding(rule, past_end, slots):
    """And goes on past the end of each text by as many tokens as asked for, which are not the text's."""
    arguments, turns = {"sampling": rule, "eos_token_ids": EOS}, [replace(turn, past_end=past_end) for turn in TURNS]
    scorer, found, ends = CachedScorer(target_model(), 8, slots), [[] for _ in turns], set()
    for index, _, block in decode_batch(scorer, None, map(single, turns), gamma=0, **arguments):
        found[index].append(block)
    for turn, blocks in zip(turns, found, strict=True):
        prompt = {"prompt_ids": turn.prompt_ids, "draws": turn.draws, "sampling": rule}
        plain = CachedScorer(target_model(), 64)
        text = list(decode_tokens(plain, max_new_tokens=turn.max_new_tokens, eos_token_ids=EOS, **prompt))
        beyond = list(decode_tokens(plain, max_new_tokens=len(text) + past_end, eos_token_ids=frozenset(), **prompt))
        assert [block.emitted for block in blocks] == [(token,) for token in beyond]
        assert [block.kept for block in blocks] == [1] * len(text) + [0] * past_end
        ends.add(blocks[-1].stop)
        assert blocks[-1].stop == ("eos" if text[-1] in EOS else "budget")
        assert not any(block.stop or block.proposed or block.beta for block in blocks[:-1])
    assert ends == {"eos", "budget"}


@pytest.mark.parametrize(("gamma", "drafts", "allowed"), [(0, 1, "an integer >= 1, with"), (2, 0, "0, without")])
def test_no_draft_and_no_proposals_go_together(gamma, drafts, allowed):
    draft = CachedScorer(draft_model(), 8) if drafts else None
    with pytest.raises(ValueError, match=f"gamma is {gamma}; allowed: {allowed}"):
        next(decode_batch(CachedScorer(target_model(), 8), draft, [], gamma=gamma, sampling=GREEDY, eos_token_ids=EOS))


ARMS = {"sc": {"sc_stoc_len": 64}, "float": PRESETS["float"], "sc linear": {"use_sc_attn": False, "sc_lm_head": True}}


@pytest.mark.parametrize("rule", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("arm", ARMS)
def test_a_batch_of_real_arithmetic_is_its_prompts_alone(arm, rule):
    """The draft is the target with layers of another seed's first weights: it agrees sometimes."""
    target = patch_model(tiny_model(), ARMS[arm])
    draft = patch_model(tiny_model(num_hidden_layers=1), ARMS[arm])
    arguments = {"gamma": 3, "sampling": rule, "eos_token_ids": frozenset(range(5))}
    with torch.inference_mode():
        alone = [decode_alone((target, draft), turn, **arguments) for turn in TURNS]
        for slots, capacity in ((1, 512), (2, 64), (3, 512), (5, 64)):
            assert decode_together((target, draft), TURNS, slots, capacity, **arguments) == alone
    assert len({len(blocks) for blocks in alone}) > 2


def test_the_batch_is_cache_free_decoding():
    arguments = {"gamma": 3, "sampling": GREEDY, "eos_token_ids": EOS}
    scorers = [CacheFreeScorer(model, 3) for model in (target_model(), draft_model())]
    found = [[] for _ in TURNS]
    for index, _, block in decode_batch(*scorers, map(single, TURNS), **arguments):
        found[index].append(untimed(block))
    assert found == decode_together((target_model(), draft_model()), TURNS, 2, **arguments)


def talk(first, turns, replies):
    """A conversation whose every prompt is the text so far and one token more."""
    ids = list(first)
    for number in range(turns):
        reply = yield Turn(ids, 6, Draws(number))
        replies.append(reply)
        ids = ids + reply + [number]


def conversations_of(slots, capacity=64):
    models, replies = (target_model(), draft_model()), [[] for _ in range(5)]
    scorers = [CachedScorer(model, capacity, slots) for model in models]
    conversations = [talk([i, 3], turns, replies[i]) for i, turns in enumerate((1, 3, 0, 2, 4))]
    places = [[] for _ in range(5)]
    for index, turn, block in decode_batch(*scorers, conversations, gamma=2, sampling=GREEDY, eos_token_ids=EOS):
        places[index].append((turn, untimed(block)))
    return places, replies, [scorer.cache.capacity for scorer in scorers]


def test_turns_follow_from_replies():
    places, replies, _ = conversations_of(1)
    assert [len(texts) for texts in replies] == [1, 3, 0, 2, 4]
    for texts, blocks in zip(replies, places, strict=True):
        assert [turn for turn, _ in blocks] == sorted(turn for turn, _ in blocks)
        for turn, reply in enumerate(texts):
            kept = [block.emitted[: block.kept] for number, block in blocks if number == turn]
            assert reply == [token for tokens in kept for token in tokens]
    for slots in (2, 3, 5):
        assert conversations_of(slots)[:2] == (places, replies)


def test_caches_grow_when_a_turn_needs_more_room():
    wanted = conversations_of(3)
    assert wanted[2] == [64, 64]
    found = conversations_of(3, capacity=10)
    assert found[:2] == wanted[:2]
    assert found[2][0] > 20


def test_every_slot_holds_its_text_but_its_last_token_and_an_idle_one_nothing():
    scorers = [CachedScorer(model, 64, 3) for model in (target_model(), draft_model())]
    texts = [list(turn.prompt_ids) for turn in TURNS]
    arguments = {"gamma": 4, "sampling": GREEDY, "eos_token_ids": EOS}
    idle = 0
    for index, _, block in decode_batch(*scorers, map(single, TURNS), **arguments):
        texts[index] += block.emitted
        for scorer in scorers:
            held = [scorer.cache.layers[0].tokens[b, :n].tolist() for b, n in enumerate(scorer.cache.lengths)]
            assert texts[index][:-1] in held
            idle += [] in held
    assert idle > 0


@pytest.mark.parametrize("slots", [1, 3])
def test_greedy_fetches_once_a_block_and_once_more_for_bonuses(slots, monkeypatch):
    fetched, cpu = [], torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: fetched.append(tensor.numel()) or cpu(tensor))
    target, draft = target_model(), draft_model(0.1)
    decode_together((target, draft), TURNS, slots, gamma=6, sampling=GREEDY, eos_token_ids=EOS)
    passes = target.fed.count(7)
    bonus_passes = draft.fed.count(1) - 6 * passes - sum(len(turn.prompt_ids) == 2 for turn in TURNS)
    assert fetched.count(slots * (2 * 6 + 3 * 7)) == passes
    assert fetched.count(slots * 2) == bonus_passes > 0
    assert len(fetched) == passes + bonus_passes


class Poisoned(FakeLM):
    """NaN (or what it is told) wherever the last token is 0, as an idle slot's is."""

    bad = float("nan")

    def _row(self, context):
        row = super()._row(context)
        return [self.bad, *row[1:]] if context[-1] == 0 else row


@pytest.mark.parametrize("rule", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("side", ["target", "draft"])
def test_logits_that_are_no_numbers_are_refused_where_a_text_needs_them(side, bad, rule, monkeypatch):
    monkeypatch.setattr(Poisoned, "bad", bad)
    models = [Poisoned(seed=1) if side == "target" else FakeLM(seed=1)]
    models += [Poisoned(seed=1) if side == "draft" else FakeLM(seed=1)]
    arguments = {"gamma": 2, "sampling": rule, "eos_token_ids": frozenset()}
    with pytest.raises(ValueError, match=r"its largest, is (nan|inf); allowed: finite or -inf"):
        decode_together(models, [Turn([5, 0], 4, Draws(0))], 2, **arguments)
    alone = [decode_alone([FakeLM(seed=1)] * 2, turn, **arguments) for turn in TURNS]
    quiet = [i for i, blocks in enumerate(alone) if all(0 not in block.proposed + block.emitted for block in blocks)]
    assert quiet
    assert decode_together(models, [TURNS[i] for i in quiet[:2]], 3, **arguments) == [alone[i] for i in quiet[:2]]


@settings(max_examples=200)
@given(st.lists(st.lists(st.sampled_from([-np.inf, -1.5, 0.0, 0.25, 7.0]), min_size=3, max_size=3), min_size=1))
def test_greedy_rows_are_those_of_the_oracle(rows):
    rows = [row if max(row) > -np.inf else [0.0, *row[1:]] for row in rows]
    logits = torch.tensor([rows])
    ids, peaks = largest(logits)
    wanted = [sampling.warp(np.array(row, np.float32), GREEDY) for row in rows]
    assert ids[0].tolist() == [int(one_hot.argmax()) for one_hot in wanted]
    assert peaks[0].tolist() == [max(row) for row in rows]
    rule = Greedy({0: (1, Draws(0))}, GREEDY)
    for row in rows[1:]:
        rule.propose(torch.tensor([row]))
    if rule.ids:
        verdict = rule.verify(logits)[0]
        assert verdict.margin == [sampling.margin(np.array(row, np.float32)) for row in rows]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_greedy_ids_are_exact_and_never_of_nan(dtype):
    logits = torch.zeros(3, 5000, dtype=dtype)
    logits[0, 3001] = logits[0, 4001] = logits[1, 4999] = 1
    ids = greedy_ids(logits)
    assert ids == [3001, 4999, 0]  # of which float16 has neither of the first two
    assert {type(token) for token in ids} == {int}
    logits[2, 7] = torch.nan
    with pytest.raises(ValueError, match=r"its largest, is nan"):
        greedy_ids(logits)


def test_each_use_of_a_position_has_its_own_draw():
    """Three proposals from position 7, all of them accepted or the third not: what was drawn, and for which use."""
    seen, p, q = [], np.array([0.5, 0.5]), np.array([0.4, 0.6])
    draws = SimpleNamespace(uniform=lambda position, use: seen.append((position, use)) or 0.25)
    assert verify([0, 0, 0], [p] * 4, [q] * 3, 7, draws) == (3, [0, 0, 0, 0])
    assert seen == [(7, COIN), (8, COIN), (9, COIN), (10, TOKEN)]
    seen.clear()
    never = np.array([0.0, 1.0])
    assert verify([0, 0, 0], [p, p, never, p], [q] * 3, 7, draws) == (2, [0, 0, 1])
    assert seen == [(7, COIN), (8, COIN), (9, COIN), (9, RESIDUAL)]


def test_a_row_of_nan_gives_an_id_that_can_be_fed():
    ids, peaks = largest(torch.tensor([[1.0, float("nan"), 2.0]]))
    assert 0 <= ids.item() < 3
    assert peaks.isnan().all()


def test_times_are_shares_of_the_batch(monkeypatch):
    """A clock that moves one second at each look: a text beside another is charged half."""
    ticks = itertools.count()
    monkeypatch.setattr(speculative.time, "perf_counter", lambda: next(ticks))
    arguments = {"gamma": 2, "sampling": GREEDY, "eos_token_ids": frozenset()}
    times = {}
    for slots in (1, 2, 4):
        scorers = [CachedScorer(model, 64, slots) for model in (target_model(), draft_model())]
        blocks = [block for _, _, block in decode_batch(*scorers, map(single, [TURNS[0]] * slots), **arguments)]
        times[slots] = [(block.draft_time_s, block.verify_time_s) for block in blocks[::slots]]
    assert times[1][0] == (2, 2)
    for slots in (2, 4):
        assert times[slots] == [(draft / slots, verify / slots) for draft, verify in times[1]]


class Queued(torch.Tensor):
    """What a device has yet to compute: a host that reads it waits until the device is idle."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function in (torch.Tensor.item, torch.Tensor.cpu, torch.Tensor.tolist):
            DEVICE.now_s = max(DEVICE.now_s, DEVICE.idle_s)
        return super().__torch_function__(function, types, args, kwargs or {})


class QueuedLM(FakeLM):
    """Its forwards return at once, and the device is busy with them for a second a token."""

    def __call__(self, input_ids, **arguments):
        DEVICE.idle_s = max(DEVICE.now_s, DEVICE.idle_s) + input_ids.shape[1]
        return SimpleNamespace(logits=super().__call__(input_ids, **arguments).logits.as_subclass(Queued))


DEVICE = SimpleNamespace(now_s=0.0, idle_s=0.0)


@pytest.mark.parametrize("sampled", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_a_prefill_is_in_no_blocks_times(monkeypatch, sampled):
    """Two turns and a text that needs more room: whatever came before it, a block takes as long as its own passes."""
    monkeypatch.setattr(speculative.time, "perf_counter", lambda: DEVICE.now_s)
    scorers = [CachedScorer(QueuedLM(seed=1, noise=noise), 16) for noise in (0.0, 0.5)]
    arguments = {"gamma": 2, "sampling": sampled, "eos_token_ids": frozenset()}
    conversations = [(turn for turn in turns) for turns in (TURNS[:1], TURNS[2:4])]
    blocks = [block for _, _, block in decode_batch(*scorers, conversations, **arguments)]
    for block in blocks:
        assert block.draft_time_s + block.verify_time_s == 2 + 3 + (block.accepted == 2)


def test_what_does_not_fit_together_is_named():
    scorers = CachedScorer(target_model(), 9, 2), CachedScorer(draft_model(), 9, 3)
    arguments = {"gamma": 1, "sampling": GREEDY, "eos_token_ids": EOS}
    with pytest.raises(ValueError, match="draft has 3 slots; allowed: 2, the target's"):
        next(decode_batch(*scorers, [], **arguments))
    with pytest.raises(ValueError, match=r"^prompt_ids is empty; allowed: at least one token id$"):
        Turn([], 3, Draws(0))
    with pytest.raises(ValueError, match="max_new_tokens is 0"):
        Turn([1], 0, Draws(0))
