"""Whatever is found in a run directory or a storage: one error of our own, no more memory, and nothing else lost."""

from __future__ import annotations

import ast
import copy
import json
import os
import random
import re
import resource
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from monitoring.follow import describe_event
from monitoring.outside import MAX_DEPTH, Unreadable, json_text, parse, read_json
from monitoring.page.feed import Feed
from monitoring.records import read_records
from monitoring.report.page import render
from monitoring.report.summary import lines_of, report_of
from monitoring.sinks.stream import Stream
from monitoring.terminal.clean import clean
from monitoring.terminal.facts import RunFacts
from monitoring.terminal.lines import as_text, status_lines
from orchestrator.checkpoint import listing
from orchestrator.checkpoint.catalog import Catalog
from orchestrator.checkpoint.encryption import OVERHEAD
from orchestrator.checkpoint.manifest import SEALED_BYTES, CheckpointError, canonical, digest_of
from orchestrator.data.ledger import audit
from orchestrator.data.sources import DataError
from orchestrator.rundir import RunDirectory, RunDirectoryError
from tests.selection import nightly
from tests.unit.checkpoints_in_tests import catalog_in, load, same, tensors, write
from tests.unit.run_directories import INCIDENT, RESULT, T0, append, make_run, status

ROOT = Path(__file__).parents[2]
OURS = (CheckpointError, RunDirectoryError, DataError, Unreadable)
MUTATIONS_OF_EACH = [250, *nightly([1000])]
HEADROOM_BYTES = 1 << 30
PLACEHOLDER = "PLACEHOLDER-DEEP"

HOSTILE: list[Any] = [
    None, True, False, -1, 0, 1, 7, 2**40, 2**63, 2**64, 10**400, 0.5, 1e308, -1e308, 1e11, float("nan"),
    float("inf"), "x", "", "\x1b[2J\x1b]0;owned\x07", "../../outside.bin", "/etc/passwd", "\ud800", "\u202egnp.exe",
    "9" * 5000, "a" * 200_000, [], {}, [[]], [None], {"a": {}}, [2**62] * 6, [[1.0]], PLACEHOLDER,
]  # fmt: skip


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container and key below a value."""
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from places(value[key])


def mutate(value: Any, how: str, where: int, what: Any) -> Any:
    """A damaged copy."""
    found = copy.deepcopy(value)
    container, key = (every := list(places(found)))[where % len(every)]
    if how == "replace":
        container[key] = what
    elif how == "remove":
        del container[key]
    elif how == "add":
        container.update({"unheard-of": what}) if isinstance(container, dict) else container.append(what)
    elif how == "twice":
        found = [found, found] if not isinstance(container, list) else (container.append(container[key]), found)[1]
    elif how == "shift" and type(container[key]) in (int, float):
        container[key] = container[key] + (1 if where % 2 else -1) * 2 ** (where % 60)
    elif how == "swap":
        other, there = every[(where * 31 + 7) % len(every)]
        container[key] = copy.deepcopy(other[there])
    return found


def as_bytes(value: Any) -> bytes:
    deep = "[" * 50_000 + "]" * 50_000
    return json.dumps(value).replace(f'"{PLACEHOLDER}"', deep).encode("utf-8", "surrogatepass")


def damage(raw: bytes, how: str, where: int) -> bytes:
    at = where % max(1, len(raw))
    if how == "flip":
        return raw[:at] + bytes([raw[at] ^ (1 << where % 8)]) + raw[at + 1 :]
    if how == "cut":
        return raw[:at]
    return raw[:at] + bytes(random.Random(where).randrange(256) for _ in range(where % 40)) + raw[at:]


MUTATIONS = st.tuples(
    st.sampled_from([*["replace"] * 3, "remove", "add", "twice", "shift", "swap", "flip", "cut", "insert"]),
    st.integers(0, 2**24),
    st.sampled_from(range(len(HOSTILE))),
)  # fmt: skip
FUZZING = {
    "deadline": None, "database": None, "print_blob": True,
    "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
}  # fmt: skip


def mutated(raw: bytes, mutation: tuple[str, int, int]) -> bytes:
    how, where, what = mutation
    if how in ("flip", "cut", "insert"):
        return damage(raw, how, where)
    return as_bytes(mutate(json.loads(raw), how, where, HOSTILE[what]))


@pytest.fixture
def little_memory() -> Iterator[None]:
    """What takes a lot of memory for a small file fails with MemoryError, which is no error of ours."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + HEADROOM_BYTES, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def outcome(read: Callable[[], Any]) -> str:
    """Whether what was read is taken or refused; anything but an error of ours is raised."""
    try:
        read()
    except OURS:
        return "refused"
    return "taken"


