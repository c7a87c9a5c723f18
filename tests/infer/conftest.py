"""An export of the smallest models whose every parameter matters, a folder of real videos, and a corpus of them."""

import dataclasses
import pathlib

import pytest
from flax import nnx

from ivcr_jax import bundle, index
from ivcr_jax.data.prompt import PromptStyle
from ivcr_jax.data.tokenizer import train_demo
from ivcr_jax.infer.assistant import Assistant
from ivcr_jax.infer.corpus import Corpus
from ivcr_jax.models.heads import MomentHeadConfig, RankHeadConfig
from ivcr_jax.models.interllava import InterLLaVA, InterLLaVAConfig
from ivcr_jax.models.llama import LlamaConfig
from ivcr_jax.models.qformer import QFormerConfig
from ivcr_jax.models.retriever import Retriever, RetrieverConfig, TextConfig
from ivcr_jax.models.video_encoder import VideoEncoderConfig
from ivcr_jax.models.vit import ViTConfig
from tests.data.video_fixtures import write_video
from tests.models.conftest import lively

FRAMES = 6
VIT = ViTConfig(image_size=16, patch_size=8, width=16, layers=1, heads=2, mlp_width=24, cls_token=False)
QFORMER = QFormerConfig(queries=2, width=16, layers=1, heads=2, mlp_width=24, cross_every=1, vocab_size=0, max_text=0)
WORDS = [
    "Find a video of a fish.",
    "When does it jump?",
    "The best match is video 1.",
    "找一个小狗的视频。",
    "什么时候？",
]
IDS = ["cooking/b_fish", "cooking/c", "d", "talks/2024/a"]


def write_export(path, *, text=True, scale=1.0, layout="isolated"):
    """A model folder. With text, the Q-Former reads when each frame is; `scale` is of the visual tokens."""
    tokenizer = train_demo([*WORDS, "This frame is sampled at 0123456789. second."] * 3, 400)
    words = tokenizer.vocab_size - len(tokenizer.special_tokens)
    with_text = {"vocab_size": words, "max_text": 40} if text else {}
    model = InterLLaVAConfig(
        vit=dataclasses.replace(VIT, image_size=24),
        qformer=dataclasses.replace(QFORMER, **with_text),
        video_qformer=dataclasses.replace(QFORMER, width=12),
        video=VideoEncoderConfig(max_frames=FRAMES, window=3, stride=2),
        llama=LlamaConfig(vocab_size=words, width=16, layers=1, heads=2, kv_heads=1, mlp_width=16),
        rank=RankHeadConfig(width=16, heads=2),
        moment=MomentHeadConfig(width=16, layers=1, heads=2, first_width=VIT.width),
        layout=layout,
    )
    retriever = RetrieverConfig(
        vit=dataclasses.replace(VIT, map_head=True),
        text=TextConfig(vocab_size=words, max_tokens=8, width=16, layers=1, heads=2, mlp_width=16),
        frame_layers=1,
        max_frames=FRAMES,
    )
    weights = bundle.weights(lively(lambda: InterLLaVA(model, nnx.Rngs(0))))
    weights["encoder.projection.kernel"] *= scale
    bundle.save(
        path,
        bundle.BundleConfig(model, retriever, PromptStyle()),
        model=weights,
        retriever=bundle.weights(lively(lambda: Retriever(retriever, nnx.Rngs(0)))),
        tokenizers=dict.fromkeys((bundle.TOKENIZER, bundle.RETRIEVER_TOKENIZER), tokenizer.proto) if text else {},
    )
    return path


@pytest.fixture(scope="session")
def export(tmp_path_factory) -> pathlib.Path:
    return write_export(tmp_path_factory.mktemp("export") / "export")


@pytest.fixture(scope="session")
def videos(tmp_path_factory) -> pathlib.Path:
    """Four videos of several containers and codecs, one of fewer frames than are asked for, and a file of another
    kind. Never changed by a test."""
    folder = tmp_path_factory.mktemp("videos")
    (folder / "cooking").mkdir()
    (folder / "talks" / "2024").mkdir(parents=True)
    write_video(folder / "talks" / "2024" / "a.mp4", count=40)
    write_video(folder / "cooking" / "b_fish.mov", count=4, rotation=90)
    write_video(folder / "cooking" / "c.WEBM", "libvpx", count=20, container_format="webm")
    write_video(folder / "d.avi", "mpeg4", count=7)
    (folder / "notes.txt").write_text("of no video")
    return folder


@pytest.fixture(scope="module")
def helper(export):
    return Assistant(export)


@pytest.fixture(scope="module")
def corpus(indexed, helper):
    return Corpus.open(indexed, helper.fingerprint)


@pytest.fixture(scope="session")
def indexed(export, videos, tmp_path_factory) -> pathlib.Path:
    """Their corpus. Never changed by a test."""
    folder = tmp_path_factory.mktemp("corpora") / "indexed"
    index.add(export, videos, folder, batch=1)
    return folder
