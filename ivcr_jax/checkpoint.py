"""Checkpoints of a run: the state and the data's position, saved together, found again, and given up where broken.

    WORKDIR/checkpoints/<step>/state    Orbax: ivcr_jax.training.State
    WORKDIR/checkpoints/<step>/data     where the stream of batches stands before the next step
    WORKDIR/checkpoints/<step>/run      seed and frozen weights' origin

Frozen weights are not here: they are read again from where they came from. It knows no model and no step function.
"""

import dataclasses
import json
import math
import signal
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import preservation_policy

from ivcr_jax.config import listed

FOLDER = "checkpoints"
# Replicas share the writing of an array. Of a smaller one than this (bytes), where cutting it up takes longer, one does
# it all: else the first save compiles hundreds of cuts, and who is told to stop has no time for that.
SHARED = 1 << 20


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When to save, and what to keep.

    Attributes:
      every: steps; 0 only at the end (and on SIGTERM).
      keep_last: newest checkpoints to keep.
      keep_best: best ones to keep besides, by `best`; 0 for none.
      best: the validation metric to judge by. higher: whether more of it is better.
    """

    every: int = 1000
    keep_last: int = 2
    keep_best: int = 1
    best: str = "loss"
    higher: bool = False

    def __post_init__(self) -> None:
        if self.keep_last < 1:
            raise ValueError(f"keep_last is {self.keep_last}; expected at least 1")


class Checkpoints:
    """The checkpoints of a workdir. Saving goes on in the background; `close` waits for it."""

    def __init__(self, workdir: epath.PathLike, config: CheckpointConfig, *, read_only: bool = False) -> None:
        self._folder = epath.Path(workdir).resolve() / FOLDER
        self._config, self._read_only = config, read_only
        if not read_only:
            self._set_metrics_aside()
        arrays = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=SHARED)
        of_state = ocp.PyTreeCheckpointHandler(
            type_handler_registry=ocp.type_handlers.create_type_handler_registry((jax.Array, arrays))
        )
        handlers = ocp.handlers.DefaultCheckpointHandlerRegistry()
        handlers.add("state", ocp.args.PyTreeSave, of_state)
        handlers.add("state", ocp.args.PyTreeRestore, of_state)
        policies: list[Any] = [preservation_policy.LatestN(config.keep_last)]
        if config.keep_best:
            policies.append(
                preservation_policy.BestN(
                    get_metric_fn=self._goodness, n=config.keep_best, keep_checkpoints_without_metrics=False
                )
            )
        self._manager = ocp.CheckpointManager(
            self._folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=preservation_policy.AnyPreservationPolicy(policies),
                best_fn=None if read_only else self._goodness,  # without it Orbax neither writes metrics nor reads them
                read_only=read_only,
                create=not read_only,
                cleanup_tmp_directories=not read_only,
            ),
            handler_registry=handlers,
        )
        self._saving = 0  # the step that was saved last, or is being saved
        self._told = False
        # Under jax.distributed the notice reaches every process through its own handler, and another displaces that.
        if not read_only and not jax.distributed.is_initialized():
            signal.signal(signal.SIGTERM, self._tell)

    def _set_metrics_aside(self) -> None:
        """Those that cannot be read: Orbax reads all metrics when it starts, and would not start."""
        for path in self._folder.glob("*/metrics/metrics") if jax.process_index() == 0 else ():
            try:
                json.loads(path.read_text())
            except ValueError as error:
                logging.error("%s cannot be read (%s); the checkpoint is judged no more", path, error)
                path.parent.rename(path.parent.with_name("broken-metrics"))
        multihost_utils.sync_global_devices("metrics")

    def _goodness(self, metrics: Mapping[str, float]) -> float:
        """By which checkpoints are compared; one without the metric, or where it is no number, comes last."""
        value = metrics.get(self._config.best, math.nan)
        return -math.inf if math.isnan(value) else value if self._config.higher else -value

    def _tell(self, *_: Any) -> None:
        self._told = True

    def must_stop(self, step: int) -> bool:
        """Whether this machine is to be taken away (SIGTERM, to any process). All processes get the same answer."""
        return self._told or self._manager.reached_preemption(step)

    def save(
        self,
        step: int,
        state: Any,
        data: Mapping[str, Any],
        run: Mapping[str, Any],
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Saves, in the background, what step number `step` begins with.

        Raises:
          OSError: naming the newest whole checkpoint, where this or the saving before fails.
          ValueError: where the metrics are there and lack `config.best`.
        """
        if step in self._manager.all_steps():
            return
        if self._config.keep_best and metrics and self._config.best not in metrics:
            raise ValueError(
                f"checkpoint.best is {self._config.best!r}, and validation found {listed(sorted(metrics), 30)}"
            )
        try:
            self._manager.wait_until_finished()  # what went wrong with the saving before is said here
            self._saving = step
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.PyTreeSave(state),
                    data=ocp.args.JsonSave(dict(data)),
                    run=ocp.args.JsonSave(dict(run)),
                ),
                metrics={name: float(value) for name, value in (metrics or {}).items()},
                force=True,
            )
        except Exception as error:
            raise self._failed(error) from error

    def judged(self, step: int) -> bool:
        """Whether the checkpoint of that step was saved with metrics."""
        return bool(self._manager.metrics(step)) if step in self._manager.all_steps() else False

    def close(self) -> None:
        """Waits until all is saved. Raises OSError as `save` does."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._failed(error) from error
        self._manager.close()

    def _failed(self, error: Exception) -> OSError:
        whole = [found for found in ocp.utils.checkpoint_steps(self._folder) if found != self._saving]
        newest = f"the newest whole checkpoint is of step {max(whole)}" if whole else "there is no whole checkpoint"
        # TensorStore names a file twice before it says what is wrong.
        reason = " ".join(str(error).split()).replace(f"{self._folder}/", "")[:300]
        return OSError(
            f"{self._folder}: saving at step {self._saving} failed ({reason}); {newest}, and starting again resumes"
        )

    def restore(self, wanted: Any) -> tuple[Any, dict[str, Any], dict[str, Any]] | None:
        """The newest checkpoint that can be read: state, data, run. None where there is none at all.

        Those that cannot are set aside under another name (not where this is read only), and said to be.

        Args:
          wanted: the state as jax.ShapeDtypeStructs with shardings: of any mesh and any number of processes.

        Raises ValueError where there are checkpoints and none can be read.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        broken: list[str] = []
        for step in steps:
            found, why = None, ""
            try:
                found = self._manager.restore(
                    step,
                    args=ocp.args.Composite(
                        state=ocp.args.PyTreeRestore(
                            wanted, restore_args=ocp.checkpoint_utils.construct_restore_args(wanted)
                        ),
                        data=ocp.args.JsonRestore(),
                        run=ocp.args.JsonRestore(),
                    ),
                )
            except Exception as error:  # whatever a damaged file leads to
                why = " ".join(str(error).split())[:300]
            if _everywhere(found is not None):
                if broken and not self._read_only:
                    for aside in broken:
                        self._set_aside(int(aside.split(":")[0]))
                    self._manager.reload()
                assert found is not None
                return found["state"], found["data"], found["run"]
            broken.append(f"{step}: {why or 'another process cannot read it'}")
            logging.error("%s/%s cannot be read (%s); trying the one before", self._folder, step, why)
        if broken:
            raise ValueError(f"{self._folder}: none of the checkpoints can be read: {'; '.join(broken)}")
        return None

    def _set_aside(self, step: int) -> None:
        if jax.process_index() == 0 and (self._folder / str(step)).exists():
            aside = self._folder.parent / f"broken-checkpoint-{step}"
            while aside.exists():
                aside = aside.with_name(f"{aside.name}-again")
            (self._folder / str(step)).rename(aside)
        multihost_utils.sync_global_devices(f"set aside {step}")


def saved(workdir: epath.PathLike) -> list[int]:
    """The steps of a run's whole checkpoints, in order."""
    folder = epath.Path(workdir) / FOLDER
    return sorted(ocp.utils.checkpoint_steps(folder)) if folder.is_dir() else []


def _everywhere(ok: bool) -> bool:
    if jax.process_count() == 1:
        return ok
    return bool(np.all(multihost_utils.process_allgather(np.array(ok))))
