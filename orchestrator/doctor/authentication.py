"""Verdicts on authentication: the mode, the token, who else can read it, and whether the cluster agrees."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from monitoring.secret_files import others
from orchestrator.doctor.check import CLUSTER, HERE, NOTE, OK, PROBLEM, WARNING, Check

MODES = (None, "disabled", "token")
NAME = "authentication"


def judge_token(facts: Mapping[str, Any], *, to_cluster: bool) -> list[Check]:
    """How this process authenticates itself, by `doctor.facts.token_facts`. A problem here means that Ray would refuse
    to start, or, `to_cluster`, to connect."""
    mode = (facts["mode"] or "").lower() or None
    if mode not in MODES:
        return [Check(NAME, HERE, PROBLEM, f"RAY_AUTH_MODE is {facts['mode']!r}, which Ray takes for disabled",
                      "set it to token or to disabled")]  # fmt: skip
    if mode == "disabled":
        return [Check(NAME, HERE, NOTE, "off (RAY_AUTH_MODE=disabled): anyone who reaches Ray's ports can run code")]
    if "error" in facts:
        return [Check(NAME, HERE, PROBLEM, f"no token in {facts['path']} (RAY_AUTH_TOKEN_PATH): {facts['error']}",
                      "write the cluster's token there, or unset RAY_AUTH_TOKEN_PATH")]  # fmt: skip
    if facts["source"] is None:
        if mode == "token" and to_cluster:
            return [Check(NAME, HERE, PROBLEM, "RAY_AUTH_MODE is token, and there is no token",
                          "copy the cluster's token to ~/.ray/auth_token, or name its file by "
                          "RAY_AUTH_TOKEN_PATH")]  # fmt: skip
        text = "no token; a cluster that asks for one would refuse" if to_cluster else (
            "no token yet; Ray makes one in ~/.ray/auth_token when it starts here")  # fmt: skip
        return [Check(NAME, HERE, NOTE, text)]
    source = facts["path"] or facts["source"]
    checks = [Check(NAME, HERE, OK, f"token from {source}" + (f" ({facts['source']})" if named(facts) else ""))]
    if facts["file_mode"] is not None:
        checks.append(_judge_file(facts["path"], facts["file_mode"]))
    return checks


def named(facts: Mapping[str, Any]) -> bool:
    return bool(facts["source"] == "RAY_AUTH_TOKEN_PATH")


def _judge_file(path: str, file_mode: int) -> Check:
    if who := others(file_mode):
        return Check("token file", HERE, WARNING, f"{path} has mode {file_mode:o}: open to {who}",
                     f"chmod 600 {path}: who has the token can run code on the cluster")  # fmt: skip
    return Check("token file", HERE, OK, f"{path} has mode {file_mode:o}")


def judge_modes(here: str, nodes: Mapping[str, str]) -> list[Check]:
    """Whether the nodes ask for a token, and whether this process sends one; modes are token or disabled."""
    asking = [node for node, mode in nodes.items() if mode == "token"]
    if not nodes:
        return []
    if asking and len(asking) < len(nodes):
        return [Check(NAME, node, PROBLEM, "asks for no token, other nodes do",
                      "start Ray on every node with RAY_AUTH_MODE=token")
                for node in nodes if node not in asking]  # fmt: skip
    if asking:
        return [Check(NAME, CLUSTER, OK, "every node asks for the token")]
    differs = "; here it is on (RAY_AUTH_MODE=token or a token file), there it is off" if here == "token" else ""
    return [Check(NAME, CLUSTER, WARNING, f"off: anyone who reaches the cluster's ports can run code on it{differs}",
                  "start Ray on every node with RAY_AUTH_MODE=token and the same token, or keep its ports behind a "
                  "firewall")]  # fmt: skip


def judge_refusal(mode_here: str, source: str | None) -> Check:
    """What to say when the cluster does not take what we sent."""
    if mode_here == "disabled":
        return Check(NAME, CLUSTER, PROBLEM, "the cluster asks for a token, and none is sent from here",
                     "set RAY_AUTH_MODE=token and put the cluster's token into ~/.ray/auth_token (or name its file by "
                     "RAY_AUTH_TOKEN_PATH)")  # fmt: skip
    return Check(NAME, CLUSTER, PROBLEM, f"the cluster refuses the token from {source or 'here'}",
                 "use the cluster's own: `ray get-auth-token` on its head prints it")  # fmt: skip
