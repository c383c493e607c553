"""Codes, scales and zero points: those of `brute_force`, and by hand where rounding ties or floors."""

import brute_force
import numpy as np
import pytest
import torch

from scspec.sc.encoding import encode, encode_causal
from scspec.sc.streams import resolve_streams


@pytest.mark.parametrize("mode", ["bipolar", "unipolar"])
@pytest.mark.parametrize(
    ("granularity", "group"), [("per_row", 1), ("per_row", 2), ("per_row", 3), ("per_head", 1), ("per_tensor", 1)]
)
def test_each_scope_has_its_own_scale(mode, granularity, group):
    x = np.random.default_rng(group).normal(size=(2, 6, 7)).astype("f4")
    x *= np.array([1, 2, 5, 0, 30, 100], "f4")[:, None]  # rows of other sizes, and one of zeros
    x += np.array([-9, 3], "f4")[:, None, None]  # rows without a positive or a negative value: zero points are clamped
    encoded = encode(torch.from_numpy(x), resolve_streams(mode, 5), granularity, group)
    expected = brute_force.quantise(x, mode, 5, granularity, group)
    assert encoded.codes.dtype == torch.int16
    np.testing.assert_array_equal(encoded.codes, expected.codes)
    np.testing.assert_array_equal(encoded.scale.expand(2, 6, 1)[..., 0], expected.scale)
    if mode == "bipolar":
        assert encoded.zero is None
    else:
        np.testing.assert_array_equal(encoded.zero.expand(2, 6, 1)[..., 0], expected.zero)
    assert encoded.scale.ndim == 3


@pytest.mark.parametrize("group", [1, 3])
def test_rows_without_heads_are_those_of_one_head(group):
    x, spec = torch.randn(2, 6, 7, generator=torch.Generator().manual_seed(0)), resolve_streams()
    heads, alone = encode(x, spec, "per_row", group), encode(x[1], spec, "per_row", group)
    assert torch.equal(alone.codes, heads.codes[1])
    assert torch.equal(alone.scale, heads.scale[1])


def test_causal_scales_go_from_keys_to_rows():
    generator = np.random.default_rng(0)
    a, b = generator.random((2, 4, 6)).astype("f4"), generator.normal(size=(2, 3, 6)).astype("f4")
    a[0, 1] = 0
    encoded = encode_causal(torch.from_numpy(a), torch.from_numpy(b), resolve_streams("bipolar", 5))
    for ours, expected in zip(encoded, brute_force.quantise_causal(a, b, 5), strict=True):
        np.testing.assert_array_equal(ours.codes, expected.codes)
        np.testing.assert_array_equal(ours.scale, expected.scale[..., None])
        assert ours.codes.dtype == torch.int16
        assert ours.zero is None
    np.testing.assert_array_equal(encoded[0].codes[0, 1], np.zeros(6))


def test_rounding_ties_go_to_even():
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5, -126.5]])  # scale 1
    assert encode(x, resolve_streams(), "per_row").codes.tolist() == [[127, 0, 2, 2, 0, -2, -2, 126, -126]]
    x = torch.tensor([[-0.5, 254.5, 0.5, 1.5, 2.5]])  # unipolar: scale 1, zero point rint(0.5) = 0; -0.5 and 254.5 tie
    encoded = encode(x, resolve_streams("unipolar"), "per_row")
    assert encoded.zero.tolist() == [[0]]
    assert encoded.codes.tolist() == [[0, 254, 0, 2, 2]]
    a = torch.tensor([[1.0, 1.0, 1.0]])  # causal: p = 3, q = 3; folded rows (3, 1.5, 0.5) / 1 have ties
    b = torch.tensor([[9.0, 4.5, 1.5], [0.0, 0.0, 0.0]])
    first, second = encode_causal(a, b, resolve_streams("bipolar", 3))
    assert first.codes.tolist() == [[3, 2, 0]]
    assert second.codes.tolist() == [[3, 3, 3], [0, 0, 0]]


def test_scale_floor():
    spec = resolve_streams()
    below, above = torch.tensor([[4e-6, 1e-7]]), torch.tensor([[2e-5, 1e-6]])
    assert encode(below, spec, "per_row").codes.tolist() == [[51, 1]]  # 4e-6 * 127 / 1e-5 = 50.8
    assert encode(above, spec, "per_row").codes.tolist() == [[127, 6]]
    a, b = torch.tensor([[1e-20, 4e-20]]), torch.tensor([[1.0, 1.0]])  # causal probabilities have no floor
    assert encode_causal(a, b, spec)[0].codes.tolist() == [[32, 127]]


def test_codes_stay_in_range_where_a_scale_has_lost_its_bits():
    tiny = 2.0**-149  # float32's smallest number; 190 / 127 of it rounds to one of it
    a, b = torch.tensor([[190.0, -190.0, 64.0]]) * tiny, torch.full((1, 3), 127.0)
    first, _ = encode_causal(a, b, resolve_streams())
    assert first.scale.tolist() == [[tiny]]
    assert first.codes.tolist() == [[127, -127, 64]]
