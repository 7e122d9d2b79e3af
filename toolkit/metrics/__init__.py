"""What is measured: CLIP and DINO similarities of images, answers scored, shares with intervals.

Comes in pure functions of images, embeddings and answers. Imports core and embedded.
"""
