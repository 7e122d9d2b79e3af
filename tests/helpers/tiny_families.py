"""A random pipeline of each family with its true architecture, a few kilobytes large, saved as a folder.

Widths and depths are the smallest that the architectures allow; classes, layouts and conventions are the real ones.
"""

from collections.abc import Callable
from pathlib import Path

import diffusers
import torch
import transformers
from tiny_vlms import mistral_3, qwen_2_5_vl, qwen_3_vl
from tokenizers import pre_tokenizers

from rankfold.toolkit.embedded import tiny_sd as tiny

CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
WIDTH = 16
FLOW = {"num_train_timesteps": 1000, "shift": 3.0}


# ---------------------------------------------------------------------------------------------- words


def clip(*, projection: bool = False):
    tokenizer = tiny.make_tokenizer()
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=WIDTH, projection_dim=WIDTH, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=tokenizer.model_max_length, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    kind = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
    return kind(config), tokenizer


def t5():
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -1.0)]
    pieces += [(letter, -2.0) for letter in "abcdefghijklmnopqrstuvwxyz ,.0123456789"]
    tokenizer = transformers.T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=512)
    config = transformers.T5Config(
        vocab_size=len(tokenizer), d_model=WIDTH, d_kv=8, d_ff=WIDTH, num_layers=1, num_heads=2
    )
    return transformers.T5EncoderModel(config), tokenizer


def qwen_tokenizer():
    tokens = [*LETTERS, "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = transformers.Qwen2TokenizerFast(vocab={t: i for i, t in enumerate(tokens)}, merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHAT
    return tokenizer


def qwen3(layers: int, *, head: bool):
    tokenizer = qwen_tokenizer()
    config = transformers.Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=WIDTH, num_hidden_layers=layers,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8,
    )  # fmt: skip
    return (transformers.Qwen3ForCausalLM if head else transformers.Qwen3Model)(config), tokenizer


def qwen_vl():
    tokenizer = qwen_tokenizer()
    text = {
        "vocab_size": len(tokenizer), "hidden_size": WIDTH, "intermediate_size": WIDTH, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4},
    }  # fmt: skip
    vision = {"depth": 1, "hidden_size": WIDTH, "intermediate_size": WIDTH, "num_heads": 2, "out_hidden_size": WIDTH}
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    return transformers.Qwen2_5_VLForConditionalGeneration(config), tokenizer


def gemma():
    tokens = [
        "<pad>",
        "<eos>",
        "<bos>",
        "<unk>",
        "<mask>",
        "▁",
        *"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ,.<>0",
    ]
    tokenizer = transformers.GemmaTokenizerFast(vocab={t: i for i, t in enumerate(tokens)}, merges=[])
    config = transformers.Gemma2Config(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=WIDTH, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8,
    )  # fmt: skip
    return transformers.Gemma2Model(config), tokenizer


# ---------------------------------------------------------------------------------------------- images


def vae(channels: int = 4, blocks: int = 3, **more):
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * blocks, up_block_types=("UpDecoderBlock2D",) * blocks,
        block_out_channels=(8,) * blocks, layers_per_block=1, latent_channels=channels, norm_num_groups=4, sample_size=32, **more,
    )  # fmt: skip


def unet(cross: int, **more):
    return diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=cross, attention_head_dim=8, **more,
    )  # fmt: skip


def stable_diffusion(prediction: str = "epsilon"):
    encoder, tokenizer = clip()
    scheduler = diffusers.DDIMScheduler(prediction_type=prediction, steps_offset=1, clip_sample=False)
    return diffusers.StableDiffusionPipeline(
        vae=vae(), text_encoder=encoder, tokenizer=tokenizer, unet=unet(WIDTH), scheduler=scheduler, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def stable_diffusion_xl():
    (first, tokenizer), (second, tokenizer_2) = clip(), clip(projection=True)
    time = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8, "use_linear_projection": True}
    return diffusers.StableDiffusionXLPipeline(
        vae=vae(), text_encoder=first, text_encoder_2=second, tokenizer=tokenizer, tokenizer_2=tokenizer_2,
        unet=unet(2 * WIDTH, projection_class_embeddings_input_dim=6 * 8 + WIDTH, transformer_layers_per_block=2, **time),
        scheduler=diffusers.EulerDiscreteScheduler(), add_watermarker=False,
    )  # fmt: skip


