"""A mutation check: seeded faults in the code, each of which the short suite must catch.

    python -m tests.mutations [--only NAME]... [--trusted] [--list]

Each mutation replaces one text, which stands once in the three packages, wherever that is. It is made in a copy of the
tracked files, and the tests that are to catch it are run there (those of every run, not the nightly ones), until the
first fails. First all of these tests are run on a copy without any mutation, where they must pass. Prints a table:
mutation, caught or MISSED, the test that caught it, seconds. Exit code 1 when one is missed.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("orchestrator", "strategies", "monitoring")


@dataclass(frozen=True)
class Mutation:
    """`old` becomes `new`; `tests` are arguments for pytest: the files that are to notice."""

    name: str
    old: str
    new: str
    tests: tuple[str, ...]


MUTATIONS = (
    Mutation(
        "the tree splits in the middle",
        "middle = start + (1 << (stop - start - 1).bit_length() - 1)",
        "middle = (start + stop) // 2",
        ("tests/unit/test_strategies.py", "tests/ranks/test_reduction.py"),
    ),
    Mutation(
        "siblings are joined before both are complete",
        "            if sibling not in self.pieces:\n                break",
        "            if sibling not in self.pieces:\n                self.pieces[sibling] = tensor * 0",
        ("tests/unit/test_step.py", "tests/ranks/test_reduction.py"),
    ),
    Mutation(
        "a vote is not heard: the gradient of all but the first rank is left out of the norm",
        "return Vote(norm_of(sums), losses,",
        "return Vote(norm_of(sums[:1]), losses,",
        ("tests/ranks/test_layouts.py",),
    ),
    Mutation(
        "a vote is not heard: only the last rank's flags count",
        "            flags |= flag\n",
        "            flags = flag\n",
        ("tests/ranks/test_votes.py",),
    ),
    Mutation(
        "ranks that do not agree on a deal take it up",
        "deals.pop() if len(deals) == 1 else 0",
        "max(deals)",
        ("tests/ranks/test_votes.py",),
    ),
    Mutation(
        "a gradient that is not finite is applied",
        "        if math.isfinite(norm):\n            self.applying = True",
        "        if True:\n            self.applying = True",
        ("tests/unit/test_step.py", "tests/ranks/test_worker_faults.py"),
    ),
    Mutation(
        "the gradient is never clipped",
        "if clip_norm is not None and norm > clip_norm:",
        "if clip_norm is not None and norm < 0:",
        ("tests/unit/test_step.py", "tests/ranks/test_layouts.py"),
    ),
    Mutation(
        "every replica counts the whole gradient in the norm",
        "        window = (start, start + sizes[place.data])",
        "        window = (0, own.flat.size)",
        ("tests/ranks/test_layouts.py",),
    ),
    Mutation(
        "vectors are weight-decayed",
        "return self.is_used and len(self.shape) >= 2",
        "return self.is_used and len(self.shape) >= 1",
        ("tests/unit/test_space.py", "tests/unit/test_training_state.py", "tests/unit/test_strategies.py"),
    ),
    Mutation(
        "warm-up is a step late",
        "return (step + 1) / self.warmup_steps",
        "return step / self.warmup_steps",
        ("tests/unit/test_strategies.py",),
    ),
    Mutation(
        "random streams do not know the virtual worker",
        "self.at = (step, virtual_worker, micro_batch)",
        "self.at = (step, 0, micro_batch)",
        ("tests/unit/test_strategies.py", "tests/unit/test_step.py"),
    ),
    Mutation(
        "state is moved without its digest being looked at",
        "if not torch.equal(self._digest().view(torch.int32), self.buffer[-DIGEST_ELEMENTS:].view(torch.int32)):",
        "if len(self.buffer) < 0:",
        ("tests/ranks/test_reduction.py",),
    ),
    Mutation(
        "chunks of a checkpoint are not verified",
        "        if digest_of(stored) != chunk.xxh3_128:",
        "        if len(stored) < 0:",
        ("tests/unit/test_checkpoints.py", "tests/unit/test_damaged_input.py"),
    ),
    Mutation(
        "a manifest of another run is taken",
        "if manifest.run != self.run:",
        'if manifest.run == "":',
        ("tests/unit/test_checkpoints.py",),
    ),
    Mutation(
        "a checkpoint without COMMIT counts",
        "own = [step for step, names in self._all() if COMMIT in names and INVALID not in names]",
        "own = [step for step, names in self._all() if INVALID not in names]",
        ("tests/unit/test_checkpoints.py", "tests/unit/test_checkpoint_crash.py"),
    ),
    Mutation(
        "workers obey a controller of an older term",
        "        if term < self.term:\n            return False",
        "        if term < -1:\n            return False",
        ("tests/unit/test_worker_protocol.py", "tests/unit/test_controller_histories.py"),
    ),
    Mutation(
        "an older generation is joined",
        "if term < self.term or order.generation.number <= self.accepted:",
        "if term < self.term or order is None:",
        ("tests/unit/test_worker_protocol.py", "tests/unit/test_controller_histories.py"),
    ),
    Mutation(
        "messages of an older generation are listened to",
        "if self.generation is None or generation != self.generation.number:",
        "if self.generation is None:",
        ("tests/unit/test_controller.py", "tests/unit/test_controller_histories.py"),
    ),
    Mutation(
        "a state of steps that are not on record is used",
        "if view.committed > recorded and view.held:",
        "if view.committed > recorded + 10**9 and view.held:",
        ("tests/unit/test_controller.py", "tests/unit/test_controller_histories.py"),
    ),
    Mutation(
        "steps are committed twice",
        "if report.step != progress.committed:",
        "if report.step > progress.committed:",
        ("tests/unit/test_controller.py",),
    ),
    Mutation(
        "who is silent is never ended",
        "silent = [view for view in warm if now - view.last_heard > limits[view.node]]",
        "silent = [view for view in warm if now - view.last_heard > 10**9]",
        ("tests/unit/test_controller.py",),
    ),
    Mutation(
        "a rolled back run keeps its record",
        "return [*actions, Rollback(committed)]",
        "return actions",
        ("tests/unit/test_controller.py",),
    ),
    Mutation(
        "growth never waits",
        "return settled and (paid_off or not self._rules.settle_s)",
        "return True",
        ("tests/unit/test_scaling.py",),
    ),
    Mutation(
        "a checkpoint is completed while a part is missing",
        "if attempt.missing or attempt.committer in alive:",
        "if attempt.committer in alive:",
        ("tests/unit/test_saving.py", "tests/unit/test_controller.py"),
    ),
    Mutation(
        "every epoch has the same order",
        "key = _splitmix64((_splitmix64(self.seed & _MASK) + epoch * _GOLDEN) & _MASK)",
        "key = _splitmix64(self.seed & _MASK)",
        ("tests/unit/test_data.py",),
    ),
    Mutation(
        "the audit takes a sample that is used again",
        "again = unique[seen[unique] | (times > 1)]",
        "again = unique[times > 1]",
        ("tests/unit/test_data.py",),
    ),
    Mutation(
        "a document's first token is predicted from another document",
        "(documents[:, 1:] == documents[:, :-1]) & (documents[:, 1:] >= 0)",
        "documents[:, 1:] >= 0",
        ("tests/unit/test_packing.py", "tests/unit/test_document_mask.py"),
    ),
    Mutation(
        "a model that changes itself goes unnoticed",
        "return value is not before or value._version != writes",
        "return False",
        ("tests/unit/test_trial.py", "tests/unit/test_step.py"),
    ),
    Mutation(
        "mirrors are on their owner's node",
        "domains[rank].zone in zones, domains[rank] in nodes, rank // layout.tensor in groups, load[rank],",
        "load[rank],",
        ("tests/unit/test_placement.py",),
    ),
    Mutation(
        "the rendezvous store lets strangers in",
        'if not hmac.compare_digest(proof, _prove(self._secret, b"client", self._number, number, scope)):',
        "if not proof:",
        ("tests/unit/test_strategies_rendezvous.py",),
    ),
    Mutation(
        "passwords in URLs are written down",
        "text = _ALONE.sub(rf\"\\1{STARS}@\", _IN_AUTHORITY.sub(rf\"\\1{STARS}@\", text))",
        "text = _ALONE.sub(rf\"\\1{STARS}@\", text)",
        ("tests/unit/test_redaction.py",),
    ),
    Mutation(
        "an exception counts no more than a death",
        'event.at or None, weight=1.0,',
        'event.at or None, weight=1 / 4,',
        ("tests/unit/test_controller.py",),
    ),
    Mutation(
        "lost steps count as training",
        '            self._waste(event)',
        '            pass',
        ("tests/unit/test_goodput.py",),
    ),
    Mutation(
        "records behind one that cannot be written are lost",
        "                self.error = error\n                return False",
        "                self.error = error\n                self._waiting.popleft()\n                return False",
        ("tests/unit/test_full_disk.py", "tests/unit/test_monitoring.py"),
    ),
    Mutation(
        "two controllers steer one run",
        "if self._directory.newest_term() > self.term:",
        "if self._directory.newest_term() > self.term + 1:",
        ("tests/unit/test_lease.py",),
    ),
)  # fmt: skip


def places_of(old: str, root: Path) -> list[Path]:
    """The files in which a text stands, once for each time."""
    found: list[Path] = []
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            found += [path] * path.read_text(encoding="utf-8").count(old)
    return found


def apply(mutation: Mutation, root: Path) -> tuple[Path, str]:
    """Makes a mutation; the file and what it was. Raises ValueError unless its text stands exactly once."""
    places = places_of(mutation.old, root)
    if len(places) != 1:
        where = ", ".join(str(place.relative_to(root)) for place in places) or "nowhere"
        raise ValueError(f"mutation {mutation.name!r}: its text must stand once, it stands in {where}")
    before = places[0].read_text(encoding="utf-8")
    places[0].write_text(before.replace(mutation.old, mutation.new), encoding="utf-8")
    return places[0], before


def copy_of_the_tree(directory: Path) -> Path:
    """The tracked files as they are now, also those not committed yet."""
    root = directory / "tree"
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    for name in filter(None, listed.decode().split("\0")):
        if (ROOT / name).is_file():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, root / name)
    return root


def run(root: Path, tests: Iterable[str]) -> tuple[bool, str]:
    """Runs tests until the first fails: whether all passed, and the first that did not."""
    present = [test for test in tests if (root / test.partition("::")[0]).exists()]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--durations=0", *present],
        cwd=root, env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode == 0:
        return True, ""
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    return False, failed.group(1) if failed else done.stdout[-2000:] + done.stderr[-2000:]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", action="append", default=[], help="a mutation whose name contains this")
    parser.add_argument("--trusted", action="store_true", help="the tests have passed just now: do not run them first")
    parser.add_argument("--list", action="store_true", help="only say where each mutation stands")
    arguments = parser.parse_args()
    chosen = [m for m in MUTATIONS if not arguments.only or any(part in m.name for part in arguments.only)]
    if arguments.list:
        for mutation in chosen:
            print(f"{len(places_of(mutation.old, ROOT))}  {mutation.name}")
        return 0
    missed = 0
    with tempfile.TemporaryDirectory(prefix="mutations-") as directory:
        root = copy_of_the_tree(Path(directory))
        tests = set() if arguments.trusted else {test for mutation in chosen for test in mutation.tests}
        passed, first = run(root, sorted(tests)) if tests else (True, "")
        if not passed:
            print(f"without a mutation {first} fails: nothing is shown by these tests")
            return 2
        for mutation in chosen:
            path, before = apply(mutation, root)
            started = time.monotonic()
            try:
                passed, first = run(root, mutation.tests)
            finally:
                path.write_text(before, encoding="utf-8")
            missed += passed
            verdict = "MISSED" if passed else "caught"
            print(f"| {mutation.name} | {verdict} | {first} | {time.monotonic() - started:.0f} s |", flush=True)
    print(f"{len(chosen) - missed} of {len(chosen)} caught")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
