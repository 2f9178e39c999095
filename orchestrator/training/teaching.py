"""What a teacher gives for the rows of a batch, where a job asks for its likeliest tokens only (`objective.top_k`).

The answer for a row is a function of that row and the teacher, computed for each row by itself, so it makes no
difference who is asked, when, or how often. It is kept on the node's disk: in later epochs, and after a restart, the
teacher is not asked again, and what nobody asks is not kept in memory.
"""

from __future__ import annotations

import dataclasses
import logging
import sqlite3
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray

from orchestrator.data.store import default_cache
from orchestrator.job import Job
from orchestrator.job.parts import objective_of
from orchestrator.training.compared import load_teacher, release_teacher
from orchestrator.training.deterministic import make_deterministic
from orchestrator.training.fingerprint import fingerprint
from strategies.gradient.compute import Fetch
from strategies.objective.batch import Batch, positions

log = logging.getLogger(__name__)
UNUSED_FETCHES = 64
"""After so many batches in a row without a question, the teacher's memory is given back."""


class Question(NamedTuple):
    """A row without its padding: tokens int64 [n + 1], and where each of the first n is in its document, int64 [n];
    None where documents are not told apart."""

    tokens: NDArray[np.int64]
    places: NDArray[np.int64] | None


class Answer(NamedTuple):
    """The likeliest next tokens at each of n positions: logits fp32 [n, k], and token ids int32 [n, k]."""

    logits: NDArray[np.float32]
    tokens: NDArray[np.int32]


LOOK_S = 1.0

Look = Callable[[], object]
"""Called about every second by who waits; what it raises ends the waiting."""


class Ask(Protocol):
    """Whom to ask. May be used by several threads at once."""

    look: Look

    @property
    def device(self) -> str:
        """What answers are computed on, in words: other devices round otherwise. May wait for that to be known."""

    def __call__(self, questions: Sequence[Question]) -> list[Answer]:
        """An answer to each."""

    def release(self) -> None:
        """Nobody has asked for long."""


class LocalTeacher:
    """The teacher of a job in this process, in memory from the first question on. See `Ask`.

    It is read, and answers, in a thread of its own, one question after the other, so that who asks can look around.
    `answered` counts the rows.
    """

    def __init__(self, job: Job, device: torch.device) -> None:
        self.look: Look = lambda: None
        self.answered = 0
        self._job, self._device = job, device
        self._top_k = int(objective_of(job).settings.top_k)
        self._thread = ThreadPoolExecutor(1, "teacher")

    @property
    def device(self) -> str:
        """See `Ask`."""
        return fingerprint(self._device)

    def __call__(self, questions: Sequence[Question]) -> list[Answer]:
        """Raises ModelError."""
        asked = self._thread.submit(self._answers, questions)
        while not wait([asked], timeout=LOOK_S).done:
            self.look()
        return asked.result()

    def _answers(self, questions: Sequence[Question]) -> list[Answer]:
        make_deterministic(self._job, self._device)  # Some of that is a thread's own.
        model = load_teacher(self._job, self._device)
        return [self._answer(model, each) for each in questions]

    @torch.no_grad()
    def _answer(self, model: Any, question: Question) -> Answer:
        more = {}
        if question.places is not None:
            more["position_ids"] = torch.from_numpy(question.places)[None].to(self._device)
        tokens = torch.from_numpy(question.tokens[:-1])[None].to(self._device)
        logits = model(input_ids=tokens, **more).logits[0].float()
        # Of equal ones the first, as a sort that keeps their order has it.
        values, ids = logits.sort(dim=-1, descending=True, stable=True)
        top = self._top_k
        self.answered += 1
        return Answer(values[:, :top].cpu().numpy(), ids[:, :top].to(torch.int32).cpu().numpy())

    def release(self) -> None:
        """Gives its memory back, until it is asked again."""
        release_teacher()


class AnswerCache:
    """Answers on disk, by a digest of their question, for all processes of a node. What goes wrong with it is told
    once, and costs time only."""

    def __init__(self, path: Path, top_k: int) -> None:
        self._top_k = top_k
        self._path = path
        self._local = threading.local()
        self._is_broken = False

    def _connection(self) -> sqlite3.Connection:
        if (found := getattr(self._local, "connection", None)) is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            found = self._local.connection = sqlite3.connect(self._path, timeout=10.0, isolation_level=None)
            found.execute("PRAGMA journal_mode = WAL")
            found.execute("PRAGMA synchronous = OFF")
            found.execute("CREATE TABLE IF NOT EXISTS answers (question BLOB PRIMARY KEY, digest BLOB, content BLOB)")
        return found

    def get(self, questions: Sequence[Question]) -> list[Answer | None]:
        """Those that are known; None for the others."""
        found: list[Answer | None] = self._try(lambda: list(map(self._get, questions)), [None] * len(questions))
        return found

    def put(self, questions: Sequence[Question], answers: Sequence[Answer]) -> None:
        """Keeps them."""
        rows = []
        for question, answer in zip(questions, answers, strict=True):
            content = answer.logits.astype("<f4").tobytes() + answer.tokens.astype("<i4").tobytes()
            rows.append((_digest_of(question), xxhash.xxh3_128_digest(content), content))
        statement = "INSERT OR IGNORE INTO answers VALUES (?, ?, ?)"
        self._try(lambda: self._connection().executemany(statement, rows), None)

    def _get(self, question: Question) -> Answer | None:
        statement = "SELECT digest, content FROM answers WHERE question = ?"
        found = self._connection().execute(statement, (_digest_of(question),)).fetchone()
        shape = (len(question.tokens) - 1, self._top_k)
        if found is None or len(found[1]) != 8 * shape[0] * shape[1] or xxhash.xxh3_128_digest(found[1]) != found[0]:
            return None
        half = len(found[1]) // 2
        logits = np.frombuffer(found[1][:half], "<f4").astype(np.float32)
        tokens = np.frombuffer(found[1][half:], "<i4").astype(np.int32)
        return Answer(logits.reshape(shape), tokens.reshape(shape))

    def _try(self, action: Callable[[], Any], otherwise: Any) -> Any:
        if self._is_broken:
            return otherwise
        try:
            return action()
        except (sqlite3.Error, OSError) as error:
            log.warning("what the teacher gives is not kept in %s: %s", self._path, error)
            self._is_broken = True
            return otherwise


