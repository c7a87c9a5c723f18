"""The published sizes: EVA ViT-g, InstructBLIP's Q-Former, TimeChat's video Q-Former, LLaMA-2-7B-chat with LoRA.

`configs/interllava_7b.py` is for new training from the published weights: isolated video blocks, and of the published
code's quirks only the one that comes with the weights (the Q-Former's word table). The first stage is SigLIP2-B.
`configs/interllava_7b.py:published` has all of them, for numbers equal to the published system's.
"""

import dataclasses

from ml_collections import ConfigDict

from ivcr_jax.bundle import BundleConfig
from ivcr_jax.config import to_dict
from ivcr_jax.data.prompt import PromptStyle
from ivcr_jax.models.interllava import InterLLaVAConfig
from ivcr_jax.models.retriever import RetrieverConfig
from ivcr_jax.models.video_encoder import VideoEncoderConfig


def get_config(arg: str = "") -> ConfigDict:
    """Model sizes; `arg` is "" or "published"."""
    if arg not in ("", "published"):
        raise ValueError(f"configs/interllava_7b.py:{arg}; expected nothing or :published after the colon")
    model = InterLLaVAConfig(llama_ids_for_qformer=True)
    style = PromptStyle()
    if arg == "published":
        video = VideoEncoderConfig(keep_text_tokens=True, attend_to_pads=True)
        model = dataclasses.replace(model, video=video, layout="inline")
        style = PromptStyle(localized=False, last_frame_seconds_bug=True)
    return ConfigDict(to_dict(BundleConfig(model, RetrieverConfig(), style)))
