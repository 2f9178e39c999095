"""The rules of a job file that involve more than one field.

Each rule asks for the values it needs and is skipped when one of them is not known, so that one mistake does
not hide another: the loader runs them on whatever part of a broken file is valid. They import nothing of the
schema. Those about the layout are in `layout_checks`.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

from orchestrator.errors import PluginError
from orchestrator.faults import KINDS
from orchestrator.job.kinds import (
    fault_kind_named,
    metric_from,
    objective_from,
    objective_named,
    optimizer_named,
    update_rule_named,
)
from orchestrator.job.layout_checks import LAYOUT_RULES
from orchestrator.job.rules import Finding, Get, Rule, Unknown
from orchestrator.job.sections.data import FIELD_NAMES, Data
from orchestrator.job.update_checks import UPDATE_RULES
from orchestrator.urls import VARIABLE
from strategies.objective.objective import Objective
from strategies.optim.optimizer import Settings


def find(get: Get) -> list[Finding]:
    """Every rule that does not hold among those whose values are known."""
    found: list[Finding] = []
    for rule in _RULES:
        try:
            found.extend(rule(get))
        except Unknown:
            continue
    return found


def reader(data: dict[str, Any]) -> Get:
    """`Get` over nested mappings and lists that are complete and valid."""

    def get(path: str) -> Any:
        value: Any = data
        for part in path.split("."):
            value = value[int(part)] if isinstance(value, list) else value[part]
        return value

    return get


def _model(get: Get) -> Iterator[Finding]:
    given = [key for key in ("hf", "factory") if get(f"model.{key}") is not None]
    if len(given) != 1:
        what = "has both" if given else "has neither"
        yield Finding(("model",), f"must have exactly one of hf and factory, and {what}")
    elif given == ["hf"] and get("model.args"):
        yield Finding(("model.args",), "only goes with model.factory; settings for hf go under model.hf")


def _of_directories(get: Get) -> Iterator[Finding]:
    if isinstance(get("model.hf"), str):
        return
    for field in ("allow_new", "untie", "content"):
        if get(f"model.{field}"):
            yield Finding((f"model.{field}",), "only goes with a directory in model.hf, whose weights are loaded")


def _hf_model_type(get: Get) -> Iterator[Finding]:
    hf = get("model.hf")
    if isinstance(hf, dict) and "model_type" not in hf:
        yield Finding(("model.hf",), "must have model_type, for example model_type: llama")
    elif isinstance(hf, dict) and not (isinstance(hf["model_type"], str) and hf["model_type"]):
        yield Finding(("model.hf.model_type",), "must name a transformers model type, for example llama")


def _free_form(get: Get) -> Iterator[Finding]:
    for field in ("model.hf", "model.args", "monitoring.sinks"):
        try:
            value = get(field)
        except Unknown:
            continue
        for path in _not_finite(value, field):
            yield Finding((path,), "must be a finite number: the resolved job is kept as JSON")


def _not_finite(value: object, path: str) -> Iterator[str]:
    if isinstance(value, float) and not math.isfinite(value):
        yield path
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _not_finite(item, f"{path}.{key}")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _not_finite(item, f"{path}.{index}")


def _batch(get: Get) -> Iterator[Finding]:
    batch, shares, micro = get("train.global_batch"), get("elastic.virtual_workers"), get("train.micro_batch")
    unit = shares * micro
    if batch % unit == 0:
        return
    below = batch // unit * unit
    fits = f"the nearest that fit are {below} and {below + unit}" if below else f"the nearest that fits is {unit}"
    yield Finding(
        ("train.global_batch", "elastic.virtual_workers", "train.micro_batch"),
        f"global_batch must be a multiple of virtual_workers * micro_batch = {shares} * {micro} = {unit}, "
        f"got {batch}; {fits}",
    )


def _worker_bounds(get: Get) -> Iterator[Finding]:
    low, high = get("elastic.workers.min"), get("elastic.workers.max")
    if low > high:
        yield Finding(
            ("elastic.workers.min", "elastic.workers.max"),
            f"workers.min = {low} is above workers.max = {high}; lower min to {high} or raise max to {low}",
        )


def _document(get: Get) -> Iterator[Finding]:
    yield from _fitting("data.document", get("data.document"), "data.format", get("data.format"))


def _mixed_documents(get: Get) -> Iterator[Finding]:
    """An entry of a mix has what `data` says where it says nothing itself."""
    for index in range(len(get("data.mix") or [])):
        kind, document = (
            f"data.mix.{index}.{name}" if get(f"data.mix.{index}.{name}") is not None else f"data.{name}"
            for name in ("format", "document")
        )
        if "mix" in kind or "mix" in document:
            yield from _fitting(document, get(document), kind, get(kind))


def _fitting(field: str, document: str | None, kind_field: str, kind: str | None) -> Iterator[Finding]:
    if document is None or kind is None:
        return
    fitting = ("file", "line") if kind == "text" else ("record",)
    if document not in fitting:
        yield Finding((field, kind_field), f"{document} does not go with {kind}, which takes {' or '.join(fitting)}")


def _steps(get: Get) -> Iterator[Finding]:
    steps, epochs = get("train.steps"), get("train.epochs")
    if not steps and epochs is None:
        yield Finding(("train.steps",), "is required, but missing; or give train.epochs")


def _warmup(get: Get) -> Iterator[Finding]:
    warmup, steps = get("train.schedule.warmup_steps"), get("train.steps")
    if warmup and get("train.schedule.warmup_ratio"):
        fields = ("train.schedule.warmup_ratio", "train.schedule.warmup_steps")
        yield Finding(fields, "and warmup_steps say the same in two ways; give one of them")
    if steps and warmup > steps:
        yield Finding(
            ("train.schedule.warmup_steps", "train.steps"),
            f"warmup_steps = {warmup} is more than train.steps = {steps}; it can be at most {steps}",
        )


def _heartbeat(get: Get) -> Iterator[Finding]:
    timeout, interval = get("elastic.heartbeat_timeout_s"), get("elastic.heartbeat_interval_s")
    if timeout < 2 * interval:
        yield Finding(
            ("elastic.heartbeat_timeout_s", "elastic.heartbeat_interval_s"),
            f"heartbeat_timeout_s = {timeout:g} must be at least twice heartbeat_interval_s = {interval:g}, "
            f"so at least {2 * interval:g}: one late heartbeat is not a failure",
        )


def _fault_kinds(get: Get) -> Iterator[Finding]:
    for index in range(len(get("faults"))):
        yield from _at(get, index, fault_kind)


def _fault_steps(get: Get) -> Iterator[Finding]:
    for index in range(len(get("faults"))):
        yield from _at(get, index, _fault_step)


def _at(get: Get, index: int, rule: Callable[[Get, str], list[Finding]]) -> list[Finding]:
    # One fault that is not valid must not keep the next from being looked at.
    try:
        return rule(get, f"faults.{index}.")
    except Unknown:
        return []


_FAULT_DETAILS = ("seconds", "factor", "steps")


def fault_kind(get: Get, fault: str) -> list[Finding]:
    """Whether the fields of the fault at `fault` (`faults.N.`) are those that its kind needs and can use."""
    name, phase = get(f"{fault}kind"), get(f"{fault}phase")
    try:
        kind = fault_kind_named(name)
    except PluginError as error:
        return [Finding((f"{fault}kind",), str(error))]
    findings = []
    if kind.needs_worker and get(f"{fault}worker") is None:
        findings.append(Finding((f"{fault}worker",), f"is required for kind {name}: which worker it happens to"))
    if kind.phases and phase not in kind.phases:
        findings.append(Finding((f"{fault}phase",), f"kind {name} {kind.why_there}, not {phase}"))
    for detail in _FAULT_DETAILS:
        if get(f"{fault}{detail}") is not None and detail not in kind.details:
            others = ", ".join(other.name for other in KINDS.values() if detail in other.details)
            findings.append(Finding((f"{fault}{detail}",), f"says nothing about kind {name}, only about {others}"))
    return findings


def _fault_step(get: Get, fault: str) -> list[Finding]:
    step, steps = get(f"{fault}step"), get("train.steps")
    if get(f"{fault}phase") in ("evaluate", "tally"):
        return _fault_evaluation(get, fault, step, steps)
    if step < steps or not steps:
        return []
    reason = f"the fault's step = {step} never comes: train.steps = {steps}, so the last step is {steps - 1}"
    return [Finding((f"{fault}step", "train.steps"), reason)]


def _fault_evaluation(get: Get, fault: str, step: int, steps: int) -> list[Finding]:
    phase = get(f"{fault}phase")
    if get("evaluation") is None:
        reason = f"is {phase}, which is a part of evaluations, and the job makes none: give it an evaluation section"
        return [Finding((f"{fault}phase",), reason)]
    every, at_start = get("evaluation.every_steps"), get("evaluation.at_start")
    if (at_start if step == 0 else step == steps or (step % every == 0 and step < steps)) or not steps:
        return []
    reason = (
        f"the weights after {step} steps are not evaluated: evaluation.every_steps = {every}, train.steps = {steps}"
    )
    return [Finding((f"{fault}step", "evaluation.every_steps"), reason)]


def _accelerators(get: Get) -> Iterator[Finding]:
    given = [field for field in ("resources.accelerators", "resources.accelerator") if get(field)]
    if len(given) == 2:
        yield Finding(tuple(given), "are two names for one thing; give accelerators: [...] or accelerator: KIND")
    elif given and not get("resources.gpu"):
        yield Finding((given[0],), "names kinds of GPU, but resources.gpu is 0; set it, or leave this out")


def _gpus(get: Get) -> Iterator[Finding]:
    gpus, transport = get("resources.gpu"), get("strategy.transport")
    if gpus > 1:
        reason = f"a worker computes on one GPU, not {gpus:g}: ask for 1, and for more workers (elastic.workers)"
        yield Finding(("resources.gpu",), reason)
    elif 0 < gpus < 1 and transport != "gloo":
        reason = (
            f"workers that share a GPU (resources.gpu = {gpus:g}) cannot be connected by NCCL, which takes each GPU "
            "once: ask for 1, or set strategy.transport to gloo"
        )
        yield Finding(("resources.gpu", "strategy.transport"), reason)
    elif not gpus and transport == "nccl":
        reason = "is nccl, which connects GPUs, and resources.gpu = 0; set that to 1, or leave this out"
        yield Finding(("strategy.transport", "resources.gpu"), reason)


_OWN_FIELDS = {
    "ray.io/market-type": "market",
    "ray.io/accelerator-type": "accelerators",
    "ray.io/node-id": None,
}


def _labels(get: Get) -> Iterator[Finding]:
    for key in get("resources.labels"):
        if key not in _OWN_FIELDS:
            continue
        own = _OWN_FIELDS[key]
        what = (
            "is set by us, to keep away from bad nodes" if own is None else f"has a field of its own: resources.{own}"
        )
        yield Finding(("resources.labels",), f"has {key}, which {what}")


_OTHERS_VARIABLES = {
    r"RAY_.*|CUDA_VISIBLE_DEVICES|NVIDIA_VISIBLE_DEVICES": "is set by Ray",
    r"TORCH_NCCL_.*|CUBLAS_WORKSPACE_CONFIG|FLASH_ATTENTION_DETERMINISTIC|TORCH_ALLOW_TF32_CUBLAS_OVERRIDE|"
    r"NVIDIA_TF32_OVERRIDE": "is set by workers themselves, to outlive each other and to compute the same bits",
    r"OMP_NUM_THREADS|MKL_NUM_THREADS": "is decided by resources.cpu",
    r"LD_.*|PYTHON.*|MALLOC_.*": "is read when a process begins: set it where nodes are started",
    r".*(TOKEN|SECRET|PASSW(OR)?D|CREDENTIALS?|_KEY|CONNECTION_STRING)(_.*)?": "must not be a secret, as a job is "
    "written down: set it where nodes are started",
}
"""Why some variables are not for `resources.env`, by what their names are like."""


def _environment(get: Get) -> Iterator[Finding]:
    for name, value in get("resources.env").items():
        if name == "TORCH_DISTRIBUTED_DEBUG" and value.upper() == "DETAIL":
            yield Finding((f"resources.env.{name}",), "is DETAIL, with which torch ends a worker that loses another")
        for pattern, why in _OTHERS_VARIABLES.items():
            if re.fullmatch(pattern, name, re.IGNORECASE):
                yield Finding((f"resources.env.{name}",), why)
                break


def _market(get: Get) -> Iterator[Finding]:
    market = get("resources.market")
    if len(set(market)) < len(market):
        yield Finding(("resources.market",), "names a market twice")


def _storage(get: Get) -> Iterator[Finding]:
    storage = get("checkpoint.storage")
    if storage is not None and "://" in storage:
        from orchestrator.storage import why_not

        if (reason := why_not(storage)) is not None:
            yield Finding(("checkpoint.storage",), reason)


def _variables(get: Get) -> Iterator[Finding]:
    """`${env:NAME}` is filled in where a URL is opened, and nowhere else."""
    fields = {"checkpoint.storage": get("checkpoint.storage")}
    if (mlflow := get("monitoring.mlflow")) is not None:
        fields["monitoring.mlflow.tracking_uri"] = mlflow.get("tracking_uri")
    sources = {"data.source": get("data.source"), "data.mirrors": get("data.mirrors")}
    sources |= {f"data.mix.{number}.source": entry.get("source") for number, entry in enumerate(get("data.mix") or ())}
    for name, value in sources.items():
        fields |= {f"{name}.{n}": one for n, one in enumerate(value)} if isinstance(value, list) else {name: value}
    for name, text in fields.items():
        if isinstance(text, str) and "${env:" in text:
            if "://" not in text:
                yield Finding((name,), "${env:NAME} is filled in in URLs only; write the path, or --set it")
            elif "${env:" in VARIABLE.sub("", text):
                yield Finding((name,), "${env:NAME} needs the name of an environment variable and a closing brace")


def _encryption(get: Get) -> Iterator[Finding]:
    if get("checkpoint.encryption") is None:
        return
    key, file = get("checkpoint.encryption.key"), get("checkpoint.encryption.file")
    if (key is None) == (file is None):
        yield Finding(("checkpoint.encryption",), "needs either key: ${env:NAME} or file: PATH")
    elif key is not None and not re.fullmatch(r"\$\{env:[A-Za-z_][A-Za-z0-9_]*\}", key):
        reason = "must be ${env:NAME}, the name of an environment variable: a key has no place in a job file"
        yield Finding(("checkpoint.encryption.key",), reason)


def _data(get: Get) -> Iterator[Finding]:
    given = [key for key in ("source", "mix") if get(f"data.{key}") is not None]
    if len(given) != 1:
        what = "has both" if given else "has neither"
        fields = ("data.mix",) if given else ("data",)
        yield Finding(fields, f"must have exactly one of source and mix, and {what}")


def _fields(get: Get) -> Iterator[Finding]:
    places = ["data.fields"]
    if get("evaluation") is not None and get("evaluation.data") is not None:
        places.append("evaluation.data.fields")
    for where in places:
        for name in get(where) or {}:
            if name not in FIELD_NAMES:
                near = difflib.get_close_matches(name, FIELD_NAMES, n=1)
                hint = f"did you mean {near[0]}?" if near else f"they are {', '.join(FIELD_NAMES)}"
                yield Finding((where,), f"{name} is none of our names, which are mapped to those of records; {hint}")


def _document_mask(get: Get) -> Iterator[Finding]:
    if get("data.document_mask") and get("data.packing") == "pad":
        yield Finding(
            ("data.document_mask", "data.packing"),
            "says nothing about packing: pad, where a sample is one document; leave it out, or use packing: pack",
        )


def _evaluation(get: Get) -> Iterator[Finding]:
    if get("evaluation") is None:
        return
    given = [key for key in ("share", "data") if get(f"evaluation.{key}") is not None]
    if len(given) == 2:
        yield Finding(("evaluation",), "must have one of share and data, and has both")
    if not given and not get("evaluation.tasks"):
        yield Finding(("evaluation",), "must have one of share and data, or tasks, and has none of them")
    if not given:
        yield from _without_samples(get)
    if get("evaluation.task_samples") is not None and not get("evaluation.tasks"):
        reason = "task_samples says how much of tasks is asked, and there are none; samples is about what is held out"
        yield Finding(("evaluation.task_samples", "evaluation.tasks"), reason)
    yield from _metrics(get)
    yield from _tasks(get)
    yield from _generate(get)


def _without_samples(get: Get) -> Iterator[Finding]:
    """Where tasks are all that is evaluated."""
    stops, best = get("evaluation.early_stop"), get("evaluation.best")
    if (stops is not None and best is None) or (best is not None and get("evaluation.best.metric") == "loss"):
        reason = "there is no loss where nothing is held out; name a metric, as in best: {metric: TASK/acc, mode: max}"
        yield Finding(("evaluation.best",), reason)
    for field in ("metrics", "samples"):
        if get(f"evaluation.{field}"):
            reason = f"{field} is about what is held out, and tasks have documents of their own"
            yield Finding((f"evaluation.{field}",), reason)


def _metrics(get: Get) -> Iterator[Finding]:
    paths, names = get("evaluation.metrics"), set()
    for path in paths:
        try:
            name = metric_from(path).name
        except PluginError as error:
            yield Finding(("evaluation.metrics",), str(error))
            continue
        if name in names or not name.isidentifier() or name == "loss":
            reason = f"{path} is called {name!r}: each needs a name of its own, of letters, digits and _, and not loss"
            yield Finding(("evaluation.metrics",), reason)
        names.add(name)
    if paths and _kind_of(get).gives_hidden_states:
        reason = "metrics measure logits, and the objective's models give hidden states: let an objective.factory do it"
        yield Finding(("evaluation.metrics", "objective.name"), reason)


def _tasks(get: Get) -> Iterator[Finding]:
    kind = _kind_of(get)
    if get("evaluation.tasks") and (kind.model_class != "AutoModelForCausalLM" or kind.gives_hidden_states):
        reason = f"tasks ask language models, and those of objective {kind.name} give no next token"
        yield Finding(("evaluation.tasks", "objective.name"), reason)


def _generate(get: Get) -> Iterator[Finding]:
    if get("evaluation") is None or get("evaluation.generate") is None:
        return
    if _kind_of(get).model_class != "AutoModelForCausalLM":
        reason = f"generate asks for texts, and models of objective {_kind_of(get).name} give none; leave it out"
        yield Finding(("evaluation.generate", "objective.name"), reason)
    most, length = get("evaluation.generate.max_new_tokens"), get("data.sequence_length")
    if most >= length:
        reason = f"max_new_tokens = {most} leaves no room for a prompt in data.sequence_length = {length}"
        yield Finding(("evaluation.generate.max_new_tokens", "data.sequence_length"), reason)


def _kind_of(get: Get) -> Objective:
    name, factory = get("objective.name"), get("objective.factory")
    return objective_named(name) if factory is None else objective_from(factory)


def _objective(get: Get) -> Iterator[Finding]:
    try:
        kind = _kind_of(get)
    except PluginError as error:
        field = "objective.name" if get("objective.factory") is None else "objective.factory"
        yield Finding((field,), str(error))
        return
    if kind.whole_virtual_workers:
        batch, shares, micro = get("train.global_batch"), get("elastic.virtual_workers"), get("train.micro_batch")
        if batch != shares * micro:
            yield Finding(
                ("train.micro_batch", "train.global_batch", "elastic.virtual_workers"),
                f"objective {kind.name} compares the samples of a virtual worker, so these must be one micro-batch: "
                f"global_batch = virtual_workers * micro_batch, got {batch}, {shares} and {micro}",
            )
    if kind.needs_teacher:
        yield from _teacher(get)
    if get("elastic.teachers") and not (kind.needs_teacher and get("objective").get("top_k")):
        reason = "teachers answer for objective distill with top_k, the only thing that is small enough to be sent"
        yield Finding(("elastic.teachers", "objective.name"), reason)
    elif get("elastic.teachers") and get("objective").get("alpha") == 1:
        reason = "alpha = 1 learns from labels alone, and no teacher is asked; lower alpha, or use teachers: 0"
        yield Finding(("elastic.teachers", "objective.alpha"), reason)
    if kind.needs_reference and get("objective").get("reference"):
        yield from _reference(get)
    if not kind.shapes:
        yield from _texts_only(get, kind.name)
    elif get("data.packing") == "stream":
        only = "pad" if kind.sequences > 1 or kind.labels_of_records or kind.counts == "last" else "pack or pad"
        yield Finding(
            ("data.packing", "objective.name"),
            f"packing = stream cuts documents anywhere, and objective {kind.name} is about whole records; use {only}",
        )
    elif get("data.packing") == "pack" and (kind.sequences > 1 or kind.labels_of_records or kind.counts == "last"):
        reason = f"packing = pack puts records side by side, and objective {kind.name} reads each by itself; use pad"
        yield Finding(("data.packing", "objective.name"), reason)


def _adapter(get: Get) -> Iterator[Finding]:
    if get("adapter") is None or get("adapter.quantize_base") == "none":
        return
    if get("adapter.name") == "dora":
        reason = "dora takes norms of the frozen weights in every pass, which a quantized base has not; use lora"
        yield Finding(("adapter.quantize_base", "adapter.name"), reason)
    if (tensor := get("strategy.tensor")) > 1:
        reason = f"a quantized base is not split over tensor-parallel ranks; got tensor = {tensor}: set it to 1"
        yield Finding(("adapter.quantize_base", "strategy.tensor"), reason)


def _teacher(get: Get) -> Iterator[Finding]:
    if get("strategy.tensor") > 1:
        reason = (
            f"a teacher is not split over tensor-parallel ranks; got tensor = {get('strategy.tensor')}: set it to 1"
        )
        yield Finding(("strategy.tensor",), reason)


def _reference(get: Get) -> Iterator[Finding]:
    if get("adapter") is not None or get("train.freeze"):
        field = "train.freeze" if get("adapter") is None else "adapter"
        reason = (
            "what is frozen is that of the model, also while the reference is computed with; leave reference out (the "
            "model as it is before training), or train all of it"
        )
        yield Finding(("objective.reference", field), reason)


def _texts_only(get: Get, name: str) -> Iterator[Finding]:
    """What is about records says nothing where the objective takes texts."""
    for field in ("fields", "chat_template", "add_bos", "truncate", "on_bad_record"):
        if get(f"data.{field}") != Data.model_fields[field].get_default(call_default_factory=True):
            yield Finding(
                (f"data.{field}", "objective.name"),
                f"{field} is about records with fields, and objective {name} takes texts; leave it out, or use sft",
            )


def _optimizer(get: Get) -> Iterator[Finding]:
    try:
        kind = optimizer_named(get("train.optimizer.name"))
    except PluginError as error:
        yield Finding(("train.optimizer.name",), str(error))
        return
    if get("train.optimizer.state") != "fp32" and not kind.moments(Settings(momentum=get("train.optimizer.momentum"))):
        reason = f"{kind.name} without momentum keeps nothing that could be of another type; leave state out"
        yield Finding(("train.optimizer.state", "train.optimizer.name"), reason)
    if kind.scope == "parameter" and (state := get("train.optimizer.state")) != "fp32":
        reason = f"{kind.name} keeps next to nothing of a matrix, and {state} is for what has its size; use state: fp32"
        yield Finding(("train.optimizer.state", "train.optimizer.name"), reason)
    if kind.scope == "element":
        return
    wholes = "whole matrices" if kind.scope == "matrix" else "whole parameters"
    if get("strategy.shard") == "parameters":
        reason = (
            f"{kind.name} updates {wholes}, and shard = parameters gives each rank rows of them; use "
            "shard: gradients or optimizer"
        )
        yield Finding(("train.optimizer.name", "strategy.shard"), reason)
    if (tensor := get("strategy.tensor")) > 1:
        reason = f"{kind.name} updates {wholes}, and tensor = {tensor} splits them; use tensor: 1"
        yield Finding(("train.optimizer.name", "strategy.tensor"), reason)


def _update_rule(get: Get) -> Iterator[Finding]:
    if isinstance(get("strategy.update"), dict):
        return
    try:
        if update_rule_named(get("strategy.update")).progress != "lockstep":
            reason = "has each replica count its own steps, and there is no controller that follows that yet"
            yield Finding(("strategy.update",), reason)
    except PluginError as error:
        yield Finding(("strategy.update",), str(error))


_RULES: tuple[Rule, ...] = (
    _objective,
    _adapter,
    _optimizer,
    _update_rule,
    _model,
    _data,
    _document_mask,
    _fields,
    _evaluation,
    _steps,
    _of_directories,
    _hf_model_type,
    _free_form,
    _batch,
    _worker_bounds,
    _document,
    _mixed_documents,
    _warmup,
    _heartbeat,
    _fault_kinds,
    _fault_steps,
    _accelerators,
    _gpus,
    _labels,
    _environment,
    _market,
    _storage,
    _encryption,
    _variables,
    *LAYOUT_RULES,
    *UPDATE_RULES,
)
