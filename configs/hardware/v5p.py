"""TPU v5p: 95 GB a chip."""

from configs.hardware.settings import Settings

SETTINGS = {
    "4x4x4": Settings(fsdp=64, batch_size=128, videos_at_once=8),
    "4x4x4:frames": Settings(fsdp=64, batch_size=128, videos_at_once=8),
}
