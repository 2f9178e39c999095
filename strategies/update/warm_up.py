"""Before there is a layout: a first pass through the model, and how fast this device is."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable

import torch

from strategies.gradient.compute import LocalGradients
from strategies.layout.space import FlatRanges
from strategies.state.shard import StateShard
from strategies.trial.probe import probe_layer, probe_model
from strategies.update.engine import StepEngine


def warm_up(engine: StepEngine, *, keep: bool) -> str:
    """Passes over a micro-batch, their results thrown away: through the whole model, whose memory is kept, with `keep`
    (in every layout of the job a rank computes with all of it), and else through a layer of it, as the whole may not
    fit. The digest of what they compute (see `strategies.trial.probe`).

    An optimizer makes an update, too: whatever it imports with its first one, no step should wait for. Memory of this
    host that is free afterwards is given back, before the state comes.

    Raises as `LocalGradients.warm_up` does, and DeviceFailed for a device that does not compute the same twice.
    """
    found = _warm_up(engine, keep=keep)
    give_back_memory()
    return found


def _warm_up(engine: StepEngine, *, keep: bool) -> str:
    state = engine.state
    one = FlatRanges.of([(0, 1)], state.space.boundary)
    StateShard(0, one, state.spec, state.device).apply(engine.spec.base_lr)
    if not keep and state.blueprint.layers is not None and not state.blueprint.cannot_cut:
        try:
            return probe_layer(state.blueprint, engine.spec, engine.loads.source(0, 0).tokens.shape[1] - 1)
        except (ValueError, AttributeError, LookupError, TypeError):
            # No layer of it can be computed by itself, and no layout of the job asks for that.
            return ""
    if state.space.tensor > 1:
        return ""
    part = state.whole_part()
    local = LocalGradients(part, engine.spec, engine.loads.fetch, engine.watch)
    local.warm_up()
    found = probe_model(local)
    if keep:
        engine.local = local
    else:
        part.close()
        state.arrangement.part = None
    return found


def give_back_memory() -> None:
    """Trials of a model leave hundreds of megabytes that the C library would keep; other ones give them back by
    themselves, or cannot."""
    if (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)


def calibrate(engine: StepEngine) -> float:
    """Seconds that this device needs for a fixed piece of work, to compare it with others before they have trained: a
    virtual worker where the whole model can be computed with alone, else products of matrices.

    On a CPU it is time of its processor, as the machine may be busy with starting other workers.
    """
    device, local = engine.state.device, engine.local
    if local is not None and engine.state.arrangement.part is local.part:
        return min(_seconds_of(local.try_out, device) for _ in range(4)) * engine.spec.micro_batches
    matrix = torch.ones((512, 512), device=device)

    def multiply() -> None:
        for _ in range(8):
            torch.mm(matrix, matrix)

    multiply()
    return min(_seconds_of(multiply, device) for _ in range(4))


def _seconds_of(work: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        started = time.perf_counter()
        work()
        torch.cuda.synchronize(device)
        return time.perf_counter() - started
    started = time.process_time()
    work()
    return time.process_time() - started