def _digest_of(question: Question) -> bytes:
    digest = xxhash.xxh3_128(question.tokens.astype("<i8").tobytes())
    if question.places is not None:
        digest.update(b"places")
        digest.update(question.places.astype("<i8").tobytes())
    return digest.digest()


class Teaching:
    """Gives batches what the teacher says to them: from the cache, or else by asking. `questions` counts what was
    asked."""

    def __init__(self, job: Job, device: torch.device, ask: Ask | None = None) -> None:
        self._job = job
        self._mask = job.data.document_mask
        self._ask: Ask = LocalTeacher(job, device) if ask is None else ask
        self._top_k = int(objective_of(job).settings.top_k)
        self._known: AnswerCache | None = None
        self._unused = 0
        self.is_trying = False
        """While it is only tried whether the model can be computed with, nobody is asked: all answers are zeros."""
        self.questions = 0

    @classmethod
    def of(cls, job: Job, device: torch.device, ask: Ask | None = None, look: Look | None = None) -> Teaching | None:
        """None where the job's objective has no teacher, or asks it for everything while it learns."""
        objective = objective_of(job)
        if not objective.needs_teacher or not objective.settings.top_k or objective.settings.alpha == 1:
            return None
        made = cls(job, device, ask)
        if look is not None:
            made._ask.look = look
        return made

    @property
    def _cache(self) -> AnswerCache:
        """By all that answers depend on: other devices, numbers of threads and versions round otherwise, and another
        precision more so."""
        if self._known is None:
            job = self._job
            root = Path(job.data.cache).expanduser() if job.data.cache is not None else default_cache()
            asked = (
                f"{objective_of(job).settings.content} {job.train.precision} {self._top_k} {self._ask.device} "
                f"{job.resources.cpu:g} {version('transformers')}"
            )
            path = root / f"teacher-{xxhash.xxh3_128_hexdigest(asked.encode())}.sqlite"
            self._known = AnswerCache(path, self._top_k)
        return self._known

    def joined_to(self, fetch: Fetch) -> Fetch:
        """What is fetched, with what the teacher gives for it."""
        return lambda step, virtual_worker: self.joined(fetch(step, virtual_worker))

    def joined(self, batch: Batch) -> Batch:
        """A batch with that. Raises ModelError, and what asking raises."""
        answers = [] if self.is_trying else self._answers(self._questions_of(batch))
        rows, width = batch.tokens.shape[0], batch.tokens.shape[1] - 1
        logits = np.zeros((rows, width, self._top_k), dtype=np.float32)
        tokens = np.zeros((rows, width, self._top_k), dtype=np.int32)
        for row, answer in enumerate(answers):
            logits[row, : len(answer.logits)] = answer.logits
            tokens[row, : len(answer.tokens)] = answer.tokens
        return dataclasses.replace(batch, taught=(logits, tokens))

    def _questions_of(self, batch: Batch) -> list[Question]:
        if batch.documents is None:
            return [Question(row, None) for row in batch.tokens]
        places = positions(batch.documents[:, :-1]) if self._mask else None
        found = []
        for row, (tokens, documents) in enumerate(zip(batch.tokens, batch.documents, strict=True)):
            # Padding is at the end.
            length = max(2, int((documents >= 0).sum()))
            found.append(Question(tokens[:length], None if places is None else places[row, : length - 1]))
        return found

    def _answers(self, questions: Sequence[Question]) -> list[Answer]:
        known = self._cache.get(questions)
        missing = [number for number, answer in enumerate(known) if answer is None]
        if missing:
            asked = [questions[number] for number in missing]
            found = self._ask(asked)
            self._cache.put(asked, found)
            for number, answer in zip(missing, found, strict=True):
                known[number] = answer
            self.questions += len(missing)
        self._unused = 0 if missing else self._unused + 1
        if self._unused == UNUSED_FETCHES:
            self._ask.release()
        return [answer for answer in known if answer is not None]
