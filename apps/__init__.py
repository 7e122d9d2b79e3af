"""What people touch: the command line and the studio in the browser.

Comes in no logic that a library user would miss. Imports training, pipelines and toolkit.
"""
