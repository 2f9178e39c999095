"""The live page: a view model folded from a run's files, and a small web server that shows it. Only reads."""
