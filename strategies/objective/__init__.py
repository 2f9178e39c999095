"""What a model is trained for: its samples, their labels, its loss."""
