"""The converter, as a user runs it: made-up published files -> a model folder -> published files again."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
import torch
from etils import epath

from configs import interllava_7b
from ivcr_jax import bundle
from ivcr_jax.convert.convert import back, forward
from ivcr_jax.convert.files import open_weights
from ivcr_jax.sharding import MeshConfig, make_mesh
from tests.convert import made_up
from tests.convert.made_up import Sizes

pytestmark = pytest.mark.torch
ROOT = pathlib.Path(__file__).resolve().parents[2]
SMALL = Sizes()
FULL_SET = ("eva", "instructblip", "llama", "timechat")


def command(*arguments):
    """The converter as a command."""
    return subprocess.run(
        [sys.executable, "-m", "ivcr_jax.convert", *map(str, arguments)],
        cwd=ROOT,
        env=os.environ,
        capture_output=True,
        text=True,
        timeout=300,
    )


def convert(files, out, names=FULL_SET, arg="", sizes=SMALL, **overrides):
    """The same in this process, which saves the seconds of starting one."""
    config = interllava_7b.get_config(arg)
    config.update_from_flattened_dict({f"model.{name}": value for name, value in (sizes.values | overrides).items()})
    bundle_config = bundle.BundleConfig.from_values(config.to_dict())
    forward(bundle_config, {name: str(files[name]) for name in names}, epath.Path(out), mesh=None)


def write_back(folder, out, to, lora="merged"):
    back(epath.Path(folder), to, lora == "merged", epath.Path(out))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return made_up.write(tmp_path_factory.mktemp("published"))


@pytest.fixture(scope="module")
def folder(files, tmp_path_factory):
    out = tmp_path_factory.mktemp("converted") / "model"
    given = [f"--{name}={files[name]}" for name in FULL_SET]
    done = command("--config=configs/interllava_7b.py", *given, f"--out={out}", *SMALL.overrides)
    assert done.returncode == 0, done.stderr[-3000:]
    return out, done.stdout


def assert_equal_values(path, expected, ignored=()):
    """A written file holds the expected tensors, bit for bit and in the same dtypes, and nothing else."""
    found = open_weights(path)
    expected = {key: value for key, value in expected.items() if not key.startswith(tuple(ignored))}
    assert set(found.entries) == set(expected)
    for key, value in expected.items():
        read = torch.from_numpy(found.read(key))
        assert read.dtype == value.dtype and torch.equal(read, value), key


def saved(path):
    state = torch.load(path, weights_only=True)
    return state.get("model", state)


def hf_values(path):
    weights = open_weights(path)
    return {key: torch.from_numpy(weights.read(key)) for key in weights.entries}


def test_counts_and_what_was_left_aside_are_printed(folder):
    _, printed = folder
    assert "--eva: 15 tensors are known and not used" in printed  # a block of 13, and the final norm
    assert "--llama: lm_head.weight: the rows of added tokens start as the mean of the others" in printed
    lines = {line[:22].strip(): line[22:].split() for line in printed.splitlines()}
    # Layers x rank x (inputs and outputs of q, k, v, o).
    assert lines["LoRA"][0] == f"{3 * 3 * (4 * 64 + 64 + 32 + 32 + 64):,}"
    assert lines["ViT"][1:] == ["published:", "985,894,528"]
    assert " ".join(lines["rank head"][1:]) == "not in published files, starts as new"


def test_the_full_set_comes_back_bit_for_bit(folder, files, tmp_path):
    out, _ = folder
    assert command(f"--from={out}", "--to=ivcr", f"--out={tmp_path / 'ivcr'}").returncode == 0
    assert command(f"--from={out}", "--to=hf", "--lora=adapter", f"--out={tmp_path / 'hf'}").returncode == 0
    unused = f"blocks.{SMALL.vit_layers}."
    assert_equal_values(tmp_path / "ivcr/eva_vit_g.pth", saved(files["eva"]), (unused, "norm."))
    instruct = saved(files["instructblip"])
    buffer = "Qformer.bert.embeddings.position_ids"
    assert_equal_values(tmp_path / "ivcr/instruct_blip_vicuna7b_trimmed.pth", instruct, ("llm_proj", buffer))
    assert_equal_values(tmp_path / "ivcr/checkpoint.pth", saved(files["timechat"]))
    assert_equal_values(tmp_path / "hf/llama", hf_values(files["llama"]))
    adapter = {
        key.removeprefix("llama_model.").replace(".default", ""): value
        for key, value in saved(files["timechat"]).items()
        if "lora" in key
    }
    assert_equal_values(tmp_path / "hf/adapter/adapter_model.safetensors", adapter)
    peft = json.loads((tmp_path / "hf/adapter/adapter_config.json").read_text())
    assert (peft["r"], peft["lora_alpha"]) == (3, 32.0)
    assert peft["target_modules"] == ["q_proj", "k_proj", "v_proj", "o_proj"]


def test_the_fifth_file_comes_back_too(files, tmp_path):
    out = tmp_path / "model"
    convert(files, out, (*FULL_SET, "ivcr"))
    write_back(out, tmp_path / "ivcr", "ivcr")
    unused = ("Qformer.cls", "video_retrieval_head")
    assert_equal_values(tmp_path / "ivcr/checkpoint.pth", saved(files["ivcr"]), unused)


def test_video_llama_gives_its_video_qformer_alone(files, tmp_path):
    out = tmp_path / "model"
    convert(files, out, (*FULL_SET, "videollama"))
    write_back(out, tmp_path / "ivcr", "ivcr")
    video = {key: value for key, value in saved(files["videollama"]).items() if key.startswith("video_Qformer.")}
    assert len(video) > 20
    assert_equal_values(tmp_path / "ivcr/checkpoint.pth", saved(files["timechat"]) | video)


def test_merged_lora_is_in_the_matrices(folder, files, tmp_path):
    out, _ = folder
    write_back(out, tmp_path / "hf", "hf")
    assert sorted(path.name for path in (tmp_path / "hf").iterdir()) == ["llama"]
    lora, base, found = saved(files["timechat"]), hf_values(files["llama"]), hf_values(tmp_path / "hf/llama")
    for name in ("q", "o", "k"):
        key = f"model.layers.1.self_attn.{name}_proj"
        a, b = (lora[f"llama_model.base_model.model.{key}.lora_{part}.default.weight"] for part in "AB")
        merged = (base[f"{key}.weight"].float() + 32 / 3 * b @ a).half()
        # Two sums in f32 in another order: a unit in the last place of half precision, in single values.
        assert (merged - found[f"{key}.weight"]).abs().max() <= 2**-10
        assert (merged != base[f"{key}.weight"]).float().mean() > 0.9
    assert torch.equal(found["model.layers.1.mlp.up_proj.weight"], base["model.layers.1.mlp.up_proj.weight"])


def test_transformers_reads_the_folder_and_gives_the_same_numbers(tmp_path):
    from transformers import AutoModelForCausalLM

    out = tmp_path / "model"
    convert(made_up.write(tmp_path / "published", llama_dtype=torch.float32), out)
    write_back(out, tmp_path / "hf", "hf")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf/llama", dtype=torch.float32)
    ours = bundle.load(out).model
    tokens = np.random.default_rng(0).integers(0, SMALL.vocab, (2, 19))
    with torch.no_grad():
        expected = theirs(torch.from_numpy(tokens)).logits.numpy()
    positions = np.broadcast_to(np.arange(19), tokens.shape)
    hidden, _ = ours.llama(ours.llama.embed(tokens), positions, np.ones_like(tokens))
    logits = np.asarray(ours.llama.logits(hidden))
    assert logits.shape[-1] == SMALL.vocab + 5
    np.testing.assert_allclose(logits[..., : SMALL.vocab], expected, atol=1e-4)
    assert np.abs(expected).max() > 1


def test_frame_positions_of_another_length_are_fitted_by_the_nearest(tmp_path, capsys):
    files = made_up.write(tmp_path / "published", timechat_frames=12)
    convert(files, tmp_path / "model")
    assert "video_frame_position_embedding.weight: fitted from (12, 36) to (8, 36)" in capsys.readouterr().out
    table = saved(files["timechat"])["video_frame_position_embedding.weight"]
    expected = torch.nn.functional.interpolate(table.T[None], size=8, mode="nearest")[0].T
    found = bundle.load(tmp_path / "model").model.encoder.frame_positions[...]
    np.testing.assert_array_equal(np.asarray(found), expected.numpy())


def test_patch_positions_of_another_grid_are_fitted_bicubically(files, tmp_path, capsys):
    convert(files, tmp_path / "model", **{"vit.image_size": 70})
    assert "pos_embed: fitted from (1, 10, 48) to (1, 26, 48)" in capsys.readouterr().out
    table = saved(files["eva"])["pos_embed"]
    grid = table[:, 1:].reshape(1, 3, 3, 48).permute(0, 3, 1, 2)
    grid = torch.nn.functional.interpolate(grid, size=(5, 5), mode="bicubic", align_corners=False)
    expected = torch.cat([table[:, :1], grid.permute(0, 2, 3, 1).reshape(1, 25, 48)], 1)[0]
    found = bundle.load(tmp_path / "model").model.encoder.vit.positions[...]
    np.testing.assert_allclose(np.asarray(found), expected.numpy(), atol=1e-6)


def test_a_checkpoint_of_several_gpus_is_read(files, tmp_path):
    wrapped = {f"module.{key}": value for key, value in saved(files["timechat"]).items()}
    torch.save({"model": wrapped}, tmp_path / "wrapped.pth")
    convert(files | {"timechat": tmp_path / "wrapped.pth"}, tmp_path / "model")
    write_back(tmp_path / "model", tmp_path / "ivcr", "ivcr")
    assert_equal_values(tmp_path / "ivcr/checkpoint.pth", saved(files["timechat"]))


def test_rows_of_added_tokens_are_kept_where_the_source_has_them(files, tmp_path, capsys):
    llama = tmp_path / "llama"
    shutil.copytree(files["llama"], llama)
    from safetensors.torch import load_file, save_file

    for path in llama.glob("*.safetensors"):
        tensors = load_file(path)
        for key in {"model.embed_tokens.weight", "lm_head.weight"} & set(tensors):
            more = torch.arange(5 * SMALL.llama).reshape(5, -1) / 100
            tensors[key] = torch.cat([tensors[key], more.to(tensors[key].dtype)])
        save_file(tensors, path)
    convert(files | {"llama": llama}, tmp_path / "model")
    assert "added tokens start" not in capsys.readouterr().out
    write_back(tmp_path / "model", tmp_path / "hf", "hf", "adapter")
    assert_equal_values(tmp_path / "hf/llama", hf_values(llama))
    assert json.loads((tmp_path / "hf/llama/config.json").read_text())["vocab_size"] == SMALL.vocab + 5


def test_without_rows_of_added_tokens_they_start_as_the_mean(folder, files):
    out, _ = folder
    model = bundle.load(out).model
    table = hf_values(files["llama"])["model.embed_tokens.weight"].double().mean(0).half()
    for row in np.asarray(model.llama.added_embedding[...]):
        np.testing.assert_array_equal(row, table.numpy())
    head = hf_values(files["llama"])["lm_head.weight"].double().mean(0).half()
    np.testing.assert_array_equal(np.asarray(model.llama.added_head.kernel[...])[:, 3], head.numpy())


def test_a_mesh_writes_the_same_values_a_shard_a_chunk(folder, files, tmp_path):
    given = [f"--{name}={files[name]}" for name in FULL_SET]
    flags = ["--config=configs/interllava_7b.py", *SMALL.overrides, "--mesh=1,4,2", f"--out={tmp_path / 'model'}"]
    done = command(*given, *flags)
    assert done.returncode == 0, done.stderr
    mesh = make_mesh(MeshConfig(1, 2, 4))
    one = bundle.parameters(bundle.load(folder[0]).model)
    many = bundle.parameters(bundle.load(tmp_path / "model", mesh=mesh).model)
    assert many["llama.layers.up.kernel"][...].sharding.spec == jax.P(None, "fsdp", "tensor")
    for path, value in one.items():
        np.testing.assert_array_equal(np.asarray(value[...]), np.asarray(many[path][...]), err_msg=path)


@pytest.mark.parametrize(
    ("names", "overrides", "expected"),
    [
        (("eva", "instructblip", "llama"), {}, "encoder.frame_positions: none of the given files holds it"),
        (FULL_SET, {"vit.width": 52}, r"--eva: cls_token: found shape \(1, 1, 48\), expected \(1, 1, 52\)"),
        (FULL_SET, {"vit.layers": 2}, "--eva: blocks.3.norm1.weight: unexpected"),
        (FULL_SET, {"vit.layers": 5}, "--eva: blocks.4.norm1.weight: missing"),
        (FULL_SET, {"llama.vocab_size": 299}, r"model.embed_tokens.weight: found shape \(300, 64\), expected"),
        (FULL_SET, {"lora.rank": 4}, r"lora_A.default.weight: found shape \(3, 64\), expected \(4, 64\)"),
        (FULL_SET, {"llama.norm_eps": 1e-6}, "rms_norm_eps: found 1e-05, the configuration has 1e-06"),
        (FULL_SET, {"llama.rope_scaling.kind": "linear"}, "rope_type: found 'none', the configuration has 'linear'"),
        (FULL_SET, {"llama_ids_for_qformer": False}, r"word_embeddings.weight: found shape \(523, 36\)"),
        (FULL_SET, {"vit.heads": 5}, "width 48 is not a multiple of heads 5"),
        ((*FULL_SET, "siglip"), {}, "no such file"),
        ((), {}, "no weights are given"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_left(files, tmp_path, names, overrides, expected):
    files = files | {"siglip": str(tmp_path / "nowhere")}
    with pytest.raises(ValueError, match=expected):
        convert(files, tmp_path / "out" / "model", names, **overrides)
    assert not (tmp_path / "out").exists()


def test_every_misfit_is_listed_at_once(files, tmp_path):
    state = saved(files["eva"])
    moved = state.pop("blocks.0.norm1.bias")
    torch.save(state | {"blocks.0.norm9.bias": moved, "cls_token": moved}, tmp_path / "eva.pth")
    given = [f"--{name}={path}" for name, path in (files | {"eva": str(tmp_path / "eva.pth")}).items()]
    flags = ["--config=configs/interllava_7b.py", *SMALL.overrides, f"--out={tmp_path / 'model'}"]
    done = command(*given, *flags)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-3:] == [
        "--eva: blocks.0.norm9.bias: unexpected, of shape (48,)",
        "--eva: cls_token: found shape (48,), expected (1, 1, 48)",
        "--eva: blocks.0.norm1.bias: missing, of shape (48,)",
    ]
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("fault", ["cut off", "changed", "asks for more", "a folder that exists", "a wrong tokenizer"])
def test_broken_files_are_refused_and_nothing_is_left(files, tmp_path, fault):
    (tmp_path / "out").mkdir()
    out = tmp_path / "out" / "model"
    bad = tmp_path / "eva.pth"
    shutil.copy(files["eva"], bad)
    content = bytearray(bad.read_bytes())
    if fault == "cut off":
        bad.write_bytes(content[: len(content) // 2])
    elif fault == "changed":
        content[len(content) // 2] ^= 1
        bad.write_bytes(content)
    elif fault == "asks for more":
        torch.save({"model": SMALL}, bad)
    elif fault == "a folder that exists":
        out.mkdir()
    else:
        shutil.copytree(files["llama"], tmp_path / "llama")
        (tmp_path / "llama" / "tokenizer.model").write_bytes(b"not a model")
        files = files | {"llama": tmp_path / "llama"}
    named = {
        "cut off": "eva.pth: cut off or changed",
        "changed": "eva.pth: cut off or changed",
        "asks for more": "asks for tests.convert.made_up.Sizes, which was not run",
        "a folder that exists": "exists; expected a new folder",
        "a wrong tokenizer": "found 11 bytes that begin b'not a model', expected a whole SentencePiece .model file",
    }
    given = [f"--{name}={path}" for name, path in (files | {"eva": bad}).items() if name in FULL_SET]
    done = command("--config=configs/interllava_7b.py", *given, *SMALL.overrides, f"--out={out}")
    assert done.returncode == 1
    assert named[fault] in done.stderr
    assert "Traceback" not in done.stderr
    assert not [path for path in (tmp_path / "out").rglob("*") if path != out]


def test_a_misspelt_field_is_refused_by_name(files, tmp_path):
    given = [f"--{name}={files[name]}" for name in FULL_SET]
    done = command("--config=configs/interllava_7b.py", *given, "--config.model.vit.depth=5", f"--out={tmp_path / 'm'}")
    assert done.returncode != 0 and "depth" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), "expected --config with files of weights, or --from with --to"),
        (("--from=nowhere",), "--from and --to go together"),
        (("--from=nowhere", "--to=hf"), "nowhere"),
        (("--config=configs/retriever.py", "--eva=x"), "--eva: the configuration has no config.model for it"),
    ],
)
def test_a_command_that_makes_no_sense_is_refused(tmp_path, arguments, expected):
    done = command(*arguments, f"--out={tmp_path / 'out'}")
    assert done.returncode == 1
    assert expected in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_must_have_a_row_for_each_id(files, realdata, tmp_path):
    llama = tmp_path / "llama"
    shutil.copytree(files["llama"], llama)
    shutil.copy(realdata / "tokenizer" / "mistral_v1.tokenizer.model", llama / "tokenizer.model")
    with pytest.raises(ValueError, match=r"the tokenizer has 32005 ids; expected 305, for a table of 300 \+ 5 added"):
        convert(files | {"llama": llama}, tmp_path / "model")


def test_a_video_is_encoded_from_the_folder_in_one_line(folder, tmp_path):
    out, _ = folder
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (6, 42, 42, 3), dtype=np.uint8)
    text, mask = rng.integers(1, 500, (6, 7)), np.arange(7) < rng.integers(3, 8, (6, 1))
    model = bundle.load(out)
    tokens, between = model.encode_video(frames, text=text, text_mask=mask, intermediates=True)
    assert tokens.shape == (2 * 6, 64) and tokens.dtype == np.float32
    shapes = {name: value.shape for name, value in between.items()}
    assert shapes == {
        "vit": (6, 10, 48),
        "vit_norm": (6, 10, 48),
        "qformer": (6, 5 + 7, 36),
        "frames": (6, 5, 36),
        "video_qformer": (2, 6, 24),
    }
    np.testing.assert_array_equal(np.asarray(model.encode_video(frames, text=text, text_mask=mask)), np.asarray(tokens))
    mean, std = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
    normalised = ((frames / 255 - mean) / std).astype(np.float32)
    same = model.encode_video(normalised, text=text, text_mask=mask)
    np.testing.assert_allclose(np.asarray(same), np.asarray(tokens), atol=1e-5)
    for wrong, message in (
        ({"text": text[:5]}, "5 times or sentences for 6 frames"),
        ({"text": text + 100}, "the Q-Former's word table has 523 rows"),
        ({}, "expected either timestamps or ready token ids"),
        ({"timestamps": [0.0] * 6}, "the folder has no tokenizer.model"),
    ):
        with pytest.raises(ValueError, match=message):
            model.encode_video(frames, **wrong)


def test_times_are_written_as_sentences_of_the_decoders_tokenizer(files, realdata, tmp_path):
    """With a real tokenizer of 32,000 pieces, whose ids index the word table out of order, as published."""
    from ivcr_jax.data.tokenizer import Tokenizer

    sizes = Sizes(vocab=32000, words=30523)
    files = made_up.write(tmp_path / "published", sizes)
    model = realdata / "tokenizer" / "mistral_v1.tokenizer.model"
    shutil.copy(model, pathlib.Path(files["llama"]) / "tokenizer.model")
    out = tmp_path / "model"
    convert(files, out, arg="published", sizes=sizes)
    loaded = bundle.load(out)
    frames = np.random.default_rng(0).integers(0, 256, (3, 42, 42, 3), dtype=np.uint8)
    tokenizer = Tokenizer.load(model)
    sentences = [
        "<s>This frame is sampled at 0.5 second.",
        "<s>This frame is sampled at 10.2 second.",
        "<s>This frame is sampled at 20.0 seconds second.",
    ]
    ids = [tokenizer.encode(sentence) for sentence in sentences]
    longest = max(map(len, ids))
    text = np.array([row + [tokenizer.pad_id] * (longest - len(row)) for row in ids])
    mask = np.array([[True] * len(row) + [False] * (longest - len(row)) for row in ids])
    found = loaded.encode_video(frames, [0.5, 10.21, 20])
    np.testing.assert_array_equal(np.asarray(found), np.asarray(loaded.encode_video(frames, text=text, text_mask=mask)))


def test_the_folder_needs_no_training_libraries(folder):
    out, _ = folder
    code = f"""
