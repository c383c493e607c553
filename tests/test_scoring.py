"""The KV cache's bookkeeping, and that scoring with it and without it is the same."""

import pytest
import torch
from fake_models import FakeLM

from scspec.decoding import CachedScorer, CacheFreeScorer, KVCache


def tokens(*rows):
    return torch.tensor(rows)


@pytest.mark.parametrize("rows", [1, 2])
def test_scorers_agree_after_any_rollback(rows):
    model = FakeLM(seed=1)
    cached, free = CachedScorer(model, 20, 2), CacheFreeScorer(model, 2)
    held = [[], [7]]
    for scorer in (cached, free):
        scorer.prefill(0, [9, 9, 9])
        scorer.prefill(0, [])
        scorer.prefill(1, [7])
    for fed, kept in (((3, 4, 5), (2, 3)), ((8, 8), (2, 5)), ((1, 2, 3, 4), (0, 0)), ((6, 5), (1, 0))):
        ids = tokens(fed, fed[::-1])
        logits = cached.feed(ids, rows)
        assert torch.equal(logits, free.feed(ids, rows))
        held = [old + new for old, new in zip(held, ids.tolist(), strict=True)]
        alone = [model(torch.tensor([text])).logits[0, -rows:] for text in held]
        assert torch.equal(logits, torch.stack(alone))
        assert cached.cache.lengths == tuple(map(len, held))
        for scorer in (cached, free):
            for slot in (0, 1):
                scorer.rollback(slot, kept[slot])
        held = [text[:length] for text, length in zip(held, kept, strict=True)]


def test_the_fake_model_sees_a_forgotten_rollback():
    model = FakeLM(seed=1)
    cached = CachedScorer(model, 20)
    cached.prefill(0, [1, 2, 3, 4])
    stale = cached.feed(tokens([9, 5]), 1)
    assert not torch.equal(stale, model(tokens([1, 2, 9, 5]), logits_to_keep=1).logits)


def test_scorers_check_shapes():
    model = FakeLM(seed=1)
    for scorer in (CacheFreeScorer(model), CachedScorer(model, 5)):
        for rows in (0, 3):
            with pytest.raises(ValueError, match=rf"rows is {rows}; allowed: 1\.\.2"):
                scorer.feed(tokens([1, 2]), rows)
    with pytest.raises(ValueError, match=r"shape \(2, 2, 12\); expected \(1, 2, V\)"):
        CacheFreeScorer(lambda input_ids: model(input_ids.repeat(2, 1))).feed(tokens([1, 2]), 1)
    with pytest.raises(ValueError, match="model is function; allowed: a model with new_kv_cache"):
        CachedScorer(lambda input_ids: model(input_ids), 5)
    with pytest.raises(ValueError, match=r"length 0 \+ n 3 > capacity 2"):
        CachedScorer(model, 2).feed(tokens([1, 2, 3]), 1)


def test_more_room_is_an_empty_cache():
    scorer = CachedScorer(FakeLM(seed=1), 5, 2)
    scorer.prefill(1, [1, 2, 3])
    assert not scorer.reserve(5)
    assert scorer.cache.lengths == (0, 3)
    assert scorer.reserve(6)
    assert (scorer.cache.batch, scorer.cache.capacity, scorer.cache.lengths) == (2, 6, (0, 0))
    assert not CacheFreeScorer(FakeLM(seed=1)).reserve(6)  # nothing of it was emptied


def test_a_model_that_leaves_its_cache_alone_is_refused():
    class WithoutCache(FakeLM):
        def __call__(self, input_ids, kv_cache, logits_to_keep):
            return super().__call__(input_ids, None, logits_to_keep)

    with pytest.raises(ValueError, match=r"the forward left the cache at lengths \(0,\); expected \(3,\)"):
        CachedScorer(WithoutCache(), 5).feed(tokens([1, 2, 3]), 1)


class Store(list):
    """One value a slot, in place of a layer's keys and values."""

    def slot(self, b):
        return self[b]


def test_cache_lengths():
    cache = KVCache(3, 8, ["opaque"])
    assert (cache.batch, cache.capacity, cache.lengths, cache.layers) == (3, 8, (0, 0, 0), ["opaque"])
    cache.advance(8)
    cache.rollback(1, 5)
    cache.rollback(2, 0)
    with pytest.raises(ValueError, match=r"length 8 \+ n 1 > capacity 8"):
        cache.advance(1)
    cache.rollback(0, 4)
    with pytest.raises(ValueError, match=r"length 5 \+ n 4 > capacity 8"):
        cache.advance(4)
    for length in (-1, 6):
        with pytest.raises(ValueError, match=rf"length is {length}; allowed: 0\.\.5 .*slot 1 holds"):
            cache.rollback(1, length)
    with pytest.raises(TypeError):
        cache.rollback(1, 2.0)
    with pytest.raises(TypeError):  # an assignment that changed nothing would be worse
        cache.lengths[1] = 2
    assert cache.lengths == (4, 5, 0)
    cache.advance(2)
    assert cache.lengths == (6, 7, 2)


def test_a_slot_of_a_cache_is_a_view():
    model = FakeLM()
    cache = KVCache(3, 8, [Store("abc"), Store("xyz")], model)
    cache.advance(2)
    view = cache.slot(1)
    assert view.owner is cache.owner is model
    assert (view.batch, view.capacity, view.lengths, view.layers) == (1, 8, (2,), ["b", "y"])
    view.advance(3)
    assert cache.lengths == (2, 5, 2)
    cache.rollback(1, 4)
    assert view.lengths == (4,)
    view.rollback(0, 1)
    assert cache.lengths == (2, 1, 2)
    with pytest.raises(IndexError):
        cache.slot(3)
