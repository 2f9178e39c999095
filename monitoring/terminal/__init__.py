"""A run in a terminal: the facts, the lines they make, a screen of them that is kept up to date."""
