"""The canonical reduction: sums whose bits do not depend on who computed what."""
