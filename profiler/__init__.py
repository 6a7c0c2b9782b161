"""What it costs: memory and time profiles, their measurement and estimation, the cost model."""
