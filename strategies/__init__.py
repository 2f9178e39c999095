"""How one training step is computed by a set of ranks.

Torch only: this package knows process groups, tensors and optimizers, and nothing of Ray, files, job files or clocks.
It holds the ideas the platform's promise hangs on: virtual workers, one canonical reduction, the step as a
transaction, and state as a map from chunks to holders.
"""
