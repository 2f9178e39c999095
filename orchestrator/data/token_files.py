"""Files of tokens that others have made: what nanoGPT and llm.c (.bin), Megatron-LM (.bin with an .idx beside it) and
numpy (.npy) write."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orchestrator.data.opening import OpenFile
from orchestrator.data.reading import Library
from orchestrator.data.sources import DataError, SourceFile

_MEGATRON = b"MMIDIDX\x00\x00"
_MEGATRON_TYPES: dict[int, Any] = {
    1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 6: np.float64, 7: np.float32, 8: np.uint16,
}  # fmt: skip
"""By the code in its index (megatron/core/datasets/indexed_dataset.py)."""


def token_documents(opened: OpenFile, end: int, vocab_size: int) -> Iterator[NDArray[np.uint32]]:
    """The documents of a file of tokens, uint32 [tokens] each: those that its index tells, or else what lies between
    the ids `end` (each belongs to the document before it).

    Raises DataError for a file that is not what its name says, and for ids that the tokenizer does not have.
    """
    index = _index_of(opened)
    is_npy = opened.file.format == "npy"
    tokens = _npy(opened) if is_npy else _raw(opened, np.dtype("<u2") if index is None else index[0])
    if tokens.size and (int(tokens.min()) < 0 or int(tokens.max()) >= vocab_size):
        raise DataError(
            f"{opened.file.url}: it has ids from {int(tokens.min())} to {int(tokens.max())}, and data.tokenizer has "
            f"{vocab_size}; name the tokenizer that made it"
        )
    if index is None:
        ends = np.flatnonzero(tokens == end) + 1
        bounds = [0, *ends.tolist()]
        bounds += [len(tokens)] if bounds[-1] < len(tokens) else []
    else:
        bounds = np.concatenate([[0], np.cumsum(index[1])]).tolist()
        if bounds[-1] != len(tokens):
            raise DataError(
                f"{opened.file.url}: it has {len(tokens):,} tokens, and the index beside it tells of {bounds[-1]:,}"
            )
    for start, stop in pairwise(bounds):
        if start < stop:
            yield tokens[start:stop].astype(np.uint32)


def _npy(opened: OpenFile) -> NDArray[Any]:
    import io

    with opened.stream() as stream:
        content = io.BytesIO(stream.read())
    try:
        found = np.lib.format.read_array(content, allow_pickle=False)
    except ValueError as error:
        raise DataError(f"{opened.file.url}: not readable as npy: {error}") from error
    if found.ndim != 1 or not np.issubdtype(found.dtype, np.integer):
        raise DataError(
            f"{opened.file.url}: an array of shape {list(found.shape)} and type {found.dtype}; tokens are one line of "
            "integers"
        )
    return found  # type: ignore[no-any-return]


def _raw(opened: OpenFile, dtype: np.dtype[Any]) -> NDArray[Any]:
    with opened.stream() as stream:
        data = stream.read()
    if len(data) % dtype.itemsize:
        raise DataError(
            f"{opened.file.url}: its {len(data):,} bytes are no whole number of tokens of {dtype.itemsize} bytes; "
            "without an .idx beside it a .bin file holds uint16"
        )
    return np.frombuffer(data, dtype=dtype)


def _index_of(opened: OpenFile) -> tuple[np.dtype[Any], NDArray[np.int32]] | None:
    """The type of the tokens and the lengths of the sequences, by Megatron's index; None where there is none."""
    file = opened.file
    if file.format != "bin":
        return None
    beside = SourceFile(file.name.removesuffix(".bin") + ".idx", file.url.removesuffix(".bin") + ".idx", -1, "bin")
    try:
        with Library(opened.library.mirrors, opened.library.patience).open(beside) as stream:
            data = stream.readall()
    except DataError:
        return None
    head = len(_MEGATRON)
    if data[:head] != _MEGATRON:
        raise DataError(f"{beside.url}: it is no index of Megatron-LM; remove it, or name the .bin file elsewhere")
    code = data[head + 8]
    dtype = _MEGATRON_TYPES.get(code)
    count = int(np.frombuffer(data, dtype="<u8", count=1, offset=head + 9)[0])
    if dtype is None or not np.issubdtype(dtype, np.integer):
        raise DataError(f"{beside.url}: its tokens are of type {code}, which is no type of integers")
    lengths = np.frombuffer(data, dtype="<i4", count=count, offset=head + 25)
    return np.dtype(dtype).newbyteorder("<"), lengths
