"""A whole dialogue model of 1.7 million parameters, for a CPU: 48-pixel frames, 12 of them a video."""

from ml_collections import ConfigDict

from ivcr_jax.bundle import BundleConfig
from ivcr_jax.config import to_dict
from ivcr_jax.data.prompt import PromptStyle
from ivcr_jax.models.heads import MomentHeadConfig, RankHeadConfig
from ivcr_jax.models.interllava import InterLLaVAConfig
from ivcr_jax.models.llama import LlamaConfig
from ivcr_jax.models.lora import LoraConfig
from ivcr_jax.models.qformer import QFormerConfig
from ivcr_jax.models.video_encoder import VideoEncoderConfig
from ivcr_jax.models.vit import ViTConfig


def get_config() -> ConfigDict:
    """Model sizes."""
    model = InterLLaVAConfig(
        vit=ViTConfig(image_size=48, patch_size=8, width=96, layers=2, heads=4, mlp_width=192),
        qformer=QFormerConfig(queries=4, width=96, layers=2, heads=4, mlp_width=192, max_text=32),
        video_qformer=QFormerConfig(
            queries=4, width=96, layers=1, heads=4, mlp_width=192, cross_every=1, vocab_size=0, max_text=0
        ),
        video=VideoEncoderConfig(max_frames=12, window=6, stride=6),
        llama=LlamaConfig(vocab_size=1200, width=128, layers=4, heads=4, kv_heads=2, mlp_width=256),
        lora=LoraConfig(rank=0),  # trained whole: there is nothing to adapt
        rank=RankHeadConfig(width=64, heads=4),
        moment=MomentHeadConfig(width=64, layers=2, heads=4),
    )
    return ConfigDict(to_dict(BundleConfig(model, retriever=None, style=PromptStyle())))
