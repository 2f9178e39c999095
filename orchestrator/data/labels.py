"""The labels of records, as words beside their tokens: one of several names, some of them, numbers, or yes and no."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Kind = Literal["single", "multi", "number", "boolean"]
_YES = {"true": 1, "yes": 1, "1": 1, "false": 0, "no": 0, "0": 0}


class BadLabel(ValueError):
    """A label that is not what the objective takes; the message says what it should be."""


@dataclass(frozen=True)
class LabelSpec:
    """What labels are. `single` is one of `count` classes and `multi` any of them, by number or by `names`; `number` is
    `count` numbers, `boolean` yes or no."""

    kind: Kind
    count: int = 1
    names: tuple[str, ...] = ()

    @property
    def words(self) -> int:
        """How many uint32 a label takes."""
        match self.kind:
            case "multi":
                return -(-self.count // 32)
            case "number":
                return self.count
        return 1

    def encode(self, value: Any) -> NDArray[np.uint32]:
        """A record's label as uint32 [words]. Raises BadLabel."""
        match self.kind:
            case "single":
                return np.array([self._index(value)], dtype=np.uint32)
            case "multi":
                return self._set_of(value)
            case "number":
                return self._numbers(value).view(np.uint32)
        return np.array([self._boolean(value)], dtype=np.uint32)

    def decode(self, words: NDArray[np.uint32]) -> NDArray[np.int64]:
        """What the objective computes with, of words [n, words]: int64 [n]. A class; a set of them as bits (at most
        62); the bits of one fp32; 0 or 1."""
        if self.kind == "multi":
            low = words[:, 0].astype(np.int64)
            return low | (words[:, 1].astype(np.int64) << 32) if words.shape[1] > 1 else low
        if self.kind == "number":
            return np.ascontiguousarray(words[:, 0]).view(np.int32).astype(np.int64)
        return words[:, 0].astype(np.int64)

    def _index(self, value: Any) -> int:
        if isinstance(value, str) and value in self.names:
            return self.names.index(value)
        if isinstance(value, str) and not self.names and value.strip().isdecimal():
            value = int(value)  # As tables without types have them.
        if isinstance(value, bool) or not isinstance(value, int):
            known = f"one of {_listed(self.names)}" if self.names else f"a number from 0 to {self.count - 1}"
            raise BadLabel(f"is {value!r}, not {known}")
        if not 0 <= value < self.count:
            raise BadLabel(f"is {value}, and there are {self.count} classes, 0 to {self.count - 1} (objective.labels)")
        return value

    def _set_of(self, value: Any) -> NDArray[np.uint32]:
        if isinstance(value, str):
            value = [part.strip() for part in value.split(",") if part.strip()]
        if not isinstance(value, Sequence):
            raise BadLabel(f"is {value!r}, not a list of classes")
        if len(value) == self.count and self.count > 1 and all(each in (0, 1, 0.0, 1.0, True, False) for each in value):
            # A vector of yes and no, as some data sets have them. (Two classes 0 and 1 are the same both ways or not at
            # all: then names are needed.)
            if not self.names and self.count == 2 and sorted(map(int, value)) == [0, 1]:
                raise BadLabel(f"is {value!r}, a list of classes or a vector: name the classes in objective.labels")
            chosen = [number for number, each in enumerate(value) if each]
        else:
            chosen = [self._index(each) for each in value]
        found = np.zeros(self.words, dtype=np.uint32)
        for number in chosen:
            found[number // 32] |= np.uint32(1 << (number % 32))
        return found

    def _numbers(self, value: Any) -> NDArray[np.float32]:
        values = list(value) if isinstance(value, (list, tuple)) else [value]
        if len(values) != self.count:
            raise BadLabel(f"has {len(values)} numbers, not {self.count}")
        found = []
        for each in values:
            try:
                number = float(each) if not isinstance(each, bool) else None
            except (TypeError, ValueError):
                number = None
            if number is None or not np.isfinite(number):
                raise BadLabel(f"is {each!r}, not a finite number")
            found.append(number)
        return np.array(found, dtype=np.float32)

    def _boolean(self, value: Any) -> int:
        if isinstance(value, (bool, int)) and value in (0, 1):
            return int(value)
        if isinstance(value, str) and value.strip().lower() in _YES:
            return _YES[value.strip().lower()]
        raise BadLabel(f"is {value!r}, not true or false")


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, names[:6]))
    return shown + (f" and {len(names) - 6} more" if len(names) > 6 else "")
