"""Whether a job's data can be read, found out from its first records: what `validate` looks at beyond the job file."""

from __future__ import annotations

from orchestrator.data.formats import check_field, documents
from orchestrator.data.of_job import mirrors_of, sources_of
from orchestrator.data.reading import Library
from orchestrator.data.sources import DataError
from orchestrator.data.tokenizers import load_tokenizer
from orchestrator.job import Job


def try_data(job: Job) -> None:
    """Lists the files of every source, and reads and tokenises the first document of each. Raises DataError."""
    tokenizer = load_tokenizer(job.data.tokenizer)
    for number, source in enumerate(sources_of(job)):
        library = Library(mirrors_of(job, number))
        files = library.files(source["source"], source["format"])
        check_field(files, source["field"], source["source"])
        file = files[0]
        text = next(documents(file, source["field"], source["document"], library=library))
        try:
            tokenizer.encode(text)
        except Exception as error:  # The tokenizers' libraries raise bare exceptions.
            raise DataError(
                f"data.tokenizer: {job.data.tokenizer} cannot encode the first document of {file.url}: {error}"
            ) from error
