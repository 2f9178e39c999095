"""The job file: what loads, what is refused, and what the user is told about it."""

from __future__ import annotations

import json
import pickle
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orchestrator.job import Job, JobError, parse_fault
from orchestrator.job.fields import CIRCUMSTANCES, NUMBERS, NUMBERS_LATER, Section, decides_of

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))
LAYOUT_EXAMPLES = {
    "sharded": (1, 1, "optimizer", "1f1b"),
    "fsdp": (1, 1, "parameters", "1f1b"),
    "tensor": (2, 1, "none", "1f1b"),
    "pipeline": (1, 2, "none", "1f1b"),
    "tensor-pipeline": (2, 2, "optimizer", "1f1b"),
    "zero-bubble": (1, 2, "none", "zero-bubble"),
}
quick = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])

MINIMAL = """\
name: tiny
model: {hf: {model_type: llama}}
data: {source: python-stdlib, sequence_length: 16}
train:
  steps: 40
  global_batch: 32
"""


def problems(text: str, overrides: tuple[str, ...] = (), faults: tuple[str, ...] = ()) -> list[str]:
    """The lines a user sees, with the file called j."""
    with pytest.raises(JobError) as caught:
        Job.loads(text, "j", overrides, faults)
    return str(caught.value).split("\n")


def refused(text: str, **options: Any) -> str:
    """The only line a user sees."""
    lines = problems(text, **options)
    assert len(lines) == 1, lines
    return lines[0]


# What loads


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_loads_and_round_trips(path: Path) -> None:
    job = Job.load(path)
    assert job.name == path.stem
    resolved = json.loads(json.dumps(job.resolved()))
    assert Job.model_validate(resolved) == job
    assert Job.loads(json.dumps(resolved)) == job


def test_the_examples_are_there() -> None:
    names = {path.stem for path in EXAMPLES}
    assert names >= {
        "quickstart",
        "text-files",
        "bf16",
        "factory",
        "chaos",
        "packed",
        "mixed",
        *LAYOUT_EXAMPLES,
        "straggler",
    }


def test_quickstart_means_what_it_says() -> None:
    job = Job.load(ROOT / "examples/quickstart.yaml")
    assert (job.train.steps, job.train.global_batch, job.elastic.virtual_workers) == (60, 32, 8)
    assert (job.samples_per_virtual_worker, job.micro_batches_per_virtual_worker) == (4, 4)
    assert job.train.optimizer.lr == 1e-3
    assert (job.elastic.workers.min, job.elastic.workers.max, job.elastic.standby) == (1, 4, 1)


def test_chaos_is_quickstart_with_faults() -> None:
    chaos, quick = (Job.load(ROOT / f"examples/{name}.yaml") for name in ("chaos", "quickstart"))
    assert chaos.digest() == quick.digest()
    assert [(fault.step, fault.worker, fault.kind) for fault in chaos.faults] == [
        (20, 1, "kill"),
        (30, 2, "hang"),
        (40, 0, "raise"),
    ]


@pytest.mark.parametrize(("name", "layout"), LAYOUT_EXAMPLES.items())
def test_the_examples_of_layouts_are_the_quickstart_in_another_layout(name: str, layout: tuple[object, ...]) -> None:
    job, quick = (Job.load(ROOT / f"examples/{file}.yaml") for file in (name, "quickstart"))
    strategy = job.strategy
    assert (strategy.tensor, strategy.pipeline, strategy.shard, strategy.schedule) == layout
    # The same numbers, but for the tensor degree.
    assert (job.digest() == quick.digest()) == (strategy.tensor == 1)
    assert job.numerics() | {"strategy": None} == quick.numerics() | {"strategy": None}


def test_the_example_factory_builds_a_model() -> None:
    torch = pytest.importorskip("torch")
    from examples.tiny_gpt import build

    job = Job.load(ROOT / "examples/factory.yaml")
    model = build(**job.model.args)
    ids = torch.randint(257, (2, 12), generator=torch.Generator().manual_seed(0))
    logits = model.eval()(ids)
    assert logits.shape == (2, 12, 257)
    # Causal: what comes later changes nothing before it.
    assert torch.allclose(model(ids[:, :6]), logits[:, :6], atol=1e-5)


def test_defaults() -> None:
    job = Job.loads(MINIMAL)
    assert job.train.optimizer.betas == (0.9, 0.95)
    assert job.strategy.reduction == "canonical"
    assert job.elastic.wait_timeout_s is None
    assert job.checkpoint.storage is None
    assert job.faults == []


@pytest.mark.parametrize(
    ("written", "value"), [("3e-4", 3e-4), ("1", 1.0), ("3.0e-4", 3e-4), ("1_0.5", 10.5), ("2E-3", 2e-3)]
)
def test_numbers_as_people_write_them(written: str, value: float) -> None:
    job = Job.loads(MINIMAL + f"  optimizer: {{lr: {written}}}\n")
    assert job.train.optimizer.lr == value
    assert isinstance(job.train.optimizer.lr, float)


