"""What is agreed in the vote at the end of a step: what any rank wants happens on all, and a deal when all know it."""

from __future__ import annotations

from strategies.comm.fabric import Fabric
from strategies.layout.placement import Domain
from strategies.layout.statemap import whole
from strategies.update.vote import PAUSE, SAVE, SAVING, Agreement
from tests.ranks.laid_out import CPU, barrier, layout_of, make_engine
from tests.ranks.local_ranks import HOST, PATIENCE_S, Endpoint, run_ranks

DEAL = ((0, 1, 2, 3, 4), (5, 6), (7,))


def wishes(rank: int, address: Endpoint) -> list[Agreement]:
    """Of five steps: nobody wants anything; rank 1 a pause; rank 2 to save; rank 0 alone knows a deal; all know it."""
    engine = make_engine()
    layout = layout_of(3)
    fabric = Fabric(rank=rank, layout=layout, device=CPU)
    fabric.form(store_address=address, prefix="wishes", host=HOST, timeout_s=PATIENCE_S)
    found = []
    try:
        held = [whole(engine.state.space.size, 1)] * 3
        domains = [Domain("", str(number)) for number in range(3)]
        engine.state.adopt_layout(layout, fabric, held, domains, 1, 0, lambda: barrier(fabric))
        engine.bind(fabric, layout, 0)
        for step in range(6):
            engine.pause_requested = (step, rank) == (1, 1)
            engine.save_requested = (step, rank) == (2, 2)
            if step == 4 or (step, rank) == (3, 0):
                engine.offer(1, DEAL)
            (record,), agreement = engine.run(step)
            assert record.deal == (1 if step == 5 else 0), "a deal is taken up in the step after that in which all knew"
            found.append(agreement)
    finally:
        fabric.drop()
    return found


def test_one_ranks_wish_is_all_ranks_agreement() -> None:
    agreements = run_ranks(3, wishes)
    assert agreements[0] == agreements[1] == agreements[2]
    nothing = Agreement()
    assert agreements[0][:3] == [nothing, Agreement(pause=True), Agreement(save=True)]
    assert [agreement.deal for agreement in agreements[0]] == [0, 0, 0, 0, 1, 1]


def test_an_agreement_is_of_all_wishes() -> None:
    assert Agreement.of(PAUSE | SAVING, {0}) == Agreement(pause=True, saving=True)
    assert Agreement.of(SAVE, {3}) == Agreement(save=True, deal=3)
    assert Agreement.of(0, {2, 3}).deal == 0, "as long as they do not know the same"
