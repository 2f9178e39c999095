"""The training state: what a rank holds of it, and how that moves, is saved and read."""
