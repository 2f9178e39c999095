"""A network without its weights: its blocks, its slots, how it is split over ranks, and the modules that compute it.

Where a network can be cut and split is its own statement, in the vocabulary of transformers: `pp_plan` names, in order,
the modules from the token embedding over the list of layers to the head; `tp_plan` gives modules, by pattern, a style
of tensor parallelism. A module of a user's own may have the same two attributes.
"""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from strategies.layout.space import Space
from strategies.model.frozen import FrozenWeights
from strategies.model.randomness import uninstall
from strategies.model.stage import PassThrough, Stage

_SPLIT: dict[str, tuple[int, int, int | None]] = {
    "colwise": (0, 1, 0),
    "colwise_rep": (0, 1, 0),
    "colwise_gather_output": (0, 1, 0),
    "rowwise": (1, 0, None),
    "rowwise_split_input": (1, 0, None),
    "embedding_rowwise": (1, 0, None),
    "embedding_colwise": (0, 1, None),
}
"""The dimension that each style splits: of a Linear's weight, of an Embedding's weight, of a bias."""
_REDUCED = ("replicated_with_grad_allreduce",)
"""Styles of modules that are whole everywhere but see a part of the activations only: their gradients are added up."""


class Activations(NamedTuple):
    """What a layer, and the whole model, gives for one micro-batch: sizes after [batch, length], and types."""

    hidden_size: torch.Size
    hidden_dtype: torch.dtype
    logits_size: torch.Size
    logits_dtype: torch.dtype


