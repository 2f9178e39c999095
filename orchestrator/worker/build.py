"""From a job to what a rank trains with: model, optimizer state, step engine. The same on every rank, bit for bit."""

from __future__ import annotations

import importlib
import logging
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from orchestrator.data import Dataset, ReadAhead
from orchestrator.job import Job
from orchestrator.job.positions import too_long
from orchestrator.planning.model import ModelCosts, describe_model, training_flops_per_token
from strategies.batch import Batch
from strategies.blueprint import Blueprint
from strategies.compute import StepSpec
from strategies.document_mask import refuse_without_positions
from strategies.optimizers import OptimizerSpec, ScheduleSpec
from strategies.randomness import seed_stream
from strategies.state import TrainingState
from strategies.trial import try_model

log = logging.getLogger(__name__)


def choose_device(job: Job) -> torch.device:
    """`cuda` when the job gives each worker a GPU, else `cpu`.

    Raises ValueError when a GPU is asked for and none can be seen.
    """
    if job.resources.gpu > 0:
        if not torch.cuda.is_available():
            raise ValueError(f"resources.gpu is {job.resources.gpu:g}, but torch sees no CUDA device in this process")
        return torch.device("cuda", 0)
    return torch.device("cpu")


def make_deterministic(job: Job, device: torch.device) -> None:
    """Process-wide settings that the numbers depend on: threads from the job file, deterministic CUDA kernels."""
    torch.set_num_threads(max(1, int(job.resources.cpu)))
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def build_model(job: Job, vocab_size: int) -> nn.Module:
    """The job's model on the CPU in fp32, in training mode, initialised from the job's seed alone.

    Raises ValueError when the configuration does not fit (unknown model type, vocabulary smaller than the
    tokenizer's, a factory that cannot be imported or gives no module).
    """
    seed_stream(job.train.seed, "initialisation")
    spec = job.model
    if spec.factory is not None:
        model = from_factory(spec.factory, spec.args)
    elif isinstance(spec.hf, str):
        from transformers import AutoModelForCausalLM

        try:
            model = AutoModelForCausalLM.from_pretrained(spec.hf, dtype=torch.float32)
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"model.hf: transformers cannot load {spec.hf!r}: {_first_line(error)}") from error
    else:
        model = _from_config(dict(spec.hf or {}), vocab_size)
    rows = _vocabulary_rows(model)
    if rows is not None and rows < vocab_size:
        raise ValueError(
            f"the model's vocabulary has {rows} entries, the tokenizer {job.data.tokenizer!r} needs {vocab_size}: "
            f"set model.hf.vocab_size to {vocab_size} or more"
        )
    config: Any = getattr(model, "config", None)
    if getattr(config, "use_cache", None):
        config.use_cache = False
    return model.float().train()


def empty_model(job: Job) -> Any:
    """The job's transformers model by its configuration alone; on the meta device it takes no memory.

    Raises ValueError.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    from orchestrator.data import load_tokenizer

    if isinstance(job.model.hf, str):
        try:
            return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(job.model.hf), dtype=torch.float32)
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"model.hf: transformers cannot load {job.model.hf!r}: {_first_line(error)}") from error
    return _from_config(dict(job.model.hf or {}), load_tokenizer(job.data.tokenizer).vocab_size)


def _from_config(config: dict[str, Any], vocab_size: int) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type = config.pop("model_type")
    config.setdefault("vocab_size", -(-vocab_size // 64) * 64)
    try:
        resolved = AutoConfig.for_model(model_type, **config)
        model: nn.Module = AutoModelForCausalLM.from_config(resolved, dtype=torch.float32)
    except Exception as error:
        # Configurations are checked by whatever line first trips over them, with whatever that raises.
        raise ValueError(
            f"model.hf: transformers cannot build {model_type!r} from this configuration: {_first_line(error)}"
        ) from error
    return model


def from_factory(path: str, args: dict[str, Any]) -> nn.Module:
    """What a user's `package.module:function` returns. Raises ValueError when that fails or is no module."""
    module_name, _, function_name = path.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"model.factory {path!r} cannot be imported: {error}") from error
    try:
        model = function(**args)
    except Exception as error:
        raise ValueError(f"model.factory {path!r} failed: {type(error).__name__}: {_first_line(error)}") from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"model.factory {path!r} returned a {type(model).__name__}, not a torch.nn.Module")
    return model


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _vocabulary_rows(model: nn.Module) -> int | None:
    get = getattr(model, "get_input_embeddings", None)
    embedding = get() if callable(get) else None
    return getattr(embedding, "num_embeddings", None)


