"""Diffusion models: found, loaded and called; noise, losses, textual inversion.

Comes in what is true of every family; what differs is in families/. Imports core only.
"""
