"""The exactness contract on real weights, on a GPU: every dtype, both backends, eager and as a graph. No tolerance."""

import itertools

import numpy as np
import pytest
import torch
from test_contract import GREEDY, PROMPTS, SAMPLED, check_identity, encode, plain, random_partition, speculate

from scspec.decoding import CachedScorer, Draws, decode_batch
from scspec.decoding.request import Turn
from scspec.models import load_model
from scspec.prompts import encode_turn, load_prompts

pytestmark = pytest.mark.gpu
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NEW_TOKENS = 32


@pytest.fixture(scope="module", params=DTYPES, ids=str)
def pair(request):
    """Two separately loaded instances with the same knobs, and the second's draft with half as long streams."""
    options = {"device": "cuda", "dtype": request.param, "sc_overrides": {"sc_stoc_len": 128}}
    return [load_model("smollm2-135m", **options) for _ in range(2)]


def logits_in_pieces(model, ids, sizes, capacity):
    cache = model.new_kv_cache(1, capacity)
    pieces = np.split(np.array(ids), np.cumsum(sizes)[:-1])
    with torch.inference_mode():
        rows = [model(input_ids=torch.tensor([p.tolist()], device="cuda"), kv_cache=cache).logits for p in pieces]
    return torch.cat(rows, dim=1)


def test_cached_equals_cache_free(pair, tokenizer):
    for prompt, capacity, seed in itertools.product(PROMPTS, (64, 512), range(3)):
        ids = encode(tokenizer, prompt * 3)[:40]
        with torch.inference_mode():
            whole = pair[0](input_ids=torch.tensor([ids], device="cuda")).logits
        assert torch.equal(logits_in_pieces(pair[0], ids, random_partition(len(ids), seed), capacity), whole)
        assert torch.equal(logits_in_pieces(pair[1], ids, [1] * len(ids), capacity), whole)


def test_a_graph_gives_the_bits_of_single_launches(pair, tokenizer):
    ids = torch.tensor([encode(tokenizer, PROMPTS[0])], device="cuda")
    cache, logits = pair[0].new_kv_cache(1, 64), []
    with torch.inference_mode():
        for _ in range(4):  # launched, captured and replayed, replayed
            logits.append(pair[0](input_ids=ids, kv_cache=cache).logits)
            cache.rollback(0, 0)
    assert all(torch.equal(logits[0], other) for other in logits[1:])


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("capacity", [64, 512])
def test_identity(pair, tokenizer, sampling, capacity):
    """gamma 1..8: everything accepted, and the text is that of plain decoding."""
    for prompt in PROMPTS if capacity == 64 else PROMPTS[:1]:
        ids = encode(tokenizer, prompt)
        wanted = plain(pair[0], ids, sampling, NEW_TOKENS)
        for gamma in range(1, 9):
            check_identity(*pair, ids, sampling, gamma, capacity=capacity, wanted=wanted)


@pytest.mark.parametrize("draft", ["twin", "shorter"])
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_a_prompt_in_a_batch_of_16_gives_what_it_gives_alone(pair, tokenizer, sampling, draft):
    prompts = load_prompts("prompts/bench48.jsonl")[:18]
    texts = [encode_turn(tokenizer, [], prompt.turns[0]) for prompt in prompts]
    target, twin = pair
    length = twin.config.sc_stoc_len
    twin.config.sc_stoc_len = 96 if draft == "shorter" else length
    try:
        together = decoded(target, twin, texts, sampling, 16)
        alone = decoded(target, twin, texts, sampling, 1)
    finally:
        twin.config.sc_stoc_len = length
    assert together == alone
    if draft == "twin":
        assert all(block[1] == 4 and set(block[3]) == {1.0} for blocks in together for block in blocks)
    else:
        assert any(block[1] < 4 for blocks in together for block in blocks)


def test_the_distilled_draft(pair, tokenizer):
    """The text is the target's at gamma 1..8, a prompt in a batch what it is alone; its own identity holds."""
    options = {"device": "cuda", "dtype": pair[0].dtype, "sc_overrides": {"sc_stoc_len": 128}}
    draft, twin = (load_model("smollm2-distilled", **options) for _ in range(2))
    for prompt in PROMPTS:
        ids = encode(tokenizer, prompt)
        wanted, own = plain(pair[0], ids, GREEDY, NEW_TOKENS), plain(draft, ids, GREEDY, NEW_TOKENS)
        for gamma in range(1, 9):
            assert speculate(pair[0], draft, ids, GREEDY, gamma, NEW_TOKENS, 64)[0] == wanted
            check_identity(draft, twin, ids, GREEDY, gamma, wanted=own)
    texts = [encode_turn(tokenizer, [], prompt.turns[0]) for prompt in load_prompts("prompts/bench48.jsonl")[:18]]
    for sampling in (GREEDY, SAMPLED):
        together = decoded(pair[0], draft, texts, sampling, 16)
        assert together == decoded(pair[0], draft, texts, sampling, 1)
        assert sum(block[1] for blocks in together for block in blocks), "nothing was accepted: is the draft trained?"


def decoded(target, draft, texts, sampling, slots):
    """Return for each text its blocks: (start, accepted, emitted, beta, margin)."""
    conversations = [(turn for turn in [Turn(ids, 12 + i % 3, Draws(i))]) for i, ids in enumerate(texts)]
    scorers = [CachedScorer(model, 64, slots) for model in (target, draft)]
    arguments = {"gamma": 4, "sampling": sampling, "eos_token_ids": frozenset()}
    blocks = [[] for _ in texts]
    for index, _, block in decode_batch(*scorers, conversations, **arguments):
        blocks[index].append((block.start, block.accepted, block.emitted, block.beta, block.margin))
    return blocks


def test_both_backends_give_the_same_logits(tokenizer):
    ids = torch.tensor([encode(tokenizer, PROMPTS[1])], device="cuda")
    logits = []
    for backend in ("cuda", "triton"):
        model = load_model("smollm2-135m", device="cuda", dtype=torch.float16, backend=backend)
        with torch.inference_mode():
            logits.append(model(input_ids=ids).logits)
    assert torch.equal(*logits)
