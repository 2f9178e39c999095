"""The table of model types says what is really so (`tests.ranks.architectures`)."""

from __future__ import annotations

import pytest

from tests.ranks.architectures import COLUMNS, SPREAD, kinds, read_table, row_of
from tests.selection import nightly


def test_the_table_has_every_type_of_the_transformers_that_is_pinned() -> None:
    assert list(read_table()) == kinds()


@pytest.mark.parametrize("kind", [*SPREAD, *nightly(kind for kind in read_table() if kind not in SPREAD)])
def test_a_type_can_be_had_as_the_table_says(kind: str) -> None:
    found = {column: said.split()[0].rstrip(":") for column, said in row_of(kind).items()}
    assert found == read_table()[kind], row_of.__name__
    assert tuple(found) == COLUMNS
