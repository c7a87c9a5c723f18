"""The first stage. `configs/retriever.py`: SigLIP2-B/16 at 224 pixels, multilingual; `:tiny`: for a CPU."""

from ml_collections import ConfigDict

from ivcr_jax.bundle import BundleConfig
from ivcr_jax.config import to_dict
from ivcr_jax.data.prompt import PromptStyle
from ivcr_jax.models.retriever import RetrieverConfig, TextConfig
from ivcr_jax.models.vit import ViTConfig

TINY = RetrieverConfig(
    vit=ViTConfig(
        image_size=48,
        patch_size=8,
        width=96,
        layers=2,
        heads=4,
        mlp_width=192,
        activation="gelu_tanh",
        cls_token=False,
        key_bias=True,
        final_norm=True,
        map_head=True,
        pixel_mean=(0.5, 0.5, 0.5),
        pixel_std=(0.5, 0.5, 0.5),
    ),
    text=TextConfig(vocab_size=1200, max_tokens=48, width=96, layers=2, heads=4, mlp_width=192),
    frame_layers=2,
    max_frames=12,
)


def get_config(arg: str = "") -> ConfigDict:
    """Model sizes; `arg` is "" or "tiny"."""
    if arg not in ("", "tiny"):
        raise ValueError(f"configs/retriever.py:{arg}; expected nothing or :tiny after the colon")
    retriever = TINY if arg else RetrieverConfig()
    return ConfigDict(to_dict(BundleConfig(model=None, retriever=retriever, style=PromptStyle())))
