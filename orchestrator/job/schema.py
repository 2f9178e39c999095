"""The job file's schema: every field, its default, its unit and the values it takes on its own.

Rules that involve two or more fields are in `checks.py` and `layout_checks.py`; turning YAML into these classes,
and mistakes into lines with positions, is `load.py`. All classes are frozen, refuse unknown fields, and convert
nothing except an integer where a number is wanted and a list where a pair is wanted.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError

from monitoring.outside import without_secrets
from orchestrator.job import checks

# The type of pydantic error whose message is already in our own words.
OWN_WORDS = "job"
# The same for mistakes across fields, which the loader finds by itself, with positions.
ACROSS_FIELDS = "job_across_fields"


def _matches(pattern: str, reason: str) -> AfterValidator:
    compiled = re.compile(pattern)

    def check(value: str) -> str:
        if not compiled.fullmatch(value):
            raise PydanticCustomError(OWN_WORDS, "{reason}", {"reason": reason})
        return value

    return AfterValidator(check)


def _pair(value: Any) -> Any:
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise PydanticCustomError(OWN_WORDS, "must be a list of two numbers")
    return tuple(value)


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _kind(value: Any) -> str | None:
    """The branch of a union that a value means; without it pydantic reports the mistakes of every branch."""
    return next((kind.__name__ for kind in (str, list, dict) if isinstance(value, kind)), None)


def _one_of(*kinds: str, reason: str) -> Discriminator:
    def choose(value: Any) -> str | None:
        kind = _kind(value)
        return kind if kind in kinds else None

    return Discriminator(choose, custom_error_type=OWN_WORDS, custom_error_message=reason)


_IDENTIFIER = r"[A-Za-z_]\w*"
Name = Annotated[
    str,
    _matches(
        r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?",
        "must be 1 to 63 lower-case letters, digits and inner hyphens (it names actors and directories)",
    ),
]
FactoryPath = Annotated[
    str,
    _matches(
        rf"{_IDENTIFIER}(\.{_IDENTIFIER})*:{_IDENTIFIER}",
        'must read "package.module:function"',
    ),
]
Text = Annotated[str, Field(min_length=1)]
_LABEL = r"[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?"
LabelKey = Annotated[
    str,
    _matches(
        rf"([a-z0-9]([a-z0-9.-]{{0,251}}[a-z0-9])?/)?{_LABEL}",
        "must be a label's name, like orchestrator/disk or ray.io/region",
    ),
]
LabelCondition = Annotated[
    str,
    _matches(
        rf"!?({_LABEL}|in\({_LABEL}(, ?{_LABEL})*\))",
        "must be a value like us-west-2a, or one of !value, in(a,b) and !in(a,b)",
    ),
]
PositiveInt = Annotated[int, Field(ge=1)]
CountInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
CountFloat = Annotated[float, Field(ge=0)]
Decay = Annotated[float, Field(ge=0, lt=1)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Model(_Section):
    """What is trained: exactly one of `hf` and `factory`."""

    hf: (
        Annotated[
            Annotated[dict[str, Any], Tag("dict")] | Annotated[Text, Tag("str")],
            _one_of("dict", "str", reason="must be a transformers config (a mapping), or a path or hub id"),
        ]
        | None
    ) = None
    """A transformers config with its `model_type`, or the path or hub id of one."""
    factory: FactoryPath | None = None
    """`package.module:function`, called with `args`; returns the module to train."""
    args: dict[str, Any] = Field(default_factory=dict)
    allow_new: list[Text] = Field(default_factory=list)
    """Of a directory: patterns (`*`, `?`, `[...]`) of tensors that may be missing or of another shape there, and are
    initialised from the seed, or that the model has no place for."""
    untie: bool = False
    """Of a directory whose head shares the embedding: the head begins as a copy of it, and they are trained apart."""
    content: Annotated[str, _matches(r"sha256:[0-9a-f]{64}", "must read sha256:<64 hexadecimal digits>")] | None = None
    """Of a directory: the digest of its files. Filled in when a run is prepared; given, it is what must be there."""


Source = Annotated[
    Annotated[Text, Tag("str")] | Annotated[list[Text], Field(min_length=1), Tag("list")],
    _one_of("str", "list", reason="must be a path, glob, URL or python-stdlib, or a list of them"),
]
Format = Literal["text", "jsonl", "parquet"]


class MixEntry(_Section):
    """One of several sources; `format`, `field` and `document` are those of `data` where they are not given."""

    source: Source
    weight: PositiveFloat
    """Relative to the weights of the others: how many of its samples are used for one of theirs."""
    format: Format | None = None
    field: Text | None = None
    document: Literal["file", "line", "record"] | None = None


class Data(_Section):
    """What is read, and how it becomes samples of `sequence_length` tokens: exactly one of `source` and `mix`."""

    source: Source | None = None
    """Relative paths start at the current working directory."""
    mix: Annotated[list[MixEntry], Field(min_length=1)] | None = None
    """Several sources, each with epochs of its own."""
    format: Format | None = None
    """None: told from each file's suffix."""
    field: Text = "text"
    """The field of a jsonl or parquet record that holds the text."""
    document: Literal["file", "line", "record"] | None = None
    """What one document is. None: text files are one each, of jsonl and parquet each record is one."""
    tokenizer: Text = "bytes"
    """`bytes` (257 ids; 256 ends a document), or a path or hub id."""
    sequence_length: Annotated[int, Field(ge=2)]
    """Tokens per sample; the most, with packing pad."""
    packing: Literal["stream", "pack", "pad"] = "stream"
    """How documents become samples. stream: end to end, cut anywhere. pack: whole ones side by side. pad: one each."""
    document_mask: bool = False
    """Whether a document is kept from attending to those before it in its sample."""
    shuffle: bool = True
    cache: Text | None = None
    """The directory for token stores. None: the platform's choice."""
    mirrors: list[Text] = Field(default_factory=list)
    """Directories or URLs with copies of the source's files, and of token stores, to be read where those fail."""


