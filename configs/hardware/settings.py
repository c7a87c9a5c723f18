"""What an entry of configs/hardware says."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Settings:
    """Attributes: data, fsdp, tensor, slices: of the mesh. batch_size: rows over all chips. remat, videos_at_once,
    accumulate: see Compute and TrainConfig."""

    fsdp: int
    batch_size: int
    videos_at_once: int
    data: int = 1
    tensor: int = 1
    slices: int = 1
    remat: str = "full"
    accumulate: int = 1
