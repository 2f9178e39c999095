"""Directories, read parameter by parameter: as transformers loads them, and no more of them than is wanted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from orchestrator.models.initialisation import without_parameters
from orchestrator.models.reading import DirectoryValues
from orchestrator.models.weights import DirectoryWeights, saved_in
from strategies.model.values import BuiltValues
from tests.small_models import family

NAMES = ("llama", "gpt2", "mixtral", "qwen3_moe", "gpt_neox", "opt", "bloom")


def saved(directory: Path, name: str, kind: str) -> None:
    model: Any = family(name)
    (model.base_model if kind == "its body alone" else model).save_pretrained(directory)
    if kind == "pickled":
        for file in directory.glob("*.safetensors"):
            file.unlink()
        torch.save(model.state_dict(), directory / "pytorch_model.bin")
    elif kind == "in several files":
        for file in directory.glob("*.safetensors"):
            file.unlink()
        model.save_pretrained(directory, max_shard_size="20KB")


def read(directory: Path, name: str, **changes: Any) -> tuple[Any, DirectoryValues]:
    with without_parameters():
        model = family(name, **changes)
    return model, DirectoryValues(model, saved_in(directory), BuiltValues(family(name, **changes)))


@pytest.mark.parametrize("kind", ["whole", "its body alone", "pickled", "in several files"])
@pytest.mark.parametrize("name", NAMES)
def test_values_are_those_that_transformers_loads(tmp_path: Path, name: str, kind: str) -> None:
    """Among them experts that are one stack today, and were saved one by one."""
    saved(tmp_path, name, kind)
    from transformers import AutoModelForCausalLM

    expected: dict[str, nn.Parameter] = dict(AutoModelForCausalLM.from_pretrained(tmp_path).named_parameters())
    model, values = read(tmp_path, name)
    names = [key for key, _ in model.named_parameters()]
    assert names == list(expected)
    assert values.account.missing == (
        ("lm_head.weight",) if kind == "its body alone" and "lm_head.weight" in names else ()
    )
    assert (values.account.unexpected, values.account.mismatched) == ((), {})
    for key in set(names) - set(values.account.missing):
        whole = expected[key].detach()
        assert torch.equal(values.read(key), whole), key
        flat = whole.reshape(-1)
        for start, stop in ((0, flat.numel()), (3, min(37, flat.numel())), (flat.numel() - 1, flat.numel())):
            assert torch.equal(values.read_range(key, start, stop), flat[start:stop]), (key, start, stop)


def test_only_the_rows_that_are_wanted_are_read(tmp_path: Path, monkeypatch: Any) -> None:
    saved(tmp_path, "llama", "whole")
    _, values = read(tmp_path, "llama")
    asked: list[tuple[str, int, int]] = []
    rows = DirectoryWeights.read_rows

    def noted(self: DirectoryWeights, name: str, first: int, last: int) -> torch.Tensor:
        asked.append((name, first, last))
        return rows(self, name, first, last)

    def never(self: DirectoryWeights, name: str) -> torch.Tensor:
        raise AssertionError(f"{name} is read whole")

    monkeypatch.setattr(DirectoryWeights, "read_rows", noted)
    monkeypatch.setattr(DirectoryWeights, "read", never)
    values.read_range("model.embed_tokens.weight", 70, 130)
    assert asked == [("model.embed_tokens.weight", 2, 5)], "32 elements a row"


def test_a_tied_parameter_is_there_under_either_name(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    saved(tmp_path, "llama", "whole")
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    table = tensors.pop("model.embed_tokens.weight")
    tensors["lm_head.weight"] = table
    save_file(tensors, file, metadata={"format": "pt"})
    model, values = read(tmp_path, "llama", tie_word_embeddings=True)
    assert values.account.missing == ()
    assert torch.equal(values.read("model.embed_tokens.weight"), table)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_tied_parameter_with_two_values_is_two(tmp_path: Path) -> None:
    """As transformers has it: what the configuration says is not what was trained."""
    saved(tmp_path, "llama", "whole")
    model, values = read(tmp_path, "llama", tie_word_embeddings=True)
    expected = family("llama")
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        assert torch.equal(values.read(name), expected.get_parameter(name))


def test_what_does_not_fit_is_accounted_for(tmp_path: Path) -> None:
    saved(tmp_path, "llama", "whole")
    model, values = read(tmp_path, "llama", num_hidden_layers=3, vocab_size=64)
    account = values.account
    assert account.missing == ()
    assert set(account.mismatched) == {"lm_head.weight", "model.embed_tokens.weight"}
    assert account.mismatched["lm_head.weight"] == ((70, 32), (64, 32))
    assert {name.split(".")[2] for name in account.unexpected} == {"3"}
    new = dict(family("llama", num_hidden_layers=3, vocab_size=64).named_parameters())
    assert torch.equal(values.read("lm_head.weight"), new["lm_head.weight"])
    assert len(list(model.parameters())) == len(new)