def test_only_true_and_false_are_booleans() -> None:
    assert Job.loads(MINIMAL + "  compile: true").train.compile is True
    line = refused(MINIMAL + "  compile: on")
    assert line == "j:7:12 train.compile: must be true or false, got the string 'on'"
    text = MINIMAL.replace("llama", "llama, a: yes, b: 0123, c: 1:30, d: 2020-01-01, e: 0x10, f: ~, g: !!str 5")
    assert Job.loads(text).model.hf == {
        "model_type": "llama",
        "a": "yes",
        "b": 123,
        "c": "1:30",
        "d": "2020-01-01",
        "e": 16,
        "f": None,
        "g": "5",
    }


def test_anchors_and_merges() -> None:
    text = (
        MINIMAL
        + """\
faults:
  - &first {step: 1, worker: 0, kind: kill}
  - {<<: *first, step: 2}
  - {step: 3, <<: [{worker: 5}, *first]}
"""
    )
    faults = Job.loads(text).faults
    assert [(fault.step, fault.worker, fault.kind) for fault in faults] == [
        (1, 0, "kill"),
        (2, 0, "kill"),
        (3, 5, "kill"),
    ]


# What is refused, and where


def test_many_mistakes_at_once_in_order() -> None:
    text = """\
name: Tiny
model: {hf: {hidden_size: 3}}
data:
  source: [a, 3]
  tokeniser: bytes
train:
  steps: "abc"
  global_batch: 30
  lr: 3e-4
  precision: bf61
  seed: true
monitoring:
  prot: 0
"""
    assert problems(text) == [
        "j:1:7 name: must be 1 to 63 lower-case letters, digits and inner hyphens "
        "(it names actors and directories), got the string 'Tiny'",
        "j:2:13 model.hf: must have model_type, for example model_type: llama",
        "j:4:3 data.sequence_length: is required, but missing",
        "j:4:15 data.source.1: must be a string, got the integer 3",
        'j:5:3 data.tokeniser: unknown field, did you mean "tokenizer"?',
        "j:7:10 train.steps: must be an integer, got the string 'abc'",
        "j:8:17 train.global_batch: global_batch must be a multiple of virtual_workers * micro_batch = "
        "8 * 1 = 8, got 30; the nearest that fit are 24 and 32",
        'j:9:3 train.lr: unknown field, did you mean "train.optimizer.lr"?',
        "j:10:14 train.precision: must be one of fp32, bf16, got the string 'bf61', did you mean \"bf16\"?",
        "j:11:9 train.seed: must be an integer, got the boolean true",
        'j:13:3 monitoring.prot: unknown field, did you mean "port"?',
    ]


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (
            "elastic: {workers: {min: 5}}",
            "j:7:26 elastic.workers.min: workers.min = 5 is above workers.max = 4;",
        ),
        (
            "elastic: {workers: {max: 9}}",
            "j:7:26 elastic.workers.max: virtual_workers = 8 cannot give each of",
        ),
        ("  micro_batch: 3", "j:6:17 train.global_batch: global_batch must be a multiple of"),
        (
            "  schedule: {warmup_steps: 41}",
            "j:7:28 train.schedule.warmup_steps: warmup_steps = 41 is more than",
        ),
        (
            "elastic: {heartbeat_interval_s: 2}",
            "j:7:33 elastic.heartbeat_interval_s: heartbeat_timeout_s = 3 must be at least twice "
            "heartbeat_interval_s = 2, so at least 4",
        ),
        ("faults: [{step: 40, worker: 0, kind: kill}]", "j:7:17 faults.0.step: the fault's step = 40 never"),
        ("faults: [{step: 4, kind: kill}]", "j:7:10 faults.0.worker: is required for kind kill"),
        ("checkpoint: {storage: 's4://bucket/x'}", "j:7:23 checkpoint.storage: s4:// is no storage that fsspec knows"),
        ("checkpoint: {storage: 'memory://'}", "j:7:23 checkpoint.storage: 'memory://' names no bucket or directory"),
        ("checkpoint: {encryption: {}}", "j:7:26 checkpoint.encryption: needs either key: ${env:NAME} or file: PATH"),
        (
            "checkpoint: {encryption: {key: swordfish}}",
            "j:7:32 checkpoint.encryption.key: must be ${env:NAME}, the name of an environment variable",
        ),
        ("faults: [{step: 4, worker: 0, kind: nan, phase: vote}]", "j:7:49 faults.0.phase: kind nan spoils the"),
        ("faults: [{step: 4, worker: 0, kind: kill, seconds: 3}]", "j:7:52 faults.0.seconds: says nothing about kind"),
        ("strategy: {schedule: 1f2b}", "j:7:22 strategy.schedule: must be one of 1f1b, gpipe, interleaved-1f1b, zero-"),
        ("monitoring: {port: 65536}", "j:7:20 monitoring.port: must be at most 65535, got 65536"),
        ("  clip_norm: .inf", "j:7:14 train.clip_norm: must be a finite number, got the number inf"),
        ("  optimizer: {betas: [0.9]}", "j:7:22 train.optimizer.betas: must be a list of two numbers, got"),
        ("  optimizer: {betas: [0.9, 1]}", "j:7:28 train.optimizer.betas.1: must be less than 1, got 1"),
        ("  seed: '1'", "j:7:9 train.seed: must be an integer, got the string '1'"),
        ("  seed: 1.0", "j:7:9 train.seed: must be an integer, got the number 1.0"),
        (
            "  seed: 99999999999999999999",
            "j:7:9 train.seed: 99999999999999999999 is not an integer of 64 bits",
        ),
        ("checkpoint:", "j:7:12 checkpoint: must be a mapping of fields, got nothing (null)"),
        (
            "checkpoint: {storage: !!binary aGk=}",
            "j:7:23 checkpoint.storage: the tag !!binary is not supported",
        ),
        ("5: x", "j:7:1: a key must be a string, got the integer 5;"),
        ("name: again", "j:7:1 name: given twice, first given at 1:1"),
        ("  steps: 41", "j:7:3 train.steps: given twice, first given at 5:3"),
        ("fautls: []", 'j:7:1 fautls: unknown field, did you mean "faults"?'),
        ("warmup_step: 1", 'j:7:1 warmup_step: unknown field, did you mean "train.schedule.warmup_steps"?'),
        ("zzz: 1", "j:7:1 zzz: unknown field; allowed here: name, model, data, train,"),
        (
            "\tseed: 1",
            "j:7:1: not valid YAML: found character '\\t' that cannot start any token; indent with",
        ),
        ("  seed: [1", "j:8:1: not valid YAML: expected ',' or ']'"),
        ("---\nname: other", "j:7:1: not valid YAML: a second document starts here"),
        ("  seed: *none", "j:7:9: not valid YAML: found undefined alias 'none'"),
        ("  seed: \x07", "j:7:9: not valid YAML: the character '\\x07' is not allowed"),
    ],
)
def test_one_mistake_one_line_at_its_place(more: str, line: str) -> None:
    found = refused(f"{MINIMAL}{more}\n")
    assert found.startswith(line), found


