"""The towers and the path from frames to visual tokens, against PyTorch with the same weights, in f32."""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx

from ivcr_jax.bundle import Bundle, BundleConfig
from ivcr_jax.convert import layouts
from ivcr_jax.data.prompt import PromptStyle
from ivcr_jax.models.interllava import InterLLaVA, InterLLaVAConfig
from ivcr_jax.models.llama import LlamaConfig
from ivcr_jax.models.qformer import QFormer, QFormerConfig
from ivcr_jax.models.retriever import Retriever, RetrieverConfig, TextConfig
from ivcr_jax.models.video_encoder import VideoEncoder, VideoEncoderConfig
from ivcr_jax.models.vit import ViT, ViTConfig
from tests.models import torch_reference as reference
from tests.models.conftest import lively
from tests.models.torch_reference import F32, assert_close, fill, randomise

pytestmark = pytest.mark.torch


def noise(seed, *shape, scale=1.0):
    """f32[shape] in NumPy and in torch."""
    array = (scale * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)
    return array, torch.from_numpy(array)


@functools.partial(nnx.jit, static_argnames="method")
def run(model, *args, method="__call__"):
    """A method of a model, compiled as a whole: that is much quicker than each operation by itself."""
    return getattr(model, method)(*args)


def sentences(seed, lengths, vocab_size):
    """Token ids i64[N, S] of texts of these lengths and bool[N, S], which are there; rubbish at the padding."""
    ids = np.random.default_rng(seed).integers(1, vocab_size, (len(lengths), max(lengths)))
    return ids, np.arange(max(lengths)) < np.array(lengths)[:, None]


# EVA ------------------------------------------------------------------------------------------------------------------

EVA = ViTConfig(image_size=42, patch_size=14, width=48, layers=3, heads=4, mlp_width=70, norm_eps=2e-3)


def eva(config, tower):
    vit = nnx.eval_shape(lambda: ViT(config, nnx.Rngs(0), F32))
    unused = reference.eva_unused(config)
    return fill(vit, [(layouts.eva(config), reference.eva_state(tower))], prefix="encoder.vit.", unused=unused)


@pytest.mark.parametrize("config", [EVA, dataclasses.replace(EVA, patch_size=6, width=30, heads=5, norm_eps=1e-6)])
def test_eva(config):
    tower = reference.eva_tower(config, seed=1)
    ours, theirs = noise(2, 3, 42, 42, 3)
    assert_close(run(eva(config, tower), ours), reference.eva_features(tower, theirs))


def test_eva_on_larger_images():
    """The table of positions is fitted to another grid when it is read, as Hugging Face does in its forward pass."""
    tower = reference.eva_tower(EVA, seed=1)
    config = dataclasses.replace(EVA, image_size=70)
    ours, theirs = noise(2, 2, 70, 70, 3)
    assert_close(run(eva(config, tower), ours), reference.eva_features(tower, theirs, interpolate_pos_encoding=True))


def test_a_stem_is_convolutions():
    config = ViTConfig(
        image_size=16, patch_size=8, stem=(5, 7), width=12, layers=1, heads=2, mlp_width=8, cls_token=False
    )
    vit = lively(lambda: ViT(config, nnx.Rngs(0), F32))
    for linear in (vit.blocks.attention.out, vit.blocks.mlp.down):  # a layer that adds nothing
        linear.kernel[...], linear.bias[...] = 0 * linear.kernel[...], 0 * linear.bias[...]
    ours, theirs = noise(2, 2, 16, 16, 3)
    theirs = theirs.permute(0, 3, 1, 2)

    def kernel(linear, size):
        weights = torch.from_numpy(np.array(linear.kernel[...])).reshape(size, size, -1, linear.kernel.shape[-1])
        return weights.permute(3, 2, 0, 1), torch.from_numpy(np.array(linear.bias[...]))

    for linear in vit.stem:
        theirs = torch.nn.functional.gelu(torch.nn.functional.conv2d(theirs, *kernel(linear, 3), stride=2, padding=1))
    expected = torch.nn.functional.conv2d(theirs, *kernel(vit.patch, 2), stride=2).flatten(2).transpose(1, 2)
    assert_close(run(vit, ours), expected + torch.from_numpy(np.array(vit.positions[...])))