# ------------------------------------------------------------------------------------------------ the fuzz tests


def recommit(catalog: Catalog, step: int, manifest: bytes) -> None:
    """A manifest with a marker that vouches for it, as somebody who can write to the storage makes them."""
    directory = Path(catalog.locate(step))
    (directory / "MANIFEST.json").write_bytes(manifest)
    content = json.loads((directory / "COMMIT").read_bytes())
    del content["xxh3_128"]
    content |= {"manifest_bytes": len(manifest), "manifest_xxh3_128": digest_of(manifest)}
    (directory / "COMMIT").write_bytes(canonical(content | {"xxh3_128": digest_of(canonical(content))}))


@pytest.mark.parametrize("mutations", MUTATIONS_OF_EACH)
def test_no_damaged_checkpoint_raises_anything_but_our_error(
    tmp_path: Path, little_memory: None, mutations: int
) -> None:
    catalog, values = catalog_in(tmp_path), tensors()
    write(catalog, 60, values)
    write(catalog, 120, values)
    directory = Path(catalog.locate(120))
    good = {name: (directory / name).read_bytes() for name in ("MANIFEST.json", "COMMIT")}
    data = sorted(path.name for path in directory.iterdir() if path.suffix == ".safetensors")
    good |= {name: (directory / name).read_bytes() for name in data}
    counts: Counter[str] = Counter()

    @settings(max_examples=mutations, **FUZZING)
    @given(st.sampled_from(["MANIFEST.json"] * 6 + ["COMMIT"] * 2 + data), MUTATIONS)
    def fuzz(name: str, mutation: tuple[str, int, int]) -> None:
        for known, raw in good.items():
            (directory / known).write_bytes(raw)
        if name == "MANIFEST.json":
            recommit(catalog, 120, mutated(good[name], mutation))
        elif name == "COMMIT":
            (directory / name).write_bytes(mutated(good[name], mutation))
        else:
            (directory / name).write_bytes(damage(good[name], "flip", mutation[1]))

        def read() -> None:
            found = catalog.open(120)
            found.verify()
            load(found)

        counts[outcome(read)] += 1
        counts["all"] += 1
        rows = listing.rows(catalog, verify=True)
        assert [row.step for row in rows] == [120, 60]
        assert rows[1].valid
        for row in rows:
            listing.describe(row, verified=True)

    fuzz()
    print(f"checkpoints: {dict(counts)}")
    assert counts["all"] >= mutations
    assert counts["refused"] > counts["all"] // 2
    assert same(load(catalog.open(60)), values)


def read_everything(path: Path, now: float) -> None:
    """All that reads a run directory, to the end: each is to come through, or to raise an error of ours."""
    directory = RunDirectory(path)
    facts = RunFacts(path)
    facts.refresh()
    for alive in (True, False):
        as_text(status_lines(facts, alive, now)).encode("utf-8")
        parse(json_text(facts.as_json(alive)))
    report = report_of(path, now=now)
    "\n".join(map(clean, lines_of(report))).encode("utf-8")
    parse(json_text(report))
    assert "\x1b" not in render(path)
    feed = Feed(path)
    feed.poll(now)
    parse(json_text(feed.view.whole(now)))
    feed.view.changes(now)
    Stream(path).new()
    for event in read_records(path / "events.jsonl"):
        clean(describe_event(event) or "").encode("utf-8")
    list(directory.take_requests())
    directory.newest_term()
    audit(path / "metrics.jsonl", num_samples=40, global_batch=4, virtual_workers=2, seed=0)
    for name in ("result.json", "environment.json", "job.resolved.json", "status.json", "fork.json"):
        directory.read_json(name)