@pytest.mark.parametrize(
    ("model", "line"),
    [
        ("{}", "j:2:8 model: must have exactly one of hf and factory, and has neither"),
        ("{hf: gpt2, factory: 'a:b'}", "j:2:8 model: must have exactly one of hf and factory, and has both"),
        ("{hf: gpt2, args: {a: 1}}", "j:2:25 model.args: only goes with model.factory"),
        (
            "{hf: 3}",
            "j:2:13 model.hf: must be a transformers config (a mapping), or a path or hub id, got the",
        ),
        (
            "{factory: a.b}",
            "j:2:18 model.factory: must read \"package.module:function\", got the string 'a.b'",
        ),
        ("{hf: {model_type: llama, x: [1, .nan]}}", "j:2:40 model.hf.x.1: must be a finite number"),
        ("&loop {hf: {model_type: llama, x: *loop}}", "j:2:8 model.hf.x: an alias that contains itself"),
    ],
)
def test_models(model: str, line: str) -> None:
    found = refused(MINIMAL.replace("{hf: {model_type: llama}}", model))
    assert found.startswith(line), found


def test_a_document_is_what_its_format_can_hold() -> None:
    line = refused(MINIMAL, overrides=("data.format=jsonl", "data.document=line"))
    assert "data.document line does not go with jsonl, which takes record" in line
    line = refused(MINIMAL, overrides=("data.format=text", "data.document=record"))
    assert "record does not go with text, which takes file or line" in line
    assert Job.loads(MINIMAL, overrides=("data.format=text", "data.document=line")).data.document == "line"
    mix = "mix: [{source: a, weight: 1}, {source: b, weight: 1, format: jsonl%s}], document: line"
    line = refused(MINIMAL.replace("source: python-stdlib", mix % ""))
    assert "data.document: line does not go with jsonl, which takes record" in line
    assert Job.loads(MINIMAL.replace("source: python-stdlib", mix % ", document: record")).data.document == "line"


DATA = "{source: python-stdlib, sequence_length: 16"


@pytest.mark.parametrize(
    ("data", "more", "line"),
    [
        ("{sequence_length: 16}", "", "j:3:7 data: must have exactly one of source and mix, and has neither"),
        (
            DATA + ", mix: [{source: a, weight: 1}]}",
            "",
            "j:3:57 data.mix: must have exactly one of source and mix, and has both",
        ),
        ("{mix: [], sequence_length: 16}", "", "j:3:13 data.mix: must not be empty"),
        ("{mix: [{source: a}], sequence_length: 16}", "", "j:3:14 data.mix.0.weight: is required, but missing"),
        (
            "{mix: [{source: a, weight: 0}], sequence_length: 16}",
            "",
            "j:3:34 data.mix.0.weight: must be more than 0, got 0",
        ),
        (
            "{mix: [{source: a, weight: 1, formt: text}], sequence_length: 16}",
            "",
            'j:3:37 data.mix.0.formt: unknown field, did you mean "format"?',
        ),
        (
            "{mix: [{source: 3, weight: 1}], sequence_length: 16}",
            "",
            "j:3:23 data.mix.0.source: must be a path, glob, URL or python-stdlib, or a list of them, got the",
        ),
        (DATA + ", packing: packed}", "", "j:3:61 data.packing: must be one of stream, pack, pad, got the string"),
        (
            DATA + ", packing: pad, document_mask: true}",
            "",
            "j:3:81 data.document_mask: says nothing about packing: pad, where a sample is one document",
        ),
        (
            DATA + ", packing: pad}",
            "strategy: {pipeline: 2}",
            "j:3:61 data.packing: packing: pad makes micro-batches of many lengths, and the stages of pipeline = 2",
        ),
        (
            DATA + ", packing: pad}",
            "  compile: true",
            "j:3:61 data.packing: packing: pad makes micro-batches of many lengths, and compile: true would",
        ),
    ],
)
def test_data(data: str, more: str, line: str) -> None:
    found = refused(MINIMAL.replace("{source: python-stdlib, sequence_length: 16}", data) + more + "\n")
    assert found.startswith(line), found


