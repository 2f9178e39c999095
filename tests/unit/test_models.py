"""Models: configurations read strictly, weights that are loaded or refused, directories known by their content."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from orchestrator.data import DataError, load_tokenizer
from orchestrator.data.tokenizers import byte_backend
from orchestrator.job import Job
from orchestrator.models import content as content_module
from orchestrator.models.configuration import config_from, known_keys
from orchestrator.models.content import content_of, with_content
from orchestrator.models.loading import build_model, empty_model, loaded_of
from orchestrator.models.problems import ModelError
from orchestrator.models.validation import check_model
from strategies.trial.derive import check_tensor

SMALL = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 320, "max_position_embeddings": 64, "tie_word_embeddings": False,
}  # fmt: skip
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"rope_theta": 5e5, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
    "mistral": {"sliding_window": 4},
    "mixtral": {"num_local_experts": 4},
    "qwen2": {},
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
    "qwen3": {"head_dim": 8},
    "qwen3_moe": {"num_experts": 4, "head_dim": 8, "moe_intermediate_size": 16},
    "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "query_pre_attn_scalar": 8},
    "gemma3_text": {"head_dim": 8, "sliding_window": 4},
    "olmo": {},
    "olmo2": {},
    "olmo3": {},
    "olmoe": {"num_experts": 4},
    "phi": {"partial_rotary_factor": 0.5},
    "phi3": {"pad_token_id": 0},
    "granite": {"embedding_multiplier": 12.0},
    "granitemoe": {"num_local_experts": 4},
    "cohere": {"logit_scale": 0.5},
    "cohere2": {},
    "starcoder2": {},
    "stablelm": {"partial_rotary_factor": 0.5},
    "nemotron": {},
    "ministral": {"head_dim": 8},
    "glm": {"head_dim": 8, "pad_token_id": 0},
    "glm4": {"head_dim": 8, "pad_token_id": 0},
    "helium": {"head_dim": 8},
    "smollm3": {"pad_token_id": 0},
    "ernie4_5": {},
    "seed_oss": {"head_dim": 8},
    "exaone4": {},
    "arcee": {},
    "deepseek_v3": {
        "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
        "n_routed_experts": 4, "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2,
    },
}  # fmt: skip
OTHER_SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": {**GPT2, "attn_pdrop": 0.0},
    "gpt_neox": {key: value for key, value in SMALL.items() if key != "num_key_value_heads"},
    "persimmon": {key: value for key, value in SMALL.items() if key != "num_key_value_heads"},
    "opt": {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "falcon": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
}  # fmt: skip


def job_of(hf: Any, **model: Any) -> Job:
    return Job.model_validate(
        {
            "name": "models",
            "model": {"hf": hf, **model},
            "data": {"source": "python-stdlib", "tokenizer": "bytes", "sequence_length": 16},
            "train": {"steps": 2, "global_batch": 2},
            "elastic": {"virtual_workers": 2, "workers": {"max": 2}},
        }
    )


def why(job: Job) -> str:
    with pytest.raises(ModelError) as caught:
        check_model(job)
    return str(caught.value)


# ------------------------------------------------------------------------------------ configurations


@pytest.mark.parametrize("name", [*FAMILIES, *OTHER_SHAPES])
def test_families_of_models_are_built_as_they_were(name: str) -> None:
    given = OTHER_SHAPES[name] if name in OTHER_SHAPES else {**SMALL, **FAMILIES[name]}
    check_model(job_of({"model_type": name, **given}))


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "deepseek_v3", "zamba2", "youtu"])
def test_what_a_saved_configuration_has_is_known(name: str) -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = CONFIG_MAPPING[name]
    assert set(kind().to_dict()) - known_keys(kind) <= {"model_type"}


@pytest.mark.parametrize(
    ("hf", "field", "said"),
    [
        ({"model_type": "llama", "num_hiden_layers": 2}, "model.hf.num_hiden_layers", '"num_hidden_layers"'),
        ({"model_type": "gpt2", "n_embed": 2}, "model.hf.n_embed", 'did you mean "n_embd"'),
        ({"model_type": "gpt2", "rope_theta": 1e4}, "model.hf.rope_theta", "unknown field"),
        ({"model_type": "llama", "rope_scaling": {"rope_typ": "yarn"}}, "model.hf.rope_scaling.rope_typ", "rope_type"),
        ({"model_type": "gemma3", "text_config": {"hiden_size": 3}}, "model.hf.text_config.hiden_size", "hidden_size"),
        ({"model_type": "lama"}, "model.hf.model_type", 'did you mean "llama"'),
        ({"model_type": "vit"}, "model.hf.model_type", "no causal language model"),
        ({"model_type": "llama", "dtype": "bfloat16"}, "model.hf.dtype", "train.precision"),
        ({"model_type": "llama", "torch_dtype": "bfloat16"}, "model.hf.torch_dtype", "train.precision"),
        ({"model_type": "llama", "quantization_config": {"bits": 4}}, "model.hf.quantization_config", "cannot"),
        ({"model_type": "llama", "auto_map": {"AutoConfig": "x.Y"}}, "model.hf.auto_map", "never run"),
        ({"model_type": "mixtral", "router_aux_loss_coef": 0.1}, "model.hf.router_aux_loss_coef", "train.router_loss"),
        ({"model_type": "bamba", "z_loss_coefficient": 0.1}, "model.hf.z_loss_coefficient", "not supported"),
        ({"model_type": "llama", **SMALL, "num_attention_heads": 5}, "model.hf", "not a multiple"),
        ({"model_type": "gpt2", **GPT2, "n_head": 5}, "model.hf.n_head", "5 heads do not divide the hidden size 32"),
        ({"model_type": "llama", **SMALL, "num_key_value_heads": 3}, "model.hf.num_key_value_heads", "3 key-value"),
        ({"model_type": "llama", **SMALL, "hidden_size": "32"}, "model.hf.hidden_size", "32"),
        ({"model_type": "llama", **SMALL, "vocab_size": 100}, "model.hf.vocab_size", "set vocab_size to 257 or more"),
        ({"model_type": "llama", **SMALL, "max_position_embeddings": 8}, "data.sequence_length", "8 positions"),
        ({"model_type": "gpt2", **GPT2, "n_positions": 8}, "data.sequence_length", "raise hf.n_positions"),
        ({"model_type": "llama", **SMALL, "hidden_act": "silo"}, "model.hf", "silo"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_a_configuration_that_would_be_taken_for_another_is_refused(hf: dict[str, Any], field: str, said: str) -> None:
    found = why(job_of(hf))
    assert found.startswith(f"{field}: ")
    assert said in found


def test_every_mistake_of_a_configuration_is_told_at_once() -> None:
    with pytest.raises(ModelError) as caught:
        config_from({"model_type": "llama", "hiden_size": 1, "num_layer": 2, "vocabsize": 3}, 257)
    assert {finding.fields[0].split(".")[-1] for finding in caught.value.findings} == {
        "hiden_size",
        "num_layer",
        "vocabsize",
    }
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


@pytest.mark.parametrize(
    ("factory", "said"),
    [
        ("no_such_module:f", "cannot be imported: No module named"),
        ("math:no_such_function", "cannot be imported"),
        ("math:sqrt", "failed: TypeError"),
        ("time:time", "returned a float"),
    ],
)
def test_a_factory_is_imported_and_called(factory: str, said: str) -> None:
    found = why(job_of(None, factory=factory))
    assert found.startswith("model.factory: ")
    assert said in found


# ------------------------------------------------------------------------------------ splitting


@pytest.mark.parametrize("name", ["gpt_oss", "falcon_h1", "bamba", "diffllama", "emu3", "lfm2", "lfm3"])
def test_a_plan_that_splits_no_layer_is_refused(name: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    few = {"num_hidden_layers": 2} if name != "emu3" else {"text_config": {"num_hidden_layers": 2}}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **few))
    with pytest.raises(ValueError, match="nothing in its layers, which every rank would compute whole"):
        check_tensor(model, 2)


@pytest.mark.parametrize("name", ["llama", "qwen3", "olmo2", "gemma"])
def test_a_plan_that_splits_layers_is_taken(name: str) -> None:
    with torch.device("meta"):
        check_tensor(empty_model(job_of({"model_type": name, **SMALL, **FAMILIES[name]})), 2)


# ------------------------------------------------------------------------------------ weights


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small llama with a head of its own, as save_pretrained writes it."""
    directory = tmp_path_factory.mktemp("models") / "llama"
    build_model(job_of({"model_type": "llama", **SMALL}), 257).save_pretrained(directory)  # type: ignore[operator]
    return directory


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    shutil.copytree(saved, tmp_path / "copy")
    return tmp_path / "copy"


