"""The one training loop, its schedules and its checkpoints; both systems train with it."""
