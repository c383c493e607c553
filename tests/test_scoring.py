"""The KV cache's bookkeeping, and that scoring with it and without it is the same."""

import numpy as np
import pytest
from fake_models import FakeLM

from scspec.decoding import CachedScorer, CacheFreeScorer, KVCache


@pytest.mark.parametrize("rows", [1, 3])
def test_scorers_agree_after_any_rollback(rows):
    model = FakeLM(seed=1)
    cached, free = CachedScorer(model, 20), CacheFreeScorer(model)
    cached.prefill([1, 2, 3])
    for held, sequence in ((3, [1, 2, 3, 4, 5, 6]), (4, [1, 2, 3, 4, 9, 9, 9, 8]), (2, [1, 2, 7, 7, 7])):
        cached.rollback(held)
        assert np.array_equal(cached.logits(sequence, rows), free.logits(sequence, rows))
        assert cached.cache.lengths == (len(sequence),)
        assert np.array_equal(cached.logits(sequence, rows), free.logits(sequence, rows))  # rolls back by itself
    cached.prefill([5])
    assert cached.cache.lengths == (1,)
    assert np.array_equal(cached.logits([5, 6, 7], 2), free.logits([5, 6, 7], 2))


def test_the_fake_model_sees_a_forgotten_rollback():
    model = FakeLM(seed=1)
    cached = CachedScorer(model, 20)
    cached.prefill([1, 2, 3, 4])
    stale = cached.logits([1, 2, 9, 9, 5], 1)
    assert not np.array_equal(stale, CacheFreeScorer(model).logits([1, 2, 9, 9, 5], 1))


def test_scorers_check_shapes():
    model = FakeLM(seed=1)
    for scorer in (CacheFreeScorer(model), CachedScorer(model, 5)):
        for rows in (0, 3):
            with pytest.raises(ValueError, match=rf"rows is {rows}; allowed: 1\.\.2"):
                scorer.logits([1, 2], rows)
    with pytest.raises(ValueError, match=r"shape \(2, 2, 12\); expected \(1, 2, V\)"):
        CacheFreeScorer(lambda input_ids: model(input_ids.repeat(2, 1))).logits([1, 2], 1)
    with pytest.raises(ValueError, match="allowed: a model with new_kv_cache"):
        CachedScorer(lambda input_ids: model(input_ids), 5)
    with pytest.raises(ValueError, match=r"length 0 \+ n 3 > capacity 2"):
        CachedScorer(model, 2).logits([1, 2, 3], 1)


def test_a_model_that_leaves_its_cache_alone_is_refused():
    class WithoutCache(FakeLM):
        def __call__(self, input_ids, kv_cache, logits_to_keep):
            return super().__call__(input_ids, None, logits_to_keep)

    with pytest.raises(ValueError, match="the forward left the cache at length 0; expected 3"):
        CachedScorer(WithoutCache(), 5).logits([1, 2, 3], 1)


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
    cache = KVCache(3, 8, [Store("abc"), Store("xyz")])
    cache.advance(2)
    view = cache.slot(1)
    assert (view.batch, view.capacity, view.lengths, view.layers) == (1, 8, (2,), ["b", "y"])
    view.advance(3)
    assert cache.lengths == (2, 5, 2)
    cache.rollback(1, 4)
    assert view.lengths == (4,)
    view.rollback(0, 1)
    assert cache.lengths == (2, 1, 2)
    with pytest.raises(IndexError):
        cache.slot(3)
