"""What everything else stands on: errors, files, paths, devices, randomness, caches, run folders, the terminal.

Comes in what has no idea of adapters, models or data. Imports nothing of rankfold outside this folder.
"""
