"""Versions: the same everywhere, and those that this package asks for."""

from __future__ import annotations

import importlib.metadata
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orchestrator.doctor.check import OK, PROBLEM, WARNING, Check

REINSTALL = "install the same elastic-orchestrator, with its dependencies, on every node (setup_commands or the image)"


def requirements() -> dict[str, str]:
    """What this package asks of python, ray and torch, as version specifiers; from its metadata, or else from the
    pyproject.toml beside it."""
    from packaging.requirements import Requirement

    try:
        metadata = importlib.metadata.metadata("elastic-orchestrator")
        python, asked = metadata["Requires-Python"], metadata.get_all("Requires-Dist") or []
    except importlib.metadata.PackageNotFoundError:
        try:
            project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))[
                "project"
            ]
        except OSError:
            return {}
        python, asked = project["requires-python"], project["dependencies"]
    parsed = {requirement.name: requirement for requirement in map(Requirement, asked)}
    return {"python": str(python)} | {name: str(parsed[name].specifier) for name in ("ray", "torch") if name in parsed}


def judge_versions(
    facts: Mapping[str, Mapping[str, Any]], asked: Mapping[str, str], reference: str | None = None
) -> list[Check]:
    """A check for each machine, by its facts; against what is `asked`, and against the `reference` machine."""
    return [_judge(node, own, asked, facts.get(reference) if reference else None) for node, own in facts.items()]


def _judge(node: str, facts: Mapping[str, Any], asked: Mapping[str, str], reference: Mapping[str, Any] | None) -> Check:
    own = _versions(facts)
    wrong = [text for name, specifier in asked.items() if (text := _outside(name, own.get(name), specifier))]
    wrong += [f"no {name}" for name, version in own.items() if version is None and name not in asked]
    doubtful: list[str] = []
    if reference is not None:
        for name, there in _versions(reference).items():
            here = own.get(name)
            if here is not None and there is not None and here != there:
                text = f"{name} {here}, but {there} where you are"
                (wrong if _differs_badly(name, here, there) else doubtful).append(text)
        if not wrong and None not in (facts["code"], reference["code"]) and facts["code"] != reference["code"]:
            wrong.append(f"other sources of elastic-orchestrator ({facts['code']}) than where you are "
                         f"({reference['code']})")  # fmt: skip
    if wrong or doubtful:
        return Check("versions", node, PROBLEM if wrong else WARNING, "; ".join(wrong or doubtful), REINSTALL)
    return Check("versions", node, OK, ", ".join(f"{name} {version}" for name, version in own.items()))


def _versions(facts: Mapping[str, Any]) -> dict[str, str | None]:
    return {"python": facts["python"], **facts["packages"]}


def _outside(name: str, version: str | None, specifier: str) -> str | None:
    from packaging.specifiers import SpecifierSet

    if version is None:
        return f"no {name}, which has to be {specifier}"
    # A build label (+cpu) or a pre-release is not what the bounds are about.
    if SpecifierSet(specifier).contains(version.partition("+")[0], prereleases=True):
        return None
    return f"{name} {version}, which has to be {specifier}"


def _differs_badly(name: str, one: str, other: str) -> bool:
    """Whether two versions do not work together; else they only may not give the same numbers, or not be meant."""
    if "importable" in one or "importable" in other:
        return False
    if name == "python":
        return one.split(".")[:2] != other.split(".")[:2]
    return one.partition("+")[0] != other.partition("+")[0]
