"""How a run survives: errors, signals, files, weights, checkpoints, processes. Imports nothing above it."""
