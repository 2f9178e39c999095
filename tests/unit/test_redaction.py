"""No password of a URL is shown or written down, whichever way text leaves the process."""

from __future__ import annotations

import logging
import pickle
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from monitoring import redaction
from monitoring.logs import LogContext, parse_line, set_up
from monitoring.outside import json_text
from monitoring.records import RecordFile
from monitoring.redaction import is_redacted, redact
from monitoring.sinks.base import settings_of
from monitoring.terminal.clean import clean, clean_lines
from orchestrator.data.sources import DataError, resolve_files
from orchestrator.data.store import prepare
from orchestrator.job import Job, JobError
from orchestrator.rundir import RunDirectory
from orchestrator.storage import StorageError, open_storage
from orchestrator.urls import UrlProblem, environment_of, expand, fields_with_secrets, take_over
from tests.password_server import PASSWORD, USER, password_server

SECRET = "tops3cret"
BASE: dict[str, Any] = {
    "name": "test",
    "model": {"hf": {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
                     "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 320}},
    "data": {"source": f"https://me:{SECRET}@host/a.txt", "tokenizer": "bytes", "sequence_length": 64},
    "train": {"steps": 120, "global_batch": 16, "micro_batch": 1, "schedule": {"warmup_steps": 1}},
    "elastic": {"workers": {"min": 1, "max": 4}, "virtual_workers": 8},
}  # fmt: skip


def job(**data: Any) -> Job:
    return Job.model_validate(BASE | {"data": BASE["data"] | data})


@pytest.fixture(autouse=True)
def nothing_learnt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redaction, "_learnt", redaction._Learnt())


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("ftp://me:pass@host/x", "ftp://me:***@host/x"),
        ("redis://:pass@host", "redis://:***@host"),
        ("s3://KEY:a/b+c=@bucket/x", "s3://KEY:***@bucket/x"),
        ("ftp://me:p@ss@host/x", "ftp://me:***@host/x"),
        ("simplecache::ftp://me:pass@host/x", "simplecache::ftp://me:***@host/x"),
        ("of ftp://a:b@c and 'http://d:e@f'", "of ftp://a:***@c and 'http://d:***@f'"),
        ("https://b.net/x.jsonl?X-Amz-Signature=abc&n=1", "https://b.net/x.jsonl?X-Amz-Signature=***&n=1"),
        ("https://b.net/x?sv=1&sig=a%2Fb", "https://b.net/x?sv=1&sig=***"),
        ("https://b.net/x?access_token=abc#end", "https://b.net/x?access_token=***#end"),
        ("https://b.net/x?sessionToken=abc&pwd=x", "https://b.net/x?sessionToken=***&pwd=***"),
        ("https://ghp_0123456789abcdef@github.com/x", "https://***@github.com/x"),
        ("ftp://me:pass@[::1]:21/x", "ftp://me:***@[::1]:21/x"),
        ("https://b.net/x?AWSAccessKeyId=AK&Expires=9&Signature=s", "https://b.net/x?AWSAccessKeyId=***&Expires=9&Signature=***"),
    ],
)  # fmt: skip
def test_passwords_and_signatures_are_hidden(text: str, shown: str) -> None:
    assert redact(text) == shown
    assert redact(shown) == shown


@pytest.mark.parametrize(
    "text",
    [
        "s3://bucket/a:b@c", "http://host:8080/path@v1", "http://host:8080", "sftp://me@host/x", "a: b@c",
        "ftp://me:@host", "ftp://me:${env:A}@host/x", "https://h/x?sig=${env:SIG}&n=1", "/data/me:pass@host",
        "https://b.net/x?page=3&design=4", "https://b.net/[x]", "http://[::1]:80/a@b",
        "github://org:repo@main/dir", "https://b.net/x?account=research&access=all", "https://someone@host/x",
        "http://127.0.0.1:80, me@host",
    ],
)  # fmt: skip
def test_what_holds_no_secret_stays_as_it_is(text: str) -> None:
    assert redact(text) == text


_PASSWORD = st.text(st.characters(min_codepoint=33, max_codepoint=126, exclude_characters="/@:\"'<>?#"), min_size=5)


