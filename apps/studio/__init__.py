"""The studio in the browser: build.py puts the pages together.

Rooms, from the bottom up: render; backend; widgets; pages. Runs are written as folders and read from folders.
"""
