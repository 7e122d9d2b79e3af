"""Data of users, read and checked: images, subjects with captions, conversations.

Comes in what turns files into samples. Imports core only.
"""