def stable_diffusion_3(*, with_t5: bool = True):
    (first, tokenizer), (second, tokenizer_2), (third, tokenizer_3) = (
        clip(projection=True), clip(projection=True), t5(),
    )  # fmt: skip
    wide = 2 * WIDTH
    third.config.d_model = wide
    third = transformers.T5EncoderModel(third.config)
    if not with_t5:
        third = tokenizer_3 = None
    return diffusers.StableDiffusion3Pipeline(
        vae=vae(16, shift_factor=0.06, scaling_factor=1.5), text_encoder=first, text_encoder_2=second, text_encoder_3=third,
        tokenizer=tokenizer, tokenizer_2=tokenizer_2, tokenizer_3=tokenizer_3,
        transformer=diffusers.SD3Transformer2DModel(
            sample_size=8, in_channels=16, num_layers=2, attention_head_dim=8, num_attention_heads=2,
            joint_attention_dim=wide, caption_projection_dim=16, pooled_projection_dim=2 * WIDTH, pos_embed_max_size=8,
            dual_attention_layers=(0,), qk_norm="rms_norm",
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**FLOW),
    )  # fmt: skip


def flux(guidance: bool = True):
    (first, tokenizer), (second, tokenizer_2) = clip(), t5()
    return diffusers.FluxPipeline(
        vae=vae(16, shift_factor=0.1, scaling_factor=0.4), text_encoder=first, text_encoder_2=second, tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        transformer=diffusers.FluxTransformer2DModel(
            in_channels=64, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=WIDTH, pooled_projection_dim=WIDTH, guidance_embeds=guidance, axes_dims_rope=(4, 6, 6),
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, **FLOW),
    )  # fmt: skip


def flux_kontext():
    return diffusers.FluxKontextPipeline(**flux().components)


def flux_2_vae():
    autoencoder = diffusers.AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8,) * 3, layers_per_block=1, latent_channels=4, norm_num_groups=4,
    )  # fmt: skip
    autoencoder.bn.running_mean.uniform_(-1, 1)
    autoencoder.bn.running_var.uniform_(0.5, 2)
    return autoencoder


def flux_2(kind: type, encoder, tokenizer, width: int, **more):
    return kind(
        vae=flux_2_vae(), text_encoder=encoder, tokenizer=tokenizer,
        transformer=diffusers.Flux2Transformer2DModel(
            in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=3 * width, timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4), **more,
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, **FLOW),
    )  # fmt: skip


def flux_2_dev():
    encoder, processor = mistral_3(
        num_hidden_layers=31, hidden_size=WIDTH, intermediate_size=WIDTH, num_attention_heads=2, num_key_value_heads=1, head_dim=8
    )  # fmt: skip  # the pipeline reads the states behind layers 10, 20 and 30
    return flux_2(diffusers.Flux2Pipeline, encoder, processor, WIDTH, guidance_embeds=True)


def flux_2_klein():
    encoder, tokenizer = qwen3(28, head=True)  # the pipeline reads the states behind layers 9, 18 and 27
    return flux_2(diffusers.Flux2KleinPipeline, encoder, tokenizer, WIDTH, guidance_embeds=False)


def sana():
    encoder, tokenizer = gemma()
    autoencoder = diffusers.AutoencoderDC(
        latent_channels=8, attention_head_dim=4, encoder_block_out_channels=(8, 8, 16),
        decoder_block_out_channels=(8, 8, 16), encoder_layers_per_block=(1, 1, 1), decoder_layers_per_block=(1, 1, 1),
        encoder_qkv_multiscales=((), (), ()), decoder_qkv_multiscales=((), (), ()), scaling_factor=0.4,
    )  # fmt: skip
    return diffusers.SanaPipeline(
        vae=autoencoder, text_encoder=encoder, tokenizer=tokenizer,
        transformer=diffusers.SanaTransformer2DModel(
            in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=8, num_layers=2,
            num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=WIDTH,
            sample_size=8,
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**FLOW),
    )  # fmt: skip


def qwen_image():
    encoder, tokenizer = qwen_vl()
    autoencoder = diffusers.AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.5, 0.7, 2.0, 1.0],
    )  # fmt: skip
    return diffusers.QwenImagePipeline(
        vae=autoencoder, text_encoder=encoder, tokenizer=tokenizer,
        transformer=diffusers.QwenImageTransformer2DModel(
            in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=WIDTH, axes_dims_rope=(4, 6, 6),
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, **FLOW),
    )  # fmt: skip


def qwen_image_edit(kind: type, **more):
    parts = qwen_image().components
    parts["text_encoder"], processor = qwen_2_5_vl()
    wide = parts["text_encoder"].config.text_config.hidden_size
    parts["transformer"] = diffusers.QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=wide,
        axes_dims_rope=(4, 6, 6), **more,
    )  # fmt: skip
    return kind(**parts | {"processor": processor, "tokenizer": processor.tokenizer})


def lumina_2():
    encoder, tokenizer = gemma()
    return diffusers.Lumina2Pipeline(
        vae=vae(4, blocks=4, shift_factor=0.1, scaling_factor=0.4),  # the pipeline takes it for granted that it shrinks by 8
        text_encoder=encoder, tokenizer=tokenizer,
        transformer=diffusers.Lumina2Transformer2DModel(
            sample_size=8, in_channels=4, hidden_size=24, num_layers=1, num_refiner_layers=1, num_attention_heads=2,
            num_kv_heads=1, multiple_of=8, axes_dim_rope=(4, 4, 4), axes_lens=(600, 32, 32), cap_feat_dim=WIDTH,
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**FLOW),
    )  # fmt: skip


