"""The whole: videos and dialogues -> decoder states, scores of candidates, moments.

Joins the video encoder, the decoder and the two heads over the batches of ivcr_jax/data/batches.py, whose docstring
says what each array is. Arrays only. Axis letters: B rows, S positions, V video slots, T frames, R turns, C candidates,
K visual tokens of a video, D the decoder's width, Dr the first stage's.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ivcr_jax.models import lora
from ivcr_jax.models.heads import MomentHead, MomentHeadConfig, Moments, RankHead, RankHeadConfig
from ivcr_jax.models.layers import Compute, of_each_row, over_chunks, split_key
from ivcr_jax.models.llama import KVCache, Llama, LlamaConfig
from ivcr_jax.models.lora import LoraConfig
from ivcr_jax.models.qformer import QFormerConfig
from ivcr_jax.models.video_encoder import EncodedVideo, VideoEncoder, VideoEncoderConfig
from ivcr_jax.models.vit import ViTConfig


@dataclasses.dataclass(frozen=True)
class InterLLaVAConfig:
    """The defaults are the published sizes (arXiv 2512.01312) and the sound values of every quirk.

    Attributes:
      vit, qformer, video_qformer, video: of the video encoder.
      llama, lora: of the decoder. rank, moment: of the heads.
      layout: "isolated" or "inline", as the batches were made with.
      llama_ids_for_qformer: (published; the sound value is False) the image Q-Former's word table is BERT's, of
        `qformer.vocab_size` rows, and the decoder's token ids index it all the same. Otherwise it has a row for each of
        the decoder's tokens, llama.vocab_size in place of qformer.vocab_size.
    """

    vit: ViTConfig = ViTConfig()
    qformer: QFormerConfig = QFormerConfig()
    video_qformer: QFormerConfig = QFormerConfig(layers=2, cross_every=1, vocab_size=0, max_text=0)
    video: VideoEncoderConfig = VideoEncoderConfig()
    llama: LlamaConfig = LlamaConfig()
    lora: LoraConfig = LoraConfig()
    rank: RankHeadConfig = RankHeadConfig()
    moment: MomentHeadConfig = MomentHeadConfig()
    layout: str = "isolated"
    llama_ids_for_qformer: bool = False

    def __post_init__(self) -> None:
        if self.layout not in ("isolated", "inline"):
            raise ValueError(f"layout is {self.layout!r}; expected isolated or inline")

    @property
    def text_qformer(self) -> QFormerConfig:
        """The image Q-Former with the word table it really has."""
        if self.llama_ids_for_qformer or not self.qformer.vocab_size:
            return self.qformer
        return dataclasses.replace(self.qformer, vocab_size=self.llama.vocab_size)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Output:
    """Attributes: hidden: f[B, S, D] after the final norm. scores: f32[B, R, C], ABSENT where there is no candidate.
    moments: of [B, R, T]; of turns without one, meaningless. Without the decoder the first two are None."""

    hidden: jax.Array | None
    scores: jax.Array | None
    moments: Moments


class InterLLaVA(nnx.Module):
    """The dialogue model."""

    def __init__(self, config: InterLLaVAConfig, rngs: nnx.Rngs, compute: Compute = Compute()) -> None:
        c = config
        self.encoder = VideoEncoder(c.vit, c.text_qformer, c.video_qformer, c.video, c.llama.width, rngs, compute)
        self.llama = Llama(c.llama, rngs, compute)
        self.rank = RankHead(c.rank, c.llama.width, rngs)
        self.moment = MomentHead(c.moment, c.llama.width, c.qformer.width, rngs, compute)
        lora.add(self, c.lora, rngs)
        self.config, self.compute = config, compute

    def __call__(
        self,
        batch: Mapping[str, jax.Array],
        key: jax.Array | None = None,
        first: jax.Array | None = None,
        texts: jax.Array | None = None,
        decode: bool = True,
    ) -> Output:
        """Everything a loss or a metric needs of a batch (see batches.empty_batch).

        Args:
          batch: with `frames` u8[B, V, T, H, W, 3], or `features` f[B, V, T, P, Dv] of the ViT.
          key: of dropout, in training; None for none.
          first: f32[B, R, C], the first stage's scores of the candidates, where `config.rank.first_stage` wants them.
          texts: f32[B, R, Dr], its vectors of the turns' `queries`, where `config.moment.first_width` wants them.
          decode: False leaves the decoder out, which is most of the work: moments then come of the texts alone, as if
            all states were zero.
        """
        keys = split_key(key, 2)
        videos = self.encode(batch, keys[0])
        if not decode:
            nothing = jnp.zeros((*batch["turn_states"].shape, self.config.llama.width), videos.frames.dtype)
            return Output(None, None, self._moment(nothing, videos.frames, batch, texts))
        slots = jnp.maximum(batch["video_slots"], 0)
        visual = batch["video_slots"] >= 0
        there = of_each_row(videos.mask, slots, batch["video_offsets"])
        tokens = of_each_row(videos.tokens, slots, batch["video_offsets"])
        x = jnp.where(visual[..., None], tokens, self.llama.embed(batch["tokens"]))
        hidden, _ = self.llama(
            x,
            batch["positions"],
            jnp.where(visual & ~there, 0, batch["segment_ids"]),
            self.blocks(batch["video_slots"]),
            key=keys[1],
        )
        states = of_each_row(hidden, batch["turn_states"])
        width = videos.tokens.shape[2]
        scores = self._rank(states, hidden, visual & there, batch["candidate_blocks"], width, first)
        return Output(hidden, scores, self._moment(states, videos.frames, batch, texts))

    def encode(self, batch: Mapping[str, jax.Array], key: jax.Array | None = None) -> EncodedVideo:
        """The batch's videos, each field with leading axes [B, V]; nothing in `intermediates`."""
        videos = [batch["features"] if "features" in batch else batch["frames"], batch["frame_mask"]]
        if self.encoder.qformer.config.vocab_size:
            videos.append(batch["frame_text"])

        def some(videos: list[jax.Array], key: jax.Array | None) -> EncodedVideo:
            rows, slots = videos[1].shape[:2]
            frames, mask, *text = (x.reshape(rows * slots, *x.shape[2:]) for x in videos)
            encoded = self.encoder(frames, mask, text[0] if text else None, key=key)
            encoded = dataclasses.replace(encoded, intermediates={})
            return jax.tree.map(lambda x: x.reshape(rows, slots, *x.shape[1:]), encoded)

        return over_chunks(some, videos, self.compute.videos_at_once, self.compute.remat, key)

    def blocks(self, video_slots: jax.Array) -> jax.Array | None:
        """i32[B, S] video slots, -1 at text -> block numbers for the decoder in this layout."""
        return video_slots + 1 if self.config.layout == "isolated" else None

    def encode_block(self, tokens: jax.Array, mask: jax.Array) -> tuple[jax.Array, KVCache]:
        """A video's visual tokens through the decoder, alone.

        In the isolated layout its keys and values are those in any context: `KVCache.append` puts them there.

        Args:
          tokens: f[B, K, D] of B videos. mask: bool[B, K].

        Returns:
          f[B, K, D] states, for `RankHead.keys`, and a cache that holds the block, number 1 in segment 1.
        """
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), mask.shape)
        ones = mask.astype(jnp.int32)
        hidden, cache = self.llama(tokens, positions, ones, ones, self.llama.empty_cache(*mask.shape))
        assert cache is not None
        return hidden, cache

    def _rank(
        self,
        states: jax.Array,
        hidden: jax.Array,
        there: jax.Array,
        blocks: jax.Array,
        width: int,
        first: jax.Array | None,
    ) -> jax.Array:
        """states f[B, R, D], hidden f[B, S, D], there bool[B, S], blocks i32[B, R, C] -> f32[B, R, C]."""
        index = blocks[..., None] + np.arange(width)
        present = (blocks >= 0)[..., None]
        index = jnp.where(present, index, 0)
        keys = self.rank.keys(hidden)  # before they are gathered: far narrower than the states
        return self.rank(states, of_each_row(keys, index), of_each_row(there, index) & present, first)

    def _moment(
        self, states: jax.Array, frames: jax.Array, batch: Mapping[str, jax.Array], texts: jax.Array | None
    ) -> Moments:
        """states f[B, R, D], frames f[B, V, T, Q, F], texts f32[B, R, Dr] -> moments of [B, R, T]."""
        shape = states.shape[:2]
        slots = jnp.maximum(batch["moment_slots"], 0)

        def flat(x: jax.Array) -> jax.Array:
            return x.reshape(shape[0] * shape[1], *x.shape[2:])

        of_turn = [self.moment.keys(frames), batch["frame_times"], batch["frame_mask"], batch["durations"]]
        keys, times, mask, durations = (flat(of_each_row(x, slots)) for x in of_turn)
        asked = None if texts is None else flat(texts)
        moments = self.moment(flat(states), keys, times, mask, durations, asked)
        return jax.tree.map(lambda x: x.reshape(*shape, *x.shape[1:]), moments)
