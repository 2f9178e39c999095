"""Checkpoints: the training state on storage. A simple, correct, atomic full save for now."""
