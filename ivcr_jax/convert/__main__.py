"""Published weights -> a model folder, and back.

    python -m ivcr_jax.convert --config=configs/interllava_7b.py --eva=F --instructblip=F --llama=DIR --timechat=F \\
      [--videollama=F] [--ivcr=F] [--siglip=DIR] --out=DIR
    python -m ivcr_jax.convert --config=configs/retriever.py --siglip=DIR --out=DIR
    python -m ivcr_jax.convert --from=DIR --to=hf|ivcr [--lora=merged|adapter] --out=DIR

The folder is what `ivcr_jax.bundle.load` reads. Later files win: InstructBLIP, TimeChat, Video-LLaMA (its video
Q-Former alone), IVCR. Where anything is missing, unexpected or of another shape it is listed and the exit status is 1.
"""

import sys

from absl import app, flags
from etils import epath
from ml_collections import config_flags

from ivcr_jax import command
from ivcr_jax.bundle import BundleConfig
from ivcr_jax.convert.convert import back, forward
from ivcr_jax.sharding import MeshConfig, make_mesh

_CONFIG = config_flags.DEFINE_config_file("config", None, "Sizes of the models.", lock_config=True)
_SOURCES = {
    name: flags.DEFINE_string(name, None, text)
    for name, text in (
        ("eva", "eva_vit_g.pth."),
        ("instructblip", "instruct_blip_vicuna7b_trimmed.pth."),
        ("llama", "Folder of LLaMA-2-7b-chat-hf."),
        ("timechat", "timechat_7b.pth."),
        ("videollama", "VL_LLaMA_2_7B_Finetuned.pth: its video Q-Former takes TimeChat's place."),
        ("ivcr", "IVCR's own checkpoint_N.pth."),
        ("siglip", "Folder of SigLIP or SigLIP2, for the first stage."),
    )
}
_OUT = flags.DEFINE_string("out", None, "The folder to write. It must not exist.", required=True)
_MESH = flags.DEFINE_list("mesh", None, "data,fsdp,tensor: write each device's shard as a chunk of its own.")
_FROM = flags.DEFINE_string("from", None, "A model folder to write back.")
_TO = flags.DEFINE_enum("to", None, ["hf", "ivcr"], "hf: LLaMA and SigLIP folders; ivcr: the rest, as .pth files.")
_LORA = flags.DEFINE_enum("lora", "merged", ["merged", "adapter"], "With --to=hf.")


def main(argv: list[str]) -> None:
    command.refuse_arguments(argv)
    command.quiet()
    out = epath.Path(_OUT.value).resolve()
    files = {name: flag.value for name, flag in _SOURCES.items() if flag.value is not None}
    try:
        if out.exists():
            raise ValueError(f"--out: {out} exists; expected a new folder")
        if _TO.value is not None or _FROM.value is not None:
            if _TO.value is None or _FROM.value is None or files or _CONFIG.value is not None:
                raise ValueError("--from and --to go together, without --config and without files of weights")
            back(epath.Path(_FROM.value).resolve(), _TO.value, _LORA.value == "merged", out)
        elif _CONFIG.value is None:
            raise ValueError("expected --config with files of weights, or --from with --to")
        else:
            mesh = None if _MESH.value is None else make_mesh(MeshConfig(*map(int, _MESH.value)))
            config = BundleConfig.from_values(_CONFIG.value.to_dict())
            forward(config, files, out, mesh)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    app.run(main)