class Blueprint:
    """See the module. Takes `model` over: its trained parameters lose their values to `initial`, on the CPU.

    `buffers` are its persistent ones, which never change, and `frozen` its frozen parameters. Of a trial of the model
    it is known which trained parameters are `unused` and what `caches` it makes for itself. Raises ValueError for
    models whose buffers change in training, that train nothing, or that cannot be split over `tensor` ranks.

    More than 15 attributes: they describe one model.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        tensor: int = 1,
        device: torch.device | None = None,
        unused: Collection[str] = (),
        caches: Collection[str] = (),
    ) -> None:
        _refuse_running_statistics(model)
        self.unused, self.caches = frozenset(unused), frozenset(caches)
        self.device = torch.device("cpu") if device is None else device
        self.model = model
        self.tensor = tensor
        self.cannot_cut, self.before, self.layers, self.after = _read_plan(model)
        self.styles = _read_styles(model) if tensor > 1 else {}
        trained = list(_trained(model).items())
        if not trained:
            raise ValueError("the model has no parameter that requires a gradient; nothing to train")
        self._sites = _sites(model, dict(trained))
        one = {id(parameter): name for name, parameter in model.named_parameters()}
        self.names = {name: one[id(p)] for name, p in model.named_parameters(remove_duplicate=False)}
        """The one name of a parameter, by each that it has: modules may share it."""
        if tensor > 1:
            self._refuse_shared("tensor", tensor)
        self.space = Space.of(
            ((name, p.shape, self._block_of(name), self._dim_of(name)) for name, p in trained), tensor, self.unused
        )
        self._activations: dict[bool, Activations] = {}
        self.initial_shapes = {name: p.shape for name, p in trained}
        self.initial = {name: p.detach().to("cpu", torch.float32) for name, p in trained}
        frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
        self.frozen = FrozenWeights(frozen)
        across = _across_blocks(model, self.layers, frozen)
        self.divisible_frozen = [name for name in self.frozen.divisible if name not in across]
        """The names of the frozen parameters that can be sharded with the trained ones of their block."""
        persistent = {name: b for name, b in model.named_buffers() if name in model.state_dict()}
        self.release(model)
        _move(model, self.device)
        self.buffers = {name: buffer.data for name, buffer in sorted(persistent.items())}

    # ------------------------------------------------------------------------------------ what it is made of

    @property
    def constants(self) -> dict[str, torch.Tensor]:
        """What training never changes, by name."""
        return self.buffers | dict(self.frozen)

    @property
    def num_layers(self) -> int:
        return len(self._layer_list(self.model)) if self.layers else 0

    def _block_of(self, name: str) -> int:
        """0 for the embedding, then the layers, then norm and head; all 0 where that is not known."""
        if self.layers is None:
            return 0
        if name.startswith(self.layers + "."):
            return 1 + int(name[len(self.layers) + 1 :].split(".")[0])
        if any(name == site or name.startswith(site + ".") for site in self.before):
            return 0
        return 1 + self.num_layers

    def _dim_of(self, name: str) -> int | None:
        owner, _, key = name.rpartition(".")
        style = self.styles.get(owner)
        if style is None or style in _REDUCED:
            return None
        linear, embedding, bias = _SPLIT[style]
        if key == "bias":
            return bias
        return embedding if isinstance(self.model.get_submodule(owner), nn.Embedding) else linear

    def _refuse_shared(self, what: str, degree: int) -> None:
        shared = [name for name, sites in self._sites.items() if len(sites) > 1]
        if shared:
            raise ValueError(_shared_reason(what, degree, shared))

    def check_pipeline(self, stages: int, context: contextlib.AbstractContextManager[Any] | None = None) -> None:
        """Raises ValueError when the network, computed in `context` (autocast), cannot be cut into stages."""
        _refuse_cut(self.cannot_cut, self._sites, stages)
        self._refuse_work_between_modules(stages, contextlib.nullcontext() if context is None else context)

    def check_sharded(self) -> None:
        """Raises ValueError when two blocks share a trained parameter: each gathers and reduces its own."""
        check_sharded(self.model)

    def _refuse_work_between_modules(self, stages: int, context: contextlib.AbstractContextManager[Any]) -> None:
        """A stage runs the whole `forward`, with other stages' modules standing aside; what it does beside its modules,
        every stage would do. So with all of them aside, it must give back what it is given."""
        name = type(self.model).__name__
        size = self.activations(context).hidden_size
        given = torch.linspace(-100.0, 100.0, 2 * size.numel(), device=self.device).view(1, 2, *size)
        try:
            with torch.no_grad(), torch.random.fork_rng():
                output = self.stage((1, 1)).train()(given)
        except (RuntimeError, TypeError) as error:
            raise ValueError(f"pipeline {stages} cannot be used with {name}: {error}") from error
        if not torch.equal(output, given):
            raise ValueError(
                f"pipeline {stages} cannot be used with {name}: its forward changes hidden states or logits outside of "
                "the modules that its pp_plan names (it scales or caps them, or has dropout between modules), and each "
                "stage would do so again. Use pipeline: 1, or a model.factory that does it inside of those modules"
            )

    def blocks(self, module: nn.Module) -> list[nn.Module]:
        """The layers that `module` (the model, or a stage of it) has; the model's largest list where it has no plan."""
        return _blocks(module, self.layers)

    def numbered_layers(self, module: nn.Module) -> list[tuple[int, nn.Module]]:
        """(number, layer) for those that `module` has; none where the model has no plan."""
        if self.layers is None:
            return []
        layers = self._layer_list(module.module if isinstance(module, Stage) else module)
        return [(number, layer) for number, layer in enumerate(layers) if not isinstance(layer, PassThrough)]

    def _layer_list(self, module: nn.Module) -> nn.ModuleList:
        found = module.get_submodule(self.layers or "")
        assert isinstance(found, nn.ModuleList)
        return found

    # ------------------------------------------------------------------------------------ modules

    def whole(self) -> nn.Module:
        """The model itself; its trained parameters have no memory until they are bound."""
        return self.model

    def stage(self, run: tuple[int, int] | None, own: Collection[str] = ()) -> nn.Module:
        """A copy with the blocks start..stop only (None: all). Buffers are shared, and so are frozen parameters but for
        the `own` ones, which have no memory, like trained parameters.

        Takes token ids when it has the embedding, otherwise hidden states; gives logits when it has the head,
        otherwise hidden states.
        """
        shared: dict[int, torch.Tensor] = {id(buffer): buffer for buffer in self.model.buffers()}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad or name in own:
                empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
                shared[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
            else:
                shared[id(parameter)] = parameter
        module: nn.Module = copy.deepcopy(self.model, shared)  # type: ignore[arg-type]
        for part in module.modules():
            uninstall(part)
        if run is None:
            return module
        start, stop = run
        last = 1 + self.num_layers
        layers = self._layer_list(module)
        for index in range(len(layers)):
            if not start <= index + 1 < stop:
                layers[index] = PassThrough()
        if start > 0:
            for name in self.before:
                _replace(module, name)
        if stop <= last:
            for name in self.after:
                _replace(module, name)
        return Stage(
            module,
            is_first=start == 0,
            before=[module.get_submodule(name) for name in self.before] if start == 0 else (),
            layers=[layer for layer in layers if not isinstance(layer, PassThrough)],
            after=[module.get_submodule(name) for name in self.after] if stop > last else (),
        )

    def activations(self, context: contextlib.AbstractContextManager[Any]) -> Activations:
        """What layers and the whole model hand on, when forward passes run in `context` (autocast). Found once, by
        tracing, or where an operator cannot be traced by computing two tokens with the initial values.

        Raises ValueError when neither works.
        """
        with context:
            casts = torch.is_autocast_enabled(self.device.type)
        if casts not in self._activations:
            try:
                self._activations[casts] = self._trace(context, is_fake=True)
            except (RuntimeError, TypeError, AttributeError):
                self._activations[casts] = self._trace(context, is_fake=False)
        return self._activations[casts]

    def _trace(self, context: contextlib.AbstractContextManager[Any], *, is_fake: bool) -> Activations:
        from strategies.compat import FakeTensorMode

        hidden: list[torch.Tensor] = []
        layers = self._layer_list(self.model)
        all_layers = list(layers)
        handle = all_layers[0].register_forward_hook(lambda module, arguments, output: hidden.append(output))
        mode: Any = FakeTensorMode(allow_non_fake_inputs=True) if is_fake else contextlib.nullcontext()
        try:
            # Of layers without values one tells as much as all, which may take many seconds.
            for number in range(1, len(all_layers) if is_fake else 0):
                layers[number] = PassThrough()
            there = dict(self.model.named_parameters(remove_duplicate=False))
            places = {place: name for place, name in self.names.items() if place in there and name in self._sites}
            with mode, torch.no_grad(), torch.random.fork_rng(), context:
                made = {
                    name: torch.empty(self.initial_shapes[name], device=self.device)
                    if is_fake
                    else self.initial[name].to(self.device)
                    for name in set(places.values())
                }
                values = {place: made[name] for place, name in places.items()}
                tokens = torch.zeros((1, 2), dtype=torch.int64, device=self.device)
                output = torch.func.functional_call(self.model, values, kwargs={"input_ids": tokens})
                logits = output if isinstance(output, torch.Tensor) else output.logits
                if not hidden or not isinstance(hidden[0], torch.Tensor):
                    raise ValueError(f"the layers of {type(self.model).__name__} do not hand on one tensor")
                return Activations(hidden[0].shape[2:], hidden[0].dtype, logits.shape[2:], logits.dtype)
        finally:
            for number, layer in enumerate(all_layers):
                layers[number] = layer
            handle.remove()

    def bind(self, module: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
        """Puts parameters (by name) into a module made by this blueprint."""
        inner = module.module if isinstance(module, Stage) else module
        for name, parameter in parameters.items():
            for owner, key in self._sites[name]:
                try:
                    place = inner.get_submodule(owner)
                except AttributeError:
                    continue  # Another stage's.
                if key in place._parameters:
                    place._parameters[key] = parameter

    def release(self, module: nn.Module) -> None:
        """Takes the memory of the trained parameters from a module."""
        for name, sites in self._sites.items():
            current = module.get_submodule(sites[0][0])._parameters[sites[0][1]]
            assert current is not None
            empty = nn.Parameter(torch.empty(current.shape, dtype=torch.float32, device="meta"))
            self.bind(module, {name: empty})

    def parallelize(self, module: nn.Module, mesh: Any) -> None:
        """Splits a module over a tensor-parallel mesh by the model's plan; to be bound afterwards."""
        from torch.distributed.tensor.parallel import parallelize_module

        inner = module.module if isinstance(module, Stage) else module
        plan = {}
        for owner, style in self.styles.items():
            try:
                target = inner.get_submodule(owner)
            except AttributeError:
                continue  # Another stage's.
            if not isinstance(target, PassThrough) and style not in _REDUCED:
                plan[owner] = _parallel_style(style, target)
        parallelize_module(inner, mesh, plan, src_data_rank=None)

    def is_reduced(self, name: str) -> bool:
        """Whether a parameter's gradient is only this coordinate's part of it."""
        return self.styles.get(name.rpartition(".")[0]) in _REDUCED


def _replace(module: nn.Module, name: str) -> None:
    owner, _, key = name.rpartition(".")
    setattr(module.get_submodule(owner), key, PassThrough())


def _move(model: nn.Module, device: torch.device) -> None:
    """Everything but the trained parameters, which have no memory, to the device."""
    for module in model.modules():
        for key, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[key] = buffer.to(device)
        for parameter in module._parameters.values():
            if parameter is not None and not parameter.is_meta:
                parameter.data = parameter.data.to(device)


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _sites(model: nn.Module, trained: Mapping[str, nn.Parameter]) -> dict[str, list[tuple[str, str]]]:
    names = {id(parameter): name for name, parameter in trained.items()}
    found: dict[str, list[tuple[str, str]]] = {name: [] for name in trained}
    for owner, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None and id(parameter) in names:
                found[names[id(parameter)]].append((owner, key))
    return found


def _refuse_running_statistics(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if getattr(module, "track_running_stats", False) and getattr(module, "running_mean", None) is not None:
            raise ValueError(
                f"module {name!r} ({type(module).__name__}) keeps running statistics, which depend on which rank "
                "saw which data; use a normalisation without them (layer, group or RMS norm)"
            )


def _read_plan(model: nn.Module) -> tuple[str, tuple[str, ...], str | None, tuple[str, ...]]:
    """(why it cannot be cut, modules before the layers, the list of layers, modules after them)."""
    plan: Iterable[str] | None = getattr(model, "pp_plan", None)
    if not plan:
        return f"{type(model).__name__} has no pp_plan that names its embedding, layers, norm and head", (), None, ()
    names = [name for name in plan if _has(model, name)]
    lists = [name for name in names if isinstance(model.get_submodule(name), nn.ModuleList)]
    if len(lists) != 1:
        return f"the pp_plan of {type(model).__name__} names {len(lists)} lists of layers, not one", (), None, ()
    layers = lists[0]
    # A head comes last, wherever the plan has it.
    depth = layers.count(".")
    inner = [name for name in names if name.count(".") >= depth]
    outer = [name for name in names if name.count(".") < depth]
    at = inner.index(layers)
    return "", tuple(inner[:at]), layers, (*inner[at + 1 :], *outer)


def _blocks(module: nn.Module, layers: str | None) -> list[nn.Module]:
    """See `Blueprint.blocks`."""
    if layers is None:
        lists = [part for part in module.modules() if isinstance(part, nn.ModuleList)]
        return list(max(lists, key=len, default=[]))
    found: Any = module.get_submodule(layers)
    return [layer for layer in found if not isinstance(layer, PassThrough)]


def _has(model: nn.Module, name: str) -> bool:
    try:
        model.get_submodule(name)
    except AttributeError:
        return False
    return True


def _read_styles(model: nn.Module) -> dict[str, str]:
    """The style of every module that the model's plan splits. Raises ValueError where it has none or an unknown one."""
    plan: Mapping[str, str] | None = getattr(model, "tp_plan", None)
    if not plan:
        raise ValueError(
            f"{type(model).__name__} has no tp_plan, which says how its modules are split: use tensor: 1, or a model "
            "with one (the decoder models of transformers have it; a model.factory may give its module one)"
        )
    patterns = [(re.compile(re.escape(p).replace(r"\*", r"[^.]+")), style) for p, style in plan.items()]
    styles = {}
    for name, module in model.named_modules():
        style = next((style for pattern, style in patterns if pattern.fullmatch(name)), None)
        if style is None or not list(module.parameters(recurse=False)):
            continue
        if style not in _SPLIT and style not in _REDUCED:
            known = ", ".join((*_SPLIT, *_REDUCED))
            raise ValueError(
                f"the tp_plan gives {name} the style {style!r}, which is not supported; supported: {known}"
            )
        styles[name] = style
    _refuse_whole_layers(model, styles)
    return styles


def check_cut(model: nn.Module, stages: int, parts: int) -> None:
    """Raises ValueError when the model, which may be without weights, cannot be cut into `parts` model parts: those of
    all `stages`."""
    cannot_cut, *_, layers, _ = _read_plan(model)
    _refuse_cut(cannot_cut, _sites(model, _trained(model)), stages)
    number = len(model.get_submodule(layers or ""))  # type: ignore[arg-type]
    if parts > number:
        raise ValueError(f"pipeline {stages} needs at least {parts} layers for its model parts; {layers} has {number}")


def _refuse_cut(cannot_cut: str, sites: Mapping[str, list[tuple[str, str]]], stages: int) -> None:
    if cannot_cut:
        raise ValueError(f"pipeline {stages} needs to know where the model can be cut: {cannot_cut}")
    if shared := [name for name, places in sites.items() if len(places) > 1]:
        raise ValueError(_shared_reason("pipeline", stages, shared))


def check_sharded(model: nn.Module) -> None:
    """Raises ValueError when the parameters of the model, which may be without weights, cannot be sharded: two blocks
    share a trained one, and each gathers and reduces its own."""
    *_, layers, _ = _read_plan(model)
    for places in _across_blocks(model, layers, _trained(model)).values():
        raise ValueError(
            "shard: parameters cannot be used with a trained parameter that two layers share, as each layer gathers "
            f"its own: {', '.join(places)}. Use another shard, which computes with whole parameters"
        )


def _across_blocks(
    model: nn.Module, layers: str | None, parameters: Mapping[str, nn.Parameter]
) -> dict[str, list[str]]:
    """The parameters that two blocks, or a block and what is in none, share, with all the names that each has."""
    blocks = _blocks(model, layers)
    block_of = {id(part): number for number, block in enumerate(blocks) for part in block.modules()}
    return {
        name: [".".join(filter(None, site)) for site in sites]
        for name, sites in _sites(model, parameters).items()
        if len({block_of.get(id(model.get_submodule(owner)), -1) for owner, _ in sites}) > 1
    }


def check_tensor(model: nn.Module, degree: int) -> None:
    """Raises ValueError when the model, which may be without weights, cannot be split over `degree` ranks."""
    _read_styles(model)
    shared = [names for names in _sites(model, _trained(model)).values() if len(names) > 1]
    if shared:
        raise ValueError(_shared_reason("tensor", degree, [".".join(filter(None, site)) for site in shared[0]]))


def _shared_reason(what: str, degree: int, shared: list[str]) -> str:
    return (
        f"{what} {degree} cannot be used with parameters that two modules share: {', '.join(shared)}. "
        "Untie them (for transformers: tie_word_embeddings: false; for a directory, model.untie: true)"
    )


def _refuse_whole_layers(model: nn.Module, styles: Mapping[str, str]) -> None:
    """A plan that splits the embedding or the head only would have every rank compute every layer."""
    split = [name for name, style in styles.items() if style in _SPLIT]
    lists = [name for name, part in model.named_modules() if isinstance(part, nn.ModuleList) and len(part)]
    if any(name.startswith(f"{layers}.") for name in split for layers in lists) or (split and not lists):
        return
    raise ValueError(
        f"the tp_plan of {type(model).__name__} splits {', '.join(split) or 'no module'} and nothing in its layers, "
        "which every rank would compute whole; use tensor: 1"
    )


def _parallel_style(style: str, module: nn.Module) -> Any:
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

    if style in ("embedding_rowwise", "rowwise_split_input"):
        return RowwiseParallel(input_layouts=Replicate())
    if style == "rowwise":
        return RowwiseParallel()
    if style == "colwise":
        return ColwiseParallel()
    return ColwiseParallel(output_layouts=Replicate())
