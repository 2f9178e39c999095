"""What is used of torch that torch does not promise. It stands here and nowhere else; `tests/unit/test_compat.py` pins
what is relied upon, so that an upgrade of torch which takes it away is noticed there.

Names are looked up when they are first asked for: some are in modules that take seconds to import.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from datetime import timedelta
from importlib import import_module
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store as Store
    from torch._C._distributed_c10d import Work as Work
    from torch._subclasses.fake_tensor import FakeTensorMode as FakeTensorMode
    from torch.distributed._functional_collectives import all_reduce as all_reduce
    from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather as AllGather
    from torch.distributed.fsdp._fully_shard._fsdp_api import ReduceScatter as ReduceScatter
    from torch.optim import Optimizer
    from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode

PRIVATE = {
    "Store": "torch._C._distributed_c10d",
    "register_process_group": "torch._C._distributed_c10d:_register_process_group",
    "FakeTensorMode": "torch._subclasses.fake_tensor",
    "all_reduce": "torch.distributed._functional_collectives",
    "AllGather": "torch.distributed.fsdp._fully_shard._fsdp_api",
    "ReduceScatter": "torch.distributed.fsdp._fully_shard._fsdp_api",
    "Work": "torch._C._distributed_c10d",
    "TorchDispatchMode": "torch.utils._python_dispatch",
}
"""Where each name is, and what torch calls it, where that is something else."""
FAKE_TENSOR_LOGGER = "torch._subclasses.fake_tensor"


def __getattr__(name: str) -> Any:
    if name not in PRIVATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, inner = PRIVATE[name].partition(":")
    found = globals()[name] = getattr(import_module(module), inner or name)
    return found


def build_optimizer(make: Callable[[], Optimizer]) -> Optimizer:
    """What `make` returns. Torch wraps methods of optimizers so that its compiler leaves them alone, and imports the
    compiler, which takes a second or two, to tell it so; here it is told beforehand that there is nothing to do."""
    import torch

    for name in WRAPPED_FOR_THE_COMPILER:
        method = getattr(torch.optim.Optimizer, name).__wrapped__
        method.__dict__.setdefault(_COMPILER_IS_TOLD, method)
    return make()


def step(optimizer: Optimizer) -> None:
    """`optimizer.step()`; of torch's own optimizers without hooks, without what surrounds it for the compiler, which
    would be imported for that, and for the profiler."""
    import torch

    everywhere: Any = import_module("torch.optim.optimizer")
    has_hooks = any((
        optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks,
        everywhere._global_optimizer_pre_hooks, everywhere._global_optimizer_post_hooks,
    ))  # fmt: skip
    if type(optimizer).__module__.startswith("torch.optim.") and not has_hooks:
        with torch.no_grad():
            inspect.unwrap(type(optimizer).step)(optimizer)
    else:
        optimizer.step()


_Function = TypeVar("_Function", bound=Callable[..., Any])


def leave_uncompiled(function: _Function) -> _Function:
    """Has torch's compiler leave a function alone, as `torch.compiler.disable` does, which would import the compiler
    for that."""
    setattr(function, COMPILER_LEAVES_ALONE, True)
    return function


COMPILER_LEAVES_ALONE = "_torchdynamo_disable"
WRAPPED_FOR_THE_COMPILER = ("add_param_group", "load_state_dict", "state_dict", "zero_grad")
_COMPILER_IS_TOLD = "__dynamo_disable"


def is_at_least(version: tuple[int, int]) -> bool:
    """Whether torch is of this version or a later one."""
    import torch

    major, minor = torch.__version__.split(".")[:2]
    return (int(major), int(minor)) >= version


NCCL_FORMS_WITHOUT_BLOCKING = (2, 12)
"""Since then `eager_connect_single_device` waits for a communicator that is formed so; before, it returned at once, and
the first collective failed with "operation in progress". One that blocks cannot be aborted while it forms."""


def make_nccl(store: Any, rank: int, world_size: int, timeout: timedelta) -> Any:
    """NCCL's process group, not connected yet. Collectives' own timeouts count for nothing there: this one does."""
    import torch.distributed as dist

    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timeout
    options.config.blocking = 0 if is_at_least(NCCL_FORMS_WITHOUT_BLOCKING) else 1
    return dist.ProcessGroupNCCL(store, rank, world_size, options)


def not_to_itself(messages: list[Any], rank: int) -> list[Any]:
    """Those with which a pipeline stage of `rank` tries out its connections, but for those to itself: torch 2.11 has
    two stages of one rank send to each other, which gloo cannot do; newer ones try them out in another way."""
    return [message for message in messages if message.group_peer != rank]


def hand_on_unused(block: Any) -> None:
    """Has FSDP2 reduce zeros in the place of gradients that a pass does not give. Torch 2.11 cannot do that; there such
    a pass is an error (`strategies.model.fsdp`)."""
    if (tell := getattr(block, HANDS_ON_UNUSED, None)) is not None:
        tell(True, recurse=False)


def keep_in(parameter: Any, rows: Any) -> None:
    """Has FSDP2 gather a parameter from these rows [elements, padding included], and from no copy of them."""
    local = parameter.sharded_param._local_tensor
    parameter._sharded_param_data = rows
    parameter.sharded_param._local_tensor = rows.view(local.shape)


HANDS_ON_UNUSED = "set_reduce_scatter_unused_params"
REGISTRIES = (
    "pg_map", "pg_names", "pg_group_ranks", "pg_backend_config", "pg_to_tag", "tags_to_pg", "pg_coalesce_state",
)  # fmt: skip
"""Where c10d keeps what it knows of its groups."""


def forget_groups() -> None:
    """Makes c10d forget all its groups, so that others can be made. Its own ways to do that end the groups too: one
    waits for their peers, the other for each in turn; ours are ended by their transports."""
    c10d: Any = import_module("torch.distributed.distributed_c10d")
    c10d._update_default_pg(None)
    for name in REGISTRIES:
        getattr(c10d._world, name).clear()
    c10d._unregister_all_process_groups()
    c10d._world.group_count = 0


def name_groups(mesh: Any, names: list[Any]) -> None:
    """Gives the groups of a mesh's axes these names, by which compiled and traced code finds them, and forgets those
    that the mesh remembers."""
    from strategies import compat

    for index, name in enumerate(names):
        compat.register_process_group(name, mesh.get_group(index))
    mesh._dim_group_names = names
    mesh._pg_registry = {}
