"""What a user is told in one line: errors that the user can correct."""

from __future__ import annotations

from typing import ClassVar


class UserError(Exception):
    """The command line prints it and exits with `exit_code` (2: what was asked for is wrong, 1: it failed), without a
    traceback. `has_place` says that the text begins with a place in a file, and needs no name before it."""

    exit_code: ClassVar[int] = 2
    has_place: ClassVar[bool] = False
