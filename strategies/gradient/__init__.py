"""What a rank computes of a step: gradients, in every kind of layout."""
