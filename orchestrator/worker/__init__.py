"""One rank: builds the model, runs the step loop, joins and leaves generations. Knows nothing of Ray."""
