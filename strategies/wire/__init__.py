"""What ranks send each other in place of fp32, and what is rounded off by that."""
