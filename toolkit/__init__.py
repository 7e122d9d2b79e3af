"""What can be said about one tensor, one weight, one image, one file.

Rooms, from the bottom up: core; adapters, data, embedded; diffusion, vlm, metrics; formats. Nothing here knows of training runs' methods
or of user interfaces.
"""
