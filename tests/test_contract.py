"""The exactness contract on real weights, CPU, float32, default knobs. No tolerance anywhere.

The whole matrix is marked `full`; what runs by default is a slice of it. `check_*` functions hold the assertions, so
that the mutants at the end can show that replacing a norm or the LM head by torch's own turns them red.
"""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from scspec.decoding import (
    CachedScorer,
    Draws,
    SamplingConfig,
    Turn,
    decode_batch,
    decode_blocks,
    generate,
    generate_autoregressive,
    generate_cached,
)
from scspec.models import load_model
from scspec.sc.knobs import PRESETS

PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "Once upon a time, in a quiet village by the sea,",
)
GREEDY = SamplingConfig()
SAMPLED = SamplingConfig(do_sample=True, temperature=0.9, top_k=50, top_p=0.95)
NEW_TOKENS = 32
full = pytest.mark.full


def encode(tokenizer, prompt: str) -> list[int]:
    return tokenizer(prompt).input_ids


def plain(target, ids: list[int], sampling: SamplingConfig, new_tokens: int) -> list[int]:
    """Return the text of the target alone, the generator's key being 0 as in `speculate`."""
    text = generate_autoregressive(target, torch.tensor([ids]), max_new_tokens=new_tokens, **vars(sampling))
    return text[0].tolist()


def speculate(target, draft, ids, sampling, gamma: int, new_tokens: int, capacity: int):
    """Return (text, blocks) of speculative decoding with a cache of `capacity` positions."""
    blocks = list(
        decode_blocks(
            CachedScorer(target, capacity),
            CachedScorer(draft, capacity),
            ids,
            max_new_tokens=new_tokens,
            gamma=gamma,
            sampling=sampling,
            eos_token_ids=frozenset(),
            draws=Draws(0),
        )
    )
    return ids + [token for block in blocks for token in block.emitted[: block.kept]], blocks


def check_identity(target, twin, ids, sampling, gamma, new_tokens=NEW_TOKENS, capacity=64, wanted=None):
    """Draft == target: every proposal accepted, beta 1 everywhere, the text that of plain decoding."""
    text, blocks = speculate(target, twin, ids, sampling, gamma, new_tokens, capacity)
    assert [block.accepted for block in blocks] == [gamma] * len(blocks)
    assert all(beta == 1.0 for block in blocks for beta in block.beta)
    assert text == (plain(target, ids, sampling, new_tokens) if wanted is None else wanted)


def check_partition(model, ids, sizes, capacity=64):
    """Feeding `ids` in pieces of `sizes` gives the bits of one cache-free forward."""
    with torch.inference_mode():
        whole = model(input_ids=torch.tensor([ids])).logits
        cache = model.new_kv_cache(1, capacity)
        pieces = [
            model(input_ids=torch.tensor([piece.tolist()]), kv_cache=cache).logits
            for piece in np.split(np.array(ids), np.cumsum(sizes)[:-1])
        ]
    assert torch.equal(torch.cat(pieces, dim=1), whole)


def check_batch(target, draft, prompts, sampling, gamma, sizes, new_tokens=NEW_TOKENS):
    """In batches of each (slots, capacity) of `sizes` a prompt's blocks are those it has alone; budgets differ."""
    budgets = [new_tokens - 3 * i for i in range(len(prompts))]
    pairs = list(zip(prompts, budgets, strict=True))
    alone = [speculate(target, draft, ids, sampling, gamma, budget, 64)[1] for ids, budget in pairs]
    arguments = {"gamma": gamma, "sampling": sampling, "eos_token_ids": frozenset()}
    for slots, capacity in sizes:
        scorers = [CachedScorer(model, capacity, slots) for model in (target, draft)]
        conversations = [(turn for turn in [Turn(ids, budget, Draws(0))]) for ids, budget in pairs]
        found = [[] for _ in prompts]
        for index, _, block in decode_batch(*scorers, conversations, **arguments):
            found[index].append(untimed(block))
        assert found == [[untimed(block) for block in blocks] for blocks in alone]


def untimed(block):
    return dataclasses.replace(block, draft_time_s=0, verify_time_s=0)


