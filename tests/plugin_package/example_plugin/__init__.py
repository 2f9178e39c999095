"""What a package of a user's own may bring; see docs/contributing.md."""
