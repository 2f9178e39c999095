"""Attention without a mask of length x length, where a model of transformers would make one: for documents that share a
row, and for windows that slide.

Each document is computed by itself, and of a long one as many queries at a time as the window has, with the keys that
these can see. So nothing is ever as large as a row's length squared, and what no query sees is not computed. Whether a
model can be computed so is found out by trying: it must give what it gives with its masks.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import nn

    from orchestrator.job import Job

NAME = "segments"
WINDOW = "sliding_window"
_CLOSE = 1e-4


def choose_attention(model: nn.Module, job: Job) -> None:
    """Has a model of transformers compute attention in segments where the job's rows would need masks, if it gives the
    same so; otherwise leaves it as it is."""
    if getattr(getattr(model, "config", None), "_attn_implementation", None) != "sdpa":
        return
    if job.data.document_mask or _has_short_windows(model, job.data.sequence_length):
        register()
        if gives_the_same(model):
            model.set_attn_implementation(NAME)  # type: ignore[operator]


def _has_short_windows(model: nn.Module, length: int) -> bool:
    return any(window < length for window in _windows(model))


def _windows(model: nn.Module) -> list[int]:
    """Those that its parts, or their configurations, have."""
    found = (getattr(each, WINDOW, None) for each in (*model.modules(), *_configs(model)))
    return [window for window in found if isinstance(window, int)]


def register() -> None:
    """Makes the attention known to transformers, which then makes no masks for it."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attend)


# ------------------------------------------------------------------------------------ computing


def attend(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any = None,
    dropout: float = 0.0, scaling: float | None = None, position_ids: torch.Tensor | None = None,
    sliding_window: int | None = None, **more: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """Causal attention of `query` [batch, heads, length, width] within documents, which begin where `position_ids`
    [batch, length] are 0 (None: a row is one): [batch, length, heads, width]. Raises ValueError for a mask, which it
    has not been made for."""
    if attention_mask is not None:
        raise ValueError("attention in segments takes no mask")
    # Other implementations take windows from the module, or are given them.
    window = sliding_window or getattr(module, "sliding_window", None)
    more |= {"dropout": dropout, "scaling": scaling}
    rows = [
        _joined([
            _document(module, _cut(query, row, part), _cut(key, row, part), _cut(value, row, part), window, more)
            for part in documents
        ], 1)
        for row, documents in enumerate(_documents(position_ids, query.shape[0], query.shape[2]))
    ]  # fmt: skip
    return _joined(rows, 0), None


def _cut(tensor: torch.Tensor, row: int, part: tuple[int, int]) -> torch.Tensor:
    return tensor[row : row + 1, :, part[0] : part[1]]


def _joined(parts: list[torch.Tensor], dim: int) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _documents(position_ids: torch.Tensor | None, batch: int, length: int) -> list[list[tuple[int, int]]]:
    """(first, behind the last) token of each document of each row. What has been looked up is noted at the tensor,
    which all layers are given."""
    if position_ids is None:
        return [[(0, length)]] * batch
    known: list[list[tuple[int, int]]] | None = getattr(position_ids, "_documents", None)
    if known is None:
        known = []
        for row in position_ids.detach().cpu().expand(batch, -1):
            starts = sorted({0, *(row == 0).nonzero()[:, 0].tolist()})
            known.append(list(zip(starts, [*starts[1:], length], strict=True)))
        position_ids._documents = known  # type: ignore[attr-defined]
    return known


def _document(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int | None,
    more: dict[str, Any],
) -> torch.Tensor:  # fmt: skip
    """Of one document: [1, length, heads, width]."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    length = query.shape[2]
    if window is None or length <= window:
        return sdpa_attention_forward(module, query, key, value, None, is_causal=True, **more)[0]
    found = []
    for start in range(0, length, window):
        stop, first = min(start + window, length), max(0, start - window + 1)
        seen = _in_window(start, stop, first, window, query.device)
        keys, values = key[:, :, first:stop], value[:, :, first:stop]
        part = sdpa_attention_forward(module, query[:, :, start:stop], keys, values, seen, is_causal=False, **more)
        found.append(part[0])
    return torch.cat(found, dim=1)


def _in_window(start: int, stop: int, first: int, window: int, device: torch.device) -> torch.Tensor:
    """Which of the keys from `first` to `stop` each query from `start` to `stop` sees: [1, 1, queries, keys]."""
    queries = torch.arange(start, stop, device=device)[:, None]
    keys = torch.arange(first, stop, device=device)[None, :]
    return ((keys <= queries) & (keys > queries - window))[None, None]


# ------------------------------------------------------------------------------------ trying


def gives_the_same(model: nn.Module) -> bool:
    """Whether a model gives with segments what it gives with masks: for documents of a few tokens, and with windows
    shorter than they are. It is tried with two layers of each kind, and with made-up values where it has none."""
    from strategies.trial.copies import Copies

    tried: Any = Copies(model, torch.device("cpu")).make(torch.float32)
    if tried is model:
        return False  # It cannot be copied.
    tried.eval()
    tried.config = copy.deepcopy(tried.config)
    for part in tried.modules():
        if getattr(part, "config", None) is not None:
            part.config = tried.config if type(part.config) is type(tried.config) else copy.deepcopy(part.config)
    for each in (*tried.modules(), *_configs(tried)):
        if isinstance(getattr(each, WINDOW, None), int):
            setattr(each, WINDOW, 3)
    tokens = torch.arange(1, 15)[None] % 7
    places = torch.cat([torch.arange(n) for n in (8, 2, 4)])[None]
    with torch.no_grad(), torch.random.fork_rng():
        try:
            found = []
            for name in ("sdpa", NAME):
                tried.set_attn_implementation(name)
                found += [tried(input_ids=tokens).logits, tried(input_ids=tokens, position_ids=places).logits]
        except Exception:  # Whatever a model raises that cannot be computed so.
            return False
    masked, masked_documents, plain, documents = found
    scale = float(masked.abs().max())
    return all(
        bool(torch.allclose(one, other, rtol=_CLOSE, atol=_CLOSE * scale))
        for one, other in ((masked, plain), (masked_documents, documents))
    )


def _configs(model: Any) -> list[Any]:
    """The configurations that a model and its parts have."""
    found = {id(part.config): part.config for part in model.modules() if getattr(part, "config", None) is not None}
    return list(found.values())