class Optimizer(_Section):
    name: Literal["adamw", "sgd"] = "adamw"
    lr: PositiveFloat = 3e-4
    """The peak learning rate."""
    betas: Annotated[tuple[Decay, Decay], BeforeValidator(_pair)] = (0.9, 0.95)
    """adamw only."""
    eps: PositiveFloat = 1e-8
    """adamw only."""
    weight_decay: CountFloat = 0.1
    momentum: Decay = 0.0
    """sgd only."""


class Schedule(_Section):
    """The learning rate over the steps: a linear warm-up, then this shape down to `min_ratio` of the peak."""

    name: Literal["constant", "linear", "cosine"] = "cosine"
    warmup_steps: CountInt = 0
    min_ratio: Annotated[float, Field(ge=0, le=1)] = 0.1
    convention: Literal["own", "transformers"] = "own"
    """own: the first step has 1 / warmup_steps of the peak, the last one min_ratio. transformers: the first step has 0,
    and min_ratio would come one step after the last."""


class Train(_Section):
    steps: PositiveInt
    global_batch: PositiveInt
    """Samples per optimizer step, whatever the number of workers."""
    micro_batch: PositiveInt = 1
    """Samples per forward pass."""
    optimizer: Optimizer = Field(default_factory=Optimizer)
    schedule: Schedule = Field(default_factory=Schedule)
    clip_norm: PositiveFloat | None = 1.0
    """The largest norm of the whole gradient. None: gradients are not clipped."""
    precision: Literal["fp32", "bf16"] = "fp32"
    compile: bool = False
    seed: CountInt = 0
    log_every: PositiveInt = 1
    """Steps between two log lines."""


