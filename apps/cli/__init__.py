"""The command line: a file for each command, the table of all in commands.py.

Comes in reading options and printing results. Heavy libraries are imported inside the commands.
"""

from .entry import main

__all__ = ["main"]
