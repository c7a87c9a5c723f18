"""The published sizes: EVA ViT-g, InstructBLIP's Q-Former, TimeChat's video Q-Former, LLaMA-2-7B-chat with LoRA.

    python -m ivcr_jax.train --config=configs/interllava_7b.py:v5e:16x16 --workdir=RUN --config.init=MODEL \\
      --config.data.dialogues=DATA/ivcr200k --config.data.videos=FEATURES

`configs/interllava_7b.py` is for new training from the published weights: isolated video blocks, and of the published
code's quirks only the one that comes with the weights (the Q-Former's word table). The first stage, SigLIP2-B, is
trained by `configs/retriever.py`. `:published` has all quirks, for numbers equal to the published system's. A topology,
such as `:v5e:16x16`, adds what `configs/hardware` has for it; `:v5e:16x16:frames` where the ViT is in the step.
"""

import dataclasses

from ml_collections import ConfigDict

from configs import hardware
from ivcr_jax.checkpoint import CheckpointConfig
from ivcr_jax.config import to_dict
from ivcr_jax.data.prompt import PromptStyle
from ivcr_jax.losses import LossConfig
from ivcr_jax.models.interllava import InterLLaVAConfig
from ivcr_jax.models.layers import Compute
from ivcr_jax.models.retriever import RetrieverConfig
from ivcr_jax.models.video_encoder import VideoEncoderConfig
from ivcr_jax.optim import OptimConfig
from ivcr_jax.training import TrainConfig

# As published: LoRA, both Q-Formers, frame positions and the projection are trained; and our heads and added tokens.
RULES = (
    (r"model\.encoder\.vit(_norm)?\..*", 0.0),
    (r"model\.llama\..*\.lora\..*", 1.0),
    (r"model\.llama\.added_.*", 1.0),
    (r"model\.llama\..*", 0.0),
    (r".*", 1.0),
)


def get_config(arg: str = "") -> ConfigDict:
    """The configuration; `arg` is "", "published", or a topology."""
    model = InterLLaVAConfig(llama_ids_for_qformer=True)
    style = PromptStyle()
    if arg == "published":
        video = VideoEncoderConfig(keep_text_tokens=True, attend_to_pads=True)
        model = dataclasses.replace(model, video=video, layout="inline")
        style = PromptStyle(localized=False, last_frame_seconds_bug=True)
    config = TrainConfig(
        model=model,
        retriever=RetrieverConfig(),
        style=style,
        compute=Compute(remat="full"),
        losses=LossConfig(moment_l1=0.5, moment_iou=0.5),
        optim=OptimConfig(rules=RULES),
        checkpoint=CheckpointConfig(best="rank_r1", higher=True),
    )
    if arg not in ("", "published"):
        config = hardware.on(config, arg)
    return ConfigDict(to_dict(config))
