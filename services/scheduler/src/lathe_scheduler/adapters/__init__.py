"""Concrete forms of the scheduler's ports."""
