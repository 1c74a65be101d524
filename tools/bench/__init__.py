"""Measure what the services serve: ``make bench``.

Each row of the table is one kind of call, made by a client process against one server process, on both HTTP/2 engines
in turn. ``docs/benchmarks.md`` says what the rows mean and how to read them.
"""
