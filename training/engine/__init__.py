"""The training loop and what it needs: optimizer, processes, sharding, progress.

Comes in what every method shares; nothing here knows images from conversations. Imports config.
"""