def test_a_mix_is_part_of_the_numbers() -> None:
    def digest(weight: str) -> str:
        mix = f"mix: [{{source: a, weight: 3}}, {{source: b, weight: {weight}, field: body}}]"
        return Job.loads(MINIMAL.replace("source: python-stdlib", mix)).digest()

    assert digest("1") == digest("1.0") != digest("2")


RECORDED = json.loads((Path(__file__).parent / "recorded_digests.json").read_text(encoding="utf-8"))
"""Digests that jobs had before: what stands in the run directories and checkpoints of users."""


@pytest.mark.parametrize(
    ("example", "overrides", "digest"), RECORDED, ids=[f"{e} {' '.join(o)}" for e, o, _ in RECORDED]
)
def test_digests_are_what_they_were(example: str, overrides: list[str], digest: str) -> None:
    assert Job.load(ROOT / example, overrides=overrides).digest() == digest


def sections_of(kind: type[Section]) -> Iterator[type[Section]]:
    yield kind
    for field in kind.model_fields.values():
        for inner in (field.annotation, *typing.get_args(field.annotation)):
            if isinstance(inner, type) and issubclass(inner, Section):
                yield from sections_of(inner)


def test_every_field_says_what_it_decides() -> None:
    sections = set(sections_of(Job))
    assert len(sections) > 15
    for section in sections:
        for field in section.model_fields.values():
            assert decides_of(field).numbers in (True, False)


def test_a_field_that_is_added_changes_no_digest_until_it_is_used() -> None:
    class Before(Section):
        steps: Annotated[int, NUMBERS]

    class After(Before):
        epochs: Annotated[int | None, NUMBERS_LATER] = None
        where: Annotated[str, CIRCUMSTANCES] = "here"

    assert After(steps=3).numerics() == After(steps=3, where="there").numerics() == Before(steps=3).numerics()
    assert After(steps=3, epochs=2).numerics() == {"steps": 3, "epochs": 2}

    class Silent(Before):
        forgotten: int = 0

    with pytest.raises(TypeError, match="must say what it decides"):
        Silent(steps=3).numerics()


def test_the_digest_of_a_job_without_the_newer_fields_is_what_it_was() -> None:
    pinned = "sha256:4f671b6e385e693c151793f0206ea1922686443c9e131cf08a64052571a1239e"
    assert Job.loads(MINIMAL).digest() == pinned
    later = ["data.mix=null", "data.packing=stream", "data.document_mask=false"]
    assert Job.loads(MINIMAL, overrides=later).digest() == pinned


def test_what_is_not_a_job_at_all(tmp_path: Path) -> None:
    assert refused("# nothing\n").startswith("j:1:1: the file is empty; a job needs at least name, model,")
    assert refused("- a\n").startswith("j:1:1: the file must hold a mapping of fields")
    with pytest.raises(JobError, match=r"missing\.yaml: cannot be read: No such file"):
        Job.load(tmp_path / "missing.yaml")
    with pytest.raises(JobError, match="cannot be read: Is a directory"):
        Job.load(tmp_path)
    latin = tmp_path / "latin.yaml"
    latin.write_bytes("name: é\nmodel: ü".encode() + b"\xff")
    with pytest.raises(JobError, match=r"latin.yaml:2:9: not UTF-8: the byte 0xff"):
        Job.load(latin)


def test_values_are_cut_and_stay_on_one_line() -> None:
    line = refused(MINIMAL, overrides=("train.seed='" + "x" * 500 + "'",))
    assert line.endswith("got the string '" + "x" * 56 + "...")
    assert "\\n" in refused(MINIMAL + '"a\\nb": 1\n')


def test_unfolding_aliases_has_an_end() -> None:
    bomb = "a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
        f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12)
    )
    assert any("once its aliases are unfolded" in line for line in problems(MINIMAL + bomb))


def test_errors_survive_pickling() -> None:
    with pytest.raises(JobError) as caught:
        Job.loads("name: 3\n", "j")
    again = pickle.loads(pickle.dumps(caught.value))
    assert again.problems == caught.value.problems
    assert str(again) == str(caught.value)
    assert (again.problems[0].line, again.problems[0].column) == (1, 1)
    assert isinstance(again, ValueError)


def test_a_job_made_in_python_is_checked_too() -> None:
    resolved = Job.loads(MINIMAL).resolved()
    resolved["train"]["global_batch"] = 30
    with pytest.raises(ValueError, match="the nearest that fit are 24 and 32"):
        Job.model_validate(resolved)


def test_a_job_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Job.loads(MINIMAL).name = "other"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["resources.gpu=1.5"], "a worker computes on one GPU, not 1.5: ask for 1, and for more workers"),
        (["resources.gpu=2", "strategy.transport=gloo"], "a worker computes on one GPU, not 2"),
        (
            ["resources.gpu=0.5"],
            "share a GPU (resources.gpu = 0.5) cannot be connected by NCCL, which takes each GPU once",
        ),
        (["strategy.transport=nccl"], "is nccl, which connects GPUs, and resources.gpu = 0"),
    ],
)
def test_gpus_that_cannot_be_had_so(settings: list[str], expected: str) -> None:
    with pytest.raises(JobError) as caught:
        Job.loads(MINIMAL, overrides=settings)
    assert expected in str(caught.value)