@given(_PASSWORD, st.sampled_from(["me", "", "a.b"]))
def test_no_password_survives(password: str, user: str) -> None:
    password = f"~{password}~"
    for text in (f"ftp://{user}:{password}@host/x", f"it failed: ftp://{user}:{password}@host:21/x, twice"):
        assert password not in redact(text)
        assert "@host" in redact(text)


def test_whatever_is_written_or_shown_is_redacted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = f"ftp://me:{SECRET}@host/x"
    file = RecordFile(tmp_path / "events.jsonl")
    file.append({"time": 1.0, "event": "x", "why": [f"of {url}"]})
    file.close()
    RunDirectory(tmp_path).write_json("result.json", {"reason": url, "parts": [{"location": url}]})
    for form in ("text", "json"):
        undo = set_up(tmp_path / form, LogContext(run="r", process="p"), form=form, echo=True)  # type: ignore[arg-type]
        try:
            raise DataError(f"{url} is away")
        except DataError:
            logging.getLogger("orchestrator.test").exception("of %s", url)
        undo()
    written = [path.read_text(encoding="utf-8") for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) == 4
    shown = [clean(url), clean_lines(url), json_text([url]), str(settings_of({"data": {"source": [url], "x": url}}))]
    for text in [*written, *shown, capsys.readouterr().err]:
        assert SECRET not in text
        assert "ftp://me:***@host/x" in text
    assert [
        parse_line(line, "p.log") is not None for line in (tmp_path / "json" / "p.log").read_text().splitlines()
    ] == [True]


def test_errors_hold_no_secret() -> None:
    for error in (DataError(f"ftp://a:{SECRET}@h"), StorageError(f"ftp://a:{SECRET}@h")):
        assert SECRET not in str(error) + repr(error)
    with pytest.raises(JobError) as refused:
        job(source=f"nothing://me:{SECRET}@host", packing=f"ftp://a:{SECRET}@h")
    assert SECRET not in str(refused.value)


def test_a_password_is_no_part_of_a_jobs_numbers() -> None:
    there = job()
    assert there.digest() == job(source="https://me:other@host/a.txt").digest()
    assert there.digest() != job(source="https://me:other@host/b.txt").digest()
    assert SECRET in str(there.resolved())


def test_a_run_directory_knows_no_password_and_says_so(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "run")
    directory.create(yaml.safe_dump(job().resolved()), job().resolved())
    for path in (tmp_path / "run").iterdir():
        assert path.is_dir() or SECRET not in path.read_text(encoding="utf-8")
    known = Job.model_validate(directory.read_json("job.resolved.json"))
    assert known.digest() == job().digest()
    assert is_redacted(str(known.data.source))
    with pytest.raises(DataError, match=r"me:\*\*\*@host.*not written down.*--run-dir.*env:NAME"):
        resolve_files(str(known.data.source))
    with pytest.raises(UrlProblem, match="not written down"):
        open_storage("ftp://me:***@host/x")


def test_fields_with_a_secret_in_the_clear_are_named() -> None:
    assert fields_with_secrets(job(mirrors=["/x", f"ftp://a:{SECRET}@h/x"])) == ["data.source", "data.mirrors.1"]
    assert fields_with_secrets(job(source="https://me:${env:PASS}@host/a.txt")) == []


def test_a_variable_is_filled_in_where_it_is_opened_and_redacted_from_then_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ORCH_PASSWORD", SECRET)
    there = job(source="https://me:${env:ORCH_PASSWORD}@host/${env:ORCH_PASSWORD}")
    assert expand(str(there.data.source)) == f"https://me:{SECRET}@host/{SECRET}"
    assert redact(f"no {SECRET} here") == "no *** here"
    assert environment_of(there) == {"ORCH_PASSWORD": SECRET}
    RunDirectory(tmp_path).write_json("job.resolved.json", there.resolved())
    assert Job.model_validate(RunDirectory(tmp_path).read_json("job.resolved.json")) == there
    assert there.digest() == job(source=there.data.source).digest(), "whatever this process has learnt"
    monkeypatch.delenv("ORCH_PASSWORD")
    with pytest.raises(UrlProblem, match=r"data.source: .*ORCH_PASSWORD is not set"):
        environment_of(there)
    with pytest.raises(DataError, match="ORCH_PASSWORD is not set"):
        resolve_files(str(there.data.source))
    take_over({"ORCH_PASSWORD": SECRET})
    assert expand("x://${env:ORCH_PASSWORD}") == f"x://{SECRET}"


