"""Run folders as the commands see them: where a run may begin; the library of trained adapters.

Comes in what reads or clears folders without training anything. Imports config.
"""
