"""How a run survives: errors, signals, whole files, weights, checkpoints, processes."""
