"""Full-size programs for TPUs that are not there: where every parameter lies, whether a step fits, what it sends."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import pytest
from flax import nnx
from jax.sharding import AbstractMesh

from configs import hardware, interllava_7b, retriever
from ivcr_jax.aot import collectives
from ivcr_jax.sharding import MESH_AXES, logical_axes, spec
from ivcr_jax.training import System, read_config

GOLDEN = pathlib.Path(__file__).parent / "golden" / "shardings.json"
ROOT = pathlib.Path(__file__).parents[1]


def lie(config, sizes):
    """Of each parameter of a configuration on a mesh of these sizes: its shape, and what divides each axis."""
    mesh = AbstractMesh(sizes, MESH_AXES)
    state = nnx.state(nnx.eval_shape(lambda: System(config, nnx.Rngs(0))), nnx.Param)

    def words(variable):
        parts = spec(logical_axes(variable), variable.shape, mesh)
        names = [part if isinstance(part, str) else "+".join(part or "-") for part in parts]
        return f"{'x'.join(map(str, variable.shape))} {' '.join(names)}"

    return {".".join(map(str, path)): words(value) for path, value in nnx.to_flat_state(state)}


def test_every_parameter_of_the_full_models_lies_where_it_did():
    """Anew: python -m tests.test_aot, and look at what changed."""
    assert golden() == json.loads(GOLDEN.read_text())


def golden():
    configs = {"interllava_7b": interllava_7b.get_config(), "retriever": retriever.get_config()}
    return {
        name: {"2x16x1": lie(read_config(values), (2, 16, 1)), "1x8x4": lie(read_config(values), (1, 8, 4))}
        for name, values in configs.items()
    }


def aot(*arguments, level="UNKNOWN", timeout=3600):
    """Runs the command; (exit status, the object of its last line, what it wrote to stderr). `level` "O1" asks the
    compiler for less effort: half the time, and more memory rather than less."""
    run = subprocess.run(
        [sys.executable, "-m", "ivcr_jax.aot", *arguments],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": "", "JAX_OPTIMIZATION_LEVEL": level},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    lines = run.stdout.strip().splitlines()
    return run.returncode, json.loads(lines[-1]) if lines else None, run.stderr


# The largest single matrix at full size, in bytes: the decoder's table of words, bf16. What is gathered outside of the
# scans over layers may be tables of words and single matrices, never a stack.
LARGEST_MATRIX = 32_000 * 4096 * 2


def check(found, slices=1):
    train = found["train"]
    assert train["fits"] and train["free_share"] >= 0.1, train
    assert train["collectives"]["outside_scans"]["bytes"] <= LARGEST_MATRIX, train["collectives"]
    assert found["slices"] == slices


HLO = """HloModule made_up

%body (p: (s32[], bf16[8,4])) -> (s32[], bf16[8,4]) {
  %g = bf16[8,4]{1,0} all-gather(bf16[2,4]{1,0} %x), dimensions={0}
  %s = (f32[2]{0}, f32[8]{0}) all-gather-start(f32[2]{0} %y), dimensions={0}
  %d = f32[8]{0} all-gather-done((f32[2]{0}, f32[8]{0}) %s)
}

%cond (p: (s32[], bf16[8,4])) -> pred[] {
  %c = pred[] constant(true)
}

%up_to_three (p: (s32[], f32[6])) -> pred[] {
  %c.1 = s32[]{:T(128)} constant(3)
  ROOT %l = pred[]{:T(512)} compare(s32[] %i, s32[]{:T(128)} %c.1), direction=LT
}

%around (p: (s32[], f32[6])) -> (s32[], f32[6]) {
  %q = f32[6]{0} collective-permute(f32[6]{0} %z), source_target_pairs={{0,1},{1,0}}
}

