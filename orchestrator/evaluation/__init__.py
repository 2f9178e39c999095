"""Evaluation: on what, when, and what is made of it. What it takes to compute is `strategies.update.evaluation`."""
