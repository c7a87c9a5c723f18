"""Videos' frames -> what a corpus keeps of them, by both models of an export, in batches of one static shape."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from ivcr_jax.bundle import Bundle
from ivcr_jax.data.encoding import frame_text_length
from ivcr_jax.data.video import Views
from ivcr_jax.infer.corpus import Record
from ivcr_jax.sharding import by_rows

STORED = np.dtype(np.float16)


class Embedder:
    """The compiled models. Attributes: frames: T, how many a video may have. sizes: (H, W) of the views it reads.
    rows: B, videos at once."""

    def __init__(self, bundle: Bundle, mesh: Mesh, batch: int) -> None:
        """Takes a bundle of both models that was loaded onto the mesh; `batch` videos at once on each of its devices.

        Raises ValueError where it lacks a tokenizer that its Q-Former needs.
        """
        assert bundle.model is not None and bundle.retriever is not None
        encoder, moment, retriever = bundle.model.encoder, bundle.model.moment, bundle.retriever
        self._reads_text = bool(encoder.qformer.config.vocab_size)
        if self._reads_text and bundle.tokenizer is None:
            raise ValueError("the export holds no tokenizer, and its Q-Former reads the frames' times as text")
        self._bundle, self._mesh = bundle, mesh
        self.frames = encoder.config.max_frames
        self._sides = [(side, side) for side in (retriever.config.vit.image_size, encoder.vit.config.image_size)]
        self.sizes, self.rows = sorted({*self._sides}), batch * mesh.size
        definitions, self._states = zip(*map(nnx.split, (retriever, encoder, moment)), strict=True)

        def run(
            states: Sequence[nnx.State],
            images: Sequence[jax.Array],
            mask: jax.Array,
            text: jax.Array | None,
            text_mask: jax.Array | None,
        ) -> dict[str, jax.Array]:
            retriever, encoder, moment = map(nnx.merge, definitions, states)
            frames = retriever.embed_frames(images[0])
            encoded = encoder(images[1], mask, text, text_mask)
            wide = frames.astype(jnp.float32)
            length = jnp.sqrt(jnp.maximum(jnp.square(wide).sum(-1, keepdims=True), 1e-24))
            return {
                "video": retriever.pool(frames, mask),
                "frames": (wide / length).astype(STORED),
                "tokens": jnp.where(encoded.mask[..., None], encoded.tokens, 0).astype(STORED),
                "token_mask": encoded.mask,
                "moment_keys": moment.keys(encoded.frames).astype(STORED),
            }

        self._run = jax.jit(run, out_shardings=by_rows(mesh))

    def start(self, videos: Sequence[Views]) -> dict[str, jax.Array]:
        """Begins to compute up to B videos of up to T frames; `finish` waits for them and takes them apart."""
        mask = np.zeros((self.rows, self.frames), bool)
        images = {size: np.zeros((self.rows, self.frames, *size, 3), np.uint8) for size in self.sizes}
        for row, views in enumerate(videos):
            mask[row, : len(views.times)] = True
            for size, batch in images.items():
                batch[row, : len(views.times)] = views.images[size]
        text = text_mask = None
        if self._reads_text:
            text, text_mask = self._text(videos)
        with jax.set_mesh(self._mesh):
            given = jax.device_put((images, mask, text, text_mask), by_rows(self._mesh))
            found = self._run(self._states, [given[0][size] for size in self._sides], *given[1:])
        for array in found.values():
            array.copy_to_host_async()
        return found

    def finish(self, names: Sequence[str], videos: Sequence[Views], found: dict[str, jax.Array]) -> list[Record]:
        """What `start` computed, of the same videos.

        Raises ValueError, naming the video, for a value that is not finite or beyond float16.
        """
        arrays = {name: np.asarray(array) for name, array in found.items()}
        records = []
        for row, (name, views) in enumerate(zip(names, videos, strict=True)):
            count = len(views.times)
            record = Record(
                video=arrays["video"][row],
                frames=arrays["frames"][row, :count],
                tokens=arrays["tokens"][row],
                token_mask=arrays["token_mask"][row],
                moment_keys=arrays["moment_keys"][row, :count],
                times=views.times,
                thumbnails=np.frombuffer(b"".join(views.thumbnails), np.uint8),
                thumbnail_sizes=np.array([len(jpeg) for jpeg in views.thumbnails], np.int32),
            )
            for part in ("video", "frames", "tokens", "moment_keys"):
                if not np.isfinite(getattr(record, part)).all():
                    raise ValueError(f"{name}: its {part} hold values beyond {STORED}'s range, or not finite")
            records.append(record)
        return records

    def _text(self, videos: Sequence[Views]) -> tuple[np.ndarray, np.ndarray]:
        """Each frame's sentence i32[B, T, L] and which ids are there. L is as in training, whatever the videos."""
        assert self._bundle.tokenizer is not None
        sentences = [self._bundle.frame_text(views.times.tolist()) for views in videos]
        length = frame_text_length(self._bundle.tokenizer, self._bundle.config.style)
        length = max([length, *(ids.shape[1] for ids, _ in sentences)])  # more for a video of over 9999.9 s
        text = np.zeros((self.rows, self.frames, length), np.int32)
        mask = np.zeros(text.shape, bool)
        for row, (ids, there) in enumerate(sentences):
            text[row, : len(ids), : ids.shape[1]] = np.where(there, ids, 0)
            mask[row, : len(ids), : ids.shape[1]] = there
        return text, mask