ENTRY %main (a: f32[3]) -> f32[3] {
  %w = (s32[], bf16[8,4]) while((s32[], bf16[8,4]) %t), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %v = (s32[], f32[6]) while((s32[], f32[6]) %u), condition=%up_to_three, body=%around
  %r = f32[3]{0} all-reduce(f32[3]{0} %a), to_apply=%add
  ROOT %o = f32[16]{0} all-gather(f32[4]{0} %b), dimensions={0}
}
"""  # noqa: E501


def test_collectives_are_counted_as_often_as_they_run():
    found = collectives(HLO)
    assert found["all-gather"] == {"count": 5 * 2 + 1, "bytes": 5 * (8 * 4 * 2 + 8 * 4) + 16 * 4}
    assert found["all-reduce"] == {"count": 1, "bytes": 12}
    assert found["collective-permute"] == {"count": 3, "bytes": 3 * 6 * 4}
    assert found["all-to-all"] == {"count": 0, "bytes": 0}
    assert found["outside_scans"] == {"bytes": 64, "shape": "f32[16]"}


SMALL = (
    "--config=configs/tiny.py",
    "--config.compute.attention=xla",
    "--config.losses.contrastive=0.0",
    "--config.model.rank.first_stage=False",
    "--config.model.moment.first_width=0",
)


@pytest.mark.aot
@pytest.mark.slow
def test_a_small_model_trains_and_decodes_on_four_chips():
    lie = ("--config.mesh.data=2", "--config.mesh.fsdp=2", "--config.compute.dtype=bfloat16")
    status, found, _ = aot(*SMALL, *lie, "--topology=v5e:2x2")
    assert status == 0 and found["fits"], found
    assert found["devices"] == 4 and found["mesh"] == {"data": 2, "fsdp": 2, "tensor": 1}
    assert found["flops_a_step"] == 4 * found["flops_a_step_and_chip"]
    for step in (found["train"], found["decode"]):
        assert 0 < step["bytes"]["all"] == sum(step["bytes"][kind] for kind in step["bytes"] if kind != "all")
        assert step["free_share"] > 0.9
    sent = found["train"]["collectives"]
    # Every layer's parameters are gathered, and the gradients of the two copies are summed.
    assert sent["all-gather"]["count"] > 0 and sent["all-gather"]["bytes"] > 0
    assert sent["all-reduce"]["count"] + sent["reduce-scatter"]["count"] > 0


@pytest.mark.aot
@pytest.mark.slow
def test_the_full_model_trains_on_sixteen_small_chips():
    status, found, _ = aot("--config=configs/interllava_7b.py:v5e:4x4", "--topology=v5e:4x4", level="O1")
    assert status == 0 and found["fits"], found
    check(found)
    assert found["decode"]["fits"] and found["decode"]["free_share"] >= 0.1
    assert found["mesh"] == {"data": 1, "fsdp": 16, "tensor": 1} and found["devices"] == 16


@pytest.mark.aot
@pytest.mark.slow
def test_what_is_too_big_is_refused():
    status, found, _ = aot(
        "--config=configs/interllava_7b.py:v5e:4x4",
        "--topology=v5e:4x4",
        "--nodecode",
        "--config.data.batch_size=256",
        "--config.compute.videos_at_once=0",
        level="O1",
    )
    assert status == 1 and not found["fits"] and not found["train"]["fits"]


@pytest.mark.aot
@pytest.mark.full
@pytest.mark.parametrize(
    "name",
    [f"{chip}:{key}" for chip, settings in hardware.CHIPS.items() for key in settings if (chip, key) != ("v5e", "4x4")],
)
def test_the_full_model_trains_on_every_topology_that_has_settings(name):
    chip, shape, *rest = name.split(":")
    slices = next((int(part) for part in rest if part.isdigit()), 1)
    kind = "frames" if "frames" in rest else "features"
    status, found, _ = aot(
        f"--config=configs/interllava_7b.py:{name}",
        f"--topology={chip}:{shape}",
        f"--num_slices={slices}",
        f"--input={kind}",
        "--nodecode",
        level="O1",
    )
    assert status == 0, found
    check(found, slices)


@pytest.mark.aot
def test_bad_input_is_one_sentence():
    for arguments, sentence in (
        (
            ("--config=configs/interllava_7b.py:v5e:4x4", "--topology=v9z:4x4"),
            "aot: topology is 'v9z:4x4'; expected a chip of",
        ),
        (
            ("--config=configs/interllava_7b.py:v5e:16x16", "--topology=v5e:4x4"),
            "aot: a mesh of {'data': 1, 'fsdp': 256",
        ),
    ):
        status, _, stderr = aot(*arguments)
        assert status == 1 and sentence in stderr and "Traceback" not in stderr


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(json.dumps(golden(), indent=1) + "\n")
