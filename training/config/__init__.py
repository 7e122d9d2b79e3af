"""Every setting of every method, with its meaning and its limits.

Comes in what can be checked without files or models. Imports core; peft_config also the adapter registry.
"""
