"""Frames with their times -> the visual tokens a decoder reads, and features of each frame for the moment head.

ViT -> image Q-Former, which reads the sentence that tells the frame's time -> frame positions -> video Q-Former over
sliding windows of frames -> projection (TimeChat, arXiv 2312.02051; Video-LLaMA, arXiv 2306.02858). Arrays only: the
sentences come as token ids. Axis letters: B videos, T frames, P patches, Q queries, S tokens of a frame's sentence, K
visual tokens of a video.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ivcr_jax.models.layers import Compute, LayerNorm, Linear, parameter, split_key
from ivcr_jax.models.qformer import QFormer, QFormerConfig
from ivcr_jax.models.vit import ViT, ViTConfig

FEATURE_NORM_EPS = 1e-5  # torch's default, which the published weights were trained with


@dataclasses.dataclass(frozen=True)
class VideoEncoderConfig:
    """How frames become tokens.

    Attributes:
      max_frames: rows of the table of frame positions. A longer video shares rows: frame i of T has row
        floor(i * max_frames / T).
      window, stride: frames the video Q-Former reads at once, and from one window's start to the next's.
      keep_text_tokens: (published; the sound value is False) hand the time sentence's own outputs on to the video
        Q-Former beside the queries'.
      attend_to_pads: (published; False) with these, also the outputs at the padding of shorter sentences.
    """

    max_frames: int = 64
    window: int = 32
    stride: int = 32
    keep_text_tokens: bool = False
    attend_to_pads: bool = False

    def __post_init__(self) -> None:
        for name in ("max_frames", "window", "stride"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1")
        if self.attend_to_pads and not self.keep_text_tokens:
            raise ValueError("attend_to_pads is about text tokens; expected keep_text_tokens=True with it")

    def windows(self, frames: int) -> int:
        """How many windows a video of that many frames has."""
        return -(-frames // self.stride)


def position_rows(mask: jax.Array, size: int) -> jax.Array:
    """Which rows of a table of `size` frame positions the frames of videos have: bool[B, T] -> i32[B, T].

    By a video's length up to its last frame that is there, so that padding a batch moves nothing.
    """
    order = np.arange(mask.shape[1])
    length = jnp.where(mask, order + 1, 1).max(1, keepdims=True)
    return jnp.minimum(jnp.where(length <= size, order, order * size // length), size - 1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EncodedVideo:
    """What the encoder makes of B videos.

    Attributes:
      tokens: f[B, K, D], K = windows * Q, window by window.
      mask: bool[B, K], whether the token's window holds a frame.
      frames: f[B, T, Q, E], the image Q-Former's queries with frame positions, zero at missing frames.
      intermediates: "vit" f[B, T, P, Dv], "vit_norm" of that shape, "qformer" f[B, T, Q + S, E], "video_qformer"
        f[B, windows, Q, E]. Under jit those nobody uses cost nothing.
    """

    tokens: jax.Array
    mask: jax.Array
    frames: jax.Array
    intermediates: dict[str, jax.Array]


class VideoEncoder(nnx.Module):
    """The vision side of the system."""

    def __init__(
        self,
        vit: ViTConfig,
        qformer: QFormerConfig,
        video_qformer: QFormerConfig,
        config: VideoEncoderConfig,
        out_width: int,
        rngs: nnx.Rngs,
        compute: Compute = Compute(),
    ) -> None:
        """Raises ValueError where the parts do not fit together."""
        if video_qformer.vocab_size:
            raise ValueError(f"video_qformer.vocab_size is {video_qformer.vocab_size}; expected 0: it reads no text")
        if config.keep_text_tokens and not qformer.vocab_size:
            raise ValueError("keep_text_tokens without text: qformer.vocab_size is 0")
        self.vit = ViT(vit, rngs, compute)
        self.vit_norm = LayerNorm(vit.width, FEATURE_NORM_EPS)
        self.qformer = QFormer(qformer, vit.width, rngs, compute)
        self.frame_positions = parameter(rngs, (config.max_frames, qformer.width), ("positions", "embed"))
        self.video_qformer = QFormer(video_qformer, qformer.width, rngs, compute)
        self.projection = Linear(rngs, ("embed", None), (video_qformer.width, out_width))
        self.config, self.compute = config, compute

    def __call__(
        self,
        frames: jax.Array,
        frame_mask: jax.Array | None = None,
        text: jax.Array | None = None,
        text_mask: jax.Array | None = None,
        key: jax.Array | None = None,
    ) -> EncodedVideo:
        """Encodes videos.

        Args:
          frames: u8[B, T, H, W, 3] pixels, f32 of that shape normalised, or f[B, T, P, Dv] features of the ViT
            computed before.
          frame_mask: bool[B, T]; None is all. A missing frame has no effect on anything.
          text: i32[B, T, S], each frame's sentence with its time. Needed where the Q-Former has a vocabulary.
          text_mask: bool[B, T, S]; None takes id 0 for padding.
          key: of dropout; None for none.

        Raises:
          ValueError: where text is absent and expected or the other way round.
        """
        videos, count = frames.shape[:2]
        if (text is None) == bool(self.qformer.config.vocab_size):
            raise ValueError(f"text is {text}; expected {'none' if text is not None else 'a sentence for each frame'}")
        if frame_mask is None:
            frame_mask = jnp.ones((videos, count), bool)
        keys = split_key(key, 2)

        def flat(x: jax.Array) -> jax.Array:
            return x.reshape(videos * count, *x.shape[2:])

        features = self.vit(flat(frames)) if frames.ndim == 5 else flat(frames).astype(self.compute.dtype)
        normed = self.vit_norm(features)
        text = None if text is None else flat(text)
        text_mask = flat(text_mask) if text_mask is not None else None if text is None else text > 0
        read = self.qformer(normed, None, text, text_mask, keys[0])
        read = read.reshape(videos, count, *read.shape[1:])
        rows = position_rows(frame_mask, self.config.max_frames)
        placed = read + self.frame_positions[...][rows][:, :, None].astype(read.dtype)
        queries = self.qformer.config.queries
        there = jnp.broadcast_to(frame_mask[:, :, None], placed.shape[:3])
        if not self.config.keep_text_tokens:
            placed, there = placed[:, :, :queries], there[:, :, :queries]
        elif not self.config.attend_to_pads and text_mask is not None:
            sentences = there[:, :, queries:] & text_mask.reshape(videos, count, -1)
            there = jnp.concatenate([there[:, :, :queries], sentences], axis=2)
        windows, window_mask = self._over_windows(placed, there, keys[1])
        tokens = self.projection(windows)
        return EncodedVideo(
            tokens=tokens.reshape(videos, -1, tokens.shape[-1]),
            mask=jnp.repeat(window_mask, windows.shape[2], axis=1),
            frames=jnp.where(frame_mask[:, :, None, None], placed[:, :, :queries], 0),
            intermediates={
                "vit": features.reshape(videos, count, *features.shape[1:]),
                "vit_norm": normed.reshape(videos, count, *normed.shape[1:]),
                "qformer": read,
                "video_qformer": windows,
            },
        )

    def _over_windows(self, x: jax.Array, mask: jax.Array, key: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        """x f[B, T, Q, E], mask bool[B, T, Q] -> f[B, windows, Q', E'], bool[B, windows]."""
        videos, count, _, width = x.shape
        index = np.arange(self.config.windows(count))[:, None] * self.config.stride + np.arange(self.config.window)
        clips = index.shape[0]
        inside = (index < count)[None, :, :, None]
        index = np.minimum(index, count - 1)
        mask = mask[:, index] & inside
        context = x[:, index].reshape(videos * clips, -1, width)
        read = self.video_qformer(context, mask.reshape(videos * clips, -1), key=key)
        return read.reshape(videos, clips, *read.shape[1:]), mask.any((2, 3))
