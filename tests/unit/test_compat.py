"""What we rely on in Ray and torch without their promise: after an upgrade this says what is gone, and where it was."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import pytest
from torch.distributed.pipelining import PipelineStage

from orchestrator.runtime.ray import compat as of_ray
from strategies import compat as of_torch


@pytest.mark.parametrize("name", of_torch.PRIVATE)
def test_torch_has_it(name: str) -> None:
    assert getattr(of_torch, name) is not None


@pytest.mark.parametrize("name", of_ray.PRIVATE)
def test_ray_has_it(name: str) -> None:
    assert getattr(of_ray, name) is not None


@pytest.mark.parametrize("module", [of_torch, of_ray])
def test_nothing_else_is_made_up(module: Any) -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        module.nothing  # noqa: B018


def parameters(function: Any) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name != "self"]


def test_torchs_have_the_shape_that_is_used() -> None:
    assert parameters(of_torch.AllGather.__call__)[:3] == ["output_tensor", "input_tensor", "group"]
    assert parameters(of_torch.ReduceScatter.__call__)[:3] == ["output_tensor", "input_tensor", "group"]
    assert of_torch.AllGather.__abstractmethods__ == {"allocate", "__call__"}
    assert parameters(of_torch.all_reduce)[:2] == ["reduceOp", "group"]
    assert "allow_non_fake_inputs" in parameters(of_torch.FakeTensorMode.__init__)
    assert hasattr(PipelineStage, "_get_init_p2p_neighbors_ops")
    for method in ("get", "set", "wait", "check", "add", "delete_key", "num_keys", "set_timeout"):
        assert hasattr(of_torch.Store, method), method


def test_the_torch_that_is_pinned_hands_on_gradients_that_a_pass_does_not_give() -> None:
    from torch.distributed.fsdp import FSDPModule

    assert hasattr(FSDPModule, of_torch.HANDS_ON_UNUSED) or not of_torch.is_at_least((2, 13))


def test_c10d_forgets_groups_as_if_there_had_never_been_any() -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    c10d: Any = importlib.import_module("torch.distributed.distributed_c10d")
    tables = {name for name, value in vars(c10d._world).items() if isinstance(value, dict)}
    for _ in range(2):
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
        mesh = init_device_mesh("cpu", (1, 1))
        assert mesh.size() == 1
        of_torch.forget_groups()
        assert not dist.is_initialized()
        assert [name for name in tables if getattr(c10d._world, name)] == []
        assert {name for name in of_torch.REGISTRIES if not hasattr(c10d._world, name)} == set()


def test_torchs_optimizers_are_wrapped_as_they_were_when_that_was_worked_around() -> None:
    import torch

    for name in of_torch.WRAPPED_FOR_THE_COMPILER:
        assert hasattr(getattr(torch.optim.Optimizer, name), "__wrapped__"), name
    for kind in (torch.optim.AdamW, torch.optim.SGD):
        assert parameters(inspect.unwrap(kind.step)) == ["closure"]


@pytest.mark.parametrize("kind", ["AdamW", "SGD"])
def test_a_step_without_what_surrounds_it_is_the_step(kind: str) -> None:
    import torch

    found = []
    for way in (of_torch.step, lambda optimizer: optimizer.step()):
        parameter = torch.nn.Parameter(torch.linspace(-1.0, 1.0, 7))
        optimizer = of_torch.build_optimizer(lambda p=parameter: getattr(torch.optim, kind)([p], lr=0.1, fused=True))
        for factor in (1.0, -0.3):
            parameter.grad = factor * torch.arange(7.0)
            way(optimizer)
        found.append(parameter.detach())
    assert torch.equal(*found)


def test_a_step_with_hooks_calls_them() -> None:
    import torch

    optimizer = of_torch.build_optimizer(lambda: torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1))
    calls: list[Any] = []
    optimizer.register_step_pre_hook(lambda *arguments: calls.append("before"))
    of_torch.step(optimizer)
    optimizer = of_torch.build_optimizer(lambda: torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1))
    everywhere: Any = importlib.import_module("torch.optim.optimizer")
    hook = everywhere.register_optimizer_step_post_hook(lambda *arguments: calls.append("after"))
    try:
        of_torch.step(optimizer)
    finally:
        hook.remove()
    assert calls == ["before", "after"]


def test_an_optimizer_of_somebody_elses_makes_its_own_step() -> None:
    import torch

    class Counted(torch.optim.SGD):
        steps = 0

        def step(self, closure: Any = None) -> None:
            self.steps += 1

    optimizer = Counted([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    of_torch.step(optimizer)
    assert optimizer.steps == 1


def test_rays_have_the_shape_that_is_used() -> None:
    inner = importlib.import_module("ray._raylet").InnerGcsClient
    for method in ("get_all_node_info", "get_cluster_status"):
        assert hasattr(inner, method), method
    for name in ("canonicalize_bootstrap_address", "canonicalize_bootstrap_address_or_die", "find_node_ids"):
        assert hasattr(of_ray.services, name), name
    for name in ("get_draining_nodes", "available_resources_per_node"):
        assert hasattr(of_ray.state, name), name
    for name in ("put", "get", "list", "del"):
        assert "namespace" in parameters(getattr(of_ray.internal_kv, f"_internal_kv_{name}")), name
    for name in ("start_log_monitor", "start_monitor", "start_api_server"):
        assert hasattr(of_ray.Node, name), f"{name}: a local Ray starts processes that have nothing to do"
    assert hasattr(of_ray.worker, "print_to_stdstream"), "Ray prints a paragraph for every dead worker"
    assert hasattr(of_ray.worker, "_global_node")
    assert of_ray.AuthenticationMode.TOKEN is not None
    assert of_ray.GcsNodeInfo.GcsNodeState.ALIVE == 0
    for module, name in (
        ("gcs_service_pb2_grpc", "NodeInfoGcsServiceStub"), ("autoscaler_pb2_grpc", "AutoscalerStateServiceStub"),
    ):  # fmt: skip
        assert hasattr(of_ray.generated(module), name), name
