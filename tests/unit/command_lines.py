"""Finding the command lines of `orchestrator` and `ray` in files and documentation, and holding them to those programs.

A command line counts as right when the program's own parser takes it: command, options, and what has a fixed set of
choices. Nothing is run.
"""

from __future__ import annotations

import re
import shlex
from typing import Any

PROGRAMS = ("orchestrator", "ray")
_END = {";", "&", "&&", "|", "||", "(", ")", "<", ">", ">&", "&>", "<<", ">>", ";;"}
_PREFIXES = {"exec", "nohup", "then", "do", "else", "until", "--", "!", "sudo", "RUN"}


def calls_in_shell(text: str) -> list[list[str]]:
    """Every call of one of PROGRAMS in a shell command: the program and its arguments, without redirections.

    A program counts where a command may begin: at the start, after an operator or an assignment, after words like
    `exec` or `--` (`ray job submit -- orchestrator run ...`), at the start of a quoted word (`ray exec F '...'`), and
    in one behind `-c` (`bash -c '...'`).
    """
    lexer = shlex.shlex(re.sub(r"\\\n", " ", text).replace("\n", " ; "), posix=True, punctuation_chars=True)
    lexer.whitespace_split, lexer.commenters = True, ""
    words = list(lexer)
    calls = []
    for number, word in enumerate(words):
        before = words[number - 1] if number else ";"
        begins = before in _END or before in _PREFIXES or re.fullmatch(r"[A-Za-z_]+=.*", before)
        if word in PROGRAMS and begins:
            rest = words[number + 1 :]
            end = next((index for index, later in enumerate(rest) if later in _END), len(rest))
            stops = end < len(rest) and rest[end] in ("<", ">", ">&", "&>", ">>") and end > 0 and rest[end - 1] in "012"
            calls.append([word, *rest[: end - 1 if stops else end]])
        elif " " in word and (before == "-c" or word.split(" ")[0] in PROGRAMS):
            calls += calls_in_shell(word)
    return calls


def commands_in_comments(text: str) -> list[str]:
    """What a file's head says to type: lines of its comments that are indented by five, continuations joined."""
    return _joined([line[6:] for line in text.splitlines() if line.startswith("#     ")])


def commands_in_markdown(text: str) -> list[str]:
    """Fenced bash blocks, lines of blocks indented by four, and `code` that begins with a program's name."""
    fenced = re.findall(r"^```(?:bash|sh)\n(.*?)^```", text, re.M | re.S)
    rest = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    lines = [line[4:] for line in rest.splitlines() if line.startswith("    ")]
    inline = [" ".join(code.split()) for code in re.findall(r"(?<!`)`([^`]+)`(?!`)", rest)]
    return fenced + _joined(lines) + [code for code in inline if code.split(" ")[0] in PROGRAMS and " " in code]


def _joined(lines: list[str]) -> list[str]:
    """Without comments at the end of a line, and with lines that end in a backslash put together."""
    joined = re.sub(r"\\\n\s*", " ", "\n".join(re.sub(r"\s{2,}#.*", "", line) for line in lines))
    return [line for line in joined.splitlines() if line.strip()]


def parse(call: list[str]) -> None:
    """Raises what the program's own parser raises for `call` (an unknown command or option, a wrong choice, ...).

    A command without any argument is taken as a mention of it, not as a call, when it needs some.
    """
    program, *arguments = call
    command: Any = _command(program)
    context, name = None, program
    while arguments:
        context = command.make_context(name, list(arguments), parent=context)
        if not hasattr(command, "resolve_command"):
            return
        name, command, arguments = command.resolve_command(context, [*context._protected_args, *context.args])


def _command(program: str) -> Any:
    if program == "ray":
        from ray.scripts.scripts import cli

        return cli
    from typer.main import get_command

    from orchestrator.cli import app

    return get_command(app)