def change(directory: Path, edit: Any) -> None:
    file = directory / "model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    file.unlink()
    save_file(tensors, file, {"format": "pt"})


def reconfigure(directory: Path, **fields: Any) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def test_a_whole_directory_is_loaded_and_nothing_is_new(saved: Path) -> None:
    model = build_model(job_of(str(saved)), 257)
    there = load_file(saved / "model.safetensors")
    assert all(torch.equal(values, there[name]) for name, values in model.state_dict().items())
    assert loaded_of(model) == {"directory": str(saved), "new": [], "left_out": [], "untied": []}


def test_missing_unexpected_and_misshaped_tensors_are_listed_in_one_error(copy: Path) -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["lm_head.weight"]
        tensors["score.weight"] = torch.zeros(2, 32)
        tensors["model.norm.weight"] = torch.zeros(7)

    change(copy, edit)
    with pytest.raises(ModelError) as caught:
        build_model(job_of(str(copy)), 257)
    for said in ("lm_head.weight", "score.weight", "model.norm.weight (7 there, 32 in the model)", "model.allow_new"):
        assert said in str(caught.value)


def test_what_may_be_new_comes_from_the_seed_and_is_told(copy: Path) -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["lm_head.weight"]
        tensors["score.weight"] = torch.zeros(2, 32)

    change(copy, edit)
    with pytest.raises(ModelError, match=r"score\.weight"):
        build_model(job_of(str(copy), allow_new=["lm_head.*"]), 257)
    job = job_of(str(copy), allow_new=["lm_head.*", "score.*"])
    first, second = build_model(job, 257), build_model(job, 257)
    other = build_model(job.model_copy(update={"train": job.train.model_copy(update={"seed": 1})}), 257)
    head = [model.get_parameter("lm_head.weight") for model in (first, second, other)]
    assert torch.equal(head[0], head[1])
    assert not torch.equal(head[0], head[2])
    assert head[0].std() > 0
    found = loaded_of(first)
    assert found is not None
    assert (found["new"], found["left_out"]) == (["lm_head.weight"], ["score.weight"])


