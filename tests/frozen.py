"""Imported last by a server of forks: what is there by then, its children's garbage collector leaves alone.

A collection looks at every object, with the interpreter's lock held; of a process that has transformers (and with it
scipy, where that is installed) loaded it takes long enough, on a busy machine, for heartbeats to be missed.
"""

from __future__ import annotations

import gc

gc.collect()
gc.freeze()
