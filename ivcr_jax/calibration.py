"""When nothing fits: a threshold on the first stage's cosine, measured on the validation split of a run."""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from etils import epath

from ivcr_jax import bundle, train
from ivcr_jax.losses import LossConfig
from ivcr_jax.optim import OptimConfig
from ivcr_jax.sharding import MeshConfig, make_mesh
from ivcr_jax.training import Program, TrainConfig
from ivcr_jax.validation import Query

# Of the queries that could be answered, so many may be refused. Who is told that nothing fits, while it is there, loses
# more than who is shown ten videos that do not fit.
SHARE = 0.02
AT_ONCE = 1024  # queries whose similarities exist at a time


class CannotTell(ValueError):
    """What was measured allows no threshold."""


@dataclasses.dataclass(frozen=True)
class Calibration:
    """A threshold, and how often it is right and wrong.

    Attributes:
      threshold: the cosine below which nothing fits.
      rule: how it was chosen, in words.
      queries, videos: measured with so many of each.
      refused_answerable: share of queries that are refused though their video is there. refused_alone: the same in a
        corpus of that video alone.
      refused_without_truth: share of queries that are refused where their video is taken out of the others.
      refused_without_candidates: the same where the candidates that the data list for the query are taken out too;
        near misses are among these.
    """

    threshold: float
    rule: str
    queries: int
    videos: int
    refused_answerable: float
    refused_alone: float
    refused_without_truth: float
    refused_without_candidates: float


def measure(queries: Sequence[Query], videos: Mapping[int, np.ndarray]) -> Calibration:
    """Chooses the threshold by its rule, and counts.

    The rule looks at the cosine of a query and its own video, not at the best of all videos: that is the larger the
    more videos there are, and a small corpus would then be refused more than SHARE.

    Args:
      queries: of searches; those whose video is not among `videos` are left out.
      videos: f32[Dr] of length 1 by number.

    Raises CannotTell where so few queries are left that one of them is more than SHARE, or a cosine is not finite.
    """
    queries = [query for query in queries if query.video in videos]
    least = round(1 / SHARE)
    if len(queries) < least:
        raise CannotTell(f"found {len(queries)} queries of videos that are there, expected at least {least}")
    place = {number: index for index, number in enumerate(sorted(videos))}
    matrix = np.stack([videos[number] for number in place])
    parts: list[tuple[np.ndarray, ...]] = []
    for begin in range(0, len(queries), AT_ONCE):
        some = queries[begin : begin + AT_ONCE]
        scores = np.stack([query.vector for query in some]) @ matrix.T
        rows, truths = np.arange(len(some)), [place[query.video] for query in some]
        own, best = scores[rows, truths], scores.max(1)
        scores[rows, truths] = -np.inf
        without = scores.max(1)
        for row, query in enumerate(some):
            scores[row, [place[number] for number in query.candidates if number in place]] = -np.inf
        parts.append((own, best, without, scores.max(1)))
    own, best, without, bare = map(np.concatenate, zip(*parts, strict=True))
    if not np.isfinite(best).all():
        raise CannotTell("found cosines that are not finite")
    threshold = np.sort(own)[int(SHARE * len(own))]
    return Calibration(
        float(threshold),
        f"At most {100 * SHARE:g} % of the queries have a cosine with their own video under that. So no more of such "
        "queries are refused in a corpus that holds the right video, whatever else it holds.",
        len(queries),
        len(matrix),
        *(float((found < threshold).mean()) for found in (best, own, without, bare)),
    )


def calibrate(config: TrainConfig, workdir: epath.PathLike, retriever: Mapping[str, jax.Array]) -> Calibration:
    """Measures a retriever on as much of its run's validation split as the run itself looks at. For one process.

    Args:
      config: of the run.
      workdir: of the run.
      retriever: its parameters by path, of any dtype.

    Raises what reading data raises where these are gone, and CannotTell as `measure` does.
    """
    rows = jax.device_count()  # one each: the memory is what little there may be
    seen = config.eval.batches * config.data.batch_size  # 0 for all
    config = dataclasses.replace(
        config,
        losses=LossConfig(lm=0, rank=0, moment=0, moment_l1=0, moment_iou=0, contrastive=1),  # the retriever alone
        optim=OptimConfig(),
        mesh=MeshConfig(),
        accumulate=1,
        compute=dataclasses.replace(config.compute, dtype="float32"),
        data=dataclasses.replace(config.data, batch_size=rows),
        eval=dataclasses.replace(config.eval, batches=-(-seen // rows)),
    )
    workdir = epath.Path(workdir)
    program = Program(config, make_mesh(config.mesh))
    held_out = train.pipeline(config, train.read_tokenizers(config, workdir), program.mesh, "validation", workdir)
    # By way of the host: one that the run did not train lies on one device, whatever the mesh.
    given = {f"{bundle.RETRIEVER}.{path}": jax.device_get(value) for path, value in retriever.items()}
    params = program.parameters(program.state.params, given)
    with jax.set_mesh(program.mesh):
        found = train.collect(config, program, held_out, params, {})
    return measure(found.queries, found.videos)
