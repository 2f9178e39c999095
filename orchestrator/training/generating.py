"""What a model says to some prompts, and how likely texts are to it, as a part of an evaluation: by all workers, in
whatever layout there is.

A token of every prompt is a pass of all ranks over the prompts as they are by then, the same passes as those of an
evaluation. That is slower than with a cache of keys and values, and needs nothing but what trains; it is for looking
at a few texts, not for serving. With a temperature tokens are drawn by noise that depends on the seed, the step, the
prompt and the position alone (Gumbel 1954), so texts are the same in every layout, too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from orchestrator.data.of_job import prompts_of
from orchestrator.data.tokenizers import Tokenizer
from orchestrator.job import Job
from strategies.gradient.spec import StepSpec
from strategies.objective.batch import Batch
from strategies.objective.objective import END_TO_END, Sums
from strategies.objective.rows import Rows
from strategies.update.engine import StepEngine
from strategies.update.evaluation import Evaluation, Measure, Measured, Samples, whole_logits

if TYPE_CHECKING:
    from strategies.model.head import Head

_NEXT = f"{END_TO_END}next"
_LOGPROB, _GREEDY = f"{END_TO_END}logprob", f"{END_TO_END}greedy"
Texts = Sequence[NDArray[np.int64]]
Passes = Callable[[Samples, Measure], Measured]
"""What is measured in a pass over some samples by all that there are to compute it. Raises PeerLost."""


class Generation:
    """Goes on with the job's prompts. `moves` counts micro-batches that were computed."""

    def __init__(self, job: Job, tokenizer: Tokenizer, prompts: Sequence[NDArray[np.uint32]]) -> None:
        assert job.evaluation is not None
        assert job.evaluation.generate is not None
        self._asked, self._job, self._tokenizer = job.evaluation.generate, job, tokenizer
        self._prompts = [prompt.astype(np.int64) for prompt in prompts]
        self._passed = 0
        self._pass: Evaluation | None = None

    @classmethod
    def of(cls, job: Job, tokenizer: Tokenizer) -> Generation | None:
        """None where the job asks for no texts. Raises DataError."""
        prompts = prompts_of(job, tokenizer)
        return cls(job, tokenizer, prompts) if prompts else None

    @property
    def moves(self) -> int:
        """See the class."""
        return self._passed + (0 if self._pass is None else self._pass.moves)

    def run(self, engine: StepEngine, committed: int) -> list[dict[str, str]]:
        """The prompts and how the weights after `committed` steps go on; all ranks find the same. Raises PeerLost."""
        asked, end = self._asked, self._tokenizer.end_of_document

        def passes(samples: Samples, chosen: Measure) -> Measured:
            self._pass = Evaluation(samples, engine.spec, chosen)
            found = engine.evaluate(committed, self._pass)
            self._passed, self._pass = self.moves, None
            return found

        most = [asked.max_new_tokens] * len(self._prompts)
        said = go_on(
            passes, self._job, self._prompts, most, lambda _, new: new[-1] == end, committed, asked.temperature
        )  # fmt: skip
        return [
            {"prompt": prompt, "text": self._tokenizer.decode(new)}
            for prompt, new in zip(asked.prompts, said, strict=True)
        ]


def go_on(
    passes: Passes,
    job: Job,
    prompts: Texts,
    most: Sequence[int],
    is_over: Callable[[int, NDArray[np.int64]], bool],
    committed: int = 0,
    temperature: float = 0.0,
) -> list[NDArray[np.int64]]:
    """How the model goes on with each of `prompts`, int64 [tokens]: by at most so many tokens, and until `is_over` says
    so of its number and what is new. With a temperature it is drawn, by the job's seed and `committed`."""
    new = [np.empty(0, dtype=np.int64) for _ in prompts]
    left = [number for number, room in enumerate(most) if room > 0]
    chosen = partial(_next_tokens, job.train.seed, committed, temperature)
    while left:
        # All of them, also those that are over, so that micro-batches stay as they are.
        texts = [np.concatenate((prompt, said, [0])) for prompt, said in zip(prompts, new, strict=True)]
        samples = TextRows(texts, [1] * len(texts), job)
        found = passes(samples, chosen)[_NEXT]
        for number in left:
            new[number] = np.append(new[number], int(found[number]))
        left = [n for n in left if len(new[n]) < most[n] and not is_over(n, new[n])]
    return new


