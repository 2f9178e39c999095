"""How many positions a loss is computed for at a time. No torch, so that the schema of jobs may know it."""

CHUNK_TOKENS = 1024
"""Unless the job says otherwise. Part of a run's numerics: sums are made in chunks."""