class Strategy(_Section):
    """How one step is spread over ranks. What tensor and pipeline leave over is data parallel."""

    tensor: PositiveInt = 1
    pipeline: PositiveInt = 1
    shard: Literal["none", "optimizer", "gradients", "parameters"] = "none"
    schedule: Literal["1f1b", "gpipe", "interleaved-1f1b", "zero-bubble"] = "1f1b"
    """The order in which a pipeline computes micro-batches; with one stage there is none to choose."""
    reduction: Literal["canonical", "native"] = "canonical"
    """canonical: the same bits for any number of workers. native: the backend's own collectives."""
    update: Literal["synchronous"] = "synchronous"


class Workers(_Section):
    min: PositiveInt = 1
    max: PositiveInt = 4


class Rebalance(_Section):
    """What is done about workers that are slower than others. None of it changes the numbers."""

    enabled: bool = True
    min_gain: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """The least share of a step's time that moving work must be predicted to save."""
    evict_below: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """A worker that stays slower than this share of the fastest is replaced, if another can be had."""
    evict_after_s: PositiveFloat = 60.0


class Scaling(_Section):
    """How a run takes and asks for nodes that come and go. None of it changes the numbers."""

    settle_s: CountFloat = 2.0
    """How long after a change of its workers a run takes in more, at the least."""
    flap_window_s: PositiveFloat = 120.0
    """A worker that is lost so soon after it joined has flapped. Each time doubles `settle_s`, up to this, until those
    that join stay for so long."""
    shortage_after_s: PositiveFloat = 60.0
    """A worker that finds no room for so long is reported, with the cluster's reason."""
    turn_s: Annotated[float, Field(ge=10)] = 120.0
    """How long a run that cannot train for want of room keeps asking before others that wait too have their turn."""
    fallback_after_s: PositiveFloat = 600.0
    """A worker that finds no room for so long, while no nodes are starting, is asked for in the next market of
    `resources.market`."""
    fallback_hold_s: PositiveFloat = 600.0
    """How long others are then asked for there as well, before the first is tried again."""


class Elastic(_Section):
    """What may change while the job runs, and how long to wait before it does. `_s` is seconds."""

    workers: Workers = Field(default_factory=Workers)
    virtual_workers: PositiveInt = 8
    """The fixed number of shares a step's batch is cut into; the numbers depend on it."""
    standby: CountInt = 0
    """Started workers kept ready beside the running ones."""
    state_copies: PositiveInt = 2
    """Living holders of every chunk of state, in different failure domains."""
    heartbeat_interval_s: PositiveFloat = 1.0
    heartbeat_timeout_s: PositiveFloat = 3.0
    progress_timeout_s: PositiveFloat = 60.0
    start_timeout_s: PositiveFloat = 300.0
    wait_timeout_s: PositiveFloat | None = None
    """How long to wait below `workers.min`. None: for ever."""
    lease_s: PositiveFloat = 30.0
    max_failures_per_step: PositiveInt = 3
    rebalance: Rebalance = Field(default_factory=Rebalance)
    scaling: Scaling = Field(default_factory=Scaling)


Market = Literal["spot", "on-demand"]


class Resources(_Section):
    """What Ray reserves for each worker, and on which nodes."""

    cpu: PositiveFloat = 1.0
    gpu: CountFloat = 0.0
    accelerators: list[Text] = Field(default_factory=list)
    """The kinds of GPU that workers may be given, by Ray's names (A100, T4, ...); any kind when empty."""
    accelerator: Text | None = None
    """The same for one kind."""
    market: Annotated[list[Market], BeforeValidator(_listed)] = Field(default_factory=list)
    """Nodes that can be taken away at any time or others, by their label `ray.io/market-type`, the preferred first; any
    when empty."""
    labels: dict[LabelKey, LabelCondition] = Field(default_factory=dict)
    """What the labels of a worker's node must be, in Ray's notation."""

    @property
    def kinds(self) -> list[str]:
        """The kinds of GPU that workers may be given; any when empty."""
        return self.accelerators if self.accelerator is None else [self.accelerator]