def tied_in(directory: Path) -> Path:
    hf = {"model_type": "llama", **SMALL, "tie_word_embeddings": True}
    build_model(job_of(hf), 257).save_pretrained(directory)  # type: ignore[operator]
    return directory


def test_untying_by_the_configuration_alone_makes_up_no_head(tmp_path: Path) -> None:
    directory = tied_in(tmp_path / "tied")
    build_model(job_of(str(directory)), 257)
    reconfigure(directory, tie_word_embeddings=False)
    with pytest.raises(ModelError, match=r"lacks lm_head\.weight.*model\.untie: true"):
        build_model(job_of(str(directory)), 257)


def test_untie_begins_with_a_copy_of_the_embedding(tmp_path: Path) -> None:
    directory = tied_in(tmp_path / "tied")
    job = job_of(str(directory), untie=True)
    model = build_model(job, 257)
    head, tokens = model.get_parameter("lm_head.weight"), model.get_parameter("model.embed_tokens.weight")
    assert head is not tokens
    assert torch.equal(head, tokens)
    assert loaded_of(model) == {"directory": str(directory), "new": [], "left_out": [], "untied": ["lm_head.weight"]}
    for either in (model, build_model(job_of(str(directory)), 257)):
        check_tensor(either, 2)
    with torch.device("meta"):
        assert "lm_head.weight" in dict(empty_model(job).named_parameters())


def test_untie_needs_a_head_that_shares_the_embedding(saved: Path) -> None:
    assert why(job_of(str(saved), untie=True)).startswith("model.untie: ")


class _Evil:
    def __reduce__(self) -> Any:
        return os.system, ("touch evil",)


@pytest.mark.parametrize("kind", ["pickled code", "cut short"])
def test_weights_that_cannot_be_read_are_told_in_our_words(copy: Path, kind: str, monkeypatch: Any) -> None:
    monkeypatch.chdir(copy)
    if kind == "pickled code":
        (copy / "model.safetensors").unlink()
        torch.save({"lm_head.weight": _Evil()}, copy / "pytorch_model.bin")
    else:
        data = (copy / "model.safetensors").read_bytes()
        (copy / "model.safetensors").write_bytes(data[: len(data) // 2])
    expected = r"model\.hf: .*(pickled with more than tensors in it, which could be code|cannot be read: .*metadata)"
    with pytest.raises(ModelError, match=expected):
        build_model(job_of(str(copy)), 257)
    assert not (copy / "evil").exists()


# ------------------------------------------------------------------------------------ directories


def test_a_path_that_is_not_there_is_said_to_be_that(tmp_path: Path) -> None:
    found = why(job_of(str(tmp_path / "none")))
    assert f"no directory '{tmp_path / 'none'}'" in found
    assert "huggingface.co" not in found
    assert "cache" in why(job_of("some-org/some-model"))


def test_a_hubs_model_is_taken_from_the_cache_only(saved: Path, tmp_path: Path, monkeypatch: Any) -> None:
    folder = tmp_path / "models--some-org--small"
    shutil.copytree(saved, folder / "snapshots" / "abc")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("abc")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    check_model(job_of("some-org/small"))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"model_type": "nobodys", "auto_map": {"AutoConfig": "x.Y"}}, "never run"),
        ({"model_type": 5}, "model_type"),
        ({"max_position_embeddings": 8}, "8 positions"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantized"),
    ],
)
def test_a_directory_is_looked_at_like_a_mapping(copy: Path, fields: dict[str, Any], said: str, capfd: Any) -> None:
    reconfigure(copy, **fields)
    assert said in why(job_of(str(copy)))
    assert "[y/N]" not in capfd.readouterr().out


