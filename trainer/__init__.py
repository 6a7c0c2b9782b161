"""Running it: launch, placement, step loop, adapter optimisation, checkpoints, metrics."""