def z_image():
    encoder, tokenizer = qwen3(2, head=False)
    return diffusers.ZImagePipeline(
        vae=vae(16, shift_factor=0.1, scaling_factor=0.4), text_encoder=encoder, tokenizer=tokenizer,
        transformer=diffusers.ZImageTransformer2DModel(
            in_channels=16, dim=32, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=WIDTH,
            axes_dims=[4, 6, 6], axes_lens=[1024, 32, 32],
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**FLOW),
    )  # fmt: skip


def chroma():
    encoder, tokenizer = t5()
    return diffusers.ChromaPipeline(
        vae=vae(16, shift_factor=0.1, scaling_factor=0.4), text_encoder=encoder, tokenizer=tokenizer,
        transformer=diffusers.ChromaTransformer2DModel(
            in_channels=64, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=WIDTH, axes_dims_rope=(4, 6, 6), approximator_num_channels=16, approximator_hidden_dim=32,
            approximator_layers=1,
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, **FLOW),
    )  # fmt: skip


def krea_2():
    """Three layers of the text encoder are read, the one behind the last is not, as in the released one."""
    parts = qwen_image().components
    encoder, processor = qwen_3_vl(num_hidden_layers=3)
    wide = encoder.config.text_config.hidden_size
    transformer = diffusers.Krea2Transformer2DModel(
        in_channels=16, num_layers=2, attention_head_dim=16, num_attention_heads=2, num_key_value_heads=1, intermediate_size=32,
        timestep_embed_dim=16, text_hidden_dim=wide, num_text_layers=3, text_num_attention_heads=2, text_num_key_value_heads=2,
        text_intermediate_size=32, num_layerwise_text_blocks=1, num_refiner_text_blocks=1, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=1000, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, base_image_seq_len=256,
        max_image_seq_len=6400,
    )  # fmt: skip
    return diffusers.Krea2Pipeline(
        vae=parts["vae"], text_encoder=encoder.model, tokenizer=processor.tokenizer, transformer=transformer, scheduler=scheduler,
        text_encoder_select_layers=(0, 1, 2),
    )  # fmt: skip


def ernie_image():
    """With the model that writes prompts anew, which is left out."""
    encoder, processor = mistral_3()
    tokenizer = processor.tokenizer
    tokenizer.model_max_length = 512
    wide = encoder.config.text_config.hidden_size
    writer = transformers.Ministral3Config(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=WIDTH, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8,
    )  # fmt: skip
    return diffusers.ErnieImagePipeline(
        vae=flux_2_vae(), text_encoder=encoder.model, tokenizer=tokenizer, pe=transformers.Ministral3ForCausalLM(writer),
        pe_tokenizer=tokenizer,
        transformer=diffusers.ErnieImageTransformer2DModel(
            hidden_size=32, num_attention_heads=2, num_layers=2, ffn_hidden_size=32, in_channels=16, out_channels=16,
            text_in_dim=wide, rope_axes_dim=(4, 6, 6),
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**FLOW),
    )  # fmt: skip


BUILDERS: dict[str, Callable[[], diffusers.DiffusionPipeline]] = {
    "sd": stable_diffusion,
    "sd-v": lambda: stable_diffusion("v_prediction"),
    "sdxl": stable_diffusion_xl,
    "sd3": stable_diffusion_3,
    "sd3-without-t5": lambda: stable_diffusion_3(with_t5=False),
    "flux-dev": flux,
    "flux-kontext": flux_kontext,
    "flux-schnell": lambda: flux(guidance=False),
    "flux2-klein": flux_2_klein,
    "sana": sana,
    "qwen-image": qwen_image,
    "lumina2": lumina_2,
    "z-image": z_image,
    "flux2-dev": flux_2_dev,
    "chroma": chroma,
    "krea2": krea_2,
    "ernie-image": ernie_image,
}
EDITORS: dict[str, Callable[[], diffusers.DiffusionPipeline]] = {
    "qwen-image-edit": lambda: qwen_image_edit(diffusers.QwenImageEditPipeline),
    "qwen-image-edit-plus": lambda: qwen_image_edit(diffusers.QwenImageEditPlusPipeline, zero_cond_t=True),
}
"""Bases that draw nothing without references."""
SIDE = 32  # of the images these models are tried with, pixels


def build(name: str, folder: Path) -> Path:
    """Saves the pipeline of this name, its weights drawn from a seed."""
    torch.manual_seed(0)
    pipe = (BUILDERS | EDITORS)[name]()
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            for parameter in part.parameters():  # some layers begin at zero, which would hide what they do
                if not parameter.any():
                    torch.nn.init.normal_(parameter, std=0.02)
    pipe.save_pretrained(folder)
    return folder
