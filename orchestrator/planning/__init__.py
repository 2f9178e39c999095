"""Which layout to train with on a number of ranks: a cost model, and a search over what fits.

`work` says what a job asks, `hardware` and `assume` what a rank can do, `partition` and `stages` where a model is cut,
`memory` and `step_time` predict a layout, `possible` what a job or its model rules out, `moved` compares a layout with
the one there is, and `search` ranks them all. `choose` and `balance` are what a run's controller asks; `command`,
`tables`, `refusals` and `calibrate` are the `orchestrator plan` command. What a network costs block by block is
`orchestrator.models.costs`, which imports torch when it is asked; nothing here knows Ray.

The formulas and their sources are in docs/planning.md.
"""
