"""What is used of Ray that Ray does not promise. It stands here and nowhere else; `tests/unit/test_compat.py` pins what
is relied upon, so that an upgrade of Ray which takes it away is noticed there.

Names are looked up when they are first asked for. (What doctor sends to nodes of a cluster asks for its own, as it runs
where this package may not be: `orchestrator.runtime.ray.examination.node`.)
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

PRIVATE = {
    "AuthenticationMode": "ray._raylet",
    "GcsClient": "ray._raylet",
    "get_authentication_mode": "ray._raylet",
    "GcsNodeInfo": "ray.core.generated.gcs_pb2",
    "GetClusterStatusReply": "ray.core.generated.autoscaler_pb2",
    "Node": "ray._private.node",
    "init_grpc_channel": "ray._private.grpc_utils",
    "internal_kv": "ray.experimental",
    "maybe_enable_token_auth_if_token_available": "ray._private.authentication.authentication_token_setup",
    "services": "ray._private",
    "state": "ray._private.state",
    "worker": "ray._private",
}
"""Where each name is."""


def __getattr__(name: str) -> Any:
    if name not in PRIVATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    parent = import_module(PRIVATE[name])
    try:
        found = getattr(parent, name)
    except AttributeError:  # A module that nobody has imported yet.
        found = import_module(f"{PRIVATE[name]}.{name}")
    globals()[name] = found
    return found


def generated(name: str) -> Any:
    """A module of Ray's generated gRPC code, which declares no types."""
    return import_module(f"ray.core.generated.{name}")


def session_dir() -> str:
    """The directory of the session that this process belongs to."""
    return str(__getattr__("worker")._global_node.get_session_dir_path())


def silence_worker_output() -> None:
    """Keeps Ray from printing what workers print, and a paragraph for every dead one."""
    __getattr__("worker").print_to_stdstream = lambda *arguments, **options: None
