from __future__ import annotations

import pytest
import torch

from xconv_fx.codec_spec import CodecSpec
from xconv_fx.ops import BITMASK, SavedAs, codec_of, layout, names, register

CASES = [
    ((2, 24, 9, 13), (0, 2, 3, 1)),
    ((2, 3, 4, 5, 6), (0, 1, 2, 3, 4)),
    ((3, 8, 50), (0, 1, 2)),
    ((33, 257), (0, 1)),
    ((1, 1, 3, 5), (0, 2, 3, 1)),
]


def mask_of(size, order):
    return layout.to_logical(torch.rand(layout.physical_size(size, order)) > 0.5, order)


@pytest.mark.parametrize(("size", "order"), CASES, ids=str)
def test_round_trip_is_exact_and_in_order(size, order):
    mask = mask_of(size, order)
    held = SavedAs(CodecSpec("bitmask"), size, torch.bool, order)
    payload = BITMASK.encode(mask, torch.tensor([1]), held)
    decoded = BITMASK.decode(payload, torch.tensor([1]), held)
    assert torch.equal(decoded, mask) and decoded.stride() == mask.stride()
    assert sum(part.nbytes for part in payload) == BITMASK.payload_bytes(held)
    assert BITMASK.noise(held) == 0
    assert BITMASK.traffic(held) == 2 * (mask.nbytes + BITMASK.payload_bytes(held))


def test_an_activation_takes_one_bit_an_element():
    held = SavedAs(CodecSpec("bitmask"), (16, 64, 64, 64), torch.bool, (0, 2, 3, 1))
    assert BITMASK.payload_bytes(held) == 16 * 64 * 64 * 64 // 8


@pytest.mark.parametrize(("size", "order"), CASES[:2], ids=str)
def test_operators_pass_opcheck(size, order):
    mask = mask_of(size, order)
    words = torch.ops.xconv.pack_mask(mask, order)
    torch.library.opcheck(torch.ops.xconv.pack_mask.default, (mask, order))
    torch.library.opcheck(torch.ops.xconv.unpack_mask.default, (words, size, order))


def test_only_booleans_are_masks():
    with pytest.raises(ValueError, match=r"torch\.bool"):
        torch.ops.xconv.pack_mask(torch.ones(4), (0,))


def test_the_table_of_codecs_refuses_duplicates_and_unknown_names():
    assert set(names()) == {"bitmask", "quantize", "probe", "fixed"}
    assert codec_of("bitmask") is BITMASK and BITMASK.lossless
    with pytest.raises(ValueError, match="'bitmask' is registered already"):
        register(BITMASK)
    with pytest.raises(ValueError, match="bitmask, fixed, probe, quantize"):
        codec_of("zip")
