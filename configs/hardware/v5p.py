"""TPU v5p: 95 GB a chip. Behind each, what `python -m ivcr_jax.aot` gave for it."""

from configs.hardware.settings import Settings

SETTINGS = {
    "4x4x4": Settings(fsdp=64, batch_size=256, videos_at_once=8),  # 36.2 GB, 65 % free
    "4x4x4:frames": Settings(fsdp=64, batch_size=128, videos_at_once=8),  # 27.4 GB, 73 % free
}
