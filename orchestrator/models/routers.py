"""The loss of a mixture's routers, as a job and its model's configuration say it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from orchestrator.models.configuration import COEFFICIENTS
from orchestrator.models.problems import refused
from strategies.gradient.router_loss import RouterLossSpec
from strategies.model.routers import Routers

if TYPE_CHECKING:
    from torch import nn

    from orchestrator.job import Job


def routers_of(job: Job, model: nn.Module) -> Routers | None:
    """None for a model without a mixture, or of whose routers' choices transformers makes no loss.

    Raises ModelError when the job wants a loss of them that there is not.
    """
    config: Any = getattr(model, "config", None)
    asks = bool(getattr(config, "output_router_logits", False))
    if hasattr(config, "model_type"):
        from orchestrator.models.transformers_internals import balances_as_usual, router_places

        places = router_places(model)
        known: Any = model
        _refuse_unused(job, asks=asks)
        if places and balances_as_usual(model) and hasattr(model, "num_experts"):
            _refuse_padding(job, asks=asks)
            balance = float(next((getattr(known, key) for key in COEFFICIENTS if hasattr(known, key)), 0.0))
            return Routers(places, known.num_experts, known.num_experts_per_tok, balance, are_balanced=asks)
    name = type(model).__name__
    if job.train.router_loss is not None:
        raise refused(
            f"{name} has no routers whose choices transformers makes a loss of; leave it out", "train.router_loss"
        )
    if asks:
        raise refused(
            f"output_router_logits is true, and what {name} makes of it is not the loss that other mixtures have, and "
            "that is the one which is computed here; set it to false"
        )
    return None


def _refuse_unused(job: Job, *, asks: bool) -> None:
    hf = job.model.hf
    given = [key for key in COEFFICIENTS if isinstance(hf, dict) and hf.get(key)]
    if given and not asks and job.train.router_loss is None:
        raise refused(
            "it is used only with output_router_logits: true beside it, or with train.router_loss; set one of them",
            f"model.hf.{given[0]}",
        )


def _refuse_padding(job: Job, *, asks: bool) -> None:
    if job.data.packing == "pad" and (asks or job.train.router_loss is not None):
        raise refused(
            "packing: pad makes micro-batches of many lengths, and a mixture's router loss is the mean over those of "
            "one; use packing: pack, or do without the loss",
            "data.packing", "train.router_loss",
        )  # fmt: skip


def keep_quiet(model: nn.Module) -> None:
    """A model need not make a loss of its routers' choices itself."""
    config: Any = getattr(model, "config", None)
    for part in (config, config.get_text_config()) if hasattr(config, "get_text_config") else ():
        if getattr(part, "output_router_logits", False):
            part.output_router_logits = False


def router_loss_spec(job: Job) -> RouterLossSpec:
    """What the job says of it."""
    asked, virtual_workers = job.train.router_loss, job.elastic.virtual_workers
    if asked is None:
        return RouterLossSpec(virtual_workers)
    return RouterLossSpec(virtual_workers, asked.over, asked.balance, asked.z, is_asking=True)
