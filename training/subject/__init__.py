"""Subject-driven training of diffusion models: cached images, batches, the denoising loss, the task.

Comes in what needs images and a denoiser. Imports evaluation, engine and config.
"""