@pytest.mark.parametrize("mutations", MUTATIONS_OF_EACH)
def test_no_damaged_run_directory_raises_anything_but_our_error(
    tmp_path: Path, little_memory: None, mutations: int
) -> None:
    path = make_run(tmp_path / "run", live=status(), result=RESULT)
    (path / "control").mkdir()
    environment = {"data": {"num_samples": 40}, "store": {"digest": "sha256:0", "tokens": 5}, "packages": {"ray": "2"}}
    (path / "environment.json").write_text(json.dumps(environment), encoding="utf-8")
    (path / "fork.json").write_text(json.dumps({"step": 1, "url": "/x", "run": "r", "from": "/y"}), encoding="utf-8")
    request = json.dumps({"id": "1-a", "kind": "resize", "workers": 2}).encode()
    names = ["events.jsonl"] * 5 + ["metrics.jsonl"] * 3 + ["status.json"] * 3 + ["result.json"] * 2
    names += ["environment.json", "fork.json", "job.resolved.json", "control/1.json", ".epoch-"]
    good = {name: (path / name).read_bytes() for name in set(names) if (path / name).is_file()}
    good["control/1.json"] = request
    counts: Counter[str] = Counter()

    @settings(max_examples=mutations, **FUZZING)
    @given(st.sampled_from(names), MUTATIONS, st.integers(0, 5))
    def fuzz(name: str, mutation: tuple[str, int, int], line: int) -> None:
        for known, raw in good.items():
            (path / known).write_bytes(raw)
        if name == ".epoch-":
            text = re.sub(r"[^\w.-]", "-", str(HOSTILE[mutation[2]])[:40], flags=re.ASCII)
            (path / f".epoch-{text}").touch()
        elif name.endswith(".jsonl"):
            lines = good[name].splitlines()
            lines[line % len(lines)] = mutated(lines[line % len(lines)], mutation)
            (path / name).write_bytes(b"\n".join(lines) + b"\n")
        else:
            (path / name).write_bytes(mutated(good[name], mutation))
        counts[outcome(lambda: read_everything(path, T0 + 40))] += 1
        counts["all"] += 1

    fuzz()
    print(f"run directories: {dict(counts)}")
    assert counts["all"] >= mutations
    assert counts["taken"] > 0
    assert counts["refused"] > 0


# ------------------------------------------------------------------------------------------------ checkpoints, by name


def change(path: Path, **changes: Any) -> bytes:
    return json.dumps(json.loads(path.read_bytes()) | changes).encode()


def other_rank(manifest: dict[str, Any]) -> None:
    manifest["chunks"][0]["sizes"].append(1)


def other_offsets(manifest: dict[str, Any]) -> None:
    manifest["chunks"][0]["offsets"] = []


def outside(manifest: dict[str, Any]) -> None:
    for entry in (manifest["files"][0], *manifest["chunks"]):
        key = "name" if "name" in entry else "file"
        entry[key] = "../../outside.bin"


def huge_header(manifest: dict[str, Any]) -> None:
    manifest["files"][0]["header_bytes"] = 2**40


def huge_file(manifest: dict[str, Any]) -> None:
    manifest["files"][0]["size"] = 2**40


@pytest.mark.parametrize("spoil", [other_rank, other_offsets, outside, huge_header, huge_file])
def test_a_manifest_that_does_not_fit_is_refused_and_an_older_one_used(
    tmp_path: Path, spoil: Callable[[dict[str, Any]], None], little_memory: None
) -> None:
    catalog, values = catalog_in(tmp_path), tensors()
    write(catalog, 60, values)
    write(catalog, 120, values)
    directory = Path(catalog.locate(120))
    (tmp_path.parent / "outside.bin").write_bytes(bytes(4096))
    manifest = json.loads((directory / "MANIFEST.json").read_bytes())
    spoil(manifest)
    recommit(catalog, 120, json.dumps(manifest).encode())
    if spoil is huge_file:  # sparse: it takes no room on the disk
        os.truncate(directory / manifest["files"][0]["name"], 2**40)
    with pytest.raises(CheckpointError):
        catalog.open(120).verify()
    assert [row.valid for row in listing.rows(catalog, verify=True)] == [False, True]
    assert same(load(catalog.open(60)), values)


