"""Makes the files of records that the examples of fine-tuning train on, from what is on any machine with Python.

    python examples/records.py [DIRECTORY]

writes below `examples/records` (or DIRECTORY):

- paragraphs.jsonl: paragraphs of source code, documentation and licences, and which of these they are;
- chats.jsonl: questions about functions of the standard library, answered with the first line of their documentation;
- preferences.jsonl: the same questions, each with its answer and the words of that in another order.

The order and what is in them is the same every time with the same Python and packages.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import json
import random
import sys
import sysconfig
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__"}
SHORTEST, LONGEST = 60, 400
"""Characters of a paragraph."""
MOST = 1500
"""Paragraphs of a kind."""


def modules() -> Iterator[tuple[str, ast.Module, str]]:
    """The modules of the standard library: name, tree and text."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        inside = path.relative_to(root)
        if SKIPPED.isdisjoint(inside.parts):
            text = path.read_text(encoding="utf-8", errors="replace")
            try:
                yield ".".join(inside.with_suffix("").parts), ast.parse(text), text
            except (SyntaxError, ValueError):
                continue


def functions(tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef]]:
    """Functions and methods, with the names of their classes."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            yield node.name, node
        elif isinstance(node, ast.ClassDef):
            yield from ((f"{node.name}.{each.name}", each) for each in node.body if isinstance(each, ast.FunctionDef))


def paragraphs() -> Iterator[tuple[str, str]]:
    """(text, kind) of all that there are."""
    for _, tree, text in modules():
        lines = text.splitlines()
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
                continue
            documentation = ast.get_docstring(node)
            if documentation:
                yield from ((each, "documentation") for each in documentation.split("\n\n"))
            if isinstance(node, ast.FunctionDef):
                body = node.body[1:] if documentation else node.body
                if body:
                    code = "\n".join(lines[body[0].lineno - 1 : body[-1].end_lineno])
                    yield textwrap.dedent(code)[:LONGEST], "code"
    for distribution in sorted(importlib.metadata.distributions(), key=lambda each: each.metadata["Name"] or ""):
        for file in distribution.files or ():
            if any(word in file.name.upper() for word in ("LICENSE", "LICENCE", "COPYING", "NOTICE")):
                path = Path(str(distribution.locate_file(file)))
                if path.is_file():
                    text = path.read_text(encoding="utf-8", errors="replace").replace("\r\n", "\n")
                    yield from ((each, "licence") for each in text.split("\n\n"))


def labelled() -> list[dict[str, Any]]:
    """As many of each kind, none twice, in an order of their own."""
    kinds: dict[str, dict[str, str]] = {}
    for text, kind in paragraphs():
        text = text.strip()[:LONGEST]
        if len(text) >= SHORTEST:
            kinds.setdefault(kind, {})[hashlib.sha256(text.encode()).hexdigest()] = text
    most = min(MOST, *(len(found) for found in kinds.values()))
    chosen = [
        (digest, {"text": found[digest], "label": kind})
        for kind, found in kinds.items()
        for digest in sorted(found)[:most]
    ]
    return [record for _, record in sorted(chosen, key=lambda each: each[0])]


def answers() -> list[tuple[str, str]]:
    """(question, answer) about functions whose documentation begins with a sentence of some length."""
    found = []
    for module, tree, _ in modules():
        for name, node in functions(tree):
            first = (ast.get_docstring(node) or "").split("\n")[0].strip()
            if 20 <= len(first) <= 100 and first.isascii():
                found.append((f"What does {module}.{name} do?", first))
    return found


def shuffled(texts: Iterable[str]) -> Iterator[str]:
    """Their words in another order, the same every time."""
    chance = random.Random(0)
    for text in texts:
        words = text.split()
        chance.shuffle(words)
        yield " ".join(words)


def main() -> None:
    directory = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "records"
    directory.mkdir(parents=True, exist_ok=True)
    known = answers()
    made = {
        "paragraphs": labelled(),
        "chats": [
            {"messages": [{"role": "user", "content": ask}, {"role": "assistant", "content": answer}]}
            for ask, answer in known
        ],
        "preferences": [
            {"prompt": ask, "chosen": answer, "rejected": other}
            for (ask, answer), other in zip(known, shuffled(answer for _, answer in known), strict=True)
            if answer != other
        ],
    }
    for name, records in made.items():
        text = "".join(json.dumps(record) + "\n" for record in records)
        (directory / f"{name}.jsonl").write_text(text, encoding="utf-8")
        print(f"{directory / name}.jsonl: {len(records):,} records")


if __name__ == "__main__":
    main()
