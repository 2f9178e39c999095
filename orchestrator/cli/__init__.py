"""The command line: what is asked for, and what is shown."""

from orchestrator.cli.app import app as app
from orchestrator.cli.app import main as main