def test_a_tokenizer_with_more_ids_than_a_directory_names_the_tokenizer(saved: Path) -> None:
    with pytest.raises(ModelError, match=rf"^data\.tokenizer: .*\(data\.tokenizer: {saved}\)"):
        build_model(job_of(str(saved)), 400)


# ------------------------------------------------------------------------------------ content


def test_a_jobs_digest_covers_what_a_directory_holds(copy: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(copy)
    here, there = with_content(job_of(str(copy))), with_content(job_of(str(tmp_path / "link")))
    assert here.digest() == there.digest()
    assert Job.model_validate(here.resolved()).digest() == here.digest()
    (copy / "README.md").write_text("not part of it")
    assert with_content(job_of(str(copy))).digest() == here.digest()
    change(copy, lambda tensors: tensors["lm_head.weight"].add_(1))
    assert with_content(job_of(str(copy))).digest() != here.digest()
    for use in (with_content, lambda job: build_model(job, 257)):
        with pytest.raises(ModelError, match="the job says sha256:"):
            use(here)


def test_a_job_without_a_directory_keeps_its_digest() -> None:
    job = job_of({"model_type": "llama"})
    assert with_content(job) is job
    assert job.numerics()["model"] == {"hf": {"model_type": "llama"}, "factory": None, "args": {}}


def test_a_file_is_hashed_once_and_its_digest_is_verified(copy: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(content_module, "_SETTLED_NS", 0)
    first = content_of(copy)
    opened: list[int] = []
    real = content_module.xxhash.xxh3_128

    def count(*data: Any) -> Any:
        opened.append(1)
        return real(*data)

    monkeypatch.setattr(content_module.xxhash, "xxh3_128", count)
    assert content_of(copy) == first
    probes = len(opened)
    assert probes == len(content_module._files(copy))  # a probe of each, and none was read whole
    weights = copy / "model.safetensors"
    times = weights.stat()
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))  # of the same size, at the same time
    assert content_of(copy) != first


def test_a_damaged_cache_is_no_cache(copy: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(content_module, "_SETTLED_NS", 0)
    first = content_of(copy)
    for entry in (tmp_path / "cache" / "elastic-orchestrator" / "model-files").iterdir():
        entry.write_text("[1]")
    assert content_of(copy) == first


# ------------------------------------------------------------------------------------ tokenizers


def test_a_tokenizer_json_is_taken_alone_in_its_directory_too(tmp_path: Path) -> None:
    backend, _ = byte_backend()
    backend.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(str(tmp_path)).identity == load_tokenizer(str(tmp_path / "tokenizer.json")).identity


def test_a_tokenizer_that_brings_code_is_refused_without_a_question(tmp_path: Path, capfd: Any) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["x.Y", None]}}))
    (tmp_path / "x.py").write_text("open('ran', 'w')")
    with pytest.raises(DataError, match="which is never run"):
        load_tokenizer(str(tmp_path))
    assert "[y/N]" not in capfd.readouterr().out


def test_a_sentencepiece_directory_says_what_it_needs(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    with pytest.raises(DataError, match=r"holds a SentencePiece model .*sentencepiece") as caught:
        load_tokenizer(str(tmp_path))
    assert "tiktoken" not in str(caught.value)


# ------------------------------------------------------------------------------------ pipelines


def cut(job: Job, pipeline: int, schedule: str = "1f1b") -> Job:
    """The job with a pipeline, past what the job file alone can tell."""
    strategy = job.strategy.model_copy(update={"pipeline": pipeline, "schedule": schedule})
    return job.model_copy(update={"strategy": strategy})


def test_a_pipeline_that_the_model_cannot_be_cut_for_is_found_before_anything_is_started(tmp_path: Path) -> None:
    directory = tied_in(tmp_path / "tied")
    check_model(cut(job_of(str(directory)), 2))
    untied = job_of(str(directory), untie=True)
    check_model(cut(untied, 2))
    assert "needs at least 3 layers for its model parts; model.layers has 2" in why(cut(untied, 3))
    assert "needs at least 4 layers" in why(cut(untied, 2, "zero-bubble"))
    check_model(cut(job_of({"model_type": "gpt2", **GPT2}), 2))


def test_parameters_that_no_loss_depends_on_are_told(tmp_path: Path) -> None:
    model = build_model(job_of({"model_type": "llama", **SMALL}), 257)
    assert loaded_of(model) is None
    assert loaded_of(model, {"b", "a"}) == {"unused": ["a", "b"]}
    loaded = build_model(job_of(str(tied_in(tmp_path / "tied"))), 257)
    assert loaded_of(loaded, {"x"}) == {**(loaded_of(loaded) or {}), "unused": ["x"]}
