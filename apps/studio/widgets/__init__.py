"""Groups of boxes that pages are made of: forms from config classes, adapter rows, uploads.

Comes in what has Gradio components and serves more than its own layout. Imports backend and render.
"""
