"""The embedded models built from scratch, and the demos on them.

Comes in what only serves the models that ship with rankfold. Imports launch.
"""
