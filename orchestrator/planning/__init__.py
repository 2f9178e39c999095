"""Which layout to train with on a number of ranks: a cost model, and a search over what fits.

`model` says what the job's network costs block by block, `hardware` what a rank can do, `partition` where stages are
cut, `schedule`, `memory` and `step_time` predict a layout, `moved` compares it with the one there is, and `search`
ranks them all. `report` and `command` are the `orchestrator plan` command. Only `model` imports torch, and only when
it is asked for a model's costs; nothing here knows Ray.

The formulas and their sources are in docs/planning.md.
"""
