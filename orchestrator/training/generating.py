"""What a model says to some prompts, as a part of an evaluation: by all workers, in whatever layout there is.

A token of every prompt is a pass of all ranks over the prompts as they are by then, the same passes as those of an
evaluation. That is slower than with a cache of keys and values, and needs nothing but what trains; it is for looking
at a few texts, not for serving. With a temperature tokens are drawn by noise that depends on the seed, the step, the
prompt and the position alone (Gumbel 1954), so texts are the same in every layout, too.
"""

from __future__ import annotations

from collections.abc import Sequence
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
from strategies.update.evaluation import Evaluation, whole_logits

if TYPE_CHECKING:
    from strategies.model.head import Head

_NEXT = f"{END_TO_END}next"


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
        texts = [prompt.copy() for prompt in self._prompts]
        is_over = [False] * len(texts)
        chosen = partial(_next_tokens, self._job.train.seed, committed, asked.temperature)
        for _ in range(asked.max_new_tokens):
            if all(is_over):
                break
            samples = _Prompts(texts, self._width(texts), self._job.train.micro_batch)
            self._pass = Evaluation(samples, engine.spec, chosen)
            found = engine.evaluate(committed, self._pass)[_NEXT]
            self._passed, self._pass = self.moves, None
            for number, token in enumerate(map(int, found)):
                if not is_over[number]:
                    texts[number] = np.append(texts[number], token)
                    is_over[number] = token == end
        return [
            {"prompt": asked.prompts[number], "text": self._tokenizer.decode(text[len(prompt) :])}
            for number, (prompt, text) in enumerate(zip(self._prompts, texts, strict=True))
        ]

    def _width(self, texts: Sequence[NDArray[np.int64]]) -> int:
        """How many positions rows have. A function of the job and the texts, never of the layout."""
        data = self._job.data
        if data.packing == "pad" and data.pad_to == "longest":
            return max(map(len, texts))
        return data.sequence_length


class _Prompts:
    """Texts so far as rows of `width` positions, of which the last token's counts. See `Samples`."""

    def __init__(self, texts: Sequence[NDArray[np.int64]], width: int, micro_batch: int) -> None:
        self._texts, self._width, self._micro_batch = texts, width, micro_batch

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
            documents[row, : len(text) + 1] = 0  # And the one that is wanted.
            marks[row, len(text)] = True
        numbers = np.arange(first, first + len(texts), dtype=np.int64)
        return Batch(
            tokens, numbers, 0, documents, len(texts), len(texts), marks=marks, labels=numbers, step_labels=numbers,
            step_samples=len(texts),
        )  # fmt: skip


def _next_tokens(
    seed: int, committed: int, temperature: float, spec: StepSpec, value: torch.Tensor, head: Head | None, rows: Rows
) -> Sums:  # fmt: skip
    """The next token of every row, in order."""
    assert rows.counting is not None
    counts = rows.counting
    if not bool(counts.any()):  # Made-up rows, which nobody looks at.
        counts = torch.zeros_like(counts)
        counts[:, 0] = True
    if head is None:
        logits = whole_logits(value)[counts]
    else:
        logits = whole_logits(head(value[counts][None])).flatten(0, 1)
    if temperature:
        assert rows.labels is not None
        places = counts.nonzero()
        noise = [
            _noise(seed, committed, int(rows.labels[row]), int(position), logits.shape[-1]) for row, position in places
        ]
        logits = logits.double() / temperature + torch.from_numpy(np.stack(noise)).to(logits.device)
    return {_NEXT: logits.argmax(dim=-1).double()}


def _noise(seed: int, committed: int, prompt: int, position: int, size: int) -> NDArray[Any]:
    """Of Gumbel's distribution: the token with the largest sum of it and its log-probability is drawn by these."""
    stream = np.random.Philox(key=[seed, committed], counter=[0, 0, position, prompt])
    return np.random.Generator(stream).gumbel(size=size)
