"""Tasks of lm-eval (Gao et al. 2024, "The Language Model Evaluation Harness") as a part of an evaluation.

The library makes requests of a task's documents and metrics of the answers; the answers are passes of all workers, in
whatever layout there is, like the rest of an evaluation. Every rank makes the same requests of the same documents, so
all find the same metrics; that the documents are the same is checked.
"""

from __future__ import annotations

import difflib
import math
import random
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from orchestrator.data.sources import DataError
from orchestrator.data.tokenizers import Tokenizer, load_tokenizer
from orchestrator.job import Job
from orchestrator.training.generating import Passes, go_on, score
from strategies.update.evaluation import Evaluation, Measure, Measured, Samples, told_by_all

if TYPE_CHECKING:
    from strategies.comm.fabric import Fabric
    from strategies.update.engine import StepEngine

USUAL_NEW_TOKENS = 256
"""Where a task does not say how much may be generated: lm-eval's own."""
SEED, FEW_SHOT_SEED = 0, 1234
"""lm-eval's own, of Python's random numbers, and of all others."""
Texts = list[NDArray[np.int64]]


class Tasks:
    """The tasks of a job, for the ranks of a run. `moves` counts micro-batches that were computed."""

    def __init__(self, job: Job) -> None:
        """Raises DataError."""
        self._job, self._tokenizer = job, load_tokenizer(job.data.tokenizer)
        self._tasks = load_tasks(job)
        self._committed = -1
        self._kept: list[tuple[bytes, Evaluation]] = []
        self._passed = 0

    @classmethod
    def of(cls, job: Job) -> Tasks | None:
        """None where the job asks for none. Raises DataError."""
        return cls(job) if job.evaluation is not None and job.evaluation.tasks else None

    @property
    def names(self) -> list[str]:
        """Of tasks and groups of them."""
        return sorted({*self._tasks["tasks"], *self._tasks["groups"]})

    @property
    def moves(self) -> int:
        """See the class."""
        return self._passed + sum(each.moves for _, each in self._kept)

    def run(self, engine: StepEngine, fabric: Fabric, committed: int) -> dict[str, float]:
        """The metrics of all tasks, of the weights after `committed` steps. What was computed before an interruption is
        not computed again. Raises PeerLost, and DataError when ranks have other documents."""
        if committed != self._committed:
            self._passed = self.moves
            self._committed, self._kept = committed, []
        number = 0

        def passes(samples: Samples, measured: Measure) -> Measured:
            nonlocal number
            digest = _digest_of(samples)
            if number == len(self._kept) or self._kept[number][0] != digest:
                self._kept[number:] = [(digest, Evaluation(samples, engine.spec, measured))]
            number += 1
            told = told_by_all(fabric.control, np.frombuffer(digest, dtype=np.float64))
            if len({each.tobytes() for each in told}) > 1:
                raise DataError(
                    "evaluation.tasks: workers have read different documents for the same task; give all of them the "
                    "same files"
                )
            return engine.evaluate(committed, self._kept[number - 1][1])

        return metrics_of_tasks(self._job, self._tasks, self._tokenizer, passes)


def _digest_of(samples: Samples) -> bytes:
    digest = xxhash.xxh3_64()
    for index in range(samples.num_micro_batches):
        batch = samples.batch(index)
        digest.update(batch.tokens.tobytes())
        if batch.marks is not None:
            digest.update(batch.marks.tobytes())
    return digest.digest()


