"""Vision-language models: found and loaded, their parts by name, conversations as tokens and labels.

Comes in what turns a conversation into a training sample. Imports core and data.
"""