def test_variables_for_workers_decide_no_numbers_and_numbers_are_text() -> None:
    job = Job.loads(MINIMAL, overrides=["resources.env={NCCL_IB_DISABLE: 1, NCCL_DEBUG: INFO, NCCL_X: ''}"])
    assert job.resources.env == {"NCCL_IB_DISABLE": "1", "NCCL_DEBUG": "INFO", "NCCL_X": ""}
    assert job.digest() == Job.loads(MINIMAL).digest()


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("RAY_ADDRESS", "a", "resources.env.RAY_ADDRESS is set by Ray"),
        ("CUDA_VISIBLE_DEVICES", "0", "is set by Ray"),
        ("TORCH_NCCL_ASYNC_ERROR_HANDLING", "3", "to outlive each other"),
        ("NVIDIA_TF32_OVERRIDE", "1", "to compute the same bits"),
        ("OMP_NUM_THREADS", "8", "is decided by resources.cpu"),
        ("LD_PRELOAD", "a.so", "read when a process begins"),
        ("HF_TOKEN", "a", "must not be a secret"),
        ("AWS_SECRET_ACCESS_KEY", "a", "must not be a secret"),
        ("hf_token", "a", "must not be a secret"),
        ("DB_PASSWD", "a", "must not be a secret"),
        ("AZURE_STORAGE_CONNECTION_STRING", "a", "must not be a secret"),
        ("TORCH_DISTRIBUTED_DEBUG", "detail", "with which torch ends a worker"),
        ("A-B", "a", "must be the name of a variable, like NCCL_IB_HCA"),
        ("NCCL_DEBUG", "true", "resources.env.NCCL_DEBUG"),
    ],
)
def test_variables_that_are_not_for_a_job_to_set(name: str, value: str, expected: str) -> None:
    with pytest.raises(JobError) as caught:
        Job.loads(MINIMAL, overrides=[f"resources.env={{{name}: {value}}}"])
    assert expected in str(caught.value)


@pytest.mark.parametrize(("gpu", "transport"), [("0", "gloo"), ("1", "auto"), ("1", "nccl"), ("0.25", "gloo")])
def test_what_carries_tensors_decides_no_numbers(gpu: str, transport: str) -> None:
    plain = Job.loads(MINIMAL, overrides=[f"resources.gpu={gpu}", "strategy.transport=gloo"])
    assert (
        Job.loads(MINIMAL, overrides=[f"resources.gpu={gpu}", f"strategy.transport={transport}"]).digest()
        == plain.digest()
    )


# Layouts

LAYOUT = """\
name: tiny
model: {hf: {model_type: llama, num_hidden_layers: 4, num_attention_heads: 8, num_key_value_heads: 4, vocab_size: 320}}
data: {source: python-stdlib, sequence_length: 16}
train: {steps: 40, global_batch: 32}
elastic: {workers: {min: 4, max: 8}, virtual_workers: 8}
"""


@pytest.mark.parametrize(
    "strategy",
    [
        "{tensor: 4, shard: optimizer}",
        "{pipeline: 4}",
        "{pipeline: 2, schedule: zero-bubble, shard: parameters}",
        "{pipeline: 2, schedule: interleaved-1f1b}",
        "{tensor: 2, pipeline: 4, schedule: gpipe, shard: gradients}",
        "{tensor: 2, reduction: native, shard: optimizer}",
        "{schedule: zero-bubble}",
    ],
)
def test_every_synchronous_layout_loads(strategy: str) -> None:
    assert Job.loads(f"{LAYOUT}strategy: {strategy}\n").strategy.update == "synchronous"