def test_pixels_are_normalised_like_clip_and_siglip():
    tower = reference.eva_tower(EVA, seed=1)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 42, 42, 3), np.uint8)
    for config, mean, std in (
        (ViTConfig(), transformers.image_utils.OPENAI_CLIP_MEAN, transformers.image_utils.OPENAI_CLIP_STD),
        (
            RetrieverConfig().vit,
            transformers.image_utils.IMAGENET_STANDARD_MEAN,
            transformers.image_utils.IMAGENET_STANDARD_STD,
        ),
    ):
        vit = eva(dataclasses.replace(EVA, pixel_mean=config.pixel_mean, pixel_std=config.pixel_std), tower)
        theirs = (torch.from_numpy(pixels) / 255 - torch.tensor(mean)) / torch.tensor(std)
        assert_close(vit.normalise(pixels), theirs)
        assert_close(run(vit, pixels), reference.eva_features(tower, theirs))


# SigLIP ---------------------------------------------------------------------------------------------------------------

TEXT = TextConfig(vocab_size=53, max_tokens=11, width=40, layers=3, heads=5, mlp_width=66, norm_eps=3e-3)
SIGLIP = RetrieverConfig(
    vit=dataclasses.replace(
        RetrieverConfig().vit, image_size=48, width=48, layers=2, heads=4, mlp_width=70, norm_eps=2e-3
    ),
    text=TEXT,
)


def siglip(config, seed):
    """Hugging Face's model, with a scale and a bias of logits that show."""
    common = {"hidden_act": "gelu_pytorch_tanh"}
    text, vit = config.text, config.vit
    model = transformers.SiglipModel(
        transformers.SiglipConfig(
            text_config=common
            | {
                "vocab_size": text.vocab_size,
                "max_position_embeddings": text.max_tokens,
                "hidden_size": text.width,
                "num_hidden_layers": text.layers,
                "num_attention_heads": text.heads,
                "intermediate_size": text.mlp_width,
                "layer_norm_eps": text.norm_eps,
                "projection_size": vit.width,
                **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 1),
            },
            vision_config=common
            | {
                "image_size": vit.image_size,
                "patch_size": vit.patch_size,
                "hidden_size": vit.width,
                "num_hidden_layers": vit.layers,
                "num_attention_heads": vit.heads,
                "intermediate_size": vit.mlp_width,
                "layer_norm_eps": vit.norm_eps,
            },
        )
    )
    randomise(model, seed)
    model.logit_scale.data.fill_(1.7)
    model.logit_bias.data.fill_(-3.1)
    return model


def retriever(config, model):
    ours = nnx.eval_shape(lambda: Retriever(config, nnx.Rngs(0), F32))
    return fill(ours, [(layouts.siglip(config), model.state_dict())])


def test_siglip_towers():
    model = siglip(SIGLIP, seed=3)
    ours = retriever(SIGLIP, model)
    pixels, images = noise(4, 3, 48, 48, 3)
    tokens = np.random.default_rng(5).integers(0, 53, (4, 11))
    with torch.no_grad():
        vision = model.vision_model(images.permute(0, 3, 1, 2))
        text = model.text_model(torch.from_numpy(tokens))
    features = run(ours.vit, pixels)
    assert_close(features, vision.last_hidden_state)
    assert_close(run(ours.vit, features, method="pool"), vision.pooler_output)
    assert_close(run(ours.text, tokens), text.pooler_output)


