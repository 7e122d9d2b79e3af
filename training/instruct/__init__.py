"""Visual instruction tuning: planned conversations, their batches, the task.

Comes in what needs conversations and a vision-language model. Imports evaluation, engine and config.
"""
