"""The one room that knows Ray: a thin adapter between its world and ours."""
