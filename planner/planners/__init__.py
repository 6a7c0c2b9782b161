"""The planners: each a small module, all behind ``planner.planners.base``."""
