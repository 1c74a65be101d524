"""The action queue: takes Execute calls from clients and gives actions to workers."""

__version__ = "0.1.0"
