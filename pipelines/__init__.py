"""Whole tasks with a trained adapter: images, captions and answers made, adapters exported and proven.

Comes in what a library call does from inputs to outputs. Imports toolkit only.
"""
