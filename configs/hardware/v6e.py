"""TPU v6e: 32 GB a chip. Behind each, what `python -m ivcr_jax.aot` gave for it."""

from configs.hardware.settings import Settings

SETTINGS = {
    "8x8": Settings(fsdp=64, batch_size=128, videos_at_once=8),  # 19.1 GB, 43 % free
    "8x8:frames": Settings(fsdp=64, batch_size=64, videos_at_once=8),  # 10.5 GB, 69 % free
}
