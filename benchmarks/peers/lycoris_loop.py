"""LyCORIS's wrapper with its LoRA in the plain loop, saved as a file of both parts."""

from __future__ import annotations

from lycoris import LycorisNetwork, create_lycoris
from plain_loop import TEXT_TARGETS, UNET_TARGETS, Parts, read_options, train
from safetensors.torch import save_file
from torch import nn

NETWORKS: dict[str, LycorisNetwork] = {}


def adapt(parts: Parts, rank: int) -> list[nn.Parameter]:
    for prefix, model, targets in (
        ("lora_unet", parts.unet, UNET_TARGETS),
        ("lora_te", parts.text_encoder, TEXT_TARGETS),
    ):
        LycorisNetwork.apply_preset(
            {
                "enable_conv": False,
                "target_module": [],
                "target_name": [f".*{name}" for name in targets],
                "lora_prefix": prefix,
            }
        )
        NETWORKS[prefix] = create_lycoris(model, 1.0, linear_dim=rank, linear_alpha=rank, algo="lora")
        NETWORKS[prefix].apply_to()
    return [p for network in NETWORKS.values() for p in network.parameters() if p.requires_grad]


if __name__ == "__main__":
    options = read_options()
    train(options, adapt)
    options.out.mkdir(parents=True, exist_ok=True)
    tensors = {key: value for network in NETWORKS.values() for key, value in network.state_dict().items()}
    save_file({key: value.contiguous() for key, value in tensors.items()}, options.out / "lycoris.safetensors")
