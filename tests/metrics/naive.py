"""The published conversion and scorer once more: slow, straight on, written from their description, crashes and all.

Shares nothing with `ivcr_jax.metrics`, not even an expression: it goes through texts character by character.
"""


# -- reading answers


def is_word(text, place):
    return 0 <= place < len(text) and (text[place].isalnum() or text[place] == "_")


def video_index(text):
    """The first word `video`, blanks, then 10 or one digit that ends a word."""
    for place in range(len(text)):
        if text[place : place + 5].lower() != "video" or is_word(text, place - 1):
            continue
        there = place + 5
        while there < len(text) and text[there].isspace():
            there += 1
        if there == place + 5:
            continue
        for number in ("10", *"0123456789"):
            if text[there:].startswith(number) and not is_word(text, there + len(number)):
                return int(number)
    return None


def number_at(text, place):
    """Where a number like 12, 12. or 12.5 that begins here ends; `place` where none does."""
    end = place
    while end < len(text) and text[end].isdecimal():
        end += 1
    if end > place and text[end : end + 1] == ".":
        end += 1
        while end < len(text) and text[end].isdecimal():
            end += 1
    return end


def skip(text, place, what):
    while place < len(text) and what(text[place]):
        place += 1
    return place


def clean(text):
    text = text.lower()
    text = text.replace("a specific example is : 20.8 - 30.0 seconds", "")
    while ".." in text:
        text = text.replace("..", ".")
    return text


def pairs(text):
    for place in range(len(text)):
        end = number_at(text, place)
        if end == place:
            continue
        there = end + 1 if text[end : end + 1] == "s" else end
        there = skip(text, there, str.isspace)
        if text[there : there + 1] != "-":
            continue
        there = skip(text, there + 1, str.isspace)
        if number_at(text, there) > there:
            return [[float(text[place:end]), float(text[there : number_at(text, there)])]]
    return []


def first_bare_number(sentence):
    for place in range(len(sentence)):
        if not sentence[place].isdecimal() or is_word(sentence, place - 1):
            continue
        whole = skip(sentence, place, str.isdecimal)
        if sentence[whole : whole + 1] == ".":
            end = skip(sentence, whole + 1, str.isdecimal)
            if end > whole + 1 and not is_word(sentence, end):
                return float(sentence[place:end])
        if not is_word(sentence, whole):
            return float(sentence[place:whole])
    return None


def first_clock(sentence):
    for place in range(len(sentence)):
        for digits in (2, 1):
            parts = sentence[place : place + digits + 6]
            shape = [parts[:digits], parts[digits + 1 : digits + 3], parts[digits + 4 :]]
            if (
                len(parts) == digits + 6
                and parts[digits] == parts[digits + 3] == ":"
                and all(part.isdecimal() for part in shape)
                and not is_word(sentence, place - 1)
                and not is_word(sentence, place + len(parts))
            ):
                hours, minutes, seconds = (int(part) for part in shape)
                return float(3600 * hours + 60 * minutes + seconds)
    return None


def predicted_time(text):
    text = clean(text)
    sentences = text.replace("?", "!").replace("\n", "!").split("!")
    found = pairs(text)
    for read in (first_bare_number, first_clock):
        if not found:
            numbers = [read(sentence) for sentence in sentences]
            numbers = [number for number in numbers if number is not None]
            for place in range(0, len(numbers) - 1, 2):
                found.append([numbers[place], numbers[place + 1]])
    if not found:
        return [0, 0]
    start, end = found[0]
    return [start, end] if end > start else [end, start]


def plain_number(text, place):
    """Where 12 or 12.5 ends, but not 12."""
    end = skip(text, place, str.isdecimal)
    if end > place and text[end : end + 1] == ".":
        further = skip(text, end + 1, str.isdecimal)
        if further > end + 1:
            return further
    return end


def true_times(text):
    times, place = [], 0
    while place < len(text):
        end = plain_number(text, place)
        if end > place and text[end : end + 2] == "s-":
            other = plain_number(text, end + 2)
            if other > end + 2 and text[other : other + 1] == "s":
                times += [float(text[place:end]), float(text[end + 2 : other])]
                place = other + 1
                continue
        place += 1
    return times


# -- the conversion


