"""What is known about a run: event log, step records, metrics, goodput, display. Knows nothing of Ray or torch."""
