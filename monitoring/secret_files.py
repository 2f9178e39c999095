"""Whether a file that holds a secret can be read by those who are not meant to."""

from __future__ import annotations


def others(mode: int) -> str:
    """Who beside its owner may do something with a file of this mode, in words; "" when nobody may."""
    return " and ".join(name for name, bits in (("its group", 0o070), ("everybody", 0o007)) if mode & bits)
