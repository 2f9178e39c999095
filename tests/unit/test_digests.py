"""Damage to state that is sent is noticed, also where the digest is made on a device."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from strategies.state import digests
from strategies.state.digests import DIGEST_ELEMENTS, digest_of, sums_of

Digest = Callable[[torch.Tensor], torch.Tensor]
both = pytest.mark.parametrize("digest", [digest_of, sums_of])


def bits(digest: torch.Tensor) -> list[int]:
    assert (digest.shape, digest.dtype) == ((DIGEST_ELEMENTS,), torch.float32)
    return digest.view(torch.int32).tolist()


def words(count: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**31), 2**31, (count,), generator=generator).to(torch.int32)


def as_state(ints: torch.Tensor) -> torch.Tensor:
    return ints.view(torch.float32)


@both
@given(st.integers(1, 300), st.data())
def test_any_single_bit_is_noticed(digest: Digest, count: int, data: st.DataObject) -> None:
    sent = words(count)
    arrived = sent.clone()
    place, bit = data.draw(st.integers(0, count - 1)), data.draw(st.integers(0, 31))
    arrived[place] ^= -(2**31) if bit == 31 else 1 << bit
    assert bits(digest(as_state(sent))) == bits(digest(as_state(sent.clone())))
    assert bits(digest(as_state(sent))) != bits(digest(as_state(arrived)))


@both
def test_words_in_another_order_are_noticed_and_so_is_an_end_that_is_missing(digest: Digest) -> None:
    sent = words(1000)
    seen = {tuple(bits(digest(as_state(sent))))}
    for arrived in (sent.flip(0), sent.roll(1), sent[:-1], torch.cat([sent, sent.new_zeros(1)]), sent.new_zeros(1000)):
        seen.add(tuple(bits(digest(as_state(arrived.contiguous())))))
    for length in (0, 1, 2):
        seen.add(tuple(bits(digest(as_state(sent.new_zeros(length))))))
    assert len(seen) == 9


def test_how_it_is_cut_to_be_added_up_makes_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    state = as_state(words(1000))
    whole = bits(sums_of(state))
    monkeypatch.setattr(digests, "_CHUNK", 7)
    assert bits(sums_of(state)) == whole


def test_a_digest_is_that_of_every_machine() -> None:
    """Integers only, so a GPU finds the same; these were found with Python's."""
    found = bits(sums_of(as_state(torch.arange(10, dtype=torch.int32))))
    assert found == [723725471, -2016815064, 1162829171, -1658664086]
