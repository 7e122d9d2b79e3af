"""Several adapters as one: fixed weights, or mixing coefficients learned on a few samples.

Comes in both kinds of data. Imports subject, instruct and what lies below.
"""
