"""How a step becomes an update: prepare, vote, commit."""
