"""Runs: each module has one `get_config()`; its docstring is the command that starts it."""
