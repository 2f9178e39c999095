"""What we rely on in Ray and torch without their promise: after an upgrade this says what is gone, and where it was."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import pytest

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
    assert parameters(of_torch.all_reduce)[:2] == ["reduceOp", "group"] or len(parameters(of_torch.all_reduce)) >= 3
    assert "allow_non_fake_inputs" in parameters(of_torch.FakeTensorMode.__init__)
    for method in ("get", "set", "wait", "check", "add", "delete_key", "num_keys", "set_timeout"):
        assert hasattr(of_torch.Store, method), method


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
