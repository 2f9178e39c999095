"""The seeded faults of `tests.mutations` can be made: a refactoring that takes their text away moves them along."""

from __future__ import annotations

import pytest

from tests.mutations import MUTATIONS, PACKAGES, ROOT, Mutation

SOURCES = [path.read_text() for package in PACKAGES for path in (ROOT / package).rglob("*.py")]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_its_text_is_there_once_and_so_are_the_tests_that_catch_it(mutation: Mutation) -> None:
    assert sum(source.count(mutation.old) for source in SOURCES) == 1
    assert mutation.new != mutation.old
    for test in mutation.tests:
        assert (ROOT / test.partition("::")[0]).is_file(), test
