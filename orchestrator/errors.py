"""What a user is told in one line: errors that are nobody's bug."""

from __future__ import annotations


class PlanError(ValueError):
    """The question cannot be answered as it was asked, or no layout fits; the text says which number is wrong."""
