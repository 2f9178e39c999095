"""Text to token ids, and the identity of whatever decides those ids.

Two tokenizers, one protocol: raw bytes, which need no file, and Hugging Face tokenizers from local disk.
Nothing is ever downloaded: a job must not depend on what a hub serves today.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import xxhash
from numpy.typing import NDArray

from orchestrator.data.sources import DataError

BYTES = "bytes"

# A bare tokenizer.json does not say which of its tokens ends a document; these are the names in use.
_END_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "<|end▁of▁sentence|>")


class Tokenizer(Protocol):
    """What the store needs of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id."""

    @property
    def end_of_document(self) -> int:
        """The id the store writes after every document."""

    @property
    def identity(self) -> str:
        """A digest of everything that decides the ids: equal identities give equal ids for equal text."""

    def encode(self, text: str) -> NDArray[np.uint32]:
        """The ids of a text, uint32 [tokens], with no special token added, so no end of document either."""

    def encode_with_starts(self, text: str) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        """The same ids, and the character of the text that each begins at, int64 [tokens]. Raises DataError for a
        tokenizer that does not know."""

    def decode(self, ids: NDArray[Any]) -> str:
        """The text of some ids [tokens], without special tokens; what is no text is replaced."""


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer called `bytes`, or the one in a directory or tokenizer.json file on local disk.

    A directory is loaded by transformers' AutoTokenizer, a .json file by the tokenizers library. Their end of
    document is their end-of-sequence token. A text that spells a special token is encoded as that token, as
    these libraries do.

    Raises DataError naming the tokenizer when it is not on disk, cannot be loaded, or has no end-of-sequence
    token.
    """
    if name == BYTES:
        return ByteTokenizer()
    path = Path(name).expanduser()
    try:
        if path.is_dir():
            return _from_directory(name, path)
        if path.is_file():
            return _from_file(name, path)
    except DataError:
        raise
    except Exception as error:  # both libraries raise bare Exception for a bad file: name the tokenizer in each
        raise DataError(
            f"data.tokenizer: {name} cannot be loaded: {type(error).__name__}: {error}; it must be a "
            "Hugging Face tokenizer directory or a tokenizer.json file"
        ) from error
    raise DataError(
        f"data.tokenizer: {name!r} does not exist on disk (working directory {os.getcwd()}); use {BYTES!r}, "
        "a directory saved by save_pretrained, or a tokenizer.json file; download what is on a hub"
    )


def byte_lengths(tokenizer: Tokenizer) -> NDArray[np.int64] | None:
    """How many bytes of text each id stands for, int64 [vocab_size], 0 for special tokens; None for a tokenizer whose
    tokens do not say. (SentencePiece puts a space before a text, which is counted.)"""
    if isinstance(tokenizer, ByteTokenizer):
        return np.array([*[1] * 256, 0], dtype=np.int64)
    return tokenizer.byte_lengths() if isinstance(tokenizer, FastTokenizer) else None


class ByteTokenizer:
    """UTF-8 bytes as ids 0 to 255, and 256 for the end of a document."""

    vocab_size = 257
    end_of_document = 256
    identity = "bytes-1"

    def encode(self, text: str) -> NDArray[np.uint32]:
        """The UTF-8 bytes of the text, uint32 [bytes]."""
        return np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.uint32)

    def encode_with_starts(self, text: str) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        """See `Tokenizer`."""
        ids = self.encode(text)
        # A byte 10xxxxxx goes on with a character.
        return ids, np.cumsum((ids & 0xC0) != 0x80, dtype=np.int64) - 1

    def decode(self, ids: NDArray[Any]) -> str:
        """See `Tokenizer`; ids beyond the tokenizer's, which a model may have, are left out."""
        return bytes(int(each) for each in ids if each < 256).decode("utf-8", "replace")


