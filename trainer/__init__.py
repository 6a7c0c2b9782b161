"""Running it: launch, coordinator and engines, adapter optimisation, checkpoints, records."""