def test_variables_that_are_no_secrets_hide_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("YEAR", "2024"), ("BUCKET", "workspace-data"), ("TOKEN", "abcdefgh12345678"), ("PIN", "1234")):
        monkeypatch.setenv(name, value)
    assert expand("s3://${env:BUCKET}/${env:YEAR}?sig=${env:TOKEN}") == "s3://workspace-data/2024?sig=abcdefgh12345678"
    assert expand("ftp://me:${env:PIN}@host/x") == "ftp://me:1234@host/x"
    text = '{"kind": "x", "samples": "2024-1234", "path": "/workspace-data/tok", "said": "abcdefgh12345678"}'
    assert redact(text) == text.replace("abcdefgh12345678", "***")


@pytest.mark.parametrize(
    ("source", "reason"),
    [("https://${env:1}@host/x", "needs the name"), ("https://${env:A/x", "needs the name"),
     ("${env:A}/x", "URLs only")],
)  # fmt: skip
def test_a_variable_that_is_none_is_refused_where_it_stands(source: str, reason: str) -> None:
    with pytest.raises(JobError, match=rf"data.source .*{reason}"):
        job(source=source)
    with pytest.raises(JobError, match=rf"data.mirrors.1 .*{reason}"):
        job(mirrors=["/x", source])


def test_a_server_that_asks_for_a_password_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("aiohttp")
    monkeypatch.setenv("ORCH_PASSWORD", PASSWORD)
    text = "a quiet line of text\n" * 200
    with password_server({"a.txt": text.encode()}) as address:
        url = f"http://{USER}:${{env:ORCH_PASSWORD}}@{address}/a.txt?X-Amz-Signature=abc"
        store = prepare(source=url, tokenizer="bytes", cache=str(tmp_path / "cache"))
        assert [file.name for file in store.manifest.files] == ["a.txt"]
        local = tmp_path / "a.txt"
        local.write_text(text)
        assert store.digest == prepare(source=str(local), tokenizer="bytes", cache=str(tmp_path / "other")).digest
        with pytest.raises(DataError) as refused:
            resolve_files(f"http://{USER}:{SECRET}@{address}/a.txt")
    assert "401" in str(refused.value)
    assert SECRET not in str(refused.value)
    kept = b"".join(path.read_bytes() for path in (tmp_path / "cache").rglob("*") if path.is_file())
    assert PASSWORD.encode() not in kept
    assert b"abc" not in kept.replace(text.encode(), b"")


def test_a_server_that_is_connected_to_at_once_and_is_not_there_is_told_in_a_line() -> None:
    with pytest.raises(DataError, match=r"ftp://me:\*\*\*@127.0.0.1:1/a.txt cannot be listed: .*[Rr]efused"):
        resolve_files(f"ftp://me:{SECRET}@127.0.0.1:1/a.txt")
    with pytest.raises(OSError, match=r"[Rr]efused"):
        open_storage(f"ftp://me:{SECRET}@127.0.0.1:1/x")


def test_what_goes_to_other_machines_by_value_has_no_secret_that_was_learnt(monkeypatch: pytest.MonkeyPatch) -> None:
    """`doctor` sends this module so to nodes that lack our package, and Ray keeps what is sent so."""
    learnt = redaction._Learnt()
    monkeypatch.setattr(redaction, "_learnt", learnt)
    redaction.learn("a long secret")
    assert redaction.redact("it is a long secret") == "it is ***"
    sent = pickle.dumps(learnt)
    assert b"a long secret" not in sent
    assert pickle.loads(sent).take_out_of("it is a long secret") == "it is a long secret"