@pytest.mark.parametrize("name", ["COMMIT", "MANIFEST.json", "INVALID", "data"])
@pytest.mark.parametrize("kind", ["pipe", "directory", "link", "sparse"])
def test_what_is_no_file_is_no_checkpoint_and_is_not_waited_for(
    tmp_path: Path, name: str, kind: str, little_memory: None
) -> None:
    catalog, values = catalog_in(tmp_path), tensors()
    write(catalog, 120, values)
    directory = Path(catalog.locate(120))
    path = directory / name if name != "data" else next(directory.glob("*.safetensors"))
    content = path.read_bytes() if path.exists() else b"why"
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    elif kind == "link":
        (tmp_path / "elsewhere").write_bytes(content)
        path.symlink_to(tmp_path / "elsewhere")
    else:
        path.write_bytes(content)
        os.truncate(path, 2**42)
    with pytest.raises(CheckpointError):
        catalog.open(120)
    assert [row.valid for row in listing.rows(catalog, verify=True)] == [False]


def test_only_the_one_spelling_of_a_step_is_a_checkpoint(tmp_path: Path) -> None:
    catalog = catalog_in(tmp_path)
    write(catalog, 120, tensors())
    for name in ("step-000000120", "step-" + "9" * 200, "step-٠٠٠٠٠١٢١"):
        (tmp_path / name).mkdir()
    assert catalog.steps() == [120]
    assert catalog.all_steps() == [120]


def test_encryption_adds_what_manifests_allow_for() -> None:
    assert OVERHEAD == SEALED_BYTES


# ------------------------------------------------------------------------------------------------ JSON and records


@pytest.mark.parametrize(
    "text",
    ["NaN", "[Infinity]", "1e999", "[" * (MAX_DEPTH + 2) + "]" * (MAX_DEPTH + 2), "[" * 10**5, '"\\ud800"',
     "9" * 5000, "{", "", "\udcff"],
)  # fmt: skip
def test_what_other_readers_cannot_read_is_no_json(text: str) -> None:
    with pytest.raises(Unreadable):
        parse(text)


def test_what_is_written_is_json_for_every_reader() -> None:
    assert parse(json_text({"a": float("nan"), "b": [float("-inf"), 1.5]})) == {"a": None, "b": [None, 1.5]}


def test_lines_that_cannot_be_read_are_counted_and_told_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_run(tmp_path / "run")
    for bad in ({"time": "x", "kind": "incident"}, {**INCIDENT, "detect_seconds": None}, {**INCIDENT, "at": 1e300}):
        append(path / "events.jsonl", bad)
    told = "3 lines of events.jsonl could not be read"
    facts = RunFacts(path)
    facts.refresh()
    facts.refresh()
    assert as_text(status_lines(facts, alive=False)).count(told) == 1
    assert facts.as_json(alive=False)["damaged"] == [told]
    report = report_of(path)
    assert (report["damaged"], len(report["incidents"])) == ([told], 1)
    assert told in render(path)
    feed = Feed(path)
    feed.poll(T0 + 40)
    feed.poll(T0 + 41)
    assert [e["text"] for e in feed.view.whole(T0 + 41)["timeline"] if e["kind"] == "damaged"] == [told]
    code, out, err = command(monkeypatch, capsys, "events", str(path))
    assert (code, err.count(told)) == (0, 1)
    assert len(out.splitlines()) == 6


