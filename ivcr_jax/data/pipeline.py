"""The pipeline: from the stores to a stream of packed batches, through Grain.

Row number n of the endless stream is the same whatever the number of processes, workers and threads, and can be
built without building those before it. So the whole state is one number, and a restart goes on exactly. It knows no
device and no mesh: a process gets its own rows as NumPy arrays.
"""

import concurrent.futures
import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np
from absl import app, flags, logging
from etils import epath

from ivcr_jax import command
from ivcr_jax.config import listed
from ivcr_jax.data import batches, packing
from ivcr_jax.data.dialogue import Dialogue
from ivcr_jax.data.encoding import EncodingConfig
from ivcr_jax.data.store import DialogueStore, VideoStore
from ivcr_jax.data.tokenizer import Tokenizer, train_demo

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class PipelineConfig:
    """What is read and how it is dealt out.

    Attributes:
      pack: the row.
      batch_size: B, rows of a batch over all processes.
      train: an endless stream with rows, candidates and frames in random order; False reads every row once, as
        stored, and fills the last batch up with empty rows.
      seed: of all that is random.
      keep_chat: whether dialogues of plain chat take part.
      threads: videos decoded at a time by a process (each worker).
      workers: processes that build batches; 0 builds them in threads of this process.
      prefetch: batches built ahead (by each worker).
    """

    pack: batches.PackConfig = batches.PackConfig()
    batch_size: int = 8
    train: bool = True
    seed: int = 0
    keep_chat: bool = True
    threads: int = 4
    workers: int = 0
    prefetch: int = 2

    def __post_init__(self) -> None:
        for name in ("batch_size", "threads", "prefetch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1")
        if self.workers < 0:
            raise ValueError(f"workers is {self.workers}; expected 0 or more")


class Pipeline:
    """The batches of one split for one process. Iterate over it, or ask for `batch(step)`.

    Attributes:
      plan: the packed rows, with what was dropped and why.
      steps: batches of a pass over the split (rounded up).
    """

    def __init__(
        self,
        dialogues: DialogueStore,
        videos: VideoStore,
        tokenizer: Tokenizer,
        config: PipelineConfig,
        *,
        queries: Tokenizer | None = None,
        rows: Sequence[int] | None = None,
        cache_dir: epath.PathLike | None = None,
    ):
        """Plans the rows, or reads the plan from `cache_dir` where an earlier start left it.

        Args:
          dialogues, videos, tokenizer, config: what is read, and how.
          queries: the first stage's tokenizer; needed where `config.pack.query_len` is not 0.
          rows: which of each batch's rows this pipeline makes, of 0 to config.batch_size - 1; None for all.
          cache_dir: a folder for plans, or None.

        Raises:
          ValueError: for rows that a batch does not have, or where no dialogue fits a row.
        """
        if bool(config.pack.query_len) != (queries is not None):
            raise ValueError(f"query_len is {config.pack.query_len}, and a tokenizer for queries is {queries}")
        rows = range(config.batch_size) if rows is None else rows
        if not rows or min(rows) < 0 or max(rows) >= config.batch_size:
            raise ValueError(f"rows {listed(list(map(str, rows)), 4)} of a batch of {config.batch_size}")
        self.config = config
        # Everything that decides what row n holds. Batch size, processes and workers do not.
        self.fingerprint = hashlib.sha256(
            json.dumps(
                [
                    packing.VERSION,
                    dialogues.fingerprint,
                    videos.fingerprint,
                    tokenizer.fingerprint,
                    queries.fingerprint if queries else None,
                    dataclasses.asdict(config.pack),
                    config.train,
                    config.seed,
                    config.keep_chat,
                ]
            ).encode()
        ).hexdigest()
        self.plan = self._plan(dialogues, videos, tokenizer, cache_dir)
        self._batches = _Batches(dialogues, videos, tokenizer, queries, config, self.plan, tuple(rows))
        self.steps = self._batches.steps

    def _plan(
        self,
        dialogues: DialogueStore,
        videos: VideoStore,
        tokenizer: Tokenizer,
        cache_dir: epath.PathLike | None,
    ) -> packing.Plan:
        config = self.config
        path = epath.Path(cache_dir) / f"plan-{self.fingerprint[:16]}.json" if cache_dir else None
        if path and path.exists():
            return packing.load_plan(path)
        plan = packing.make_plan(
            dialogues,
            videos,
            tokenizer,
            config.pack,
            keep_chat=config.keep_chat,
            seed=config.seed if config.train else None,
            threads=config.threads,
        )
        logging.info("packed %s: %s", dialogues.split, plan.report(config.pack.seq_len))
        if path:
            packing.save_plan(path, plan)
        return plan

    def batch(self, step: int) -> Batch:
        """This process's rows of batch `step`; `batches.empty_batch` lists the arrays."""
        return self._batches[step]

    def __iter__(self) -> "BatchIterator":
        return BatchIterator(self, self._batches)


