"""Hostile inputs for every command: a generator, the processes they run in, and what is right of how they end.

`commands.py` reads the commands and their options from the command line itself, `sources.py` the kinds of files from the table of kinds that
the package reads; `cases.py` makes inputs of both, and `coverage.py` names what has none. To read it, begin with `cases.py`.
"""
