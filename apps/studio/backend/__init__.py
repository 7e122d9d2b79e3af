"""What lies behind the pages: checked paths, the loaded pipeline, recipes, what all pages share (context.py).

Comes in what has no Gradio component. Imports render only within the studio.
"""
