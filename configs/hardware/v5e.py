"""TPU v5e: 16 GB a chip. Behind each, what `python -m ivcr_jax.aot` gave for it."""

from configs.hardware.settings import Settings

SETTINGS = {
    "4x4": Settings(fsdp=16, batch_size=16, videos_at_once=4),  # 9.4 GB, 44 % free
    "4x4:frames": Settings(fsdp=16, batch_size=16, videos_at_once=4),  # 9.8 GB, 42 % free
    "16x16": Settings(fsdp=256, batch_size=256, videos_at_once=4),  # 8.2 GB, 51 % free
    "16x16:frames": Settings(fsdp=256, batch_size=256, videos_at_once=4),  # 11.1 GB, 34 % free
    "16x16:2": Settings(data=2, slices=2, fsdp=256, batch_size=512, videos_at_once=4),  # 8.4 GB, 50 % free
    "16x16:2:frames": Settings(data=2, slices=2, fsdp=256, batch_size=512, videos_at_once=4),  # 11.2 GB, 33 % free
}
