"""A whole dialogue model and its first stage, 2 million parameters, for a CPU: 48-pixel frames, 12 of them a video.

    python -m ivcr_jax.train --config=configs/tiny.py[:STAGE] --workdir=RUN --config.init=INIT \\
      --config.data.dialogues=DATA/ivcr200k --config.data.videos=FEATURES

with INIT from `ivcr_jax.pretrain` and FEATURES from `ivcr_jax.encode` (docs/training.md). Without the decoder the
retriever and the moment head learn from ten times as many turns a second, so they go first (stage "retriever"); both
models go on (stage "both") from what `ivcr_jax.export` makes of its run. The stages "long-retriever" and "long" are the
same for an hour.
"""

import dataclasses

from ml_collections import ConfigDict

from ivcr_jax.checkpoint import CheckpointConfig
from ivcr_jax.config import to_dict
from ivcr_jax.data.prompt import PromptStyle
from ivcr_jax.losses import LossConfig
from ivcr_jax.models.heads import MomentHeadConfig, RankHeadConfig
from ivcr_jax.models.interllava import InterLLaVAConfig
from ivcr_jax.models.layers import Compute
from ivcr_jax.models.llama import LlamaConfig
from ivcr_jax.models.lora import LoraConfig
from ivcr_jax.models.qformer import QFormerConfig
from ivcr_jax.models.retriever import RetrieverConfig, TextConfig
from ivcr_jax.models.video_encoder import VideoEncoderConfig
from ivcr_jax.models.vit import ViTConfig
from ivcr_jax.optim import OptimConfig
from ivcr_jax.sharding import MeshConfig
from ivcr_jax.training import DataConfig, EvalConfig, TrainConfig

# One tower for both models: features computed once serve both.
VIT = ViTConfig(
    image_size=48,
    patch_size=16,
    stem=(24, 48),
    width=96,
    layers=2,
    heads=4,
    mlp_width=384,
    activation="gelu_tanh",
    cls_token=False,
    key_bias=True,
    final_norm=True,
    pixel_mean=(0.37, 0.37, 0.37),  # of the synthetic videos
    pixel_std=(0.2, 0.2, 0.2),
)
VOCAB = 1200
STEPS = {"retriever": 450, "both": 200, "long-retriever": 1800, "long": 1500}


def config(stage: str = "both") -> TrainConfig:
    """The configuration, typed, of a stage in STEPS. Raises ValueError where it is another."""
    if stage not in STEPS:
        raise ValueError(f"configs/tiny.py: found stage {stage!r}, expected one of {', '.join(STEPS)}")
    model = InterLLaVAConfig(
        vit=VIT,
        qformer=QFormerConfig(
            queries=4, width=96, layers=1, heads=2, mlp_width=192, cross_every=1, vocab_size=0, max_text=0
        ),
        video_qformer=QFormerConfig(
            queries=4, width=96, layers=1, heads=2, mlp_width=192, cross_every=1, vocab_size=0, max_text=0
        ),
        video=VideoEncoderConfig(max_frames=12, window=6, stride=6),
        llama=LlamaConfig(vocab_size=VOCAB, width=96, layers=2, heads=4, kv_heads=4, mlp_width=192),
        lora=LoraConfig(rank=0),  # trained whole: there is nothing to adapt
        rank=RankHeadConfig(width=64, heads=4, first_stage=True),
        moment=MomentHeadConfig(width=64, layers=2, heads=4, first_width=VIT.width),
    )
    retriever = RetrieverConfig(
        vit=dataclasses.replace(VIT, map_head=True),
        text=TextConfig(vocab_size=VOCAB, max_tokens=48, width=96, layers=2, heads=4, mlp_width=192),
        frame_layers=1,
        max_frames=12,
    )
    alone = stage.endswith("retriever")
    return TrainConfig(
        model=model,
        retriever=retriever,
        style=PromptStyle(frame_times=False, numbered=False),
        compute=Compute(dtype="float32"),
        mesh=MeshConfig(data=-1, fsdp=1),
        data=DataConfig(
            # The retriever's negatives are all videos of a batch, so a turn need not bring ten of its own. Rows are as
            # long as it takes to fill the videos' slots: without the decoder they cost nothing.
            seq_len=2048 if alone else 512,
            max_turns=20 if alone else 6,
            max_candidates=2 if alone else 10,
            batch_size=16 if alone else 8,
            video_slots=20,
            frames=12,
            keep_chat=False,
            threads=2,
        ),
        losses=LossConfig(lm=0.0, rank=0.0, contrastive=1.0) if alone else LossConfig(contrastive=1.0),
        optim=OptimConfig(
            # Towers stay as pretraining left them.
            rules=(*((r"model\.(?!moment\.).*", 0.0),) * alone, (r".*\.vit\.(?!head).*", 0.0), (".*", 1.0)),
            peak_lr=2e-3 if alone else 1.2e-3,
            initial_lr=1e-5,
            final_lr=4e-5,
            warmup=0.05,
            b2=0.98,
            weight_decay=0.02,
        ),
        eval=EvalConfig(every=100, batches=16),
        checkpoint=CheckpointConfig(every=100),
        steps=STEPS[stage],
    )


def get_config(stage: str = "both") -> ConfigDict:
    """The configuration of a stage. Raises ValueError where there is no such stage."""
    return ConfigDict(to_dict(config(stage)))