import sys
import numpy as np
from ivcr_jax.bundle import load
load({str(out)!r}).encode_video(np.zeros((4, 42, 42, 3), np.uint8), text=np.ones((4, 3), np.int32))
heavy = {{"tensorflow", "tensorflow_datasets", "grain", "ml_collections", "torch", "safetensors", "transformers"}}
print(sorted(heavy & {{name.split(".")[0] for name in sys.modules}}))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.stdout.splitlines()[-1:] == ["[]"], done.stderr[-2000:]


@pytest.mark.parametrize("fault", ["another size", "no config", "not JSON", "an unknown field", "no parameters"])
def test_a_folder_that_contradicts_itself_is_refused(folder, tmp_path, fault):
    out = tmp_path / "model"
    shutil.copytree(folder[0], out)
    config = out / "config.json"
    values = json.loads(config.read_text())
    expected = {
        "another size": r"encoder.vit.blocks.mlp.up.kernel: found shape \(3, 48, 80\), expected \(3, 48, 81\)",
        "no config": "found no config.json",
        "not JSON": "expected JSON",
        "an unknown field": r"config.model: missing fields none, unknown fields \['speed'\]",
        "no parameters": "model",
    }
    if fault == "another size":
        values["model"]["vit"]["mlp_width"] = 81
        config.write_text(json.dumps(values))
    elif fault == "no config":
        config.unlink()
    elif fault == "not JSON":
        config.write_text("{")
    elif fault == "an unknown field":
        values["model"]["speed"] = 3
        config.write_text(json.dumps(values))
    else:
        shutil.rmtree(out / "model")
    with pytest.raises((ValueError, FileNotFoundError), match=expected[fault]):
        bundle.load(out)
