"""The trial of a model, before any layout: what would make results wrong is refused."""