@pytest.mark.parametrize(
    ("strategy", "overrides", "expected"),
    [
        (
            "{tensor: 2}", ["elastic.workers.min=3"],
            "workers.min = 3 must be a multiple of tensor = 2, as a tensor-parallel group works or waits as one; the "
            "nearest that fit are 2 and 4",
        ),
        (
            "{tensor: 4}", ["elastic.workers={min: 1, max: 8}"],
            "workers.min = 1 must be a multiple of tensor = 4, as a tensor-parallel group works or waits as one; the "
            "nearest is 4",
        ),
        (
            "{tensor: 4, pipeline: 4}", [],
            "workers.max = 8 is less than a replica of tensor 4 x pipeline 4 = 16 workers; raise workers.max to 16, or "
            "lower pipeline to 2",
        ),
        (
            "{tensor: 2}", ["elastic.workers.max=18"],
            "virtual_workers = 8 cannot give each of workers.max / (tensor x pipeline) = 18 / 2 replicas a share; "
            "raise virtual_workers to at least 9 or lower workers.max to 16",
        ),
        (
            "{pipeline: 2}", ["elastic.workers.max=16", "train.global_batch=8"],
            "a replica has 1 micro-batches, fewer than the 2 stages of the pipeline (schedule 1f1b; global_batch / "
            "micro_batch = 8 micro-batches over workers.max / (tensor x pipeline) = 16 / 2, 8 replicas); "
            "global_batch: 16 or workers.max: 8 would fit",
        ),
        (
            "{pipeline: 2, schedule: zero-bubble}", ["elastic.workers.max=16", "train.global_batch=16"],
            "a replica has 2 micro-batches; zero bubble over 2 stages needs 3 (schedule zero-bubble; global_batch / "
            "micro_batch = 16 micro-batches over workers.max / (tensor x pipeline) = 16 / 2, 8 replicas); "
            "global_batch: 24 or workers.max: 8 would fit",
        ),
        (
            "{pipeline: 2, schedule: interleaved-1f1b}", ["elastic.workers.max=16", "train.global_batch=40"],
            "a replica's 5 micro-batches do not divide into the 2 rounds of 2 stages (schedule interleaved-1f1b; "
            "global_batch / micro_batch = 40 micro-batches over workers.max / (tensor x pipeline) = 16 / 2, 8 "
            "replicas); global_batch: 48 would fit",
        ),
        (
            "{pipeline: 5}", [],
            "pipeline = 5 needs at least 5 layers, num_hidden_layers = 4; pipeline can be at most 4",
        ),
        (
            "{pipeline: 4, schedule: interleaved-1f1b}", [],
            "pipeline = 4 x 2 parts on each stage (schedule interleaved-1f1b) needs at least 8 layers, "
            "num_hidden_layers = 4; pipeline can be at most 2",
        ),
        (
            "{tensor: 8}", ["elastic.workers.min=8"],
            "tensor = 8 does not divide num_key_value_heads = 4; tensor 1 or 2 or 4 would fit",
        ),
        (
            "{tensor: 2}", ["model.hf.vocab_size=321"],
            "tensor = 2 does not divide vocab_size = 321; tensor 1 would fit, and so would vocab_size: 322",
        ),
        (
            "{tensor: 4}", ["model.hf.hidden_size=102", "model.hf.intermediate_size=250"],
            "tensor = 4 does not divide hidden_size = 102, intermediate_size = 250; tensor 1 or 2 would fit",
        ),
        (
            "{pipeline: 2, reduction: native}", [],
            "reduction: native works with pipeline: 1 and shard: none or optimizer, got pipeline = 2 and shard = none; "
            "set reduction: canonical",
        ),
        (
            "{shard: gradients, reduction: native}", [],
            "reduction: native works with pipeline: 1 and shard: none or optimizer, got pipeline = 1 and shard = "
            "gradients; set reduction: canonical",
        ),
        (
            "{tensor: 2, shard: optimizer}", ["train.compile=true"],
            "compile: true needs a model that is whole on every worker, so tensor: 1, pipeline: 1 and a shard other "
            "than parameters; got tensor = 2, pipeline = 1, shard = optimizer; set compile: false",
        ),
        (
            "{shard: parameters}", ["train.compile=true"],
            "compile: true needs a model that is whole on every worker, so tensor: 1, pipeline: 1 and a shard other "
            "than parameters; got tensor = 1, pipeline = 1, shard = parameters; set compile: false",
        ),
    ],
)  # fmt: skip
def test_a_layout_that_cannot_be_is_refused_with_what_would_fit(
    strategy: str, overrides: list[str], expected: str
) -> None:
    line = refused(f"{LAYOUT}strategy: {strategy}\n", overrides=tuple(overrides))
    assert line.endswith(f" {expected}"), line


@quick
@given(
    st.sampled_from([1, 2, 4]), st.integers(1, 4), st.integers(1, 4), st.integers(1, 12), st.integers(1, 6),
    st.sampled_from(["1f1b", "gpipe", "interleaved-1f1b", "zero-bubble"]),
)  # fmt: skip
def test_what_is_said_to_fit_fits(
    tensor: int, pipeline: int, replicas: int, shares: int, micro_batches: int, schedule: str
) -> None:
    replicas = min(replicas, shares)
    overrides = [
        f"elastic={{workers: {{min: {tensor}, max: {tensor * pipeline * replicas}}}, virtual_workers: {shares}}}",
        f"train.global_batch={shares * micro_batches}", "model.hf.num_hidden_layers=8",
    ]  # fmt: skip
    text = f"{LAYOUT}strategy: {{tensor: {tensor}, pipeline: {pipeline}, schedule: {schedule}}}\n"
    try:
        Job.loads(text, overrides=overrides)
    except JobError as error:
        found = [re.search(r"replicas\); (.*) would fit", line) for line in str(error).split("\n")]
        for hint in [hint for each in found if each for hint in each[1].split(" or ")]:
            field, value = hint.split(": ")
            section = "train" if field == "global_batch" else "elastic"
            Job.loads(text, overrides=[*overrides, f"{section}.{field}={value}"])


def test_a_layout_of_enormous_numbers_is_refused_at_once() -> None:
    huge = 2**62
    text = MINIMAL.replace("llama}", f"llama, num_attention_heads: {huge}, num_hidden_layers: {huge}}}")
    for schedule in ("1f1b", "interleaved-1f1b", "zero-bubble"):
        strategy = f"strategy={{tensor: 3, pipeline: {huge}, schedule: {schedule}}}"
        problems(text, overrides=(strategy, f"elastic={{workers: {{max: {huge}}}, virtual_workers: {huge}}}"))
        problems(text, overrides=(f"strategy={{pipeline: {huge // 4}}}", f"elastic.workers.max={huge}"))


