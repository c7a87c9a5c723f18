"""Datasets as the builder makes them, of raw rows that are given."""

import json

from tfds_builder.build import build


def rows_of(dialogues):
    """Raw rows of dialogues as the dataset has them."""
    rows = []
    for dialogue in dialogues:
        messages = []
        for turn in dialogue.turns:
            answer = {"from": "gpt", "value": turn.answer, "gt_se": list(turn.span or (-1, -1))}
            if turn.video_id:
                answer |= {"video_id": f"{turn.video_id}.mp4"}
            if turn.candidates:
                answer |= {"candidate_videos": [f"{name}.mp4" for name in turn.candidates]}
            messages += [{"from": "human", "value": turn.user}, answer]
        rows.append({"id": dialogue.id, "split": dialogue.split, "type": [dialogue.type], "conversations": messages})
    return rows


def build_of(folder, rows):
    """Writes rows to IVCR-200K.json in a folder; the paths of it and of the dataset that is built of it."""
    folder.mkdir(parents=True, exist_ok=True)
    raw = folder / "IVCR-200K.json"
    raw.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    build("ivcr200k", manual_dir=folder, data_dir=folder, max_loss=1)
    return str(raw), str(folder / "ivcr200k")