class Encryption(_Section):
    """Where the key of encrypted checkpoints is: 32 bytes in hexadecimal or base64. One of the two."""

    key: Text | None = None
    """`${env:NAME}`: in that environment variable of whoever starts the run."""
    file: Text | None = None
    """In that file, on the machine where the run is started."""


class Checkpoint(_Section):
    """A checkpoint is made when either interval is over, when the run ends, and on request."""

    storage: Text | None = None
    """A directory or fsspec URL. None: the run directory."""
    every_steps: PositiveInt | None = None
    every_seconds: PositiveFloat | None = None
    keep: PositiveInt = 3
    """How many of the newest stay."""
    keep_every: PositiveInt | None = None
    """Those of a multiple of so many steps stay for ever."""
    final_patience_s: Annotated[float, Field(ge=0)] = 300.0
    """How long a run that ends tries to save its last state, and to write its record, where a storage refuses."""
    encryption: Encryption | None = None


class MLflow(_Section):
    """Where steps, goodput and incidents are logged with the package `mlflow`."""

    tracking_uri: Text
    experiment: Text = "orchestrator"


class WandB(_Section):
    """The same for the package `wandb`, which finds its key where it always does."""

    project: Text
    mode: Literal["online", "offline"] = "online"
    entity: Text | None = None


class Monitoring(_Section):
    """How a run is watched; no part of the numbers."""

    port: Annotated[int, Field(ge=0, le=65535)] = 0
    """0: any free port."""
    peak_tflops: PositiveFloat | None = None
    """What a worker's device can do at the most, for MFU; None: by the device's name, or measured."""
    targets: Text | None = None
    """Where Prometheus finds the endpoints of runs (`file_sd`); None: beside Ray's own."""
    logs: Literal["text", "json"] = "text"
    """What the lines of the files in `logs/` are."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    tensorboard: bool = False
    """Event files in the run directory's `tensorboard/`."""
    mlflow: MLflow | None = None
    wandb: WandB | None = None


class Fault(_Section):
    """One planned failure: a game day."""

    step: CountInt
    worker: CountInt | None = None
    """Required for every kind but controller."""
    kind: Literal["kill", "segfault", "raise", "exit", "hang", "deadlock", "slow", "nan", "drain", "node", "controller"]
    phase: Literal["data", "compute", "reduce", "gather", "vote", "commit", "refresh"] = "compute"
    seconds: PositiveFloat | None = None
    """How long it lasts (slow), or the time that is left (drain)."""
    steps: PositiveInt | None = None
    """How many steps it lasts (slow)."""
    factor: Annotated[float, Field(gt=1)] | None = None
    """How many times as long a virtual worker takes (slow); 2 when it is not said."""


def _in_own_words(error: ValidationError, data: Any) -> Exception:
    from orchestrator.job.load import mistakes_in

    return mistakes_in(error, data)