def test_siglip_on_larger_images():
    model = siglip(SIGLIP, seed=3)
    config = dataclasses.replace(SIGLIP, vit=dataclasses.replace(SIGLIP.vit, image_size=80))
    ours = retriever(config, model)
    pixels, images = noise(4, 2, 80, 80, 3)
    with torch.no_grad():
        theirs = model.vision_model(images.permute(0, 3, 1, 2), interpolate_pos_encoding=True)
    assert_close(run(ours.vit, run(ours.vit, pixels), method="pool"), theirs.pooler_output)


def test_retriever_of_one_frame_is_siglip():
    model = siglip(SIGLIP, seed=6)
    ours = retriever(SIGLIP, model)
    pixels, images = noise(7, 5, 48, 48, 3)
    tokens = np.random.default_rng(8).integers(0, 53, (4, 11))
    with torch.no_grad():
        theirs = model(input_ids=torch.from_numpy(tokens), pixel_values=images.permute(0, 3, 1, 2))
    texts = run(ours, tokens, method="embed_text")
    videos = run(ours, pixels[:, None], method="embed_video")
    assert_close(texts, theirs.text_embeds)
    assert_close(videos, theirs.image_embeds)
    assert_close(ours.logits(texts, videos), theirs.logits_per_text)


def test_retriever_averages_the_frames_that_are_there():
    """Frames are averaged as they come from the tower; the mean is brought to length 1, not each frame."""
    model = siglip(SIGLIP, seed=9)
    ours = retriever(SIGLIP, model)
    pixels, images = noise(10, 3, 5, 48, 48, 3)
    mask = np.array([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 1, 0, 1, 1]], bool)
    theirs = []
    for video, there in zip(images, mask, strict=True):
        with torch.no_grad():
            frames = model.get_image_features(video[there].permute(0, 3, 1, 2)).pooler_output
        mean = frames.mean(0)
        theirs.append(mean / mean.norm())
    assert_close(run(ours, pixels, mask, method="embed_video"), torch.stack(theirs))


# Q-Former -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def qformer():
    """(cross_every, layers, eps of norms) -> our Q-Former, and Hugging Face's as a function of the same arrays."""

    def make(cross_every, layers, norm_eps):
        config = QFormerConfig(
            queries=5,
            width=36,
            layers=layers,
            heads=3,
            mlp_width=50,
            cross_every=cross_every,
            vocab_size=41,
            max_text=13,
            norm_eps=norm_eps,
        )
        model = randomise(reference.hf_qformer(config, 22), seed=11)
        queries = noise(12, 1, 5, 36, scale=0.5)[1]
        table = layouts.qformer(config, "Qformer.bert.", "q")
        table["query_tokens"] = (layouts.Piece("q.queries", form=layouts.BATCHED),)
        state = reference.qformer_state(model, "Qformer.bert.") | {"query_tokens": queries}
        ours = nnx.eval_shape(lambda: QFormer(config, 22, nnx.Rngs(0), F32))
        fill(ours, [(layouts.Layout("qformer", table), state)], prefix="q.")

        @torch.no_grad()
        def theirs(context, context_mask=None, text=None, text_mask=None):
            rows = len(context)
            mask = None
            if text is not None:
                text, text_mask = torch.from_numpy(text), torch.from_numpy(text_mask).long()
                mask = torch.cat([torch.ones(rows, 5, dtype=torch.long), text_mask], dim=1)
            return model(
                input_ids=text,
                attention_mask=mask,
                query_embeds=queries.expand(rows, -1, -1),
                encoder_hidden_states=torch.from_numpy(context),
                encoder_attention_mask=None if context_mask is None else torch.from_numpy(context_mask).long(),
            ).last_hidden_state

        return ours, theirs

    return make


