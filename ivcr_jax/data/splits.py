"""Carves a validation split out of train, so that no ground-truth video of one is a ground truth of the other.

Works on ids alone, the same on every machine: order and choice come from hashes of the ids.
"""

import collections
import hashlib
from collections.abc import Mapping, Sequence


def carve(truths: Mapping[str, Sequence[str]], share: float) -> tuple[set[str], set[str]]:
    """Chooses which dialogues of train become validation.

    Dialogues that share a ground-truth video, at first or second hand, form a group, and a group stays together.
    Whole groups are taken in the order of their hash while they fit in the budget of `share` of the dialogues. Where
    a few giant groups hold nearly everything (videos link dialogues, dialogues link videos), that finds too little;
    then a neighbourhood is cut out of the largest group: videos are added outward from one chosen by hash, a
    dialogue whose videos all lie inside becomes validation, and one that straddles the border is left out of both.
    The budget counts what is left out too. Of the dialogues without a ground truth (chat) the same share is taken, by
    their own hash, and no more: they would fill the budget of a corpus whose videos are all linked.

    Args:
      truths: dialogue id -> its ground-truth video ids.
      share: of the dialogues, in [0, 1), that may leave train.

    Returns:
      (ids that become validation, ids left out).
    """
    chat = [dialogue for dialogue, videos in truths.items() if not videos]
    budget = int(share * (len(truths) - len(chat)))
    groups: dict[str, list[str]] = collections.defaultdict(list)
    parent: dict[str, str] = {}

    def find(node: str) -> str:
        while parent[node] != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    for videos in truths.values():
        for video in videos:
            parent.setdefault(video, video)
            a, b = find(videos[0]), find(video)
            parent[max(a, b)] = min(a, b)
    for dialogue, videos in truths.items():
        if videos:
            groups[find(videos[0])].append(dialogue)

    validation: set[str] = set()
    for root in sorted(groups, key=_hash):
        if len(validation) + len(groups[root]) <= budget:
            validation.update(groups[root])
    left_out: set[str] = set()
    if groups and len(validation) < budget // 2:
        largest = max(groups, key=lambda root: (len(groups[root]), _hash(root)))
        inside, left_out = _cut_out(
            {dialogue: set(truths[dialogue]) for dialogue in groups[largest]}, budget - len(validation)
        )
        validation |= inside
    return validation | set(sorted(chat, key=_hash)[: int(share * len(chat))]), left_out


def _cut_out(truths: Mapping[str, set[str]], budget: int) -> tuple[set[str], set[str]]:
    """(dialogues inside, dialogues astride) of a neighbourhood with at most `budget` dialogues in all."""
    of_video: dict[str, list[str]] = collections.defaultdict(list)
    for dialogue, videos in truths.items():
        for video in videos:
            of_video[video].append(dialogue)
    taken: set[str] = set()
    touched: set[str] = set()
    # Breadth first from the video with the smallest hash: neighbours share dialogues, so the border stays short.
    queue = collections.deque([min(of_video, key=_hash)])
    queued = set(queue)
    while queue:
        video = queue.popleft()
        new = [dialogue for dialogue in of_video[video] if dialogue not in touched]
        if len(touched) + len(new) > budget:
            continue
        taken.add(video)
        touched.update(new)
        neighbours = {other for dialogue in of_video[video] for other in truths[dialogue]} - queued
        queue.extend(sorted(neighbours, key=_hash))
        queued |= neighbours
    inside = {dialogue for dialogue in touched if truths[dialogue] <= taken}
    return inside, touched - inside


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()
