"""`orchestrator audit`: the ledger of a run against its job, and the tokens against those that it was made with."""

from __future__ import annotations

import json
from dataclasses import asdict

from orchestrator.data.ledger import audit as audit_ledger
from orchestrator.data.proof import rehash_tokens
from orchestrator.rundir import RunDirectory, RunDirectoryError


def audit(directory: RunDirectory, *, as_json: bool) -> bool:
    """Prints what was found; whether it proves that the run used its data as its job file says.

    Raises RunDirectoryError when the run never got as far as its data.
    """
    environment = directory.read_json("environment.json")
    if environment is None or "data" not in environment:
        raise RunDirectoryError(f"{directory.path} has no environment.json: the run never got as far as its data")
    report = audit_ledger(directory.metrics, **environment["data"])
    result = directory.read_json("result.json") or {}
    problems = list(report.problems)
    recorded = result.get("data_digest")
    if recorded and report.ok and recorded != report.data_digest:
        problems.append(f"result.json says {recorded}, the ledger gives {report.data_digest}")
    tokens = rehash_tokens(environment.get("store", {}))
    problems += tokens.problems
    if as_json:
        found = {"tokens_verified": tokens.num_tokens, "tokens_unchecked": tokens.unchecked}
        print(json.dumps(asdict(report) | found | {"ok": not problems, "problems": problems}))
        return not problems
    if problems:
        print("audit failed:\n  " + "\n  ".join(problems))
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
        print(f"tokens not checked: {what}")
    return not problems