def convert(all_data, longest):
    """Samples and lists of videos, as the notebook makes them; raises where it does."""
    kept = []
    for dialogue in all_data:
        if dialogue["split"] == "test" and dialogue["type"] != [0]:
            messages = dialogue["conversations"]
            if dialogue["type"] != [7]:
                if messages and messages[0]["from"] == "human":
                    answer = messages[1]
                    if answer["gt_se"] == [-1, -1]:
                        good = answer["video_id"] in answer["candidate_videos"]
                    else:
                        good = answer["video_id"] == answer["candidate_videos"][0]
                    if good:
                        kept.append(messages)
            else:
                questions = []
                for place, message in enumerate(messages):
                    if message["from"] == "human":
                        answer = messages[place + 1]
                        if answer["gt_se"] == [-1, -1]:
                            good = answer["video_id"] in answer["candidate_videos"]
                        else:
                            good = answer["video_id"] == answer["candidate_videos"][0]
                        if good:
                            questions.append(message)
                kept.append(questions)  # without the answers
    samples, videos = [], []
    for messages in kept:
        turns = []
        for place in range(1, len(messages), 2):
            if messages[place]["from"] != "gpt":
                continue
            turns.append((messages[place - 1], messages[place]))
            if len(turns) <= 10:
                sample = [{"role": "system", "content": "You are an excellent video retrieval AI assistant."}]
                shown = []
                for human, gpt in turns:
                    question = human["value"].strip()
                    if gpt.get("gt_se") == [-1, -1]:
                        text = "Candidate videos : "
                        for number in range(1, 11):
                            text += "<VID> " + str(number) + " </VID> <VIDEO> <VIDEOTOKEN> </VIDEO>"
                            text += "," if number < 10 else "."
                        if not gpt.get("candidate_videos"):
                            raise KeyError("candidate_videos")
                        shown.append(gpt["candidate_videos"])
                    else:
                        number = str(video_index(gpt["value"].strip()))
                        text = "Current video : <VID> " + number + " </VID> <VIDEO> <VIDEOTOKEN> </VIDEO>."
                        shown.append(gpt.get("video_id"))
                    sample.append({"role": "user", "content": (text + question).strip()})
                    sample.append({"role": "assistant", "content": gpt["value"].strip()})
                if len(sample) <= 1 + 2 * longest:
                    samples.append(sample)
                    videos.append(shown)
    return samples, videos


# -- the scorer


def iou(truth, found):
    most = max(truth[1], found[1]) - min(truth[0], found[0])
    return max(min(truth[1], found[1]) - max(truth[0], found[0]), 0) / most


class Scorer:
    """`at` is where it was when it crashed."""

    def __init__(self, predictions, samples, all_data):
        self.predictions, self.samples, self.all_data = predictions, samples, all_data
        self.at = ""

    def dialogues(self):
        return [each for each in self.all_data if each["split"] == "test" and each["type"] != [0]]

    def overall(self):
        result = {}
        for number, sample in enumerate(self.samples):
            self.at = f"sample {number}"
            if sample[-2]["content"].count("VIDEOTOKEN") == 10:
                if "vr" not in result:
                    result["vr"] = {"right": 0, "all": 0}
                else:
                    truth = video_index(sample[-1]["content"])
                    if truth == video_index(self.predictions[number]["output"]):
                        result["vr"]["right"] += 1
            else:
                if "vmr" not in result:
                    result["vmr"] = {"r3": 0, "r5": 0, "r7": 0, "all": 0}
                else:
                    truth = true_times(sample[-1]["content"])
                    value = iou(truth, predicted_time(self.predictions[number]["output"]))
                    for name, bar in (("r3", 0.3), ("r5", 0.5), ("r7", 0.7)):
                        if value >= bar:
                            result["vmr"][name] += 1
        for dialogue in self.dialogues():
            for place, message in enumerate(dialogue["conversations"]):
                self.at = f"{dialogue['id']} message {place}"
                if message["from"] == "gpt":
                    if message["gt_se"] == [-1, -1]:
                        result["vr"]["all"] += 1
                    else:
                        result["vmr"]["all"] += 1
        self.at = "overall"
        return {
            "r1": result["vr"]["right"] / result["vr"]["all"],
            "r1_iou_0.3": result["vmr"]["r3"] / result["vmr"]["all"],
            "r1_iou_0.5": result["vmr"]["r5"] / result["vmr"]["all"],
            "r1_iou_0.7": result["vmr"]["r7"] / result["vmr"]["all"],
        }

    def answer_to(self, question):
        for prediction in self.predictions:
            if prediction["user_q"] == question:
                return prediction["output"]
        return None

    def table(self):
        result = {}
        for dialogue in self.dialogues():
            messages = dialogue["conversations"]
            for place in range(len(messages)):
                if messages[place]["from"] != "human":
                    continue
                turn = int((place + 2) / 2)
                if turn not in result:
                    result[turn] = {"vr_right": 0, "vr_all": 0, "r3": 0, "r5": 0, "r7": 0, "vmr_all": 0}
                self.at = f"{dialogue['id']} message {place + 1}"
                found = self.answer_to(messages[place]["value"])
                truth = messages[place + 1]
                if truth["gt_se"] == [-1, -1]:
                    if found is not None and video_index(truth["value"]) == video_index(found):
                        result[turn]["vr_right"] += 1
                    result[turn]["vr_all"] += 1
                else:
                    if found is not None:
                        value = iou(true_times(truth["value"]), predicted_time(found))
                        for name, bar in (("r3", 0.3), ("r5", 0.5), ("r7", 0.7)):
                            if value >= bar:
                                result[turn][name] += 1
                    result[turn]["vmr_all"] += 1
        return result
