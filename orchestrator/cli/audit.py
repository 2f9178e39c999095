"""`orchestrator audit`: the ledger of a run against its job, and the tokens against those that it was made with."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from monitoring.outside import json_text
from monitoring.terminal.clean import clean
from orchestrator.data.ledger import AuditReport
from orchestrator.data.ledger import audit as audit_ledger
from orchestrator.data.proof import rehash_tokens
from orchestrator.data.sources import DataError
from orchestrator.rundir import RunDirectory, RunDirectoryError


def audit(directory: RunDirectory, *, as_json: bool) -> bool:
    """Prints what was found; whether it proves that the run used its data as its job file says.

    Raises RunDirectoryError when the run never got as far as its data, or environment.json is damaged.
    """
    environment = directory.read_json("environment.json")
    if environment is None or "data" not in environment:
        raise RunDirectoryError(f"{directory.path} has no environment.json: the run never got as far as its data")
    report = _ledger(directory, environment["data"])
    problems = list(report.problems)
    result: dict[str, Any] = {}
    try:
        result = directory.read_json("result.json") or {}
    except RunDirectoryError as error:
        problems.append(f"what the run recorded cannot be compared: {error}")
    recorded = result.get("data_digest")
    if recorded and report.ok and recorded != report.data_digest:
        problems.append(f"result.json says {recorded}, the ledger gives {report.data_digest}")
    tokens = rehash_tokens(environment.get("store", {}))
    problems += tokens.problems
    if as_json:
        found = {"tokens_verified": tokens.num_tokens, "tokens_unchecked": tokens.unchecked}
        print(json_text(asdict(report) | found | {"ok": not problems, "problems": problems}))
        return not problems
    if problems:
        print("audit failed:\n  " + "\n  ".join(map(clean, problems)))
    else:
        several = " of its sources" if "sources" in environment["data"] else ""
        print(
            f"audit passed: {report.steps} steps, {report.samples:,} samples, each exactly once "
            f"({report.epochs_complete} whole epochs{several}, {report.partial_epoch_samples:,} samples of the next)"
        )
        if tokens.num_tokens:
            print(f"{tokens.num_tokens:,} tokens in the store, hashed again: those that the run was made with")
        print(report.data_digest)
    for what in tokens.unchecked:
        print(f"tokens not checked: {clean(what)}")
    return not problems


def _ledger(directory: RunDirectory, data: dict[str, Any]) -> AuditReport:
    try:
        return audit_ledger(directory.metrics, **data)
    except DataError:
        raise
    except (TypeError, KeyError, ValueError, ArithmeticError, MemoryError) as error:
        path = directory.path / "environment.json"
        raise RunDirectoryError(f"{path} is damaged: its data cannot be audited: {error}") from error