class _Batches(grain.sources.RandomAccessDataSource[Batch]):
    """Batches by step. Travels to worker processes."""

    def __init__(
        self,
        dialogues: DialogueStore,
        videos: VideoStore,
        tokenizer: Tokenizer,
        queries: Tokenizer | None,
        config: PipelineConfig,
        plan: packing.Plan,
        rows: tuple[int, ...],
    ):
        self._dialogues = dialogues
        self._videos = videos
        self._tokenizer = tokenizer
        self._queries = queries
        self._shape = batches.BatchShape.of(videos, tokenizer, config.pack)
        self._config = config
        self._plan = plan
        self._rows = rows
        self.steps = -(-len(plan) // config.batch_size)
        # Row numbers in the order of training: each pass all rows once, shuffled anew, any place in O(1).
        self._order = grain.MapDataset.range(len(plan)).seed(config.seed).shuffle().repeat()
        self._pool: concurrent.futures.ThreadPoolExecutor | None = None

    def __len__(self) -> int:
        if self._config.train:
            return 2**40  # endless, as far as anyone trains
        return self.steps

    def __getitem__(self, step: int) -> Batch:
        config = self._config
        batch = batches.empty_batch(len(self._rows), config.pack, self._shape)
        work = []
        for row, place in enumerate(self._rows):
            number = step * config.batch_size + place
            epoch, place = divmod(number, len(self._plan))
            rng = None
            if config.train:
                place = int(self._order[number])
                rng = np.random.default_rng((config.seed, epoch, place))
            elif epoch:
                continue  # past the end: the last batch is filled up with empty rows
            content = [(record, self._dialogue(record, turns)) for record, turns in self._plan.row(place)]
            work += batches.fill_row(
                batch, row, content, self._videos, self._tokenizer, config.pack, rng, self._queries
            )
        if self._pool is None:
            self._pool = concurrent.futures.ThreadPoolExecutor(config.threads)
        for _ in self._pool.map(lambda item: self._videos.decode(*item), work):
            pass
        return batch

    def _dialogue(self, record: int, turns: int) -> Dialogue:
        usable, _ = packing.restrict(self._dialogues[record], self._videos)
        assert usable is not None  # the plan holds only what is usable
        return dataclasses.replace(usable, turns=usable.turns[:turns])

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_pool": None}


class BatchIterator(Iterator[Batch]):
    """Batches from a position on. The position counts rows over all processes."""

    def __init__(self, pipeline: Pipeline, batches: _Batches):
        self._pipeline = pipeline
        self._batches = batches
        self._step = 0
        self._inner: Iterator[Batch] | None = None

    def __next__(self) -> Batch:
        if self._inner is None:
            self._inner = iter(self._start())
        batch = next(self._inner)
        self._step += 1
        return batch

    def get_state(self) -> dict[str, Any]:
        """Where the stream stands, as plain JSON values; the same in every process."""
        return {
            "rows": self._step * self._pipeline.config.batch_size,
            "fingerprint": self._pipeline.fingerprint,
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on from a state of this or another iterator, of any number of processes, workers or threads.

        Raises:
          ValueError: where the state is of other data, another tokenizer, seed or row, or where the batch size
            changed so that the rows read so far are not a whole number of batches.
        """
        if state["fingerprint"] != self._pipeline.fingerprint:
            raise ValueError(
                f"the saved position is of another stream ({state['fingerprint'][:12]}, this one is "
                f"{self._pipeline.fingerprint[:12]}): data, tokenizer, seed or row shape changed since"
            )
        step, rest = divmod(state["rows"], self._pipeline.config.batch_size)
        if rest:
            raise ValueError(
                f"the saved position is row {state['rows']}, inside a batch of "
                f"{self._pipeline.config.batch_size} rows; expected a multiple of it"
            )
        self._step = step
        self._inner = None

    def _start(self) -> grain.IterDataset:
        config = self._pipeline.config
        # Grain's own state is never used: the dataset starts at our step, so it need not survive a change of
        # workers (its state does not).
        options = grain.ReadOptions(num_threads=config.prefetch, prefetch_buffer_size=config.prefetch)
        dataset = grain.MapDataset.source(self._batches)[self._step :].to_iter_dataset(options)
        if config.workers:
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()  # Grain's workers read flags, parsed or not
            dataset = dataset.mp_prefetch(
                grain.multiprocessing.MultiprocessingOptions(
                    num_workers=config.workers, per_worker_buffer_size=config.prefetch
                )
            )
        return dataset


def describe(batch: Batch, tokenizer: Tokenizer) -> str:
    """A batch in words: each dialogue's text with its videos as [slot 3 x64], each turn with what it should say."""
    lines = []
    for row in range(len(batch["tokens"])):
        used = int((batch["segment_ids"][row] > 0).sum())
        lines.append(f"row {row}: {used} of {batch['tokens'].shape[1]} positions")
        for slot in np.flatnonzero(batch["video_mask"][row]):
            times = batch["frame_times"][row, slot][batch["frame_mask"][row, slot]]
            listed = ", ".join(f"{time:.2f}" for time in times)
            lines.append(f"  slot {slot}: {batch['durations'][row, slot]:.2f} s, frames at {listed}")
        for segment in range(1, int(batch["segment_ids"][row].max(initial=0)) + 1):
            here = np.flatnonzero(batch["segment_ids"][row] == segment)
            positions = batch["positions"][row, here]
            lines.append(
                f"  dialogue {segment} at {here[0]}..{here[-1]}, positions {positions.min()}..{positions.max()}"
            )
            lines += [f"    {line}" for line in _text(batch, row, here, tokenizer).split("\n")]
            for turn in np.flatnonzero(batch["turn_mask"][row] & (batch["turn_segments"][row] == segment)):
                lines.append(f"    turn {batch['turn_numbers'][row, turn]}: {_targets(batch, row, turn)}")
    return "\n".join(lines) + "\n"


def _text(batch: Batch, row: int, here: np.ndarray, tokenizer: Tokenizer) -> str:
    """The text; what is learnt stands in {braces}."""
    parts: list[str] = []
    run: list[int] = []
    learning = False

    def flush() -> None:
        if run:
            text = tokenizer.decode(run)
            parts.append("{" + text + "}" if learning else text)
            run.clear()

    for place in here:
        slot, offset = batch["video_slots"][row, place], batch["video_offsets"][row, place]
        learnt = bool(place > here[0] and batch["loss_mask"][row, place - 1])
        if learnt != learning or slot >= 0:
            flush()
        learning = learnt
        if slot >= 0:
            if offset == 0:
                width = int((batch["video_slots"][row, place:] == slot).argmin())
                parts.append(f"[slot {slot} x{width}]")
        else:
            run.append(int(batch["tokens"][row, place]))
    flush()
    return "".join(parts)


def _targets(batch: Batch, row: int, turn: np.integer) -> str:
    state = f"state {batch['turn_states'][row, turn]}"
    slots = batch["candidate_slots"][row, turn]
    if (slots >= 0).any():
        blocks = batch["candidate_blocks"][row, turn][slots >= 0].tolist()
        target = batch["candidate_targets"][row, turn]
        return f"{state}, candidates in slots {slots[slots >= 0].tolist()} at {blocks}, target {target}"
    if batch["moment_slots"][row, turn] >= 0:
        start, end = batch["moment_spans"][row, turn]
        slot, block = batch["moment_slots"][row, turn], batch["moment_blocks"][row, turn]
        return f"{state}, moment {start:.2f}-{end:.2f} s in slot {slot} at {block}"
    return f"{state}, chat"


def _define_flags() -> None:
    # Not at import: another program may import this module and have flags of the same names.
    flags.DEFINE_string("dialogues", None, "A built ivcr200k.", required=True)
    flags.DEFINE_string("videos", None, "A built ivcr200k_videos, or a feature store.", required=True)
    flags.DEFINE_string("tokenizer", None, "A SentencePiece .model; by default one is trained on the dialogues.")
    flags.DEFINE_string("split", "train", "Which dialogues.")
    flags.DEFINE_enum("layout", "isolated", ["isolated", "inline"], "Where visual tokens stand.")
    flags.DEFINE_integer("seq_len", 2048, "Positions of a row.")
    flags.DEFINE_integer("video_slots", 16, "Videos of a row.")
    flags.DEFINE_integer("frames", 8, "Frames of a video.")
    flags.DEFINE_integer("step", 0, "Which batch (of one row) to show.")


def main(argv: list[str]) -> None:
    """Packs a split, says what became of it, and shows one row in words."""
    command.refuse_arguments(argv)
    args = flags.FLAGS
    dialogues = DialogueStore(args.dialogues, args.split)
    if args.tokenizer:
        tokenizer = Tokenizer.load(args.tokenizer)
    else:
        turns = (turn for i in range(min(len(dialogues), 1000)) for turn in dialogues[i].turns)
        tokenizer = train_demo((text for turn in turns for text in (turn.user, turn.answer)), 2000)
    pack = batches.PackConfig(
        EncodingConfig(layout=args.layout), args.seq_len, args.video_slots, max_turns=32, frames=args.frames
    )
    config = PipelineConfig(pack=pack, batch_size=1, train=args.split == "train")
    stream = Pipeline(dialogues, VideoStore(args.videos), tokenizer, config)
    print(json.dumps(stream.plan.report(args.seq_len), indent=1))
    print(describe(stream.batch(args.step), tokenizer), end="")


if __name__ == "__main__":
    _define_flags()
    app.run(main)
