"""YAML to plain data, with the position of every key and value.

Only the scanner, parser and composer of PyYAML are used; the values are made here. That keeps positions,
finds duplicate keys, and leaves out the parts of YAML 1.1 that surprise: `3e-4` is a number, `010` is ten,
and `on`, `yes`, `1:30` and `2020-01-01` are strings.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import yaml

Path = tuple[str | int, ...]

_MAX_DEPTH = 64
_MAX_NODES = 100_000  # aliases of aliases can unfold a short file into billions of values
_TAG = "tag:yaml.org,2002:"

_INT = re.compile(r"[-+]?[0-9][0-9_]*")
_INT_WITH_BASE = re.compile(r"0x[0-9a-fA-F_]+|0o[0-7_]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9][0-9_]*|[0-9][0-9_]*(\.[0-9_]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_NULLS = frozenset({"", "~", "null", "Null", "NULL"})
_BOOLS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}


@dataclass(frozen=True, slots=True)
class Position:
    """Where something was written. `option`: 0 for the job file, n for the n-th option given."""

    file: str
    line: int = 0
    column: int = 0
    option: int = 0


@dataclass(frozen=True, slots=True)
class Mistake:
    """A problem whose field is still a path and whose position can still be sorted."""

    place: Position
    path: Path
    reason: str


class _Broken:
    """Stands for a value that was reported while reading, so that nobody reports it again."""

    def __repr__(self) -> str:
        return "<broken>"


BROKEN = _Broken()


@dataclass(slots=True)
class Tree:
    """Plain data, where its keys and values stand, and what was wrong with it."""

    data: Any = None
    keys: dict[Path, Position] = field(default_factory=dict)
    values: dict[Path, Position] = field(default_factory=dict)
    mistakes: list[Mistake] = field(default_factory=list)
    broken: set[Path] = field(default_factory=set)
    empty: bool = False
    """The text holds no value at all; `data` is None."""


class _Composer(yaml.SafeLoader):
    """Composes nodes, and tells plain scalars, whose kind `_plain` decides, from quoted or tagged ones."""

    # PyYAML's own table: first character (None: any) to (tag, what the whole scalar must match).
    yaml_implicit_resolvers = {  # noqa: RUF012
        "<": [(f"{_TAG}merge", re.compile(r"<<\Z"))],
        None: [(f"{_TAG}plain", re.compile(""))],
    }


def read(text: str, place: Position) -> Tree:
    """The one YAML document in `text`. With `place.option` set, everything stands at `place` itself."""
    try:
        node = yaml.compose(text, Loader=_Composer)
    except yaml.MarkedYAMLError as error:
        return _failed(place, error.problem_mark or error.context_mark, _syntax_reason(error))
    except yaml.reader.ReaderError as error:
        before = text[: error.position]
        line, column = before.count("\n"), len(before) - (before.rfind("\n") + 1)
        reason = f"not valid YAML: the character {chr(error.character)!r} is not allowed"
        return _failed(place, yaml.Mark("", 0, line, column, None, 0), reason)
    except RecursionError:
        return _failed(place, None, "not valid YAML: nested too deeply")
    except (ValueError, OverflowError, LookupError, TypeError, AttributeError) as error:
        # PyYAML lets a few escape, for example for the escape "\U00110000".
        return _failed(place, None, f"not valid YAML: {shorten(str(error))}")
    walker = _Walker(place)
    if node is None:
        walker.tree.empty = True
        walker.tree.values[()] = walker.at(None)
    else:
        walker.tree.data = walker.walk(node, (), ())
    return walker.tree


def one_line(text: str) -> str:
    """`text` with everything that does not print, line ends above all, as escapes."""
    return text if text.isprintable() else text.encode("unicode_escape").decode("ascii")


def shorten(text: str, limit: int = 60) -> str:
    """`text` cut to `limit` characters, the last three of them dots where something was cut."""
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _syntax_reason(error: yaml.MarkedYAMLError) -> str:
    problem = error.problem or error.context or "cannot be read"
    reason = f"not valid YAML: {shorten(problem, 120)}"
    if "'\\t'" in problem:
        reason += "; indent with spaces, not tabs"
    elif "single document" in (error.context or ""):
        reason = "not valid YAML: a second document starts here (---); a job file holds one"
    return reason


def _failed(place: Position, mark: yaml.Mark | None, reason: str) -> Tree:
    walker = _Walker(place)
    walker.report(walker.at(mark), (), reason)
    walker.tree.data = BROKEN
    return walker.tree


class _Walker:
    def __init__(self, place: Position) -> None:
        self.tree = Tree()
        self._place = place
        self._nodes = 0

    def at(self, mark: yaml.Mark | None) -> Position:
        if self._place.option:
            return self._place
        line, column = (mark.line, mark.column) if mark else (0, 0)
        return Position(self._place.file, line + 1, column + 1)

    def report(self, place: Position, path: Path, reason: str) -> None:
        self.tree.mistakes.append(Mistake(place, path, reason))
        self.tree.broken.add(path)

    def walk(self, node: yaml.Node, path: Path, above: tuple[int, ...]) -> Any:
        """The value of `node`; `above` are the ids of the nodes it stands in."""
        place = self.at(node.start_mark)
        self.tree.values[path] = place
        self._nodes += 1
        reason = None
        if id(node) in above:
            reason = "an alias that contains itself cannot be read"
        elif len(above) >= _MAX_DEPTH:
            reason = f"nested more than {_MAX_DEPTH} levels deep"
        elif self._nodes > _MAX_NODES:
            reason = f"more than {_MAX_NODES} values once its aliases are unfolded"
            if self._nodes > _MAX_NODES + 1:
                return BROKEN  # said once
        if reason is None:
            inside = (*above, id(node))
            if isinstance(node, yaml.MappingNode) and node.tag == f"{_TAG}map":
                return self._mapping(node, path, inside)
            if isinstance(node, yaml.SequenceNode) and node.tag == f"{_TAG}seq":
                return [self.walk(item, (*path, index), inside) for index, item in enumerate(node.value)]
            if isinstance(node, yaml.ScalarNode):
                try:
                    return _scalar(node)
                except ValueError as error:
                    reason = str(error)
            else:
                reason = f"the tag {shorten(node.tag.replace(_TAG, '!!'))} is not supported here"
        self.report(place, path, reason)
        return BROKEN

    def _mapping(self, node: yaml.MappingNode, path: Path, above: tuple[int, ...]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        merged: list[yaml.Node] = []
        for key_node, value_node in node.value:
            place = self.at(key_node.start_mark)
            if key_node.tag == f"{_TAG}merge":
                merged.append(value_node)
                continue
            key = self._key(key_node, path)
            if key is None:
                continue
            if key in result:
                first = self.tree.keys[(*path, key)]
                where = f", first given at {first.line}:{first.column}" if first.line else ""
                self.tree.mistakes.append(Mistake(place, (*path, key), f"given twice{where}"))
                continue
            self.tree.keys[(*path, key)] = place
            result[key] = self.walk(value_node, (*path, key), above)
        for source in merged:
            self._merge(source, result, path, above)
        return result

    def _key(self, node: yaml.Node, path: Path) -> str | None:
        shown, hint = "a list or mapping", ""
        if isinstance(node, yaml.ScalarNode):
            try:
                key = _scalar(node)
            except ValueError:
                key = None
            if isinstance(key, str):
                return key
            shown, hint = describe(key), f'; write "{shorten(node.value)}" in quotes if it is meant'
        self.tree.mistakes.append(Mistake(self.at(node.start_mark), path, f"a key must be a string, got {shown}{hint}"))
        return None

    def _merge(self, source: yaml.Node, result: dict[str, Any], path: Path, above: tuple[int, ...]) -> None:
        """`<<`: the keys of `source` that are not in `result` yet, as YAML 1.1 has it."""
        sources = source.value if isinstance(source, yaml.SequenceNode) else [source]
        for item in sources:
            if not isinstance(item, yaml.MappingNode) or id(item) in above or len(above) >= _MAX_DEPTH:
                place = self.at(item.start_mark)
                self.tree.mistakes.append(Mistake(place, path, "<< needs a mapping or a list of them"))
                continue
            # A key that is overridden must leave no trace, so the merged mapping is read apart.
            apart = _Walker(self._place)
            apart._nodes = self._nodes
            values = apart._mapping(item, path, (*above, id(item)))
            self._nodes = apart._nodes
            new = {key: value for key, value in values.items() if key not in result}
            result.update(new)
            self._take(apart.tree, path, set(new))

    def _take(self, other: Tree, path: Path, keys: set[str]) -> None:
        depth = len(path)

        def wanted(found: Path) -> bool:
            return len(found) <= depth or found[depth] in keys

        self.tree.keys.update({found: at for found, at in other.keys.items() if wanted(found)})
        self.tree.values.update({found: at for found, at in other.values.items() if wanted(found)})
        self.tree.broken.update(found for found in other.broken if wanted(found))
        self.tree.mistakes.extend(mistake for mistake in other.mistakes if wanted(mistake.path))


def describe(value: object) -> str:
    """A value in words for an error: its kind and its repr, cut at 60 characters."""
    if value is None:
        return "nothing (null)"
    if isinstance(value, bool):
        return f"the boolean {str(value).lower()}"
    kinds = {int: "integer", float: "number", str: "string", list: "list", dict: "mapping"}
    return f"the {kinds.get(type(value), type(value).__name__)} {shorten(repr(value))}"


def _scalar(node: yaml.ScalarNode) -> Any:
    """The value of a scalar: by its tag where it has one, a string where it is quoted. Raises ValueError."""
    value: str = node.value
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise ValueError(f"{shorten(ascii(value))} is half a character (a surrogate), not text")
    tag = node.tag.removeprefix(_TAG)
    if tag == "plain":
        return _plain(value)
    if tag in ("str", "merge"):
        return value
    if tag not in ("int", "float", "bool", "null"):
        raise ValueError(f"the tag {shorten(node.tag.replace(_TAG, '!!'))} is not supported here")
    result = _plain(value)
    if tag == "float" and type(result) is int:
        result = float(result)
    kind = {int: "int", float: "float", bool: "bool", type(None): "null"}.get(type(result), "str")
    if kind != tag:
        raise ValueError(f"{shorten(repr(value))} is not a value of the tag !!{tag}")
    return result


def _plain(value: str) -> Any:
    if value in _NULLS:
        return None
    if value in _BOOLS:
        return _BOOLS[value]
    if _INT.fullmatch(value) or _INT_WITH_BASE.fullmatch(value):
        return _integer(value)
    if _FLOAT.fullmatch(value):
        return float(value.replace("_", ""))
    if _NOT_FINITE.fullmatch(value):
        return float(value.replace(".", "").lower())
    return value


def _integer(text: str) -> int:
    digits = text.replace("_", "")
    base = {"0x": 16, "0o": 8}.get(digits[:2], 10)
    if len(digits) <= 40 and digits not in ("0x", "0o"):
        number = int(digits, base)
        if abs(number) < 2**63:
            return number
    raise ValueError(f"{shorten(text)} is not an integer of 64 bits")
