"""The commands: typed functions, whose parameters and their docstrings are the options."""
