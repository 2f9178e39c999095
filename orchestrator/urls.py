"""URLs of a job that name a secret: `${env:NAME}` stays as it is wherever the job goes; who opens a URL fills it in."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from monitoring.errors import UserError
from monitoring.redaction import is_redacted, learn, redact_urls

VARIABLE = re.compile(r"\$\{env:([A-Za-z_][A-Za-z0-9_]*)\}")


class UrlProblem(UserError, ValueError):
    """A URL that cannot be opened as it is written; says why and what to do."""


def expand(url: str) -> str:
    """The URL with the values of its variables; those of its secrets are redacted from then on.

    Raises UrlProblem for a variable that is not set, and for a URL whose password was not written down.
    """
    if is_redacted(url):
        raise UrlProblem(
            f"{url}: the secret in this URL is not written down in a run directory; run again with the job file "
            "(`orchestrator run JOB --run-dir DIR` goes on from there), or write ${env:NAME} in its place"
        )

    def value(found: re.Match[str]) -> str:
        content = os.environ.get(found[1], "")
        if not content:
            raise UrlProblem(f"{url}: the environment variable {found[1]} is not set")
        if found[1] in secrets:
            learn(content)
        return content

    secrets = secrets_of(url)
    return VARIABLE.sub(value, url)


def expand_settings(value: Any) -> Any:
    """Settings of somebody else's, as JSON has them, with the values of the variables in their texts: all of these are
    secrets.

    Raises UrlProblem for a variable that is not set.
    """
    if isinstance(value, dict):
        return {key: expand_settings(item) for key, item in value.items()}
    if isinstance(value, list):
        return [expand_settings(item) for item in value]
    if not isinstance(value, str):
        return value
    filled = expand(value)
    for name in VARIABLE.findall(value):
        learn(os.environ[name])
    return filled


def secrets_of(url: str) -> set[str]:
    """The variables that stand where a URL has a password or a signature; the others are no secrets (a bucket, a
    year)."""
    names = VARIABLE.findall(url)
    shown = redact_urls(VARIABLE.sub(r"-variable-\1-end-of-it-", url))
    return {name for name in names if shown.count(f"-variable-{name}-end-of-it-") < names.count(name)}


def urls_of(job: Any) -> Iterator[tuple[str, str]]:
    """The dotted field and the text of whatever may be a URL in a `Job`."""
    data = job.data
    entries = [("data", data.source)] if data.mix is None else []
    entries += [(f"data.mix.{number}", entry.source) for number, entry in enumerate(data.mix or ())]
    for where, source in entries:
        if isinstance(source, str):
            yield f"{where}.source", source
        else:
            yield from ((f"{where}.source.{number}", one) for number, one in enumerate(source or ()))
    yield from ((f"data.mirrors.{number}", mirror) for number, mirror in enumerate(data.mirrors))
    if job.checkpoint.storage is not None:
        yield "checkpoint.storage", job.checkpoint.storage
    if job.monitoring.mlflow is not None:
        yield "monitoring.mlflow.tracking_uri", job.monitoring.mlflow.tracking_uri


def environment_of(job: Any) -> dict[str, str]:
    """The variables that the URLs of a `Job` name, and their values here: what its other processes need to open them.

    Raises UrlProblem for one that is not set.
    """
    environment: dict[str, str] = {}
    for field, url in urls_of(job):
        try:
            expand(url)
        except UrlProblem as error:
            raise UrlProblem(f"{field}: {error}") from None
        environment |= {name: os.environ[name] for name in VARIABLE.findall(url)}
    return environment


def fields_with_secrets(job: Any) -> list[str]:
    """The fields of a `Job` that hold a secret in the clear."""
    return [field for field, url in urls_of(job) if redact_urls(url) != url]


def take_over(environment: Mapping[str, str]) -> None:
    """In another process of the run: the variables that `environment_of` found."""
    os.environ.update(environment)
