"""Every setting of every method: frozen dataclasses, read from the command line or YAML, written to every run folder.

Comes in what can be checked without files or models. Imports core; peft_config also the adapter registry. No heavy library is
imported, so that help answers at once.
"""