def byte_backend() -> tuple[Any, str]:
    """The same ids from the `tokenizers` library, which other tools can load: its tokenizer, and the token that ends a
    document."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    end = _END_TOKENS[0]
    letters = _byte_letters()
    tokenizer = Tokenizer(models.BPE(vocab={letter: byte for byte, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(end, special=True)])
    assert tokenizer.token_to_id(end) == ByteTokenizer.end_of_document
    return tokenizer, end


def _byte_letters() -> list[str]:
    """The letter that byte-level tokenizers write for each byte: itself if it can be seen, else one from 256 on
    (Radford et al. 2019, GPT-2)."""
    visible = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    hidden = [byte for byte in range(256) if byte not in visible]
    return [chr(byte) if byte in visible else chr(256 + hidden.index(byte)) for byte in range(256)]


@dataclass(frozen=True)
class Conventions:
    """What a tokenizer's files say beside how text becomes ids: its chat template ("": none), the special tokens that a
    template may name, and the one that begins a text, if there is one."""

    chat_template: str = ""
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    begin: int | None = None


class FastTokenizer:
    """A `tokenizers.Tokenizer` (transformers calls these fast)."""

    def __init__(self, backend: Any, end_of_document: int, conventions: Conventions | None = None) -> None:
        import tokenizers

        # Both would silently change the ids: a saved tokenizer may still carry its model's truncation and
        # padding.
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.end_of_document = end_of_document
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        self.identity = _identity("fast", tokenizers.__version__, end_of_document, backend.to_str().encode())
        found = conventions or Conventions()
        self.chat_template, self.special_tokens = found.chat_template, found.special_tokens
        self.begin_of_document = found.begin

    def encode(self, text: str) -> NDArray[np.uint32]:
        """The ids of the text, uint32 [tokens]."""
        return np.array(self._backend.encode(text, add_special_tokens=False).ids, dtype=np.uint32)

    def encode_with_starts(self, text: str) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        """See `Tokenizer`."""
        found = self._backend.encode(text, add_special_tokens=False)
        starts = np.array([first for first, _ in found.offsets], dtype=np.int64)
        return np.array(found.ids, dtype=np.uint32), starts

    def decode(self, ids: NDArray[Any]) -> str:
        """See `Tokenizer`."""
        found: str = self._backend.decode(list(map(int, ids)), skip_special_tokens=True)
        return found

    def byte_lengths(self) -> NDArray[np.int64] | None:
        """See the function `byte_lengths`."""
        known = json.loads(self._backend.to_str())
        decoder = known.get("decoder") or {}
        kinds = {each["type"] for each in decoder.get("decoders", [decoder]) if "type" in each}
        added = {entry["id"]: entry for entry in known.get("added_tokens", [])}
        if not kinds & {"ByteLevel", "ByteFallback", "Metaspace"}:
            return None
        lengths = np.zeros(self.vocab_size, dtype=np.int64)
        for token, number in self._backend.get_vocab(with_added_tokens=True).items():
            if number in added:
                lengths[number] = 0 if added[number]["special"] else len(token.encode())
            elif "ByteLevel" in kinds:
                # A letter for each byte.
                lengths[number] = len(token)
            elif "ByteFallback" in kinds and re.fullmatch(r"<0x[0-9A-F]{2}>", token):
                lengths[number] = 1
            else:
                lengths[number] = len(token.replace("\u2581", " ").encode())
        return lengths


class SlowTokenizer:
    """A transformers tokenizer that is not backed by the tokenizers library."""

    def __init__(self, tokenizer: Any, directory: Path) -> None:
        import transformers

        self._tokenizer = tokenizer
        self.end_of_document = int(tokenizer.eos_token_id)
        self.vocab_size = max(tokenizer.get_vocab().values()) + 1
        # It cannot be written out as one text, so its files stand for it; model weights lie in files of other
        # kinds.
        kinds = (".json", ".txt", ".model", ".tiktoken")
        files = sorted(path for path in directory.iterdir() if path.suffix in kinds)
        content = [part for path in files for part in (path.name.encode(), path.read_bytes())]
        self.identity = _identity("slow", transformers.__version__, self.end_of_document, *content)

    def encode(self, text: str) -> NDArray[np.uint32]:
        """The ids of the text, uint32 [tokens]."""
        ids = self._tokenizer.encode(text, add_special_tokens=False, truncation=False, verbose=False)
        return np.array(ids, dtype=np.uint32)

    def encode_with_starts(self, text: str) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        """It does not know. Raises DataError."""
        raise DataError(
            "data.tokenizer: it is not one of the tokenizers library, and does not tell which part of a text a token "
            "is of, which records with parts that count need; convert it (tokenizer.json)"
        )

    def decode(self, ids: NDArray[Any]) -> str:
        """See `Tokenizer`."""
        return str(self._tokenizer.decode(list(map(int, ids)), skip_special_tokens=True))


def _from_directory(name: str, path: Path) -> Tokenizer:
    config = _tokenizer_config(path)
    if "auto_map" in config:
        raise DataError(
            f"data.tokenizer: {name} brings code of its own (auto_map in tokenizer_config.json), which is never run; "
            "convert it to a tokenizer.json, and name that file"
        )
    alone = path / "tokenizer.json"
    if alone.is_file() and not (config or (path / "config.json").is_file()):
        return _from_file(name, alone)
    import transformers

    try:
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(
            str(path), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:
        # Without a package that it needs, the library asks for another one.
        if not alone.is_file() and (pieces := sorted(each.name for each in path.glob("*.model"))):
            raise DataError(
                f"data.tokenizer: {name} holds a SentencePiece model ({', '.join(pieces)}) and no tokenizer.json, and "
                f"transformers cannot load it ({type(error).__name__}); it needs the packages sentencepiece and "
                "protobuf, or convert it once where they are installed: "
                "AutoTokenizer.from_pretrained(...).save_pretrained(...)"
            ) from error
        raise
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"data.tokenizer: {name} has no end-of-sequence token, which marks the end of a document; "
            "set eos_token in its tokenizer_config.json"
        )
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return SlowTokenizer(tokenizer, path)
    return FastTokenizer(backend, int(tokenizer.eos_token_id), _conventions_of(tokenizer))


def _conventions_of(tokenizer: Any) -> Conventions:
    """Of a tokenizer of transformers."""
    template = getattr(tokenizer, "chat_template", None)
    special = {name: str(value) for name, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
    begin = tokenizer.bos_token_id
    return Conventions(template if isinstance(template, str) else "", special, None if begin is None else int(begin))


def _tokenizer_config(path: Path) -> dict[str, Any]:
    """The content of the directory's tokenizer_config.json, if it has one."""
    file = path / "tokenizer_config.json"
    content = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    if not isinstance(content, dict):
        raise DataError(f"data.tokenizer: {file} must be a mapping")
    return content