def load_tasks(job: Job) -> dict[str, Any]:
    """The library's tasks and groups of them, their documents read. A name may be that of a YAML file. Raises DataError
    for one that is not known, cannot be read or cannot be asked, and where the library is not installed."""
    assert job.evaluation is not None
    names, folders = [], []
    for given in job.evaluation.tasks:
        path = Path(given).expanduser()
        if path.suffix in (".yaml", ".yml"):
            names.append(_name_in(path))
            folders.append(str(path.parent.resolve()))
        else:
            names.append(given)
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise DataError("evaluation.tasks needs lm-eval, which is not installed: pip install lm-eval") from error
    # Its own tasks, of which there are thousands, take seconds to list. Files of a user's may refer to some.
    found: dict[str, Any] = {}
    for with_its_own in (False, True) if len(folders) == len(names) else (True,):
        manager = TaskManager(include_path=list(dict.fromkeys(folders)) or None, include_defaults=with_its_own)
        if unknown := sorted(set(names) - set(manager.all_tasks)):
            near = difflib.get_close_matches(unknown[0], manager.all_tasks, n=1)
            hint = f"did you mean {near[0]}?" if near else "name a YAML file of it"
            raise DataError(f"evaluation.tasks: lm-eval {version('lm-eval')} knows no {', '.join(unknown)}; {hint}")
        try:
            with _seeded(), _offline():
                found = dict(manager.load(names))
            break
        except Exception as error:  # The library and those that it reads with fail in many ways.
            if with_its_own:
                raise DataError(
                    f"evaluation.tasks: {', '.join(names)} cannot be loaded: {type(error).__name__}: {error}; what a "
                    "task reads must be on this machine, in the cache of datasets or in files that it names"
                ) from error
    for name, task in found["tasks"].items():
        if (reason := _refused(task, job.data.sequence_length)) is not None:
            raise DataError(f"evaluation.tasks: {name} {reason}")
    return found


@contextmanager
def _seeded() -> Iterator[None]:
    """What tasks draw (the order of answers, examples) is drawn as lm-eval's own command draws it, in every process."""
    before, of_numpy = random.getstate(), np.random.get_state()
    random.seed(SEED)
    np.random.seed(FEW_SHOT_SEED)
    try:
        yield
    finally:
        random.setstate(before)
        np.random.set_state(of_numpy)


@contextmanager
def _offline() -> Iterator[None]:
    """Nothing is fetched from a hub: what is evaluated must not depend on what that serves today."""
    import datasets
    from huggingface_hub import constants

    places: list[Any] = [datasets.config, constants]
    before = [place.HF_HUB_OFFLINE for place in places]
    for place in places:
        place.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            place.HF_HUB_OFFLINE = value


def _refused(task: Any, room: int) -> str | None:
    """Why a task cannot be asked of a model with this many positions; None: it can."""
    if getattr(task, "MULTIMODAL", False):
        return "shows more than text, and only text is asked about"
    if getattr(task, "UNSAFE_CODE", False):
        return "runs code that the model has written, which is not done here"
    if task.OUTPUT_TYPE != "generate_until":
        return None
    settings = task.config.generation_kwargs or {}
    if settings.get("do_sample") and settings.get("temperature", 0.0) > 0:
        return "draws its answers, and only likeliest ones are generated"
    most = int(settings.get("max_gen_toks", USUAL_NEW_TOKENS))
    if most >= room:
        return (
            f"has up to {most} tokens generated, and data.sequence_length = {room} leaves no room for a question; "
            "raise that, or lower max_gen_toks in a task file of yours"
        )
    return None


def _name_in(path: Path) -> str:
    """What the task in a file is called."""
    try:
        # The library has tags of its own in its files.
        found = re.search(r"^task:[ \t]*([\w./-]+)[ \t]*(#.*)?$", path.read_text("utf-8"), re.MULTILINE)
    except (OSError, ValueError) as error:
        raise DataError(f"evaluation.tasks: {path} cannot be read: {error}") from error
    if found is None:
        raise DataError(f"evaluation.tasks: {path} has no line `task: NAME`")
    return found[1]


