"""Runs actions in sandboxes: fetches inputs, starts the command, uploads what it made."""

__version__ = "0.1.0"