def _from_file(name: str, path: Path) -> Tokenizer:
    import tokenizers

    backend = tokenizers.Tokenizer.from_file(str(path))
    declared = _tokenizer_config(path.parent).get("eos_token")
    if isinstance(declared, dict):  # an added token written out with its flags
        declared = declared.get("content")
    candidates = [declared] if declared else list(_END_TOKENS)
    ids = {token: backend.token_to_id(token) for token in candidates}
    found = {token: id for token, id in ids.items() if id is not None}
    if len(found) != 1:
        said = f"several ({', '.join(found)})" if found else f"none (looked for {', '.join(candidates)})"
        raise DataError(
            f"data.tokenizer: {name} must have one end-of-sequence token, which marks the end of a document, "
            f"but has {said}; name it as eos_token in {path.with_name('tokenizer_config.json')}"
        )
    return FastTokenizer(backend, next(iter(found.values())), _conventions_beside(path, backend))


def _conventions_beside(path: Path, backend: Any) -> Conventions:
    """What the files beside a tokenizer.json say."""
    config = _tokenizer_config(path.parent)
    special = {}
    for name, value in config.items():
        token = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(token, str):
            special[name] = token
    template = config.get("chat_template")
    beside = path.with_name("chat_template.jinja")
    if beside.is_file():
        template = beside.read_text("utf-8")
    begin = backend.token_to_id(special["bos_token"]) if "bos_token" in special else None
    return Conventions(template if isinstance(template, str) else "", special, begin)


def _identity(kind: str, version: str, end_of_document: int, *content: bytes) -> str:
    """A digest of all that decides the ids. The library's version is part of it: its fixes change ids."""
    digest = xxhash.xxh3_128()
    for part in (str(end_of_document).encode(), *content):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return f"{kind}-{version}-{digest.hexdigest()}"
