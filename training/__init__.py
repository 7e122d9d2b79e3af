"""Training runs of every method, from config to adapter.

Rooms, from the bottom up: config; runs; engine; evaluation; subject, instruct; compose, search; launch; embedded.
Imports pipelines and toolkit.
"""
