"""The table of model types says what is really so (`tests.ranks.architectures`)."""

from __future__ import annotations

import pytest

from tests.ranks.architectures import SPREAD, YES, kinds, read_table, row_of, row_of_all_yes

LAYOUTS = ("trains", "pipeline", "tensor", "shard")
"""What every run tries of the twelve types that it tries."""


def test_the_table_has_every_type_of_the_transformers_that_is_pinned() -> None:
    assert list(read_table()) == kinds()


@pytest.mark.parametrize("kind", SPREAD)
def test_a_type_can_be_laid_out_as_the_table_says(kind: str) -> None:
    expected = {column: said for column, said in read_table()[kind].items() if column in LAYOUTS}
    possible = tuple(column for column, said in expected.items() if said == YES)
    row = row_of_all_yes(kind, possible)
    row |= {column: row_of(kind, ("trains", column))[column] for column in LAYOUTS if column not in possible}
    assert said_in(row) == expected, row


@pytest.mark.nightly
@pytest.mark.parametrize("kind", read_table())
def test_a_type_can_be_had_as_the_table_says(kind: str) -> None:
    row = row_of(kind)
    assert said_in(row) == read_table()[kind], row


def said_in(row: dict[str, str]) -> dict[str, str]:
    """Yes or no, by column, as the table has them."""
    return {column: said.split()[0].rstrip(":") for column, said in row.items()}
