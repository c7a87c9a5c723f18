"""What a training configuration says, and the two programs it is compiled to: the train step and the validation step.

The same programs run on a CPU, on a pod, and through `ivcr_jax.aot` on no device at all. It knows shapes and meshes;
it reads no data, writes no checkpoint and keeps no time.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ivcr_jax import bundle, losses, optim
from ivcr_jax.checkpoint import CheckpointConfig
from ivcr_jax.config import from_dict, listed
from ivcr_jax.data import prompt
from ivcr_jax.data.batches import PackConfig
from ivcr_jax.data.encoding import EncodingConfig
from ivcr_jax.losses import LossConfig
from ivcr_jax.models.interllava import InterLLaVA, InterLLaVAConfig, Output
from ivcr_jax.models.layers import Compute
from ivcr_jax.models.retriever import Retriever, RetrieverConfig
from ivcr_jax.optim import OptimConfig
from ivcr_jax.sharding import MeshConfig, by_rows, row_axes, shardings
from ivcr_jax.telemetry import LogConfig

Arrays = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What is read (docs/data.md).

    Attributes:
      dialogues, videos: folders of a built `ivcr200k`, and of a built `ivcr200k_videos` or a feature store.
      tokenizer, retriever_tokenizer: SentencePiece models, where the folder that training starts from has none.
      seq_len, video_slots, max_turns, max_candidates, frames: S, V, R, C, T of a batch.
      batch_size: B, rows of a batch over all processes.
      keep_chat: whether dialogues of plain chat take part.
      threads, workers: of the pipeline, in each process.
    """

    dialogues: str = ""
    videos: str = ""
    tokenizer: str = ""
    retriever_tokenizer: str = ""
    seq_len: int = 4096
    video_slots: int = 48
    max_turns: int = 24
    max_candidates: int = 10
    frames: int = 64
    batch_size: int = 16
    keep_chat: bool = True
    threads: int = 16
    workers: int = 0


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Validation in the loop. Attributes: every: steps; 0 for never. batches: at most so many; 0 for all."""

    every: int = 1000
    batches: int = 64


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A whole configuration, as `configs/*.py` give it.

    Attributes:
      model, retriever, style: of a model folder (bundle.BundleConfig). A model none of whose losses has a weight is
        not trained.
      compute, mesh, data, losses, optim, eval, checkpoint, log: see there.
      steps: updates in all.
      accumulate: slices of a batch that are worked through one after the other before an update; it divides a
        device's rows.
      seed: of everything random.
      init: a model folder to start from; "" starts from random weights.
      resume: the workdir of another run whose newest state to start from; "" for none.
      max_skipped: steps in a row that may be skipped because the loss or a gradient is not finite.
    """

    model: InterLLaVAConfig | None
    retriever: RetrieverConfig | None
    style: prompt.PromptStyle
    compute: Compute = Compute()
    mesh: MeshConfig = MeshConfig()
    data: DataConfig = DataConfig()
    losses: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    steps: int = 62_500
    accumulate: int = 1
    seed: int = 0
    init: str = ""
    resume: str = ""
    max_skipped: int = 10

    def __post_init__(self) -> None:
        """Raises ValueError for what does not go together."""
        if self.losses.of_model and self.model is None:
            raise ValueError("losses of the dialogue model have a weight, and there is no config.model")
        if self.losses.contrastive and self.retriever is None:
            raise ValueError("losses.contrastive has a weight, and there is no config.retriever")
        if self.model and self.losses.of_model:
            rank, moment = self.model.rank.first_stage, self.model.moment.first_width
            if (rank or moment) and not self.losses.contrastive:
                found = "model.rank.first_stage is True" if rank else f"model.moment.first_width is {moment}"
                raise ValueError(f"{found}, and no retriever is trained; losses.contrastive has no weight")
            if not (moment or self.losses.decode):
                raise ValueError(
                    "losses.lm and losses.rank are 0, so no decoder runs, and model.moment.first_width is 0: a moment "
                    "would have no question"
                )
            if moment and self.retriever and moment != self.retriever.vit.width:
                raise ValueError(
                    f"model.moment.first_width is {moment}; expected 0 or the retriever's {self.retriever.vit.width}"
                )
        if self.losses.contrastive and self.accumulate > 1:
            raise ValueError(
                f"accumulate is {self.accumulate}; expected 1: losses.contrastive compares all rows of a batch at once"
            )
        for name in ("steps", "accumulate", "max_skipped"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1")

    @property
    def bundle(self) -> bundle.BundleConfig:
        """Of the model folder: all that may be there, trained or not."""
        return bundle.BundleConfig(self.model, self.retriever, self.style)

    @property
    def pack(self) -> PackConfig:
        """The row of a batch. Where there is only a retriever, a video takes one position of the dialogue."""
        data = self.data
        model = self.model
        width = model.video.windows(data.frames) * model.video_qformer.queries if model else 1
        layout = model.layout if model else "isolated"
        return PackConfig(
            EncodingConfig(layout, width, data.max_candidates, self.style),  # type: ignore[arg-type]
            data.seq_len,
            data.video_slots,
            data.max_turns,
            data.frames,
            self.retriever.text.max_tokens if self.retriever and self.losses.contrastive else 0,
        )


def read_config(values: Any) -> TrainConfig:
    """From the ConfigDict of a `configs/*.py`. Raises ValueError for what it cannot be."""
    return from_dict(TrainConfig, values.to_dict())


_DECODED = r"model\.(llama|rank|encoder\.(video_qformer|projection))\."  # what no loss reaches without the decoder


class System(nnx.Module):
    """The models that are trained, or None."""

    def __init__(self, config: TrainConfig, rngs: nnx.Rngs) -> None:
        trained = config.losses
        self.model = InterLLaVA(config.model, rngs, config.compute) if config.model and trained.of_model else None
        self.retriever = (
            Retriever(config.retriever, rngs, config.compute) if config.retriever and trained.contrastive else None
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """What training changes.

    Attributes:
      step: i32[], updates done or skipped.
      skipped: i32[2], of these: skipped in a row up to now, and in all.
      params: f32, the trained parameters by path.
      optimizer: its state, of the trained parameters alone.
    """

    step: jax.Array
    skipped: jax.Array
    params: Arrays
    optimizer: optax.OptState


class Program:
    """A configuration on a mesh: shapes, where they lie, and the steps.

    Attributes:
      factors: of every parameter by path, on the learning rate; 0 for a frozen one.
      state: State of jax.ShapeDtypeStruct with shardings. frozen: likewise, the frozen parameters by path, in the
        dtype of the computation.
    """

    def __init__(self, config: TrainConfig, mesh: Mesh) -> None:
        """Raises ValueError where the configuration and the mesh do not go together."""
        self.config, self.mesh = config, mesh
        rows = config.data.batch_size
        devices = 1
        for axis in row_axes(mesh):
            devices *= mesh.shape[axis]
        if rows % (devices * config.accumulate):
            raise ValueError(
                f"data.batch_size is {rows} for {devices} devices with rows of their own and accumulate="
                f"{config.accumulate}; expected a multiple of {devices * config.accumulate}"
            )
        self._make = functools.partial(System, config)
        self._definition, state = nnx.split(nnx.eval_shape(lambda: self._make(nnx.Rngs(0))))
        self._where = {".".join(map(str, path)): (path, value) for path, value in nnx.to_flat_state(state)}
        self.factors = optim.factors(config.optim, self._where)
        lies = {
            ".".join(map(str, path)): value.get_value() for path, value in nnx.to_flat_state(shardings(state, mesh))
        }
        trained = {path: factor for path, factor in self.factors.items() if factor}
        idle = [path for path in trained if re.match(_DECODED, path)] if not config.losses.decode else []
        if idle:
            raise ValueError(
                f"losses.lm and losses.rank are 0, so no decoder runs, and optim.rules train {listed(idle)}: weight "
                "decay alone would change them"
            )
        axes = {path: len(value.get_metadata("axes")) for path, (_, value) in self._where.items()}
        self._tx = optim.make(config.optim, config.steps, trained, axes)
        self._rate = optim.schedule(config.optim, config.steps)

        def shape(path: str, dtype: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(self._where[path][1].shape, dtype, sharding=lies[path])

        params = {path: shape(path, jnp.float32) for path in trained}
        self.frozen = {
            path: shape(path, jnp.dtype(config.compute.dtype)) for path in self._where if path not in trained
        }
        self.state = self._placed(jax.eval_shape(self._fresh, params), lies)
        self.train_step = jax.jit(
            self._train_step,
            donate_argnums=0,
            out_shardings=(self._lies(self.state), NamedSharding(mesh, PartitionSpec())),
        )
        self.validation_step = jax.jit(self._validation_step, out_shardings=NamedSharding(mesh, PartitionSpec()))

    def _placed(self, state: State, lies: Mapping[str, NamedSharding]) -> State:
        """With shardings: what belongs to a parameter (a moment of Adam's) lies as it does."""

        def place(where: tuple[Any, ...], leaf: Any) -> jax.ShapeDtypeStruct:
            of = [key.key for key in where if isinstance(key, jax.tree_util.DictKey)]
            lie = lies[of[-1]] if of else NamedSharding(self.mesh, PartitionSpec())
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=lie)

        return jax.tree_util.tree_map_with_path(place, state)

    @staticmethod
    def _lies(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf.sharding, tree)

    def _fresh(self, params: Arrays) -> State:
        return State(jnp.int32(0), jnp.zeros(2, jnp.int32), params, self._tx.init(params))

    def fresh(self, params: Arrays) -> State:
        """The state before the first step, from all of `state.params`."""
        with jax.set_mesh(self.mesh):
            return jax.jit(self._fresh, out_shardings=self._lies(self.state))(params)

    def parameters(self, wanted: Mapping[str, Any], given: Mapping[str, jax.Array]) -> Arrays:
        """Values of `state.params`, or of `frozen`.

        Args:
          wanted: one of the two, as shapes with shardings.
          given: parameters by path, from a model folder, of any dtype; the others are drawn from the seed.
        """
        missing = {path: value for path, value in wanted.items() if path not in given}

        def draw() -> Arrays:
            drawn = bundle.parameters(self._make(nnx.Rngs(self.config.seed)))
            return {path: drawn[path].get_value().astype(value.dtype) for path, value in missing.items()}

        with jax.set_mesh(self.mesh):
            # Under jit each device makes its own share, and nothing that is not missing is made at all.
            values = jax.jit(draw, out_shardings=self._lies(missing))() if missing else {}
            for path, value in wanted.items():
                if path in given:
                    values[path] = jax.device_put(given[path].astype(value.dtype), value.sharding)
        return values

    def merge(self, params: Mapping[str, jax.Array], frozen: Mapping[str, jax.Array]) -> System:
        """The models with these parameters."""
        arrays = {**params, **frozen}
        flat = [(where, value.replace(arrays[path])) for path, (where, value) in self._where.items()]
        return nnx.merge(self._definition, nnx.from_flat_state(flat))

    def _apply(
        self, system: System, batch: losses.Batch, key: jax.Array | None
    ) -> tuple[losses.Sums, Output | None, tuple[jax.Array, jax.Array] | None]:
        """Sums of all losses, what the dialogue model says, and the retriever's vectors of queries and of videos."""
        sums: losses.Sums = {}
        out = embedded = first = texts = None
        if system.retriever is not None:
            embedded = losses.embeddings(system.retriever, batch)
            sums |= losses.of_retriever(system.retriever, *embedded, batch)
            if self.config.model and self.config.model.rank.first_stage:
                first = losses.first_stage(*embedded, batch)
            if self.config.model and self.config.model.moment.first_width:
                texts = embedded[0]
        if system.model is not None:
            out = system.model(batch, key, first, texts, self.config.losses.decode)
            sums |= losses.of_dialogues(out, batch, system.model.llama.logits)
        return sums, out, embedded

    def _train_step(self, state: State, frozen: Arrays, batch: losses.Batch) -> tuple[State, losses.Sums]:
        """One update. Returns the new state and the step's metrics, f32[] each."""
        config = self.config
        counts = losses.counts(batch)
        weights = {name: weight for name, weight in config.losses.weights.items() if weight}

        def loss_of(params: Arrays, batch: losses.Batch, key: jax.Array) -> tuple[jax.Array, losses.Sums]:
            sums, *_ = self._apply(self.merge(params, frozen), batch, key)
            means = {name: sums[name] / jnp.maximum(counts[name], 1) for name in weights}
            return jnp.sum(jnp.stack([weight * means[name] for name, weight in weights.items()])), means

        differentiate = jax.value_and_grad(loss_of, has_aux=True)
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        if config.accumulate == 1:
            (loss, means), gradients = differentiate(state.params, batch, key)
        else:
            (loss, means), gradients = self._accumulated(differentiate, state.params, batch, key)
        norm = optax.tree.norm(gradients)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        updates, optimizer = self._tx.update(gradients, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        params, optimizer = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old), (params, optimizer), (state.params, state.optimizer)
        )
        skipped = jnp.where(finite, state.skipped * jnp.array([0, 1]), state.skipped + 1)
        metrics = {
            "loss": loss,
            **means,
            "gradient_norm": norm,
            "parameter_norm": optax.tree.norm(params),
            "learning_rate": self._rate(state.step - state.skipped[1]),  # the optimiser counts what it did
            "skipped_in_a_row": skipped[0].astype(jnp.float32),
            "skipped": skipped[1].astype(jnp.float32),
            "tokens": (batch["segment_ids"] > 0).sum().astype(jnp.float32),
            "frames": batch["frame_mask"].sum().astype(jnp.float32),
        }
        return State(state.step + 1, skipped, params, optimizer), metrics

    def _accumulated(
        self, differentiate: Callable[..., Any], params: Arrays, batch: losses.Batch, key: jax.Array
    ) -> tuple[tuple[jax.Array, losses.Sums], Arrays]:
        """Sums of losses and gradients over slices of the batch, each with some of every device's rows."""
        count = self.config.accumulate

        def sliced(x: jax.Array) -> jax.Array:
            x = x.reshape(len(x) // count, count, *x.shape[1:]).swapaxes(0, 1)
            rows = by_rows(self.mesh).spec
            return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, PartitionSpec(None, *rows)))

        def step(total: Any, each: tuple[losses.Batch, jax.Array]) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, differentiate(params, *each)), None

        slices = (jax.tree.map(sliced, dict(batch)), jax.random.split(key, count))
        first = jax.tree.map(lambda x: x[0], slices)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(differentiate, params, *first))
        total, _ = jax.lax.scan(step, zeros, slices)
        return total

    def _validation_step(self, params: Arrays, frozen: Arrays, batch: losses.Batch) -> dict[str, Any]:
        """What `validation.py` counts: sums and counts f32[], and what the models say of each turn of all rows."""
        system = self.merge(params, frozen)
        found: dict[str, Any] = {"counts": losses.counts(batch)}
        sums, out, embedded = self._apply(system, batch, None)
        if out is not None:
            found["spans"] = out.moments.best()[0][..., 0, :]
            if out.scores is not None:
                found["ranked"] = out.scores.argmax(-1)
        if embedded is not None:
            found["texts"], found["videos"] = embedded
        names = "candidate_slots candidate_targets moment_slots moment_spans turn_languages turn_videos video_numbers"
        return found | {"sums": sums} | {name: batch[name] for name in names.split()}
