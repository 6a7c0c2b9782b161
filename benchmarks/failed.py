"""What a benchmark raises that was to prove something and did not."""


class Failed(Exception):
    """Says what was not proven; the command then ends with 1."""
