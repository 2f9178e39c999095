"""Whether a job's data can be read, found out from its first records: what `validate` looks at beyond the job file."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from orchestrator.data.encoding import Encoded, encoder_of, sequences_of
from orchestrator.data.formats import check_field
from orchestrator.data.of_job import held_out_sources, mirrors_of, prompts_of, record_spec, sources_of
from orchestrator.data.reading import Library
from orchestrator.data.records import MARK
from orchestrator.data.sources import DataError
from orchestrator.data.tokenizers import Tokenizer, load_tokenizer
from orchestrator.job import Job


class Shown(NamedTuple):
    """A sequence of what a file holds: ids [tokens], and which of them the model is trained to predict, bool [tokens];
    None: all."""

    url: str
    ids: NDArray[np.uint32]
    counts: NDArray[np.bool_] | None


def try_data(job: Job, show: int = 0) -> list[Shown]:
    """Lists the files of every source, also of what is evaluated on, and reads and encodes the first document or record
    of each, as a run will; of the first source `show` sequences are returned. Raises DataError."""
    tokenizer = load_tokenizer(job.data.tokenizer)
    shown: list[Shown] = []
    for number, source in enumerate(sources_of(job)):
        found = _sequences(job, source, mirrors_of(job, number), tokenizer, is_held_out=False)
        shown += list(islice(found, max(1, show if number == 0 else 1)))
    if job.evaluation is not None and job.evaluation.data is not None:
        for source in held_out_sources(job):
            try:
                next(_sequences(job, source, [], tokenizer, is_held_out=True))
            except DataError as error:
                raise DataError(f"evaluation.data: {error}") from error
    prompts_of(job, tokenizer)
    return shown[:show]


def _sequences(
    job: Job, source: dict[str, Any], mirrors: list[str], tokenizer: Tokenizer, *, is_held_out: bool
) -> Iterator[Shown]:
    library = Library(mirrors)
    files = library.files(source["source"], source["format"], source["include"])
    spec = record_spec(job, is_held_out=is_held_out)
    if spec is None:
        check_field(files, source["field"], source["source"])
    encoder = encoder_of(spec, tokenizer)
    words, is_empty = 0 if spec is None else spec.label_words, True
    for file in files:
        wanted = Encoded(file, library, field=source["field"], document=source["document"])
        try:
            for sequence in sequences_of(wanted, tokenizer, encoder):
                ids, is_empty = sequence[: len(sequence) - words], False
                counts = None if encoder is None else (ids & MARK) != 0
                yield Shown(file.url, (ids & ~MARK).astype(np.uint32), counts)
        except (DataError, OSError):
            raise
        except Exception as error:  # The tokenizers' libraries raise bare exceptions.
            raise DataError(
                f"data.tokenizer: {job.data.tokenizer} cannot encode the first document of {file.url}: {error}"
            ) from error
    if encoder is not None and encoder.skipped and is_empty:
        told = encoder.first_skipped[0]
        raise DataError(f"all of {encoder.skipped:,} records are bad, and nothing is left; the first: {told}")


def as_text(shown: Shown, tokenizer: Tokenizer) -> str:
    """A sequence for people: what the model is trained to predict in double brackets, ends of documents as such."""
    pieces: list[str] = []
    counts = np.ones(len(shown.ids), dtype=np.bool_) if shown.counts is None else shown.counts
    edges = np.flatnonzero(np.diff(counts)) + 1
    for ids, counting in zip(np.split(shown.ids, edges), np.split(counts, edges), strict=True):
        if not len(ids):
            continue
        text = _decoded(ids, tokenizer)
        pieces.append(f"[[{text}]]" if counting[0] else text)
    return "".join(pieces)


def _decoded(ids: NDArray[np.uint32], tokenizer: Tokenizer) -> str:
    parts, special = [], getattr(tokenizer, "special_tokens", {})
    end = special.get("eos_token", "<end>")
    for piece in np.split(ids, np.flatnonzero(ids == tokenizer.end_of_document)):
        if len(piece) and piece[0] == tokenizer.end_of_document:
            parts.append(str(end))
            piece = piece[1:]
        parts.append(tokenizer.decode(piece))
    return "".join(parts)
