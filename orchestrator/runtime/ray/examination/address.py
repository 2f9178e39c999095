"""Whether a Ray cluster answers at an address, and takes us: before `ray.init`, which may wait for minutes."""

from __future__ import annotations

import socket
import time

from ray.exceptions import AuthenticationError, RayError

from orchestrator.doctor.authentication import judge_refusal
from orchestrator.doctor.check import CLUSTER, OK, PROBLEM, Check
from orchestrator.runtime.ray import compat

CONNECT_S = 5.0
NAME = "address"


def mode_here() -> str:
    """How this process authenticates itself: token or disabled. Asked of Ray, which takes a token that it finds also
    when nobody said so."""
    compat.maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
    return "token" if compat.get_authentication_mode() == compat.AuthenticationMode.TOKEN else "disabled"


def find_cluster(address: str, token_source: str | None) -> tuple[str | None, list[Check]]:
    """The cluster's "host:port" if it answers, else None; and what was found.

    `address` is host:port, or auto for the cluster that this machine is a node of.
    """
    try:
        resolved = compat.services.canonicalize_bootstrap_address(address)
    except (ConnectionError, OSError, ValueError) as error:
        return None, [_problem(f"{address}: {str(error).splitlines()[0]}", _advice(address))]
    if resolved is None:
        return None, [_problem(f"{address}: no Ray runs on this machine", _advice(address))]
    host, _, port = resolved.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_S).close()
    except ConnectionRefusedError:
        return None, [_problem(f"nobody listens at {resolved}", _advice(address))]
    except TimeoutError:
        found = f"{resolved} does not answer within {CONNECT_S:.0f} s"
        return None, [_problem(found, "see that the head runs, and that no firewall is between here and its port")]
    except OSError as error:
        return None, [_problem(f"{resolved}: {error.strerror or error}", _advice(address))]
    mode = mode_here()
    begin = time.monotonic()
    try:
        compat.GcsClient(address=resolved).get_all_node_info(timeout=CONNECT_S)
    except AuthenticationError:
        return None, [judge_refusal(mode, token_source)]
    except RayError as error:
        found = f"{resolved} is no healthy GCS: {str(error).splitlines()[0]}"
        return None, [_problem(found, "see gcs_server.out in the logs of the head")]
    took_ms = (time.monotonic() - begin) * 1e3
    return resolved, [Check(NAME, CLUSTER, OK, f"the GCS at {resolved} answers in {took_ms:.0f} ms")]


def _problem(found: str, advice: str) -> Check:
    return Check(NAME, CLUSTER, PROBLEM, found, advice)


def _advice(address: str) -> str:
    if address == "auto":
        return "start Ray on this machine, or say where the head is with --address HOST:6379"
    return "see that the head runs (`ray status` there), and that this is its GCS: HOST:6379 if not chosen otherwise"
