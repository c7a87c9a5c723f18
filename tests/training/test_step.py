"""The train step: what a slice, a row, a mesh, a frozen tower and a number that is none may change, and may not."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ivcr_jax import bundle, optim, train
from ivcr_jax.data import batches
from ivcr_jax.data.store import DialogueStore, VideoStore
from ivcr_jax.losses import LossConfig
from ivcr_jax.sharding import MeshConfig, make_mesh
from ivcr_jax.training import Program


def begin(world, program):
    """The state and the frozen parameters of the model folder."""
    wanted = {**program.frozen, **program.state.params}
    given = bundle.read_folder(world.folder / "init", wanted, program.factors)
    return program.fresh(program.parameters(program.state.params, given)), program.parameters(program.frozen, given)


def host(tree):
    return jax.tree.map(lambda leaf: np.array(leaf), tree)


def step(program, state, frozen, batch):
    with jax.set_mesh(program.mesh):
        state, numbers = program.train_step(state, frozen, train.place(batch, program.mesh, program.config))
    return state, {name: float(value) for name, value in numbers.items()}


def rows_of(world, config, rows):
    """A batch in which row i holds the dialogues with the record numbers rows[i]."""
    dialogues, videos = DialogueStore(config.data.dialogues, "train"), VideoStore(config.data.videos)
    tokenizer = train.read_tokenizers(config, world.folder)[bundle.TOKENIZER]
    batch = batches.empty_batch(len(rows), config.pack, batches.BatchShape.of(videos, tokenizer, config.pack))
    for row, records in enumerate(rows):
        content = [(record, dialogues[record]) for record in records]
        for work in batches.fill_row(batch, row, content, videos, tokenizer, config.pack, None):
            videos.decode(*work)
    return batch


@pytest.fixture(scope="module")
def gradients(world):
    """(mesh, changes of the configuration, rows) -> the losses and gradients of these dialogues."""
    made = {}

    def compute(sizes, rows, **data):
        accumulate = data.pop("accumulate", 1)
        key = (sizes, accumulate, len(rows), *sorted(data.items()))
        if key not in made:
            config = world.without_dropout(
                losses=LossConfig(moment_l1=0.5),
                data={"batch_size": len(rows), **data},
                accumulate=accumulate,
                optim={"clip": 0.0},
                mesh=MeshConfig(*sizes),
            )
            count = int(np.prod(sizes))
            made[key] = Program(config, make_mesh(config.mesh, jax.devices()[:count]))
        program = made[key]
        state, frozen = begin(world, program)
        state, numbers = step(program, state, frozen, rows_of(world, program.config, rows))
        # After one step the first moment is a fixed share of the gradient.
        (moments,) = (part.mu for part in state.optimizer if hasattr(part, "mu"))
        return numbers, {path: np.asarray(mu) / (1 - optim.B1) for path, mu in moments.items()}

    return compute


LOSSES = ("loss", "lm", "rank", "moment", "moment_l1", "moment_iou", "gradient_norm")


def same(found, expected):
    for name in LOSSES:
        assert found[0][name] == pytest.approx(expected[0][name], rel=1e-5), name
    assert sorted(found[1]) == sorted(expected[1])
    for path, gradient in expected[1].items():
        scale = max(1e-2, float(np.abs(gradient).max()))
        np.testing.assert_allclose(found[1][path], gradient, rtol=0, atol=1e-5 * scale, err_msg=path)


@pytest.mark.slow
def test_slices_rows_padding_and_meshes_change_nothing(gradients):
    """Four dialogues on one device, one a row; against the same in two slices, packed, in longer rows, on eight."""
    plain = gradients((1, 1, 1), ((0,), (1,), (4,), (2,)))
    assert all(plain[0][name] > 0.01 for name in LOSSES)
    assert all(np.abs(gradient).max() > 0 for gradient in plain[1].values()), "each parameter matters"
    eight = {"seq_len": 360, "video_slots": 9, "max_turns": 6, "accumulate": 2}
    same(gradients((2, 2, 2), ((), (), (4,), (0, 2), (), (1,), (), ()), **eight), plain)  # packed in two slices
    same(gradients((2, 2, 2), ((0,), (1,), (), (), (4,), (), (), (2,)), **eight), plain)  # one a row


@pytest.fixture(scope="module")
def stepped(world, program):
    """The program of both models, what it begins with, and two batches."""
    config = world.config()
    of = program(config, make_mesh(config.mesh))
    stream = world.pipeline(config)
    return of, stream.batch(0), stream.batch(1)


@pytest.mark.slow
def test_what_is_frozen_stays_bit_for_bit_and_costs_nothing(world, stepped):
    of, first, second = stepped
    state, frozen = begin(world, of)
    before = host((state.params, frozen))
    trained = sum(value.size for value in before[0].values())
    assert sum(leaf.size for leaf in jax.tree.leaves(state.optimizer)) == 2 * trained + 2
    assert {path for path in frozen if "lora" in path or "head" in path} <= {"model.llama.head.kernel"}
    assert "retriever.vit.head.probe" in state.params and "retriever.vit.blocks.mlp.up.kernel" in frozen
    for batch in (first, second):
        state, _ = step(of, state, frozen, batch)
    for path, value in frozen.items():
        np.testing.assert_array_equal(value, before[1][path], err_msg=path)
    moved = [path for path, value in state.params.items() if (np.asarray(value) != before[0][path]).any()]
    assert sorted(moved) == sorted(state.params), "and what is trained is"
    assert {path: value.sharding for path, value in state.params.items()} == {
        path: value.sharding for path, value in of.state.params.items()
    }


@pytest.mark.slow
def test_a_step_that_is_not_finite_changes_the_counters_alone(world, stepped):
    of, good, other = stepped
    poisoned = {name: array.copy() for name, array in good.items()}
    poisoned["features"][np.unravel_index(good["frame_mask"].argmax(), good["frame_mask"].shape)][0] = np.nan
    state, frozen = begin(world, of)
    state, numbers = step(of, state, frozen, other)
    rate = numbers["learning_rate"]
    before = host(state)
    expected = [(1, 1), (2, 2), (0, 2), (1, 3)]
    for place, batch in enumerate((poisoned, poisoned, good, poisoned)):
        if place == 3:
            before = host(state)
        state, numbers = step(of, state, frozen, batch)
        assert (numbers["skipped_in_a_row"], numbers["skipped"]) == expected[place]
        if place < 2:
            assert np.isnan(numbers["gradient_norm"])
            jax.tree.map(
                np.testing.assert_array_equal, (state.params, state.optimizer), (before.params, before.optimizer)
            )
        assert int(state.step) == 2 + place
    # The steps that were skipped are none to the schedule: the fourth update follows the second.
    assert numbers["learning_rate"] == pytest.approx(float(of._rate(jnp.int32(2)))) != rate


@pytest.mark.slow
def test_a_moment_teaches_the_first_stage_to_read_its_message(world):
    """On one device and on eight; its videos learn nothing by it."""
    batch, found = world.pipeline(world.config()).batch(0), []
    rules = ((r"model\.(?!moment\.).*", 0.0), (r".*\.vit\.(?!head).*", 0.0), (".*", 1.0))
    for sizes in ((1, 1, 1), (2, 2, 2)):
        plain = world.without_dropout()
        model = dataclasses.replace(plain.model, moment=dataclasses.replace(plain.model.moment, first_width=16))
        config = dataclasses.replace(
            plain,
            model=model,
            losses=LossConfig(lm=0, rank=0, moment=1, moment_l1=0, moment_iou=0, contrastive=1e-9),
            optim=dataclasses.replace(plain.optim, clip=0.0, rules=rules),
            mesh=MeshConfig(*sizes),
        )
        program = Program(config, make_mesh(config.mesh, jax.devices()[: int(np.prod(sizes))]))
        state, frozen = begin(world, program)
        state, numbers = step(program, state, frozen, batch)
        (moments,) = (part.mu for part in state.optimizer if hasattr(part, "mu"))
        size = {path: float(np.abs(mu).max()) / (1 - optim.B1) for path, mu in moments.items()}
        found.append((numbers["moment"], size["retriever.text.words"], size["retriever.vit.head.probe"]))
    assert found[0] == pytest.approx(found[1], rel=1e-4)
    assert found[0][1] > 1e-5 > found[0][2]


def test_what_does_not_fit_the_mesh_is_refused(world):
    plain = world.config().model

    def reading(width):
        return dataclasses.replace(plain, moment=dataclasses.replace(plain.moment, first_width=width))

    with pytest.raises(ValueError, match="data.batch_size is 8 for 8 devices with rows of their own and accumulate=2"):
        Program(
            world.config(losses=LossConfig(), accumulate=2, mesh=MeshConfig(8, 1, 1)), make_mesh(MeshConfig(8, 1, 1))
        )
    without = world.config(losses=LossConfig(lm=0, rank=0, contrastive=1), model=reading(16))
    with pytest.raises(ValueError, match=r"no decoder runs, and optim.rules train model\.encoder\.projection"):
        Program(without, make_mesh(without.mesh))
    with pytest.raises(ValueError, match="accumulate is 2; expected 1: losses.contrastive"):
        world.config(accumulate=2)
    for change, message in (
        ({"retriever": None}, "losses.contrastive has a weight, and there is no config.retriever"),
        ({"model": None}, "losses of the dialogue model have a weight, and there is no config.model"),
        ({"steps": 0}, "steps is 0; expected at least 1"),
        ({"model": reading(8)}, "model.moment.first_width is 8; expected 0 or the retriever's 16"),
        ({"model": reading(16), "losses": LossConfig()}, "model.moment.first_width is 16, and no retriever is trained"),
    ):
        with pytest.raises(ValueError, match=message):
            world.config(**change)
