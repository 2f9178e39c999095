"""Small files of records of every shape, for tests: what they say can be learnt."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

WORDS = ("apple", "stone", "river", "cloud", "lamp", "green", "seven", "north")
CHATML = (
    "{% for message in messages %}<|{{ message['role'] }}|>{% if message['role'] == 'assistant' %}{% generation %}"
    "{{ message['content'] }}<end>{% endgeneration %}{% else %}{{ message['content'] }}<end>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""Of the kind of ChatML, with what the assistant says marked."""


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    """As lines of JSON."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def phrases(count: int, seed: int = 0) -> list[str]:
    """Of two to six words."""
    chance = random.Random(seed)
    return [" ".join(chance.choices(WORDS, k=chance.randint(2, 6))) for _ in range(count)]


def chats(count: int = 40) -> list[dict[str, Any]]:
    """Somebody says a phrase, and is answered with its last word, twice."""
    found = []
    for number, phrase in enumerate(phrases(count)):
        messages = [{"role": "user", "content": phrase}, {"role": "assistant", "content": phrase.split()[-1]}]
        if number % 3 == 0:
            messages += [{"role": "user", "content": "and first?"}, {"role": "assistant", "content": phrase.split()[0]}]
        found.append({"messages": messages})
    return found


def completions(count: int = 40) -> list[dict[str, Any]]:
    """A phrase, and its last word."""
    return [{"prompt": f"{each} -> ", "completion": each.split()[-1]} for each in phrases(count)]


def labelled(count: int = 40) -> list[dict[str, Any]]:
    """Whether a phrase begins with a word of the first half."""
    return [{"text": each, "label": int(each.split()[0] in WORDS[:4])} for each in phrases(count)]


def scored(count: int = 40) -> list[dict[str, Any]]:
    """How many words a phrase has, by ten."""
    return [{"text": each, "label": len(each.split()) / 10} for each in phrases(count)]


def preferences(count: int = 40) -> list[dict[str, Any]]:
    """The last word is preferred to the first."""
    return [
        {"prompt": f"{each} -> ", "chosen": each.split()[-1], "rejected": each.split()[0] + " no"}
        for each in phrases(count)
    ]


def liked(count: int = 40) -> list[dict[str, Any]]:
    """The last word is liked, the first is not."""
    return [
        {"prompt": f"{each} -> ", "completion": each.split()[-1 if number % 2 else 0], "label": bool(number % 2)}
        for number, each in enumerate(phrases(count))
    ]


def together(count: int = 40) -> list[dict[str, Any]]:
    """A phrase and its words in order."""
    return [{"anchor": each, "positive": " ".join(sorted(each.split()))} for each in phrases(count)]
