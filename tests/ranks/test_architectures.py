"""The table of model types says what is really so (`tests.ranks.architectures`)."""

from __future__ import annotations

import pytest

from tests.ranks.architectures import COLUMNS, SPREAD, kinds, read_table, row_of

LAYOUTS = ("trains", "pipeline", "tensor", "shard")
"""What every run tries of the twelve types that it tries."""


def test_the_table_has_every_type_of_the_transformers_that_is_pinned() -> None:
    assert list(read_table()) == kinds()


@pytest.mark.parametrize("kind", SPREAD)
def test_a_type_can_be_laid_out_as_the_table_says(kind: str) -> None:
    check(kind, LAYOUTS)


@pytest.mark.nightly
@pytest.mark.parametrize("kind", read_table())
def test_a_type_can_be_had_as_the_table_says(kind: str) -> None:
    check(kind, COLUMNS)


def check(kind: str, columns: tuple[str, ...]) -> None:
    row = row_of(kind, columns)
    expected = {column: said for column, said in read_table()[kind].items() if column in columns}
    assert {column: said.split()[0].rstrip(":") for column, said in row.items()} == expected, row
