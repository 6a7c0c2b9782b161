"""What to deploy and what to dispatch: candidates, planners, the dispatcher, the simulator."""
