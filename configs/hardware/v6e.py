"""TPU v6e: 32 GB a chip."""

from configs.hardware.settings import Settings

SETTINGS = {
    "8x8": Settings(fsdp=64, batch_size=64, videos_at_once=8),
    "8x8:frames": Settings(fsdp=64, batch_size=64, videos_at_once=8),
}
