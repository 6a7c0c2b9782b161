"""Errors, files, locks, checks: what every package uses."""
