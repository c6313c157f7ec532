"""Where `mfjax launch` can start a command: a module each.

A target is a module with a docstring, flags of its own (registered when it is imported) and
`run(command: Sequence[str]) -> int`, where `command` is what would follow `mfjax` on one machine.
"""
