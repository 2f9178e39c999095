"""What a job's network costs, block by block, from its shapes alone: it is built without weights.

The only module of the planner that imports torch and transformers, and only inside functions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from orchestrator.errors import PlanError
from orchestrator.job.parts import objective_of
from orchestrator.models.trace import CannotTrace, kept_bytes_per_sample

if TYPE_CHECKING:
    from torch import nn

    from orchestrator.job import Job
    from orchestrator.job.sections.train import EveryLayers


@dataclass(frozen=True)
class Block:
    """A part of the network that no stage boundary goes through: the embedding, a decoder layer, or norm and head.

    Tokens are those of one sample in one forward pass. `kept` is what the forward pass keeps for the backward pass,
    `recomputed` what is needed while the backward pass runs, and `split` the part of either that tensor parallelism
    divides. `working` is needed only while the block runs; it is the head's, whose classes are divided.

    More than 15 attributes: each is a number that the planner adds up by itself.
    """

    name: str
    parameters: int
    """Elements that are trained, without those it borrows from another block."""
    whole_parameters: int
    """Of these, the ones every tensor-parallel rank keeps: vectors, as in norms."""
    flops_per_token: int
    """Forward, attention included."""
    attention_flops_per_token: int
    """Of these, the products of activations with activations, which have no gradient of weights."""
    kept_bytes_per_token: int
    kept_split_bytes_per_token: int
    working_bytes_per_token: int = 0
    frozen_parameters: int = 0
    frozen_linear: int = 0
    """Of these, the ones of linear modules other than the head."""
    largest_linear: int = 0
    """The most that any of those has."""
    frozen_flops_per_token: int = 0
    """Of the forward pass, the products with frozen matrices, of which no gradient is made."""
    recomputed_flops_per_token: int = 0
    """What of the forward pass is computed again in the backward pass."""
    recomputed_bytes_per_token: int = 0
    recomputed_split_bytes_per_token: int = 0
    kept_bytes: int = 0
    """What is kept of a micro-batch whatever its tokens."""
    working_bytes: int = 0
    """What is needed while the block runs, whatever the tokens."""

    @property
    def training_flops_per_token(self) -> int:
        """Forward, backward (the gradients of inputs, and of what is trained) and what is computed again."""
        return 3 * self.flops_per_token - self.frozen_flops_per_token + self.recomputed_flops_per_token


@dataclass(frozen=True)
class ModelCosts:
    """A network as the planner sees it. `blocks`: the embedding, the decoder layers, the norm and head."""

    blocks: tuple[Block, ...]
    tied: int
    """Elements of the embedding that the head uses too; 0 when each has its own."""
    hidden_size: int
    vocab_size: int
    heads: int | None
    key_value_heads: int | None
    """Heads are None when the network does not say: then it cannot be split by tensor parallelism."""
    value_bytes: int
    """Of an activation that is communicated or multiplied: 4 in fp32, 2 under bf16 autocast."""
    notes: tuple[str, ...] = ()
    recomputes: bool = False
    """Whether layers compute again in the backward pass what they do not keep."""

    @property
    def layers(self) -> int:
        return len(self.blocks) - 2

    @property
    def parameters(self) -> int:
        """All elements, shared ones once."""
        return sum(block.parameters + block.frozen_parameters for block in self.blocks)

    @property
    def flops_per_token(self) -> int:
        """Forward."""
        return sum(block.flops_per_token for block in self.blocks)


def describe_model(job: Job) -> ModelCosts:
    """The costs of the job's network at its sequence length and precision, with what of it is computed twice.

    Raises PlanError when it cannot be built without weights or has no list of layers.
    """
    (costs,) = describe_modes(job, [job.train.recompute])
    return costs


def describe_modes(job: Job, modes: Sequence[str | EveryLayers]) -> list[ModelCosts]:
    """The same with each of these values of `train.recompute`."""
    build = _builder(job)
    module = _on_meta(job, build)
    layers, tokens, measure = _look_at(module, job)
    config = getattr(module, "config", None)
    text = config.get_text_config() if config is not None and hasattr(config, "get_text_config") else config
    heads = getattr(text, "num_attention_heads", None)
    blocks, tied = _blocks(module, layers, tokens, measure)
    notes = [] if heads else ["the network does not name its number of attention heads, so tensor stays 1"]
    try:
        kept = kept_bytes_per_sample(build, _layers, measure.sequence, measure.value_bytes == 2, objective_of(job))
    except CannotTrace as error:
        notes.append(f"activation memory is estimated from weight shapes, as the network cannot be traced: {error}")
        kept = None
    if kept is not None:
        blocks = [
            _with_kept(block, each.everything / measure.sequence) for block, each in zip(blocks, kept, strict=True)
        ]
    head = getattr(module, "get_output_embeddings", lambda: None)()
    if job.train.loss_chunk and objective_of(job).by_token and head is not None:
        blocks[-1] = _with_chunks(job, measure, blocks[-1], getattr(head, "base_layer", head).weight)
    costs = ModelCosts(
        blocks=tuple(blocks), tied=tied, hidden_size=measure.hidden, vocab_size=tokens.num_embeddings, heads=heads,
        key_value_heads=getattr(text, "num_key_value_heads", None) or heads, value_bytes=measure.value_bytes,
        notes=tuple(notes),
    )  # fmt: skip
    selected = None if kept is None else [each.selected for each in kept]
    return [
        replace(costs, blocks=tuple(_with_recompute(mode, measure, blocks, selected)), recomputes=mode != "none")
        for mode in modes
    ]


def _with_recompute(
    asked: str | EveryLayers, measure: _Measure, blocks: list[Block], selected: Sequence[float] | None
) -> list[Block]:
    """What layers keep if they compute the rest again: what they are given, and `selected` bytes a sample, where it is
    known what `selective` would keep."""
    if asked == "none" or (asked == "selective" and selected is None):
        return blocks
    every = 1 if isinstance(asked, str) else asked.every
    given = measure.hidden * measure.value_bytes
    found = list(blocks)
    for index in range(1, len(blocks) - 1, every):
        block, more = blocks[index], 0
        if asked == "selective":
            assert selected is not None
            more = int(selected[index] / measure.sequence)
        share = block.kept_split_bytes_per_token / max(1, block.kept_bytes_per_token)
        found[index] = replace(
            block,
            kept_bytes_per_token=given + more,
            kept_split_bytes_per_token=int(more * share),
            recomputed_bytes_per_token=max(0, block.kept_bytes_per_token - more),
            recomputed_split_bytes_per_token=max(0, block.kept_split_bytes_per_token - int(more * share)),
            recomputed_flops_per_token=0 if more else block.flops_per_token,
        )
    return found


def _with_chunks(job: Job, measure: _Measure, head: Block, weight: Any) -> Block:
    """With logits of some positions at a time (`strategies.gradient.loss`): the gradients of hidden states and of the
    head are made in the forward pass."""
    tokens = min(job.train.loss_chunk, job.train.micro_batch * measure.sequence)
    logits = tokens * weight.shape[0]
    trained = weight.numel() if weight.requires_grad else 0
    return replace(
        head,
        # Logits, in fp32 too, the logarithms of probabilities and the gradients of both; the head's gradient of a
        # chunk beside the sum.
        working_bytes=logits * (12 + 2 * (measure.value_bytes < 4) * measure.value_bytes)
        + trained * (4 + measure.value_bytes),
        kept_bytes=trained * measure.value_bytes,
        # What norm and head are given, and the gradient of that.
        kept_bytes_per_token=3 * measure.hidden * measure.value_bytes,
        kept_split_bytes_per_token=0,
        working_bytes_per_token=0,
    )


def training_flops_per_token(job: Job, module: nn.Module | None = None) -> int:
    """What the network takes for a token, forward and backward (twice as much again), attention included and nothing
    counted twice: after PaLM (arXiv:2204.02311), appendix B. With `module` the network need not be built again; its
    parameters need have no memory. Raises PlanError or ValueError like `describe_model`."""
    module = _on_meta(job, _builder(job)) if module is None else module
    layers, tokens, measure = _look_at(module, job)
    blocks, _ = _blocks(module, layers, tokens, measure)
    return sum(block.training_flops_per_token for block in blocks)


def _look_at(module: nn.Module, job: Job) -> tuple[nn.ModuleList, nn.Embedding, _Measure]:
    """A network's layers, its table of tokens, and the rules by which its blocks are measured."""
    layers = _layers(module)
    config = getattr(module, "config", None)
    text = config.get_text_config() if config is not None and hasattr(config, "get_text_config") else config
    tokens = _tokens(module)
    heads = getattr(text, "num_attention_heads", None)
    hidden = int(getattr(text, "hidden_size", None) or tokens.embedding_dim)
    measure = _Measure(
        hidden=hidden,
        attention_width=(getattr(text, "head_dim", None) or hidden // heads) * heads if heads else hidden,
        sequence=job.data.sequence_length,
        value_bytes=2 if job.train.precision == "bf16" else 4,
        active_experts=_first(text, "num_experts_per_tok", "num_experts_per_token", "moe_topk", "top_k_experts"),
        experts=_first(text, "num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"),
    )
    return layers, tokens, measure


def _with_kept(block: Block, kept_per_token: float) -> Block:
    """With what was traced instead of what shapes say; the share that tensor parallelism divides stays."""
    share = block.kept_split_bytes_per_token / block.kept_bytes_per_token
    return replace(
        block, kept_bytes_per_token=int(kept_per_token), kept_split_bytes_per_token=int(kept_per_token * share)
    )


def _layers(module: nn.Module) -> nn.ModuleList:
    layers = max(_outermost_lists(module), key=len, default=None)
    if not layers:
        raise PlanError(
            f"{type(module).__name__} has no torch.nn.ModuleList of layers, so the planner cannot tell its blocks; "
            "keep the decoder layers in one"
        )
    return layers


def _tokens(module: nn.Module) -> nn.Embedding:
    """The table of tokens: what the network says, or the one a head gives logits for, or the largest."""
    from torch import nn

    get = getattr(module, "get_input_embeddings", None)
    found = get() if callable(get) else None
    if isinstance(found, nn.Embedding):
        return found
    embeddings = [part for part in module.modules() if isinstance(part, nn.Embedding)]
    if not embeddings:
        raise PlanError(f"{type(module).__name__} has no torch.nn.Embedding, so the planner cannot tell its width")
    outputs = {part.out_features for part in module.modules() if isinstance(part, nn.Linear)}
    return max(embeddings, key=lambda part: (part.num_embeddings in outputs, part.num_embeddings))


def _blocks(
    module: nn.Module, layers: nn.ModuleList, tokens: nn.Embedding, measure: _Measure
) -> tuple[list[Block], int]:
    """The blocks by the shapes of their parameters, each parameter once, and the elements of a tied head."""
    from torch import nn

    inside = {id(parameter) for layer in layers for parameter in layer.parameters()}
    tables = {id(part.weight): part.weight for part in module.modules() if isinstance(part, nn.Embedding)}
    first = [table for key, table in tables.items() if key not in inside]
    outside = {id(parameter) for parameter in first} | inside
    last = [parameter for parameter in module.parameters() if id(parameter) not in outside]
    tied = _head_weight(module, tokens) is tokens.weight
    blocks = [
        measure.embedding(first),
        *(
            _with_linear(measure.layer(f"layer {index}", list(layer.named_parameters())), layer)
            for index, layer in enumerate(layers)
        ),
        measure.head(last, tokens.weight if tied else None, tokens.num_embeddings),
    ]
    return blocks, tokens.weight.numel() if tied else 0


def _with_linear(block: Block, layer: nn.Module) -> Block:
    from torch import nn

    sizes = [
        part.weight.numel()
        for part in layer.modules()
        if isinstance(part, nn.Linear) and not part.weight.requires_grad
    ]  # fmt: skip
    return replace(block, frozen_linear=sum(sizes), largest_linear=max(sizes, default=0))


@dataclass(frozen=True)
class _Measure:
    """Turns parameter shapes into costs; the rules and how good they are: docs/planning.md."""

    hidden: int
    attention_width: int
    sequence: int
    value_bytes: int
    active_experts: int | None
    experts: int | None

    def embedding(self, tables: list[Any]) -> Block:
        # A look-up keeps the token ids only.
        trained, frozen = _numbers(tables)
        return Block("embedding", trained, 0, 0, 0, 8, 0, frozen_parameters=frozen)

    def layer(self, name: str, named: list[tuple[str, Any]]) -> Block:
        matrices = [(part, self._active(part, parameter)) for part, parameter in named if parameter.dim() >= 2]
        shapes = {part: parameter.shape for part, parameter in named}
        attention = 4 * self.sequence * self.attention_width
        flops = sum(2 * shapes[part].numel() * active for part, active in matrices)
        trains = {part: parameter.requires_grad for part, parameter in named}
        frozen_flops = sum(2 * shapes[part].numel() * active for part, active in matrices if not trains[part])
        trained, frozen = _numbers([parameter for _, parameter in named])
        # Every product keeps its input and its output (which is some operation's input). One side of each has the
        # network's width and is whole on every tensor-parallel rank, the other is split.
        sides = sum(sum(_sides(shapes[part])) * active for part, active in matrices)
        whole = min(sides, sum(self.hidden * active * _copies(shapes[part]) for part, active in matrices))
        # Norms work in fp32 whatever the precision: their input is kept a second time under autocast.
        norms = 2 * self.hidden * 4 if self.value_bytes < 4 else 0
        split = int((sides - whole) * self.value_bytes)
        return Block(
            name,
            parameters=trained,
            whole_parameters=sum(p.numel() for _, p in named if p.dim() < 2 and p.requires_grad),
            flops_per_token=int(flops) + attention,
            attention_flops_per_token=attention,
            kept_bytes_per_token=int(whole * self.value_bytes) + norms + split,
            kept_split_bytes_per_token=split,
            frozen_parameters=frozen,
            frozen_flops_per_token=int(frozen_flops),
        )

    def head(self, parameters: list[Any], borrowed: Any, vocab_size: int) -> Block:
        matrices = [each for each in (*parameters, borrowed) if each is not None and each.dim() >= 2]
        trained, frozen = _numbers(parameters)
        return Block(
            "norm and head",
            parameters=trained,
            whole_parameters=sum(p.numel() for p in parameters if p.dim() < 2 and p.requires_grad),
            flops_per_token=sum(2 * matrix.numel() for matrix in matrices),
            attention_flops_per_token=0,
            # The loss keeps the logarithms of all probabilities in fp32; around it the logits live in the products'
            # precision and again in fp32. Tensor-parallel ranks have those of their own classes.
            kept_bytes_per_token=2 * self.hidden * self.value_bytes + 4 * vocab_size,
            kept_split_bytes_per_token=4 * vocab_size,
            working_bytes_per_token=(4 + self.value_bytes) * vocab_size,
            frozen_parameters=frozen,
            frozen_flops_per_token=sum(2 * matrix.numel() for matrix in matrices if not matrix.requires_grad),
        )

    def _active(self, name: str, parameter: Any) -> float:
        """The fraction of a parameter that one token goes through: less than 1 in a mixture's experts."""
        routed = "experts" in name and "shared" not in name
        return self.active_experts / self.experts if routed and self.active_experts and self.experts else 1.0


def _numbers(parameters: Sequence[Any]) -> tuple[int, int]:
    """Elements that are trained, and frozen ones."""
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    return trained, sum(parameter.numel() for parameter in parameters) - trained


def _copies(shape: Any) -> int:
    return int(shape[0]) if len(shape) == 3 else 1


def _sides(shape: Any) -> tuple[int, int]:
    """Input plus output features of a matrix, or of a stack of them (all experts in one tensor)."""
    if len(shape) == 3:
        return int(shape[0] * shape[1]), int(shape[0] * shape[2])
    return int(shape[0]), int(shape[1:].numel())


def _first(config: Any, *names: str) -> int | None:
    return next((value for name in names if isinstance(value := getattr(config, name, None), int)), None)


def _outermost_lists(module: nn.Module) -> list[nn.ModuleList]:
    """The ModuleLists that are not inside another: a mixture's experts are not its layers."""
    from torch import nn

    found: list[nn.ModuleList] = []
    for child in module.children():
        found.extend([child] if isinstance(child, nn.ModuleList) else _outermost_lists(child))
    return found


def _head_weight(module: nn.Module, tokens: nn.Embedding) -> Any:
    """The weight that makes logits, if it can be told."""
    from torch import nn

    get = getattr(module, "get_output_embeddings", None)
    found = get() if callable(get) else None
    if found is not None:
        return found.weight
    linears = [part for part in module.modules() if isinstance(part, nn.Linear)]
    return next((part.weight for part in reversed(linears) if part.out_features == tokens.num_embeddings), None)


def _on_meta(job: Job, build: Callable[[], nn.Module]) -> nn.Module:
    import torch

    from orchestrator.models.problems import ModelError

    try:
        with torch.device("meta"):
            return build()
    except ModelError as error:
        if job.model.factory is None:
            raise  # It says what to change.
        raise PlanError(
            "model.factory: the network cannot be built without weights (on torch's meta device), which planning "
            f"needs: {error.findings[0].reason}"
        ) from error
    except Exception as error:
        # Whatever transformers or a user's own code raises, the planner can only say that and where.
        where = "model.factory" if job.model.factory else "model.hf"
        raise PlanError(
            f"{where}: the network cannot be built without weights (on torch's meta device), which planning needs: "
            f"{type(error).__name__}: {error}"
        ) from error


def _builder(job: Job) -> Callable[[], nn.Module]:
    """A function that builds the job's network as the worker does, in fp32, wherever torch is told to put it."""
    from orchestrator.models.loading import choose_trained, empty_model, from_factory

    def build() -> nn.Module:
        factory = job.model.factory
        return choose_trained(job, empty_model(job) if factory is None else from_factory(factory, job.model.args))

    return build
