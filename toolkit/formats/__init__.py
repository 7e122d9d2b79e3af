"""Adapter files of every origin: read, reported on, written; PEFT's merges.

Comes in what knows how a file names its tensors. Imports core, adapters and diffusion.
"""