def random_partition(length: int, seed: int) -> list[int]:
    generator, sizes = np.random.default_rng(seed), []
    while sum(sizes) < length:
        sizes.append(int(min(generator.integers(1, 7), length - sum(sizes))))
    return sizes


@pytest.mark.parametrize(("gamma", "sampling"), [(4, GREEDY), (3, SAMPLED)])
def test_identity_accepts_everything(target, twin, tokenizer, gamma, sampling):
    check_identity(target, twin, encode(tokenizer, PROMPTS[0]), sampling, gamma, new_tokens=16)


def test_cached_equals_cache_free(target, twin, tokenizer):
    ids = encode(tokenizer, PROMPTS[1])
    check_partition(target, ids, random_partition(len(ids), seed=0))
    input_ids = torch.tensor([ids])
    cached = generate_cached(target, twin, input_ids, max_new_tokens=6, gamma=2)
    free = generate(target, twin, input_ids, max_new_tokens=6, gamma=2)
    assert torch.equal(cached[0], free[0])
    assert [b.beta for b in cached[1].blocks] == [b.beta for b in free[1].blocks]
    assert [b.margin for b in cached[1].blocks] == [b.margin for b in free[1].blocks]


def test_a_shorter_draft_leaves_the_greedy_text_alone(target, tokenizer):
    draft = load_model("smollm2-135m", sc_overrides={"sc_stoc_len": 32})
    ids = encode(tokenizer, PROMPTS[0])
    text, blocks = speculate(target, draft, ids, GREEDY, 4, 16, 64)
    assert text == plain(target, ids, GREEDY, 16)
    assert any(block.accepted < 4 for block in blocks), "a draft this short should miss: is it the draft that runs?"


def test_threads_and_batches_change_no_bit(target, tokenizer, threads):
    batch = torch.tensor([encode(tokenizer, prompt)[:5] for prompt in PROMPTS])
    rows = []
    with torch.inference_mode():
        for count in (1, 2):
            threads(count)
            together = target(input_ids=batch).logits
            alone = torch.cat([target(input_ids=ids[None]).logits for ids in batch])
            rows += [together, alone]
    assert all(torch.equal(rows[0], other) for other in rows[1:])


def test_a_batch_is_its_prompts_alone(target, tokenizer):
    draft = load_model("smollm2-135m", sc_overrides={"sc_stoc_len": 64})
    check_batch(target, draft, [encode(tokenizer, prompt) for prompt in PROMPTS], GREEDY, 3, [(2, 512)], new_tokens=10)


def test_float_arms_are_exact_too(tokenizer):
    pair = [load_model("smollm2-135m", sc_overrides=PRESETS["float"]) for _ in range(2)]
    ids = encode(tokenizer, PROMPTS[2])
    check_partition(pair[0], ids, random_partition(len(ids), seed=1))
    check_identity(*pair, ids, GREEDY, 4, new_tokens=12)


def test_sc_lm_head_is_exact_too(tokenizer):
    pair = [load_model("smollm2-135m", sc_overrides={"sc_lm_head": True}) for _ in range(2)]
    check_identity(*pair, encode(tokenizer, PROMPTS[0]), GREEDY, 2, new_tokens=6)


@full
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED, SamplingConfig(do_sample=True)], ids=["greedy", "top", "pure"])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_identity_full(target, twin, tokenizer, threads, prompt, sampling):
    """gamma 1, 2, 4, 8 x cache capacities 64 and 512 x 1 and 2 threads, 32 new tokens each."""
    ids = encode(tokenizer, prompt)
    wanted = plain(target, ids, sampling, NEW_TOKENS)
    for count, capacity, gamma in itertools.product((1, 2), (64, 512), (1, 2, 4, 8)):
        threads(count)
        check_identity(target, twin, ids, sampling, gamma, capacity=capacity, wanted=wanted)


@full
@pytest.mark.parametrize("count", [1, 2])
def test_partitions_full(target, tokenizer, threads, count):
    threads(count)
    for prompt, capacity, seed in itertools.product(PROMPTS, (64, 512), range(5)):
        ids = encode(tokenizer, prompt * 3)[:40]
        check_partition(target, ids, random_partition(len(ids), seed), capacity)


