"""In which group of the Advanced settings each setting stands."""

from __future__ import annotations

from collections.abc import Sequence

GROUPS: dict[str, tuple[str, ...]] = {
    "Adapter": (
        "adapter", "rank", "alpha", "dropout", "target_modules", "target_parts", "blocks", "rank_pattern", "vision_alpha",
        "train_text_encoder", "text_target_modules", "num_vectors", "train_projector", "freeze", "start_from",
        "training_adapter",
    ),
    "Learning": (
        "learning_rate", "text_learning_rate", "vision_learning_rate", "projector_learning_rate", "lr_pattern", "lora_plus_ratio",
        "lr_scheduler", "lr_warmup_steps", "optimizer", "weight_decay", "max_grad_norm", "ema_decay", "batch_size",
        "gradient_accumulation", "epochs", "seed",
    ),
    "Data": (
        "resolution", "extra_resolutions", "crop", "flip", "masks", "unmasked_weight", "also", "caption_dropout", "caption_orders",
        "skip_bad", "max_left_out", "split", "columns", "learn_turns", "more_data", "replay", "replay_share", "max_pixels",
        "min_pixels", "video_frames", "max_length", "truncate", "pad_to_square", "chat_template", "group_by_length", "packing",
    ),
    "What the base keeps": ("preservation_weight", "prior_weight", "prior_folder", "prior_images"),
    "Noise and loss": ("min_snr_gamma", "debiased", "noise_offset", "timestep_sampling", "timestep_shift"),
    "Previews and measuring": (
        "preview_every", "preview_prompts", "preview_base", "preview_steps", "preview_rows", "preview_tokens", "guidance_scale",
        "evaluate_every", "evaluate_images", "evaluate_data", "evaluate_answers", "hold_out", "evaluate_prompts", "evaluate_clip",
        "keep", "patience",
    ),
    "Memory and speed": (
        "precision", "quantize", "gradient_checkpointing", "compile", "attention", "shard_base", "blocks_to_swap", "threads",
        "workers",
    ),
    "Logging and checkpoints": ("log_every", "checkpoint_every", "keep_checkpoints", "export", "tracker"),
}  # fmt: skip
OTHERS = "More"


def grouped(names: Sequence[str]) -> dict[str, list[str]]:
    """Settings by group, in the order of the groups; what stands in none comes last."""
    known = {name for own in GROUPS.values() for name in own}
    found = {title: [name for name in own if name in names] for title, own in GROUPS.items()}
    found[OTHERS] = [name for name in names if name not in known]
    return {title: own for title, own in found.items() if own}
