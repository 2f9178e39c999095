"""The model that a rank computes with: cut into stages, split over ranks, sharded."""