# Options


def test_overrides() -> None:
    job = Job.loads(
        MINIMAL + "faults: [{step: 1, worker: 0, kind: kill}]\n",
        overrides=[
            "train.steps=100",
            "train.optimizer.lr=1e-2",
            "train.clip_norm=null",
            "elastic.workers={min: 2, max: 3}",
            "model.hf.hidden_size=64",
            "faults.0.step=3",
            "data.source=[a, b=c]",
            "train.steps=50",
        ],
    )
    assert job.train.steps == 50
    assert (job.train.optimizer.lr, job.train.clip_norm) == (0.01, None)
    assert job.elastic.workers.max == 3
    assert job.model.hf == {"model_type": "llama", "hidden_size": 64}
    assert job.faults[0].step == 3
    assert job.data.source == ["a", "b=c"]


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("train.step=5", 'train.step unknown field, did you mean "steps"?'),
        ("trian.steps=5", 'trian unknown field, did you mean "train"?'),
        ("train.steps=x", "train.steps must be an integer, got the string 'x'"),
        ("train.steps=[", "train.steps not valid YAML:"),
        ("faults.0.step=3", "faults.0.step no entry"),
        ("name.x=3", "name.x cannot be set: name is the string 'tiny', which has no fields"),
        ("name", "must read a.b=value"),
        ("a..b=1", "must read a.b=value"),
        ("elastic.virtual_workers=5", "elastic.virtual_workers global_batch must be a multiple of"),
    ],
)
def test_a_wrong_override_is_named(override: str, reason: str) -> None:
    line = refused(MINIMAL + "faults: []\n", overrides=(override,))
    assert line.startswith(f"--set {override}: {reason}"), line


def test_an_override_repairs_the_file() -> None:
    assert Job.loads(MINIMAL.replace("40", "forty"), overrides=["train.steps=40"]).train.steps == 40


def test_faults_from_the_command_line() -> None:
    assert parse_fault("step=20,worker=1,kind=kill") == {"step": 20, "worker": 1, "kind": "kill"}
    assert parse_fault("step=20, worker=0, kind=drain, seconds=1e1")["seconds"] == 10.0
    job = Job.loads(MINIMAL, faults=["step=20,worker=1,kind=kill", "step=3,worker=0,kind=slow,factor=2"])
    assert [(fault.step, fault.kind, fault.factor) for fault in job.faults] == [
        (20, "kill", None),
        (3, "slow", 2.0),
    ]


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("step=20,worker=1,kind=kil", "kind must be one of kill, segfault, raise,"),
        ("step=x,worker=1,kind=kill", "step must be an integer, got the string 'x'"),
        ("worker=1,kind=kill", "step is required, but missing"),
        ("step=1,kind=kill", "worker is required for kind kill"),
        ("step=1,worker=1,kind=nan,phase=vote", "phase kind nan spoils the gradient before it is reduced"),
        ("step=1,worker=1,kind=hang,seconds=3", "seconds says nothing about kind hang, only about slow, drain"),
        ("step=1,worker=1,kind=kill,phse=data", 'phse unknown field, did you mean "phase"?'),
        ("step=1,worker=1,kind=kill,step=2", "step given twice"),
        ("kill", "must read like step=20,worker=1,kind=kill, got 'kill'"),
        ("", "must read like step=20,worker=1,kind=kill, got ''"),
    ],
)
def test_a_wrong_fault_is_named(fault: str, reason: str) -> None:
    with pytest.raises(JobError) as caught:
        parse_fault(fault)
    assert str(caught.value).startswith(f"--fault {fault}: {reason}")
    assert refused(MINIMAL, faults=(fault,)) == str(caught.value)


def test_a_fault_that_never_comes() -> None:
    line = refused(MINIMAL, faults=("step=40,worker=1,kind=kill",))
    assert line == (
        "--fault step=40,worker=1,kind=kill: step the fault's step = 40 never comes: "
        "train.steps = 40, so the last step is 39"
    )


def test_file_first_then_options_in_order() -> None:
    lines = problems(MINIMAL + "zzz: 1\n", overrides=("b=1", "train.seed=x"), faults=("step=1,worker=-1,kind=kill",))
    assert [line.split(":")[0] for line in lines] == [
        "j",
        "--set b=1",
        "--set train.seed=x",
        "--fault step=1,worker=-1,kind=kill",
    ]


# The digest


@pytest.mark.parametrize(
    "override",
    [
        "train.optimizer.lr=1e-2",
        "train.seed=1",
        "train.micro_batch=2",
        "elastic.virtual_workers=16",
        "resources.cpu=2",
        "strategy.reduction=native",
        "strategy={tensor: 2}",
        "data.shuffle=false",
        "data.document=line",
        "model.hf.hidden_size=8",
        "data.packing=pack",
        "data.packing=pad",
        "data.document_mask=true",
    ],
)
def test_the_digest_changes_with_the_numbers(override: str) -> None:
    job = Job.loads(MINIMAL, overrides=[override, "elastic.workers.min=2"])
    assert job.digest() != Job.loads(MINIMAL).digest()


