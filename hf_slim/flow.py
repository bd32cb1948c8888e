"""Placeholder."""


class UnreadableError(Exception):
    """No."""


def read_flow(module, structure):
    """No."""
    raise UnreadableError("its code is not read yet")
