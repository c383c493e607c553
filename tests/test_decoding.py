"""Speculative and plain decoding, cached and cache-free, on a fake model that sees its whole context."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from fake_models import FakeLM
from hypothesis import given, settings
from hypothesis import strategies as st

from scspec.decoding import (
    Block,
    CachedScorer,
    Draws,
    SamplingConfig,
    SpecDecodeStats,
    decode_blocks,
    generate,
    generate_autoregressive,
    generate_cached,
)
from scspec.decoding.request import Request
from scspec.decoding.sampling import TOKEN

PROMPT = torch.tensor([[3, 1, 4, 1, 5]])
WARPED = {"do_sample": True, "temperature": 0.9, "top_k": 10, "top_p": 0.95}
MODES = [{}, WARPED]
GAMMAS = range(1, 9)


def target_model():
    return FakeLM(seed=1)


def draft_model(noise=0.4):
    """Agrees with the target often, not always."""
    return FakeLM(seed=1, noise=noise, noise_seed=2)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def untimed(blocks):
    return [replace(block, draft_time_s=0, verify_time_s=0) for block in blocks]


def new_ids(sequence):
    return sequence[0, PROMPT.shape[1] :].tolist()


def check_counters(sequence, stats, gamma):
    position = PROMPT.shape[1]
    for block in stats.blocks:
        assert block.start == position
        assert len(block.proposed) == gamma
        assert len(block.beta) == len(block.margin) == len(block.emitted)
        assert block.emitted[:-1] == block.proposed[: len(block.emitted) - 1]
        assert len(block.emitted) == block.accepted + 1 or (block.stop and len(block.emitted) <= block.accepted)
        assert all(0 <= value <= 1 for value in block.beta)
        position += len(block.emitted)
    assert [block.stop for block in stats.blocks[:-1]] == [None] * (stats.steps - 1)
    assert all(block.kept == len(block.emitted) for block in stats.blocks[:-1])
    assert stats.blocks[-1].stop in ("eos", "budget")
    assert stats.proposed == gamma * stats.steps
    assert stats.accepted == sum(stats.accepted_per_step)
    assert stats.new_tokens == len(new_ids(sequence))
    assert stats.acceptance_rate == stats.accepted / stats.proposed
    assert stats.mean_accepted_per_step == stats.accepted / stats.steps


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("gamma", GAMMAS)
def test_cached_is_cache_free(gamma, mode):
    arguments = {"max_new_tokens": 30, "gamma": gamma, **mode}
    cached, cached_stats = generate_cached(target_model(), draft_model(), PROMPT, generator=seeded(3), **arguments)
    free, free_stats = generate(target_model(), draft_model(), PROMPT, generator=seeded(3), **arguments)
    assert torch.equal(cached, free)
    assert untimed(cached_stats.blocks) == untimed(free_stats.blocks)
    assert 0 < cached_stats.acceptance_rate < 1
    check_counters(cached, cached_stats, gamma)


@pytest.mark.parametrize("gamma", GAMMAS)
def test_greedy_text_is_that_of_plain_decoding(gamma):
    plain = generate_autoregressive(target_model(), PROMPT, max_new_tokens=40)
    text, _ = generate_cached(target_model(), draft_model(), PROMPT, max_new_tokens=40, gamma=gamma)
    assert torch.equal(text, plain)


@settings(max_examples=60)
@given(
    st.lists(st.integers(0, 11), min_size=1, max_size=6),
    st.sampled_from([0.0, 0.2, 1.0, 5.0]),
    st.integers(1, 8),
    st.integers(1, 20),
    st.sets(st.integers(0, 11), max_size=2),
)
def test_greedy_text_is_that_of_plain_decoding_whatever_the_arguments(prompt, noise, gamma, budget, eos):
    arguments = {"max_new_tokens": budget, "eos_token_id": eos}
    plain = generate_autoregressive(target_model(), torch.tensor([prompt]), **arguments)
    text, stats = generate_cached(target_model(), draft_model(noise), torch.tensor([prompt]), gamma=gamma, **arguments)
    assert torch.equal(text, plain)
    assert stats.blocks[-1].stop == ("eos" if text[0, -1].item() in eos else "budget")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("gamma", GAMMAS)
def test_identity_accepts_everything_and_is_plain_decoding(gamma, mode):
    model = target_model()
    for seed in range(5):
        arguments = {"max_new_tokens": 25, **mode}
        plain = generate_autoregressive(model, PROMPT, generator=seeded(seed), **arguments)
        text, stats = generate_cached(model, model, PROMPT, gamma=gamma, generator=seeded(seed), **arguments)
        assert torch.equal(text, plain)
        assert stats.acceptance_rate == stats.alpha == 1.0
        assert stats.tau == gamma + 1
        assert stats.accepted_per_step == [gamma] * stats.steps


@pytest.mark.parametrize("mode", MODES)
def test_plain_decoding_cached_is_cache_free(mode):
    model = target_model()
    cached = generate_autoregressive(model, PROMPT, max_new_tokens=30, generator=seeded(1), **mode)
    assert model.fed == [4] + [1] * 30
    free = generate_autoregressive(
        lambda input_ids: model(input_ids), PROMPT, max_new_tokens=30, generator=seeded(1), **mode
    )
    assert torch.equal(cached, free)
    assert model.fed[31:] == list(range(5, 35))


def test_sampled_text_depends_on_its_seed_alone():
    texts = {}
    for seed in (0, 1, 2):
        for _ in range(2):
            text, _ = generate(target_model(), draft_model(), PROMPT, generator=seeded(seed), **WARPED)
            texts.setdefault(tuple(text[0].tolist()), set()).add(seed)
    assert sorted(map(sorted, texts.values())) == [[0], [1], [2]]
    without = [generate(target_model(), draft_model(), PROMPT, **WARPED)[0] for _ in range(2)]
    assert torch.equal(*without)


def test_a_call_takes_one_key_from_the_generator_and_nothing_from_global_state():
    before = torch.random.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    generator, expected = seeded(7), seeded(7)
    for decode in (generate, generate_cached):
        decode(target_model(), draft_model(), PROMPT, generator=generator, max_new_tokens=9, **WARPED)
        torch.randint(2**63 - 1, (1,), generator=expected)
    generate_autoregressive(target_model(), PROMPT, generator=generator, max_new_tokens=9, **WARPED)
    torch.randint(2**63 - 1, (1,), generator=expected)
    assert torch.equal(generator.get_state(), expected.get_state())
    assert torch.equal(before[0], torch.random.get_rng_state())
    assert before[1:] == (np.random.get_state()[1].tolist(), random.getstate())


def test_eos_ends_the_text_wherever_it_is_emitted():
    places = set()
    for eos in [*([token] for token in range(12)), [2, 7], [0, 5, 11]]:
        plain = generate_autoregressive(target_model(), PROMPT, max_new_tokens=60, eos_token_id=eos)
        for gamma in (1, 2, 4):
            text, stats = generate_cached(
                target_model(), draft_model(), PROMPT, max_new_tokens=60, gamma=gamma, eos_token_id=eos
            )
            assert torch.equal(text, plain)
            assert [token in eos for token in new_ids(text)] == [False] * (stats.new_tokens - 1) + [True]
            check_counters(text, stats, gamma)
            last = stats.blocks[-1]
            assert last.stop == "eos"
            if len(last.emitted) <= last.accepted:
                places.add("accepted proposal")
            else:
                places.add("bonus" if last.accepted == gamma else "correction")
    assert places == {"accepted proposal", "correction", "bonus"}


def test_accepted_counts_what_verification_accepts_whatever_eos_does():
    model = target_model()
    _, stats = generate_cached(model, model, PROMPT, max_new_tokens=20, gamma=4)
    eos = stats.blocks[0].emitted[2]
    assert eos not in stats.blocks[0].emitted[:2]
    _, stats = generate_cached(model, model, PROMPT, max_new_tokens=20, gamma=4, eos_token_id=eos)
    (block,) = stats.blocks
    assert (len(block.emitted), block.accepted, block.kept, block.stop) == (3, 4, 3, "eos")
    assert len(block.beta) == len(block.margin) == 3


@pytest.mark.parametrize("mode", MODES)
def test_the_budget_cuts_the_text_and_not_the_statistics(mode):
    long, long_stats = generate_cached(target_model(), draft_model(), PROMPT, max_new_tokens=60, gamma=4, **mode)
    crossed = 0
    for budget in range(1, 25):
        text, stats = generate_cached(target_model(), draft_model(), PROMPT, max_new_tokens=budget, gamma=4, **mode)
        assert torch.equal(text, long[:, : PROMPT.shape[1] + budget])
        assert stats.new_tokens == budget
        last = stats.blocks[-1]
        assert last.stop == "budget"
        assert untimed([replace(last, stop=None, kept=len(last.emitted))]) == untimed(
            [long_stats.blocks[stats.steps - 1]]
        )
        crossed += last.kept < len(last.emitted)
    assert crossed > 5


def test_eos_beyond_the_budget_does_not_count():
    model = target_model()
    _, stats = generate_cached(model, model, PROMPT, max_new_tokens=20, gamma=4)
    third = stats.blocks[0].emitted[2]
    assert third not in stats.blocks[0].emitted[:2]
    for budget, stop in ((2, "budget"), (3, "eos")):
        text, stats = generate_cached(model, model, PROMPT, max_new_tokens=budget, gamma=4, eos_token_id=third)
        assert stats.blocks[-1].stop == stop
        assert len(new_ids(text)) == stats.blocks[-1].kept == budget
        assert len(stats.blocks[-1].emitted) == 3


@pytest.mark.parametrize("mode", MODES)
def test_a_prompt_of_one_token(mode):
    prompt = torch.tensor([[6]], dtype=torch.int32)
    cached, _ = generate_cached(target_model(), draft_model(), prompt, max_new_tokens=12, **mode)
    free, _ = generate(target_model(), draft_model(), prompt, max_new_tokens=12, **mode)
    assert torch.equal(cached, free)
    assert (cached.dtype, cached.shape) == (torch.int32, (1, 13))
    assert cached[0, 0] == 6


def test_one_target_pass_a_block_and_nothing_fed_twice():
    target, draft = target_model(), draft_model()
    _, stats = generate_cached(target, draft, PROMPT, max_new_tokens=40, gamma=3)
    bonuses = stats.accepted_per_step.count(3)
    assert bonuses > 0
    assert target.fed == [4] + [4] * stats.steps
    assert draft.fed == [4] + [1] * (3 * stats.steps + bonuses)


def test_both_caches_hold_the_text_but_its_last_token_after_every_block():
    scorers = CachedScorer(target_model(), 60), CachedScorer(draft_model(), 60)
    text = PROMPT[0].tolist()
    for block in decode_blocks(
        *scorers,
        text,
        max_new_tokens=40,
        gamma=4,
        sampling=SamplingConfig(),
        eos_token_ids=frozenset(),
        draws=Draws(0),
    ):
        text += block.emitted
        for scorer in scorers:
            assert scorer.cache.lengths == (len(text) - 1,)
            assert scorer.cache.layers[0].tokens[0, : len(text) - 1].tolist() == text[:-1]


def test_beta_and_margin_belong_to_the_emitted_positions():
    target, draft = target_model(), draft_model()
    text, stats = generate_cached(target_model(), draft_model(), PROMPT, max_new_tokens=40, gamma=3)
    assert 3 in stats.accepted_per_step
    betas = []
    for block in stats.blocks[:-1]:
        for i in range(len(block.emitted)):
            before = text[:, : block.start + i]
            p, q = (model(before, logits_to_keep=1).logits[0, 0].numpy() for model in (target, draft))
            assert block.beta[i] == float(p.argmax() == q.argmax())
            assert block.margin[i] == float(np.sort(p)[-1]) - float(np.sort(p)[-2])
            betas.append(block.beta[i])
    betas += stats.blocks[-1].beta
    assert stats.alpha == sum(betas) / len(betas)


@pytest.mark.parametrize("decode", [generate, generate_cached])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_ids": torch.tensor([1, 2])}, r"input_ids has shape \(2,\); allowed: \(1, T\)"),
        ({"input_ids": torch.ones(2, 3, dtype=torch.int64)}, r"input_ids has shape \(2, 3\)"),
        ({"input_ids": torch.ones(1, 0, dtype=torch.int64)}, r"input_ids has shape \(1, 0\)"),
        ({"input_ids": torch.ones(1, 3)}, "input_ids has dtype torch.float32; allowed: an integer"),
        ({"input_ids": torch.ones(1, 3, dtype=torch.bool)}, "input_ids has dtype torch.bool"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0; allowed: an integer >= 1"),
        ({"max_new_tokens": 2.0}, "max_new_tokens is 2.0"),
        ({"gamma": 0}, "gamma is 0; allowed: an integer >= 1"),
        ({"gamma": True}, "gamma is True"),
        ({"temperature": 0.0}, "temperature is 0.0; allowed: "),
        ({"top_k": -1}, "top_k is -1; allowed: "),
        ({"top_p": 1.5}, "top_p is 1.5; allowed: "),
        ({"eos_token_id": -1}, "eos_token_id is -1; allowed: "),
        ({"eos_token_id": [1, 2.5]}, r"eos_token_id is \[1, 2.5\]; allowed: "),
        ({"draft": FakeLM(11)}, "draft has a vocabulary of 11; allowed: 12, the target's"),
    ],
)
def test_wrong_arguments_are_named_before_any_work(decode, arguments, message):
    call = {"target": target_model(), "draft": draft_model(), "input_ids": PROMPT, **arguments}
    with pytest.raises(ValueError, match=message):
        decode(**call)
    assert call["target"].fed == call["draft"].fed == []


@pytest.mark.parametrize(
    "decode",
    [
        lambda **its: generate(target_model(), draft_model(), PROMPT, do_sample=True, **its),
        lambda **its: generate_cached(target_model(), draft_model(), PROMPT, do_sample=True, **its),
        lambda **its: (generate_autoregressive(target_model(), PROMPT, do_sample=True, **its), SpecDecodeStats(())),
    ],
    ids=["generate", "generate_cached", "generate_autoregressive"],
)
def test_what_is_not_said(decode):
    said = {"max_new_tokens": 128, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "eos_token_id": None}
    text, stats = decode()
    wanted, _ = decode(**said)
    assert torch.equal(text, wanted)
    assert all(len(block.proposed) == 4 for block in stats.blocks)


def test_a_call_without_a_generator_has_key_0():
    draws = [Request.from_arguments(PROMPT, 9, SamplingConfig(), None, its).draws for its in (None, seeded(5))]
    for drawn, key in zip(draws, (0, 4095051218741643470), strict=True):  # a seed's text stays what it is
        assert drawn.uniform(7, TOKEN) == Draws(key).uniform(7, TOKEN)


def test_input_ids_must_be_a_tensor():
    with pytest.raises(TypeError, match="input_ids is list"):
        generate_autoregressive(target_model(), [[1, 2]])


def test_vocabularies_are_compared_at_the_first_pass_where_no_config_tells():
    narrow = FakeLM(11)
    with pytest.raises(ValueError, match="draft has a vocabulary of 11"):
        generate(target_model(), lambda input_ids: narrow(input_ids), PROMPT)


def block_of(emitted, accepted, gamma=3, beta=1.0):
    return Block(0, (0,) * gamma, accepted, (0,) * emitted, emitted, None, (beta,) * emitted, (), 0, 0)


def test_alpha_and_tau_by_hand():
    # Emitted, accepted: full; rejected at once; rejected at the third; cut by EOS after two (all accepted).
    blocks = (block_of(4, 3), block_of(1, 0, beta=0.5), block_of(3, 2), block_of(2, 3))
    stats = SpecDecodeStats(blocks)
    # At risk 4, 3, 2 and accepted 3, 3, 1 of them: hazards 3/4, 1, 1/2.
    assert stats.tau == 1 + 3 / 4 + 3 / 4 + 3 / 8
    assert stats.alpha == (4 + 0.5 + 3 + 2) / 10
    assert stats.accepted_per_step == [3, 0, 2, 3]
    assert (stats.steps, stats.proposed, stats.accepted, stats.new_tokens) == (4, 12, 8, 10)
    assert stats.acceptance_rate == 8 / 12
    assert stats.mean_accepted_per_step == 2


def test_levels_nobody_reached_add_nothing_to_tau():
    assert SpecDecodeStats((block_of(1, 0),)).tau == 1
    assert SpecDecodeStats((block_of(1, 3),)).tau == 2  # EOS was the first, accepted proposal