@pytest.mark.parametrize(
    "override",
    [
        "name=other",
        "elastic.workers.max=2",
        "elastic.standby=2",
        "checkpoint.every_steps=5",
        "monitoring.port=8000",
        "data.cache=/tmp/x",
        "data.mirrors=[/mnt/copy]",
        "train.log_every=10",
        "faults=[{step: 1, worker: 0, kind: kill}]",
        "train.optimizer.lr=0.0003",
        "strategy.pipeline=2",
        "strategy.shard=parameters",
        "strategy={pipeline: 2, schedule: zero-bubble}",
    ],
)
def test_the_digest_does_not_change_with_the_rest(override: str) -> None:
    job = Job.loads(MINIMAL, overrides=[override])
    assert job.digest() == Job.loads(MINIMAL).digest()
    assert job.digest().startswith("sha256:")
    assert len(job.digest()) == len("sha256:") + 64


# Garbage

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
fields = st.sampled_from(
    ["name", "model", "hf", "factory", "args", "data", "source", "train", "steps", "elastic", "max", "faults"]
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(fields | scalars, inner, max_size=5),
    max_leaves=15,
)


def loads_or_job_error(text: str, **options: Any) -> None:
    try:
        Job.loads(text, "j", **options)
    except JobError as error:
        assert_shows_well(error)


def assert_shows_well(error: JobError) -> None:
    assert error.problems
    assert len(str(error).splitlines()) == len(error.problems)
    assert str(error).encode()


@quick
@given(st.text() | st.text(alphabet="ab:-[]{}&*!<>|?%@#'\", \n\t0\\u"))
def test_garbage_text_raises_nothing_but_job_errors(text: str) -> None:
    loads_or_job_error(text)
    loads_or_job_error(MINIMAL + text)
    loads_or_job_error(MINIMAL, overrides=[text], faults=[text])
    loads_or_job_error(MINIMAL, overrides=[f"train.steps={text}", f"model.hf.{text}=1"])


@quick
@given(st.dictionaries(fields, values, max_size=6))
def test_garbage_values_raise_nothing_but_job_errors(data: dict[str, Any]) -> None:
    loads_or_job_error(yaml.safe_dump(data))
    loads_or_job_error(yaml.safe_dump({**yaml.safe_load(MINIMAL), **data}))


def test_a_key_given_as_an_override_is_not_repeated() -> None:
    with pytest.raises(JobError) as caught:
        Job.loads(MINIMAL, overrides=["checkpoint.encryption.key=swordfish"])
    assert "--set checkpoint.encryption.key=...: " in str(caught.value)
    assert "swordfish" not in str(caught.value)


# Jobs made in Python


@pytest.mark.parametrize("make", [lambda data: Job(**data), Job.model_validate], ids=["Job(**d)", "model_validate"])
def test_a_job_made_of_a_mapping_tells_every_mistake_in_our_words(make: Any) -> None:
    data = Job.loads(MINIMAL).resolved()
    data["train"]["stepz"] = 3
    data["train"]["global_batch"] = 33
    data["elastic"]["workers"] = {"min": 5, "max": 2}
    with pytest.raises(JobError) as caught:
        make(data)
    lines = str(caught.value).split("\n")
    assert len(lines) == 3
    for field, said in (
        ("train.stepz", 'did you mean "steps"'),
        ("train.global_batch", "multiple"),
        ("elastic.workers.min", "workers.min = 5 is above"),
    ):
        assert any(line.startswith(f"job: {field} ") and said in line for line in lines), lines
    assert "pydantic" not in str(caught.value)


def test_a_job_made_of_something_else_says_so() -> None:
    with pytest.raises(JobError, match="must be a mapping"):
        Job.model_validate([1])


def test_the_documents_list_what_may_change_between_two_starts() -> None:
    text = (Path(__file__).parents[2] / "docs" / "job-file.md").read_text(encoding="utf-8")
    paragraph = text.split("Others may change", 1)[1].split("\n\n", 1)[0]
    listed = set(re.findall(r"`([a-z_.]+)`", paragraph))
    found: set[str] = set()
    decide: set[str] = set()
    for section, field in Job.model_fields.items():
        inner: Any = getattr(field.annotation, "model_fields", {})
        if not decides_of(field).numbers:
            found.add(section)
            continue
        for name, one in inner.items():
            (decide if decides_of(one).numbers else found).add(f"{section}.{name}")
    # Of this section what decides the numbers is the exception.
    found = {name for name in found if not name.startswith("elastic.")} | {"elastic"}
    assert listed == found | {name for name in decide if name.startswith("elastic.")}


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["data.fields={promt: q}"], "promt is none of our names, which are mapped to those of records; did you mean"),
        (["data.fields={zzz: q}"], "they are text, prompt, completion"),
        (["evaluation={data: {source: x, fields: {lable: q}}}"], "did you mean label?"),
        (["train.optimizer={name: sgd, state: bf16}"], "sgd without momentum keeps nothing"),
    ],
)  # fmt: skip
def test_what_would_have_no_effect_is_refused(overrides: list[str], expected: str) -> None:
    base = ["objective.name=sft", "data.packing=pad"] if "fields" in overrides[0] else []
    with pytest.raises(JobError, match=re.escape(expected)):
        Job.loads(MINIMAL, overrides=[*base, *overrides])


def test_sgd_with_momentum_keeps_something() -> None:
    job = Job.loads(MINIMAL, overrides=["train.optimizer={name: sgd, state: bf16, momentum: 0.9}"])
    assert job.train.optimizer.state == "bf16"
