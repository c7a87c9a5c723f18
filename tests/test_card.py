"""Cards of exports, as inference reads them."""

import json

import pytest

from ivcr_jax import card

CARD = {
    "run": {"step": 1500, "steps": 2000, "seed": 3, "began_with": "warm", "losses": {"rank": 1.0, "lm": 0.5}},
    "data": {
        "dialogues": {"name": "ivcr200k", "what": "90 dialogues", "fingerprint": "d00d:train"},
        "videos": {"name": "features", "what": None, "fingerprint": None},
        "stream": "5eed",
    },
    "validation": {"step": 1400, "metrics": {"rank_r1": 0.25, "queries": 634.0, "loss": None}},
    "parameters": {"model.llama": {"count": 1200, "trained": 34}, "retriever.text": {"count": 5, "trained": 5}},
    "dtype": "bfloat16",
    "lora": {"rank": 2, "alpha": 1.0},
    "tokenizers": {"tokenizer.model": "7071"},
    "code": {"revision": "c0de", "changed": True},
    "versions": {"jax": "0.10.2"},
    "calibration": {
        "threshold": 0.125,
        "rule": "By a rule.",
        "queries": 634,
        "videos": 150,
        "refused_answerable": 0.006,
        "refused_alone": 0.019,
        "refused_without_truth": 0.087,
        "refused_without_candidates": 0.095,
    },
}


def test_a_card_is_written_for_programs_and_for_people(tmp_path):
    card.write(tmp_path, CARD)
    assert json.loads((tmp_path / "card.json").read_text()) == {"version": 1, **CARD}
    assert card.threshold(tmp_path) == 0.125
    text = (tmp_path / "README.md").read_text()
    for said in (
        "| model.llama | 1,200 | 34 |",
        "| all | 1,205 | 39 |",
        "They are bfloat16. Parameters with one axis (norms, biases, scales) are float32.",
        "LoRA of rank 2 and alpha 1 is merged into the matrices.",
        "Step 1,500 of 2,000, seed 3. It began with `warm`.",
        "| lm | 0.5 |",
        "| dialogues | ivcr200k | 90 dialogues | d00d:train |",
        "| videos | features | not at hand | unknown |",
        "has the fingerprint 5eed.",
        "After step 1,400:",
        "| rank_r1 | 0.2500 |\n| queries | 634 |\n| loss | not finite |",
        "A search whose best cosine is under 0.1250 finds nothing. By a rule.",
        "634 queries among 150 videos",
        "| is among them | 0.6 %, wrongly |",
        "| is taken out | 8.7 %, rightly |",
        "Code of revision c0de, with changes that no revision holds; jax 0.10.2.",
        "| tokenizer.model | 7071 |",
    ):
        assert said in text, said


def test_what_is_not_known_is_said(tmp_path):
    run = CARD["run"] | {"began_with": None}
    changed = {"lora": None, "dtype": "float32", "validation": None, "run": run}
    changed |= {"calibration": {"threshold": None, "why": "there is no reason"}}
    card.write(tmp_path, CARD | changed | {"code": {"revision": "unknown", "changed": None}})
    assert card.threshold(tmp_path) is None
    text = (tmp_path / "README.md").read_text()
    for said in (
        "They are float32.\nThere was no LoRA to merge.",
        "It began with random weights.",
        "The run wrote no metrics of validation.",
        "No threshold is stated: there is no reason.",
        "Code of revision unknown; jax",
    ):
        assert said in text, said


def test_a_folder_without_a_card_states_no_threshold(tmp_path):
    assert card.threshold(tmp_path) is None


@pytest.mark.parametrize(
    "text, said",
    [
        ("{", "found no card"),
        ("[1]", "found no card"),
        ('{"version": 1}', "found no card .KeyError: 'calibration'"),
        ('{"version": 2, "calibration": {"threshold": null}}', "found version 2, expected 1"),
        ('{"version": 1, "calibration": {"threshold": 1.5}}', "is 1.5; expected null or a number from -1 to 1"),
        ('{"version": 1, "calibration": {"threshold": "0.5"}}', "is '0.5'; expected null or a number"),
        ('{"version": 1, "calibration": {"threshold": true}}', "is True; expected null or a number"),
        ('{"version": 1, "calibration": {"threshold": NaN}}', "is nan; expected null or a number"),
    ],
)
def test_a_card_that_cannot_be_read_is_refused(text, said, tmp_path):
    (tmp_path / "card.json").write_text(text)
    with pytest.raises(ValueError, match=f"card.json: .*{said}"):
        card.threshold(tmp_path)


def test_a_threshold_may_be_set_by_hand(tmp_path):
    card.write(tmp_path, CARD)
    values = json.loads((tmp_path / "card.json").read_text())
    values["calibration"]["threshold"] = -1
    (tmp_path / "card.json").write_text(json.dumps(values))
    assert card.threshold(tmp_path) == -1.0