@pytest.mark.parametrize("cross_every, layers, norm_eps", [(2, 6, 1e-12), (1, 3, 4e-3), (3, 6, 4e-3)])
def test_qformer(cross_every, layers, norm_eps, qformer):
    ours, theirs = qformer(cross_every, layers, norm_eps)
    context = noise(13, 4, 9, 22)[0]
    text, text_mask = sentences(15, [7, 3, 1, 5], 41)
    some = np.random.default_rng(14).random((4, 9)) < 0.6
    some[:, 0] = True
    for context_mask in (some, np.ones_like(some)):
        # Padding's own outputs are equal, too: it sees what its neighbours see, and the published system reads it.
        assert_close(run(ours, context, context_mask, text, text_mask), theirs(context, context_mask, text, text_mask))


def test_qformer_without_masks_and_without_text(qformer):
    ours, theirs = qformer(2, 4, 4e-3)
    context = noise(13, 4, 9, 22)[0]
    text = sentences(15, [7, 7, 7, 7], 41)[0]
    assert_close(run(ours, context, None, text), theirs(context, None, text, np.ones(text.shape, bool)))
    assert_close(run(ours, context), theirs(context))


# From frames to visual tokens -----------------------------------------------------------------------------------------

VISION = InterLLaVAConfig(
    vit=dataclasses.replace(EVA, image_size=28, layers=2, norm_eps=1e-3),
    qformer=QFormerConfig(
        queries=3, width=36, layers=4, heads=3, mlp_width=50, cross_every=2, vocab_size=41, max_text=13, norm_eps=2e-3
    ),
    video_qformer=QFormerConfig(
        queries=4, width=24, layers=2, heads=4, mlp_width=44, cross_every=1, vocab_size=0, max_text=0, norm_eps=3e-3
    ),
    llama=LlamaConfig(width=32),
    llama_ids_for_qformer=True,
)
PUBLISHED = {"keep_text_tokens": True, "attend_to_pads": True}


def encoder_of(config, seed):
    vision = reference.Vision(config, seed)
    c = config
    encoder = nnx.eval_shape(
        lambda: VideoEncoder(c.vit, c.text_qformer, c.video_qformer, c.video, c.llama.width, nnx.Rngs(0), F32)
    )
    return vision, reference.fill_vision(encoder, vision)


VIDEOS = {
    "published": VideoEncoderConfig(max_frames=9, window=4, stride=3, **PUBLISHED),  # the last window has two frames
    "published, apart": VideoEncoderConfig(max_frames=8, window=3, stride=3, **PUBLISHED),
    "text without padding": VideoEncoderConfig(max_frames=8, window=2, stride=3, keep_text_tokens=True),
    "queries alone": VideoEncoderConfig(max_frames=8, window=5, stride=3),
    "no text": VideoEncoderConfig(max_frames=8, window=3, stride=2),
}


@pytest.mark.parametrize("name", VIDEOS)
def test_video(name):
    """A whole video, one of four frames, one with holes, in one batch; torch gets each by itself, cut at its end."""
    vocab_size = 0 if name == "no text" else 41
    qformer = dataclasses.replace(VISION.qformer, vocab_size=vocab_size, max_text=13 if vocab_size else 0)
    vision, encoder = encoder_of(dataclasses.replace(VISION, qformer=qformer, video=VIDEOS[name]), seed=16)
    pixels, theirs = noise(17, 3, 8, 28, 28, 3)
    there = np.array([[1, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0, 0], [0, 1, 1, 0, 0, 0, 1, 0]], bool)
    text = text_mask = None
    if vocab_size:
        text, text_mask = sentences(18, [7, 6, 7, 5, 4, 7, 6, 6] * 3, vocab_size)
        text, text_mask = text.reshape(3, 8, -1), text_mask.reshape(3, 8, -1)
    encoded = run(encoder, pixels, there, text, text_mask)
    for i, last in enumerate([8, 4, 7]):
        sentence = (torch.from_numpy(text[i, :last]), torch.from_numpy(text_mask[i, :last])) if vocab_size else ()
        kept = there[i, :last]
        expected = vision(theirs[i, :last], *sentence, there=kept)
        assert_close(encoded.tokens[i][encoded.mask[i]], expected["tokens"])
        assert_close(encoded.frames[i, :last][kept], expected["frames"][kept])
        assert not np.asarray(encoded.frames)[i, ~there[i]].any()
        for between in ("vit", "vit_norm", "qformer"):
            assert_close(encoded.intermediates[between][i, :last], expected[between])
        windows = encoded.mask[i].reshape(-1, VISION.video_qformer.queries).any(1)
        assert_close(encoded.intermediates["video_qformer"][i][windows], expected["video_qformer"])