def command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> tuple[int, str, str]:
    """Runs the command line as its entry point does; the exit code, stdout and stderr."""
    from orchestrator.cli import main

    monkeypatch.setattr(sys, "argv", ["orchestrator", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    shown = capsys.readouterr()
    return int(ended.value.code or 0), shown.out, shown.err


def test_a_result_that_is_none_is_said_and_proves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_run(tmp_path / "run", steps=0)
    data = {"num_samples": 40, "global_batch": 4, "virtual_workers": 2, "seed": 0}
    (path / "environment.json").write_text(json.dumps({"data": data}), encoding="utf-8")
    assert command(monkeypatch, capsys, "audit", str(path))[0] == 0
    (path / "result.json").write_text("[1]", encoding="utf-8")
    for name, code in (("status", 0), ("report", 0), ("audit", 1)):
        found, out, err = command(monkeypatch, capsys, name, str(path))
        assert "result.json is damaged" in out + err, name
        assert found == code, name
    (path / "environment.json").write_text(json.dumps({"data": {"num_samples": "x"}}), encoding="utf-8")
    code, _, err = command(monkeypatch, capsys, "audit", str(path))
    assert (code, "environment.json is damaged" in err) == (2, True)


def test_a_malformed_request_costs_no_other(tmp_path: Path) -> None:
    directory = RunDirectory(make_run(tmp_path / "run"))
    control = directory.path / "control"
    control.mkdir()
    first = directory.request("resize", workers=2)
    (control / "2-bad.json").write_bytes(b"[" * 10**5)
    (control / "3-bad.json").write_text(json.dumps({"id": "3", "kind": "resize", "workers": "x"}), encoding="utf-8")
    os.mkfifo(control / "4-bad.json")
    (control / "5-bad.json").mkdir()
    last = directory.request("stop", reason="enough")
    taken = directory.take_requests()
    assert {one["id"] for one in taken if "error" not in one} == {first, last}
    assert {one["id"] for one in taken if "error" in one} == {f"{n}-bad" for n in range(2, 6)}
    assert directory.take_requests() == []
    assert len(list((control / "refused").iterdir())) == 4  # nothing of anybody's is lost


def test_epochs_are_those_that_have_a_number(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    for name in (".epoch-abc", ".epoch-", ".epoch--3", ".epoch-" + "9" * 100, ".epoch-٣", ".epoch-4"):
        (tmp_path / name).touch()
    assert (directory.newest_term(), directory.next_term()) == (4, 5)


@pytest.mark.parametrize("name", ["events.jsonl", "metrics.jsonl", "status.json", "result.json"])
def test_a_pipe_in_a_run_directory_is_not_waited_for(tmp_path: Path, name: str) -> None:
    path = make_run(tmp_path / "run", live=status(), result=RESULT)
    (path / name).unlink()
    os.mkfifo(path / name)
    try:
        facts = RunFacts(path)
        facts.refresh()
        said = as_text(status_lines(facts, alive=False))
    except Unreadable as error:
        said = str(error)
    assert f"{name} is not a regular file" in said


# ------------------------------------------------------------------------------------------------ terminals and locales

STEERING = "\x1b[31mred\x07\x9b2J\u202eback\r[bold]x[/bold]\nforged line"


def test_nothing_that_others_wrote_steers_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from monitoring.display import Display

    path = make_run(tmp_path / "run", result=RESULT | {"status": "failed", "reason": STEERING})
    append(path / "events.jsonl", INCIDENT | {"cause": STEERING})
    append(path / "events.jsonl", {"time": T0 + 30, "kind": "unheard_of\x1b[1m", "text": STEERING})
    (path / "logs").mkdir()
    line = f"2026-08-02T22:21:51.123Z INFO [run=r process=driver] {'x'}: {STEERING.splitlines()[0]}"
    (path / "logs" / "driver.log").write_text(line + "\n", encoding="utf-8")
    for name in ("status", "events", "report", "logs", "watch"):
        _, out, err = command(monkeypatch, capsys, name, str(path))
        shown = out + err
        assert "red" in shown, name
        assert not set(shown) & set("\x1b\x07\x9b\u202e\r"), name
        assert not any(text.startswith("forged") for text in shown.splitlines()), name
    with Display(path, 20, history=10) as display:
        display.note(STEERING)
    assert "[bold]x[/bold]" in (shown := capsys.readouterr().out)
    assert not set(shown) & set("\x1b\x07\x9b\u202e\r")


def test_the_pages_escape_what_others_wrote(tmp_path: Path) -> None:
    text = "<script>alert(1)</script><b onmouseover='x'>"
    path = make_run(tmp_path / "run", result=RESULT | {"status": "failed", "reason": text, "state_digest": text})
    (path / "job.resolved.json").write_text(json.dumps({"name": text}), encoding="utf-8")
    for event in (INCIDENT | {"cause": text, "incident": text}, {"time": T0 + 40, "kind": "checkpoint_failed",
                                                                  "committed": 5, "error": text}):  # fmt: skip
        append(path / "events.jsonl", event)
    page = render(path)
    assert "<script>" not in page
    assert "<b onmouseover" not in page
    assert "&lt;script&gt;" in page


def test_the_locale_changes_nothing(tmp_path: Path) -> None:
    job = (ROOT / "examples" / "quickstart.yaml").read_text(encoding="utf-8")
    file = tmp_path / "übung.yaml"
    file.write_text(f"# Ein Versuch mit Umlauten: äöü €\n{job}", encoding="utf-8")
    path = make_run(tmp_path / "rün")
    append(path / "events.jsonl", INCIDENT | {"cause": "größer als ε"})
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("LC_", "LANG", "PYTHON"))} | locale
    for arguments in (["validate", str(file)], ["events", str(path)], ["report", str(path)], ["status", str(path)]):
        command_line = [sys.executable, "-m", "orchestrator", *arguments]
        done = subprocess.run(command_line, capture_output=True, env=environment, cwd=ROOT, check=False)
        assert done.returncode == 0, done.stderr.decode("utf-8", "replace")
    assert "größer als ε" in (path / "report.html").read_text(encoding="utf-8")


def test_every_file_says_its_encoding_and_all_json_is_strict() -> None:
    problems = []
    for package in ("orchestrator", "monitoring", "strategies"):
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and (wrong := _wrong(node)):
                    problems.append(f"{path.relative_to(ROOT)}:{node.lineno}: {wrong}")
    assert problems == []


def _wrong(call: ast.Call) -> str:
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    owner = call.func.value if isinstance(call.func, ast.Attribute) else None
    owned = getattr(owner, "id", "")
    said = {keyword.arg for keyword in call.keywords}
    modes = [a.value for a in call.args[:2] if isinstance(a, ast.Constant) and isinstance(a.value, str)]
    if name == "read_text" and "encoding" not in said and not call.args:
        return "read_text without encoding"
    if name == "write_text" and "encoding" not in said and len(call.args) < 2:
        return "write_text without encoding"
    text_mode = not any("b" in mode for mode in modes)
    if (name == "fdopen" or (name == "open" and owner is None)) and text_mode and "encoding" not in said:
        return f"{name} without encoding"
    if name == "open" and owner is not None and any(mode in ("r", "w", "a", "x") for mode in modes):
        return "open without encoding" if "encoding" not in said else ""
    if owned == "json" and name in ("dumps", "dump") and not {"allow_nan", "ensure_ascii"} & said:
        return "json.dumps may write NaN; use monitoring.outside.json_text"
    return ""


def test_a_value_that_is_none_of_ours_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{", encoding="utf-8")
    with pytest.raises(Unreadable, match=r"x\.json is damaged: not JSON"):
        read_json(tmp_path / "x.json")


@pytest.mark.parametrize("name", ["status.json", "result.json", "events.jsonl", "metrics.jsonl"])
def test_every_field_may_be_missing_null_or_of_another_kind(tmp_path: Path, name: str) -> None:
    """Not by chance, but each of them once."""
    path = make_run(tmp_path / "run", live=status(), result=RESULT)
    lines = (path / name).read_text(encoding="utf-8").splitlines()
    for number in range(min(len(lines), 7)):
        whole = json.loads(lines[number])
        for where in range(len(list(places(whole)))):
            for how, what in (("remove", None), ("replace", None), ("replace", "x"), ("replace", -1), ("replace", [])):
                damaged = [*lines[:number], json.dumps(mutate(whole, how, where, what)), *lines[number + 1 :]]
                (path / name).write_text("\n".join(damaged) + "\n", encoding="utf-8")
                facts = RunFacts(path)
                facts.refresh()
                for alive in (True, False):
                    as_text(status_lines(facts, alive, T0 + 40))
                lines_of(report_of(path, now=T0 + 40))
                Feed(path).poll(T0 + 40)
                if how == "replace" and what == "x":
                    render(path)
                    Stream(path).new()
