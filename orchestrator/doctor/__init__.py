"""`orchestrator doctor`: what is measured, and what is thought of it. Knows nothing of Ray."""
