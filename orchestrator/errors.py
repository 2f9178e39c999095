"""What a user is told in one line: errors that are nobody's bug."""

from __future__ import annotations

from monitoring.errors import UserError


class PlanError(UserError, ValueError):
    """The question cannot be answered as it was asked, or no layout fits; the text says which number is wrong."""


class PluginError(UserError, ValueError):
    """A part that another package was to bring is not there, or is not what it should be."""
