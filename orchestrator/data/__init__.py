"""What a job trains on: sources, the tokenised store, samples, the sampler, and the ledger that proves their use.

Everything here is a function of its arguments: which tokens exist (`prepare`), what a virtual worker gets of them
at a step (`Dataset`), and whether a run used them as its job file says (`audit`). Nothing here knows of Ray, torch,
the cluster or (but for `of_job`) the job file, and importing it costs numpy and xxhash only.
"""

from orchestrator.data.dataset import DataPlan, Dataset
from orchestrator.data.formats import documents
from orchestrator.data.ledger import AuditReport, audit, data_digest, step_hash, virtual_worker_hash
from orchestrator.data.read_ahead import ReadAhead
from orchestrator.data.reading import Library
from orchestrator.data.sampler import Sampler, permute
from orchestrator.data.sources import DataError, SourceFile, resolve_files
from orchestrator.data.store import TokenStore, open_store, prepare
from orchestrator.data.tokenizers import Tokenizer, load_tokenizer

__all__ = [
    "AuditReport",
    "DataError",
    "DataPlan",
    "Dataset",
    "Library",
    "ReadAhead",
    "Sampler",
    "SourceFile",
    "TokenStore",
    "Tokenizer",
    "audit",
    "data_digest",
    "documents",
    "load_tokenizer",
    "open_store",
    "permute",
    "prepare",
    "resolve_files",
    "step_hash",
    "virtual_worker_hash",
]
