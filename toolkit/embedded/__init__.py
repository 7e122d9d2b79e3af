"""The models that ship with rankfold: the drawn world that they know, and their architectures.

Comes in what training/embedded builds and evaluation asks about. Imports core only.
"""
