"""HTML, curves and image grids made from data.

Comes in pure drawing. Imports nothing else of the studio.
"""
