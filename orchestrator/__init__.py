"""The driver of an elastic training run: what runs where, and when that changes."""