def score(passes: Passes, job: Job, texts: Texts, targets: Sequence[int]) -> list[tuple[float, bool]]:
    """Of each text, int64 [tokens], how likely its last `targets` tokens are after those before: the sum of their
    log-probabilities, in nats, and whether each is the likeliest."""
    if not texts:
        return []
    found = passes(TextRows(texts, targets, job), _scored)
    return [(total, greedy == 1.0) for total, greedy in zip(found[_LOGPROB], found[_GREEDY], strict=True)]


class TextRows:
    """Texts as rows, of each of which the last `targets` tokens count. See `Samples`. How many positions rows have is a
    function of the job and the texts, never of the layout."""

    def __init__(self, texts: Texts, targets: Sequence[int], job: Job) -> None:
        self._texts, self._targets, self._micro_batch = texts, targets, job.train.micro_batch
        data = job.data
        is_ragged = data.packing == "pad" and data.pad_to == "longest"
        self._width = max(map(len, texts)) - 1 if is_ragged else data.sequence_length

    @property
    def num_micro_batches(self) -> int:
        """See `Samples`."""
        return -(-len(self._texts) // self._micro_batch)

    def batch(self, index: int) -> Batch:
        """See `Samples`; labels are the numbers of prompts."""
        first = index * self._micro_batch
        texts = self._texts[first : first + self._micro_batch]
        tokens = np.zeros((len(texts), self._width + 1), dtype=np.int64)
        documents = np.full(tokens.shape, -1, dtype=np.int32)
        marks = np.zeros(tokens.shape, dtype=np.bool_)
        for row, text in enumerate(texts):
            tokens[row, : len(text)] = text
            documents[row, : len(text)] = 0
            marks[row, len(text) - self._targets[first + row] : len(text)] = True
        numbers = np.arange(first, first + len(texts), dtype=np.int64)
        return Batch(
            tokens, numbers, 0, documents, len(texts), len(texts), marks=marks, labels=numbers, step_labels=numbers,
            step_samples=len(texts),
        )  # fmt: skip


def _next_tokens(
    seed: int, committed: int, temperature: float, spec: StepSpec, value: torch.Tensor, head: Head | None, rows: Rows
) -> Sums:  # fmt: skip
    """The next token of every row, in order."""
    counts = _counting(rows)
    logits = _logits_at(value, head, counts)
    if temperature:
        assert rows.labels is not None
        places = counts.nonzero()
        noise = [
            _noise(seed, committed, int(rows.labels[row]), int(position), logits.shape[-1]) for row, position in places
        ]
        logits = logits.double() / temperature + torch.from_numpy(np.stack(noise)).to(logits.device)
    return {_NEXT: logits.argmax(dim=-1).double()}


def _scored(spec: StepSpec, value: torch.Tensor, head: Head | None, rows: Rows) -> Sums:
    """Of every row, in order, the log-probability of what counts of it, and whether all that is the likeliest."""
    counts = _counting(rows)
    labels, places = rows.tokens[:, 1:][counts], counts.nonzero()
    chunk = spec.loss_chunk or len(places)
    logprobs, right = [], []
    for start in range(0, len(places), chunk):
        some = torch.zeros_like(counts)
        some[places[start : start + chunk, 0], places[start : start + chunk, 1]] = True
        found = torch.log_softmax(_logits_at(value, head, some).float(), dim=-1)
        wanted = labels[start : start + chunk]
        logprobs.append(found.gather(1, wanted[:, None])[:, 0].double())
        right.append(found.argmax(dim=-1) == wanted)
    of_row = [places[:, 0] == row for row in range(len(counts))]
    all_logprobs, all_right = torch.cat(logprobs), torch.cat(right)
    return {
        _LOGPROB: torch.stack([all_logprobs[mine].sum() for mine in of_row]),
        _GREEDY: torch.stack([all_right[mine].all().double() for mine in of_row]),
    }


def _counting(rows: Rows) -> torch.Tensor:
    """What counts, bool [rows, length]; of made-up rows, which nobody looks at, the first of each."""
    assert rows.counting is not None
    if bool(rows.counting.any()):
        return rows.counting
    first = torch.zeros_like(rows.counting)
    first[:, 0] = True
    return first


def _logits_at(value: torch.Tensor, head: Head | None, counts: torch.Tensor) -> torch.Tensor:
    """[positions that count, vocabulary]."""
    if head is None:
        return whole_logits(value)[counts]
    return whole_logits(head(value[counts][None])).flatten(0, 1)


def _noise(seed: int, committed: int, prompt: int, position: int, size: int) -> NDArray[Any]:
    """Of Gumbel's distribution: the token with the largest sum of it and its log-probability is drawn by these."""
    stream = np.random.Philox(key=[seed, committed], counter=[0, 0, position, prompt])
    return np.random.Generator(stream).gumbel(size=size)
