"""A run as it happens: its records, its controller's lease, its mailbox. Knows no Ray."""