class Job(_Section):
    """A training job: the one thing a user describes, and all that decides its result."""

    name: Name
    model: Model
    data: Data
    train: Train
    strategy: Strategy = Field(default_factory=Strategy)
    elastic: Elastic = Field(default_factory=Elastic)
    resources: Resources = Field(default_factory=Resources)
    checkpoint: Checkpoint = Field(default_factory=Checkpoint)
    monitoring: Monitoring = Field(default_factory=Monitoring)
    faults: list[Fault] = Field(default_factory=list)

    @model_validator(mode="after")
    def _fields_fit_together(self) -> Job:
        # The loader runs the same checks by itself, with positions; this is for jobs made in Python.
        found = checks.find(checks.reader(self.model_dump()))
        if found:
            lines = "; ".join(f"{finding.fields[0]} {finding.reason}" for finding in found)
            raise PydanticCustomError(ACROSS_FIELDS, "{lines}", {"lines": lines})
        return self

    def __init__(self, **data: Any) -> None:
        try:
            super().__init__(**data)
        except ValidationError as error:
            raise _in_own_words(error, data) from None

    # For pydantic it is as if there was no `__init__` of ours: it makes jobs out of mappings without it.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    @classmethod
    def model_validate(cls, obj: Any, **options: Any) -> Job:  # type: ignore[override]
        """The job in a mapping, as `resolved()` gives it. Raises JobError, which lists every mistake."""
        try:
            return super().model_validate(obj, **options)
        except ValidationError as error:
            raise _in_own_words(error, obj) from None

    @classmethod
    def load(cls, path: str | os.PathLike[str], overrides: Sequence[str] = (), faults: Sequence[str] = ()) -> Job:
        """The job in a YAML file, after `overrides` (each `a.b=value`) and with `faults` (see `parse_fault`).

        Raises JobError, which lists every mistake.
        """
        from orchestrator.job.load import load_file

        return load_file(path, overrides, faults)

    @classmethod
    def loads(
        cls,
        text: str,
        filename: str = "<string>",
        overrides: Sequence[str] = (),
        faults: Sequence[str] = (),
    ) -> Job:
        """The job in a YAML text; `filename` is what its problems are reported under. Raises JobError."""
        from orchestrator.job.load import load_text

        return load_text(text, filename, overrides, faults)

    @property
    def samples_per_virtual_worker(self) -> int:
        """Samples of one step that each virtual worker computes."""
        return self.train.global_batch // self.elastic.virtual_workers

    @property
    def micro_batches_per_virtual_worker(self) -> int:
        """Forward passes of one step that each virtual worker runs, in order."""
        return self.samples_per_virtual_worker // self.train.micro_batch

    def resolved(self) -> dict[str, Any]:
        """The whole job as JSON values, every default filled in. `Job.model_validate` turns it back."""
        return self.model_dump(mode="json")

    def numerics(self) -> dict[str, Any]:
        """The part of `resolved()` that decides the numbers: two jobs that agree here give the same bits. A password
        in a URL decides nothing and is no part.

        Resources stay in: the number of threads decides how a sum inside an operator is split.
        """
        full = without_secrets(self.resolved())
        full["elastic"] = {"virtual_workers": full["elastic"]["virtual_workers"]}
        # The tensor degree splits sums inside a matrix product; the rest of a layout changes no bit.
        full["strategy"] = {key: full["strategy"][key] for key in ("tensor", "reduction", "update")}
        del full["data"]["cache"], full["data"]["mirrors"], full["train"]["log_every"]
        # Fields that came later: a job that does without them is what it was.
        for key, default in (("mix", None), ("packing", "stream"), ("document_mask", False), ("document", None)):
            if full["data"][key] == default:
                del full["data"][key]
        for key in ("allow_new", "untie", "content"):
            if not full["model"][key]:
                del full["model"][key]
        if "content" in full["model"]:
            del full["model"]["hf"]  # Two links to one directory are one model.
        if full["train"]["schedule"]["convention"] == "own":
            del full["train"]["schedule"]["convention"]
        # Two kinds of device need not round alike, so that the kinds are part of the numbers once they are named.
        full["resources"] = {"cpu": self.resources.cpu, "gpu": self.resources.gpu}
        if self.resources.kinds:
            full["resources"]["accelerators"] = self.resources.kinds
        return {part: full[part] for part in ("model", "data", "train", "strategy", "elastic", "resources")}

    def digest(self) -> str:
        """`sha256:<hex>` over the canonical JSON (sorted keys, no spaces, ASCII) of `numerics()`."""
        canonical = json.dumps(self.numerics(), sort_keys=True, separators=(",", ":"), allow_nan=False)
        return "sha256:" + hashlib.sha256(canonical.encode("ascii")).hexdigest()
