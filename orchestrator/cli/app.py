"""The command line. Nothing heavy is imported before a command needs it, so that `--help` answers at once."""

from __future__ import annotations

import io
import sys
import traceback
from typing import Any, NoReturn

import typer
import typer.core

from monitoring.errors import UserError
from monitoring.redaction import redact
from monitoring.terminal.clean import clean_lines
from orchestrator.cli import before, evaluating, looking, machines, saved, steering, training
from orchestrator.cli.monitoring import app as monitoring_app
from orchestrator.cli.outcome import EXIT_FAILED


class _WholeSentences(typer.core.TyperGroup):
    """Lists commands with the whole of their first sentence, over as many lines as it takes."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Writes the list."""
        found = [(name, self.get_command(ctx, name)) for name in self.list_commands(ctx)]
        rows = [(name, each.get_short_help_str(limit=10_000)) for name, each in found if each and not each.hidden]
        with formatter.section("Commands"):
            formatter.write_dl(rows)


app = typer.Typer(
    name="orchestrator",
    cls=_WholeSentences,
    help="Elastic training on Ray: the result is a function of the job file, not of the cluster's luck.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

app.add_typer(monitoring_app, name="monitoring")
app.command()(training.run)
app.command()(training.resume)
app.command()(training.submit)
app.command()(training.attach)
app.command()(before.validate)
app.command()(before.plan)
app.command()(looking.status)
app.command()(looking.watch)
app.command()(looking.events)
app.command()(looking.logs)
app.command()(looking.report)
app.command("page")(looking.page_)
app.command()(steering.resize)
app.command()(steering.checkpoint)
app.command()(saved.checkpoints)
app.command()(saved.export)
app.command()(steering.stop)
app.command()(machines.drain)
app.command("node-watcher")(machines.node_watcher)
app.command()(saved.audit)
app.command()(before.doctor)
app.command()(evaluating.evaluate)


def main() -> None:
    """Entry point: turns what a user did wrong into one clear error and exit code 2."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # What the locale of a terminal has no letters for is shown as an escape.
            stream.reconfigure(errors="backslashreplace")
    try:
        app()
    except BrokenPipeError:
        _end_unread()
    except SystemExit:
        if type(sys.stdout).__name__ == "PacifyFlushWrapper":  # Typer's sign that it met a closed pipe.
            _end_unread()
        try:
            sys.stdout.flush()
        except BrokenPipeError:
            _end_unread()
        raise
    except UserError as error:
        print(clean_lines(str(error) if error.has_place else f"orchestrator: {error}"), file=sys.stderr)
        sys.exit(error.exit_code)
    except Exception as error:
        print(redact("".join(traceback.format_exception(error))), end="", file=sys.stderr)
        sys.exit(EXIT_FAILED)


def _end_unread() -> NoReturn:
    """Nobody reads what is printed (`orchestrator events RUN | head`): that is no error."""
    from monitoring.terminal.gone import EXIT_CODE, silence_stdout

    silence_stdout()
    sys.exit(EXIT_CODE)


if __name__ == "__main__":
    main()
