"""The search of each layer's GLoRA structure: supernet, evolution, report.

Comes in both kinds of data. Imports subject, instruct and what lies below.
"""