def test_more_frames_than_positions():
    """Frames share rows of the table, by the number of frames that are there: padding a batch moves none."""
    config = dataclasses.replace(VISION, video=VideoEncoderConfig(max_frames=5, window=3, stride=2))
    vision, encoder = encoder_of(config, seed=19)
    pixels, theirs = noise(20, 3, 8, 28, 28, 3)
    text, text_mask = sentences(21, [7] * 24, 41)
    text, text_mask = text.reshape(3, 8, -1), text_mask.reshape(3, 8, -1)
    counts = np.array([8, 7, 4])
    encoded = run(encoder, pixels, np.arange(8) < counts[:, None], text, text_mask)
    for i, count in enumerate(counts):
        expected = vision(theirs[i, :count], torch.from_numpy(text[i, :count]), torch.from_numpy(text_mask[i, :count]))
        assert_close(encoded.frames[i, :count], expected["frames"])
        assert_close(encoded.tokens[i][encoded.mask[i]], expected["tokens"])


def test_features_of_small_variance():
    """Features that the ViT made before, so small that the epsilon of their norm, torch's default, decides."""
    config = dataclasses.replace(VISION, video=VideoEncoderConfig(max_frames=8, window=4, stride=3, **PUBLISHED))
    vision, encoder = encoder_of(config, seed=22)
    features, theirs = noise(23, 1, 5, 5, 48, scale=2e-3)
    text, text_mask = sentences(24, [7, 6, 7, 5, 4], 41)
    encoded = run(encoder, features, None, text[None], text_mask[None])
    expected = vision(theirs[0], torch.from_numpy(text), torch.from_numpy(text_mask))
    assert_close(encoded.intermediates["vit_norm"][0], expected["vit_norm"])
    assert_close(encoded.tokens[0], expected["tokens"])


def test_encode_video_of_a_bundle():
    """Pixels 0..255 and ready ids go in, every step of the published system comes out."""
    config = dataclasses.replace(
        VISION,
        vit=dataclasses.replace(VISION.vit, pixel_mean=(0.4, 0.5, 0.6), pixel_std=(0.2, 0.25, 0.3)),
        llama=LlamaConfig(vocab_size=11, width=32, layers=1, heads=2, kv_heads=2, mlp_width=40),
        video=VideoEncoderConfig(max_frames=8, window=4, stride=3, **PUBLISHED),
    )
    model = nnx.eval_shape(lambda: InterLLaVA(config, nnx.Rngs(0), F32))
    vision = reference.Vision(config, seed=25)
    reference.fill_vision(model.encoder, vision)
    bundle = Bundle(BundleConfig(config, None, PromptStyle()), model, None, None, None)
    frames = np.random.default_rng(26).integers(0, 256, (5, 28, 28, 3), np.uint8)
    text, text_mask = sentences(27, [7, 6, 7, 5, 4], 41)
    normalised = (torch.from_numpy(frames) / 255 - torch.tensor([0.4, 0.5, 0.6])) / torch.tensor([0.2, 0.25, 0.3])
    expected = vision(normalised, torch.from_numpy(text), torch.from_numpy(text_mask))
    tokens, between = bundle.encode_video(frames, text=text, text_mask=text_mask, intermediates=True)
    assert between.keys() == expected.keys() - {"tokens"}
    for name, value in between.items():
        assert_close(value, expected[name])
    assert_close(tokens, expected["tokens"])
    assert_close(bundle.encode_video(frames, text=jnp.asarray(text), text_mask=text_mask), expected["tokens"])
