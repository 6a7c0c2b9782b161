"""What to deploy and what to dispatch: buckets, planners, the dispatcher, the simulator."""
