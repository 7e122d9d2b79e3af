"""What adapters are worth: subjects and answers measured, before and while training, and the pages that show it.

Comes in what scores outputs. Imports engine (for several processes) and config.
"""