@full
@pytest.mark.parametrize("gamma", [1, 2, 4, 8])
def test_cache_free_generation_full(target, twin, tokenizer, gamma):
    for prompt, sampling in itertools.product(PROMPTS, (GREEDY, SAMPLED)):
        input_ids = torch.tensor([encode(tokenizer, prompt)])
        arguments = {"max_new_tokens": 8, "gamma": gamma, **vars(sampling)}
        cached, stats = generate_cached(target, twin, input_ids, **arguments)
        free, free_stats = generate(target, twin, input_ids, **arguments)
        assert torch.equal(cached, free)
        assert stats.acceptance_rate == free_stats.acceptance_rate == 1.0


@full
@pytest.mark.parametrize("gamma", [1, 2, 4, 8])
def test_a_batch_is_its_prompts_alone_full(target, tokenizer, gamma):
    draft = load_model("smollm2-135m", sc_overrides={"sc_stoc_len": 64})
    ids = [encode(tokenizer, prompt) for prompt in (*PROMPTS, PROMPTS[0] + PROMPTS[2])]
    for sampling in (GREEDY, SAMPLED):
        check_batch(target, draft, ids, sampling, gamma, [(2, 64), (3, 512), (4, 64)])


@full
@pytest.mark.parametrize("stoc_len", [96, 64])
def test_greedy_text_does_not_depend_on_draft_or_gamma_full(target, tokenizer, stoc_len):
    draft = load_model("smollm2-135m", sc_overrides={"sc_stoc_len": stoc_len}, skip_layers=(12,))
    for prompt, gamma in itertools.product(PROMPTS, (1, 2, 4, 8)):
        ids = encode(tokenizer, prompt)
        assert speculate(target, draft, ids, GREEDY, gamma, NEW_TOKENS, 64)[0] == plain(target, ids, GREEDY, NEW_TOKENS)


# What would break it. On this kind of processor torch's norm happens to give equal rows whatever their number, its LM
# head does not; so a norm is held to its specified bits, which no other order of summation gives.


def check_norms_have_the_specified_bits(model):
    """Every norm sums the squares in float64 in ascending order, on rows of real hidden states' size."""
    x = torch.randn(64, model.config.hidden_size, generator=torch.Generator().manual_seed(0)) * 3
    total = np.zeros(64)
    for column in x.numpy().T.astype(np.float64):
        total += column * column
    for name, module in model.named_modules():
        if "norm" in name:
            eps = np.float32(getattr(module, "eps", getattr(module, "variance_epsilon", None)))
            mean = (total / x.shape[1]).astype(np.float32)
            factor = np.float32(1) / np.sqrt(mean + eps)
            wanted = module.weight.detach().numpy() * (x.numpy() * factor[:, None])
            with torch.inference_mode():
                assert np.array_equal(module(x).numpy(), wanted), name


def test_norms_have_the_specified_bits(target):
    check_norms_have_the_specified_bits(target)


@pytest.fixture
def replaced(target):
    """A function that puts another module at a path of the shared target; undone afterwards."""
    undo = []

    def replace(path: str, module: nn.Module) -> None:
        undo.append((path, target.get_submodule(path)))
        target.set_submodule(path, module)

    yield replace
    for path, module in undo:
        target.set_submodule(path, module)


def test_torchs_norm_would_be_caught(target, replaced):
    ours = target.get_submodule("model.layers.7.input_layernorm")
    torchs = LlamaRMSNorm(target.config.hidden_size, float(ours.eps))
    torchs.weight = ours.weight
    replaced("model.layers.7.input_layernorm", torchs)
    with pytest.raises(AssertionError, match=r"layers\.7\.input_layernorm"):
        check_norms_have_the_specified_bits(target)


def test_torchs_lm_head_would_be_caught(target, tokenizer, replaced):
    head = nn.Linear(target.config.hidden_size, target.config.vocab_size, bias=False)
    head.weight = target.model.embed_tokens.weight
    replaced("lm_head", head)
    ids = encode(tokenizer, PROMPTS[0])
    with pytest.raises(AssertionError):
        check_partition(target, ids, [1] * len(ids))
