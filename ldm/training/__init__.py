"""The one training loop, its checkpoints, and the two objectives."""