def metrics_of_tasks(job: Job, tasks: dict[str, Any], tokenizer: Tokenizer, passes: Passes) -> dict[str, float]:
    """The metrics of the library, by "task/metric", of what a model answers by `passes`."""
    from lm_eval import evaluator

    assert job.evaluation is not None
    for task in tasks["tasks"].values():
        # Each time anew: a worker that has come later has not drawn what others have.
        task.set_fewshot_seed(seed=FEW_SHOT_SEED)
    with _seeded():
        found: Any = evaluator.evaluate(
            _model_of(job, tokenizer, passes), tasks, limit=job.evaluation.task_samples, bootstrap_iters=0,
            log_samples=False, verbosity="ERROR",
        )  # fmt: skip
    metrics = {}
    for task, values in sorted(found["results"].items()):
        for key, value in sorted(values.items()):
            name, _, filtered_by = key.partition(",")
            if isinstance(value, int | float) and not name.endswith("_stderr") and filtered_by:
                metrics[f"{task}/{name}" + ("" if filtered_by == "none" else f"_{filtered_by}")] = float(value)
    return metrics


def _model_of(job: Job, tokenizer: Tokenizer, passes: Passes) -> Any:
    """What the library asks. Its class is made here, as it derives from one of the library's."""
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    room = job.data.sequence_length
    begin = getattr(tokenizer, "begin_of_document", None) if job.data.add_bos else None

    def encode(text: str) -> list[int]:
        return [int(each) for each in tokenizer.encode(text)]

    class Model(TemplateLM):  # type: ignore[misc]
        """Tokens as in training; texts that are too long lose what comes first, as the library's own models do."""

        @property
        def eot_token_id(self) -> int:
            return int(tokenizer.end_of_document)

        @property
        def prefix_token_id(self) -> int:
            return self.eot_token_id if begin is None else int(begin)

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            first = [] if begin is None or add_special_tokens is False else [int(begin)]
            return first + encode(string)

        def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:
            return super().loglikelihood(requests, disable_tqdm=True)

        def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
            return self._scored([(before, after) for _, before, after in requests])

        def _scored(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
            texts, targets = [], []
            for before, after in pairs:
                text = [*before, *after][-room - 1 :]
                texts.append(np.array(text, dtype=np.int64))
                targets.append(min(len(after), len(text) - 1))
            return score(passes, job, texts, targets)

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> list[float]:
            pairs, counts = [], []
            for request in requests:
                windows = get_rolling_token_windows(
                    token_list=encode(request.args[0]), prefix_token=self.prefix_token_id, max_seq_len=room,
                    context_len=1,
                )  # fmt: skip
                cut = [make_disjoint_window(window) for window in windows]
                pairs += cut
                counts.append(len(cut))
            found = iter(self._scored(pairs))
            return [math.fsum(next(found)[0] for _ in range(count)) for count in counts]

        def generate_until(self, requests: Any, disable_tqdm: bool = True) -> list[str]:
            asked = [request.args for request in requests]
            return _generated(job, tokenizer, passes, [(self.tok_encode(text), given) for text, given in asked])

    return Model()


def _generated(
    job: Job, tokenizer: Tokenizer, passes: Passes, asked: Sequence[tuple[list[int], dict[str, Any]]]
) -> list[str]:
    """How the model goes on with each of these tokens, until what the library's settings beside them say."""
    prompts, most, stops = [], [], []
    room = job.data.sequence_length
    for tokens, settings in asked:
        until = settings.get("until") or []
        stops.append([until] if isinstance(until, str) else list(until))
        most.append(int(settings.get("max_gen_toks", USUAL_NEW_TOKENS)))
        prompts.append(np.array(tokens[-(room - most[-1]) :], dtype=np.int64))

    def is_over(number: int, new: NDArray[np.int64]) -> bool:
        text = tokenizer.decode(new)
        return int(new[-1]) == tokenizer.end_of_document or any(stop in text for stop in stops[number])

    said = map(tokenizer.decode, go_on(passes, job, prompts, most, is_over))
    return [_until(text, stop) for text, stop in zip(said, stops, strict=True)]


def _until(text: str, stops: Sequence[str]) -> str:
    for stop in stops:
        text = text.split(stop)[0] if stop else text
    return text