def build_blueprint(job: Job, vocab_size: int, device: torch.device) -> Blueprint:
    """The job's model, ready to be laid out. Raises ValueError like `build_model`, and when the model cannot be split
    or cut, or keep documents apart, as the job wants it to, or fails its trial (`strategies.trial`)."""
    model = build_model(job, vocab_size)
    if job.data.document_mask:
        refuse_without_positions(model)
    reason = too_long(job.data.sequence_length, getattr(model, "config", None))
    if reason is not None:
        raise ValueError(reason)
    started = time.perf_counter()
    trial = try_model(
        model, step_spec(job), vocabulary=vocab_size, length=job.data.sequence_length, device=device,
        is_ragged=job.data.packing == "pad",
    )  # fmt: skip
    log.info("the model passed its trial in %.2f s", time.perf_counter() - started)
    if trial.unused:
        log.warning(
            "the loss does not depend on %d parameters, which are left as they are: %s",
            len(trial.unused), ", ".join(sorted(trial.unused)),
        )  # fmt: skip
    blueprint = Blueprint(
        model, tensor=job.strategy.tensor, device=device, unused=trial.unused, caches=trial.caches
    )  # fmt: skip
    if job.strategy.pipeline > 1:
        blueprint.check_pipeline(job.strategy.pipeline, step_spec(job).autocast(device))
    return blueprint


def build_state(job: Job, vocab_size: int, device: torch.device) -> TrainingState:
    """The training state of step 0; raises like `build_blueprint`."""

    def rebuild() -> dict[str, torch.Tensor]:
        return Blueprint(build_model(job, vocab_size), tensor=job.strategy.tensor).initial

    return TrainingState(build_blueprint(job, vocab_size, device), optimizer_spec(job), rebuild)


def computes_with_the_whole_model(job: Job) -> bool:
    """Whether every rank of every layout of the job has all the model's weights."""
    return job.strategy.tensor == job.strategy.pipeline == 1 and job.strategy.shard != "parameters"


def memory_bytes(device: torch.device) -> int:
    """What a worker on this device may use; 0 where that is not known (on a CPU, whose memory others share)."""
    return int(torch.cuda.get_device_properties(device).total_memory) if device.type == "cuda" else 0


def model_costs(job: Job) -> ModelCosts | None:
    """What the model costs block by block, for a job that has a pipeline to cut it for. Raises PlanError."""
    return describe_model(job) if job.strategy.pipeline > 1 else None


def flops_per_token(job: Job) -> float:
    """What the model takes for a token, forward and backward; 0 where its shapes do not say."""
    try:
        return float(training_flops_per_token(job))
    except Exception as error:
        # Networks and their configurations are of all kinds, and nobody trains less well for a number that is missing.
        log.info("there will be no MFU: %s: %s", type(error).__name__, _first_line(error))
        return 0.0


def allocated_bytes(device: torch.device) -> int:
    """What this process has allocated on its device; 0 on a CPU, whose memory is the process's own."""
    return int(torch.cuda.memory_allocated(device)) if device.type == "cuda" else 0


def optimizer_spec(job: Job) -> OptimizerSpec:
    o = job.train.optimizer
    return OptimizerSpec(
        name=o.name, lr=o.lr, betas=o.betas, eps=o.eps, weight_decay=o.weight_decay, momentum=o.momentum
    )


def step_spec(job: Job) -> StepSpec:
    """The numbers a step is made of, from the job."""
    train = job.train
    return StepSpec(
        seed=train.seed,
        micro_batch=train.micro_batch,
        micro_batches=job.micro_batches_per_virtual_worker,
        base_lr=train.optimizer.lr,
        schedule=ScheduleSpec(
            name=train.schedule.name,
            warmup_steps=train.schedule.warmup_steps,
            min_ratio=train.schedule.min_ratio,
            convention=train.schedule.convention,
            total_steps=train.steps,
        ),
        clip_norm=train.clip_norm,
        precision=train.precision,
        native_reduction=job.strategy.reduction == "native",
        compile=train.compile,
        document_mask=job.data.document_mask,
    )


def make_fetch(job: Job, dataset: Dataset, delay: Callable[[], None] | None = None) -> ReadAhead[Batch]:
    """How a step gets its samples: by (step, virtual worker) alone; before they are asked for, where reading is slow.
    `delay` is called before each reading (an injected slow input)."""

    def read(step: int, virtual_worker: int) -> Batch:
        if delay is not None:
            delay()
        return dataset.batch(step, virtual_worker)

    return ReadAhead(read, num_steps=job.train.steps)
