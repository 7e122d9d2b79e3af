"""Runs of any method checked, planned, started, resumed, queued and cross-validated.

Comes in what chooses a method's task by its config. Imports every method.
"""
