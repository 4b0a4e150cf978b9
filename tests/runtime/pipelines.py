"""Small random diffusers pipelines, complete with tokenizers, text encoders and VAE, saved to folders."""

from __future__ import annotations

from pathlib import Path

import diffusers
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from tests.runtime.test_sparsify import CASES

TEXT_VOCABULARY = 128
"""Single characters of ASCII."""
SMALL = {"layers_per_block": 1, "norm_num_groups": 4}


def characters() -> transformers.PreTrainedTokenizerFast:
    """A tokenizer with a token a character, padding 0 and unknown 1."""
    vocabulary = {"<pad>": 0, "<unk>": 1, **{chr(i): i for i in range(32, TEXT_VOCABULARY)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", model_max_length=77
    )


def wan(case) -> diffusers.DiffusionPipeline:
    config = transformers.UMT5Config(
        vocab_size=TEXT_VOCABULARY, d_model=48, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    vae = diffusers.AutoencoderKLWan(base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    return diffusers.WanPipeline(
        tokenizer=characters(), text_encoder=transformers.UMT5EncoderModel(config), vae=vae,
        scheduler=case.pipe.scheduler, transformer=case.pipe.transformer,
    )


def cogvideox(case) -> diffusers.DiffusionPipeline:
    config = transformers.T5Config(
        vocab_size=TEXT_VOCABULARY, d_model=40, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    vae = diffusers.AutoencoderKLCogVideoX(
        down_block_types=["CogVideoXDownBlock3D"] * 4, up_block_types=["CogVideoXUpBlock3D"] * 4,
        block_out_channels=[8] * 4, latent_channels=4, **SMALL,
    )
    return diffusers.CogVideoXPipeline(
        tokenizer=characters(), text_encoder=transformers.T5EncoderModel(config), vae=vae,
        scheduler=case.pipe.scheduler, transformer=case.pipe.transformer,
    )


def hunyuan(case) -> diffusers.DiffusionPipeline:
    config = transformers.LlamaConfig(
        vocab_size=TEXT_VOCABULARY, hidden_size=24, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
        pad_token_id=0, bos_token_id=None, eos_token_id=None,
    )
    pooled = transformers.CLIPTextConfig(
        vocab_size=TEXT_VOCABULARY, hidden_size=20, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )
    vae = diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=[8] * 4, mid_block_add_attention=False, **SMALL
    )
    return diffusers.HunyuanVideoPipeline(
        text_encoder=transformers.LlamaModel(config), tokenizer=characters(), vae=vae, scheduler=case.pipe.scheduler,
        transformer=case.pipe.transformer, text_encoder_2=transformers.CLIPTextModel(pooled),
        tokenizer_2=characters(),
    )


BUILDERS = {"wan": wan, "cogvideox": cogvideox, "hunyuan": hunyuan}


def save_pipeline(name: str, folder: Path):
    """Save the pipeline of a case of test_sparsify; returns the case."""
    case = CASES[name]()
    torch.manual_seed(0)
    BUILDERS[name](case).save_pretrained(folder)
    return case
