"""One file for each page: what it shows, and what its events do.

Comes in a page's layout and handlers. Imports widgets, backend and render; no page imports another.
"""
