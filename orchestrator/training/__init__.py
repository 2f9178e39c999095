"""The worker: one process that is a rank of generation after generation, and what it and a controller say."""
