"""Training's decisions: progress, generations, where the state is, checkpoints, the end of a run."""
