"""Conversations as text: what the tokenizer's chat template makes of messages, and which parts the assistant said."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Spans = list[tuple[int, int]]
"""Parts of a text, in characters: from, to."""
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class BadConversation(ValueError):
    """Messages that cannot be rendered; the message says why."""


OTHER_ROLES = {"human": "user", "gpt": "assistant"}
"""What they are called where the key of roles is another, too."""


def check_messages(field: str, messages: Any, names: Mapping[str, str] = {}) -> list[dict[str, Any]]:
    """The messages in a field of a record; `names` are what their `role` and `content` are called there. Raises
    BadConversation for what are none."""
    if names.keys() & {"role", "content"} and isinstance(messages, list):
        messages = [_renamed(message, names) for message in messages]
    if not isinstance(messages, list) or not messages:
        raise BadConversation(f"field {field!r} must be a list of messages, not {_kind(messages)}")
    for number, message in enumerate(messages):
        if not isinstance(message, dict):
            raise BadConversation(f"message {number} of {field!r} is {_kind(message)}, not an object")
        if not isinstance(message.get("role"), str):
            raise BadConversation(
                f"message {number} of {field!r} has no role, only {sorted(message)[:10]}; data.fields maps other names "
                "of role and content"
            )
        content = message.get("content")
        is_empty = content is None and not message.get("tool_calls")
        if is_empty or not isinstance(content, (str, list, type(None))):
            raise BadConversation(f"message {number} of {field!r} has content that is {_kind(content)}, not a string")
    return [{key: value for key, value in message.items() if value is not None} for message in messages]


def _renamed(message: Any, names: Mapping[str, str]) -> Any:
    if not isinstance(message, dict):
        return message
    ours = {theirs: name for name, theirs in names.items() if name in ("role", "content")}
    found = {ours.get(key, key): value for key, value in message.items()}
    if "role" in names and isinstance(found.get("role"), str):
        found["role"] = OTHER_ROLES.get(found["role"], found["role"])
    return found


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja template of Hugging Face's kind, and the special tokens (`eos_token` and its like) that it may name."""

    text: str
    special: Mapping[str, str]

    @property
    def is_marked(self) -> bool:
        """Whether it says itself, by {% generation %}, what the assistant said."""
        return _GENERATION.search(self.text) is not None

    def render(
        self, messages: Sequence[dict[str, Any]], tools: Any = None, *, ask: bool = False
    ) -> str:  # fmt: skip
        """The text of a conversation; with `ask`, and of what the assistant's next answer begins with. Raises
        BadConversation."""
        text, _ = self._render(messages, tools, ask=ask)
        return text

    def render_parts(self, messages: Sequence[dict[str, Any]], tools: Any = None) -> tuple[str, Spans]:
        """The text, and the spans of it that the assistant said.

        Those that the template marks with {% generation %}. Of one that does not, each answer is what the text has more
        with it than without, which needs a template that says the same of earlier messages whatever follows. Raises
        BadConversation where it does not.
        """
        if self.is_marked:
            return self._render(messages, tools, marks=True)
        whole, spans = self.render(messages, tools), []
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self.render(messages[:number], tools, ask=True) if number else ""
            after = self.render(messages[: number + 1], tools)
            if not (after.startswith(before) and whole.startswith(after)):
                raise BadConversation(
                    "the chat template renders earlier messages otherwise when others follow, so that what the "
                    "assistant said cannot be told from its text: mark it in the template with {% generation %} ... "
                    "{% endgeneration %} (data.chat_template), or set objective.loss_on: all"
                )
            spans.append((len(before), len(after)))
        return whole, spans

    def _render(
        self, messages: Sequence[dict[str, Any]], tools: Any, *, ask: bool = False, marks: bool = False
    ) -> tuple[str, Spans]:
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            more: dict[str, Any] = dict(self.special)
            found: Any = render_jinja_template(
                [list(messages)], tools=tools or None, chat_template=self.text, add_generation_prompt=ask,
                return_assistant_tokens_mask=marks, **more,
            )  # fmt: skip
        except Exception as error:  # A template can fail with anything, and raises what it wants for bad roles.
            raise BadConversation(f"the chat template fails: {type(error).__name__}: {error}") from error
        texts, spans = found
        return texts[0], [(int(first), int(last)) for first, last in spans[0]] if marks else []


def _kind(value: Any) -> str:
    return "missing" if value is None else f"a {type(value).__name__}"
