"""The tokenizer against Hugging Face's (ids frozen from transformers 4.47.1, and the installed release)."""

import base64
import io
import json
import pathlib
import pickle
import random
import re
import subprocess
import sys
from typing import Any

import pytest
import sentencepiece

from ivcr_jax.data.tokenizer import VIDEO_TOKENS, Tokenizer, train_demo

GOLDEN = json.loads((pathlib.Path(__file__).parent / "golden" / "tokenizer_hf.json").read_text("utf-8"))
DEMO_PROTO = base64.b64decode(GOLDEN["models"]["demo"]["base64"])
SENTENCES = [
    f"{who} {what} {when}"
    for who in ("The man", "A woman in white", "一个穿蓝色背心的男人", "他")
    for what in ("walks into the room", "is holding a red ball", "正在做俯卧撑，", "打开视频")
    for when in ("at 12.5 seconds.", "and smiles.", "，然后离开。", "from 0.0s to 7.3s.")
]


@pytest.fixture(scope="session")
def real(realdata: pathlib.Path) -> pathlib.Path:
    return realdata / "tokenizer"


@pytest.fixture(scope="module")
def demo() -> Tokenizer:
    return Tokenizer.from_proto(DEMO_PROTO)


@pytest.fixture(scope="module", params=["demo", "mistral_v1"])
def model(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def proto(model: str, request: pytest.FixtureRequest) -> bytes:
    if model == "demo":
        return DEMO_PROTO
    return (request.getfixturevalue("real") / "mistral_v1.tokenizer.model").read_bytes()


@pytest.fixture(scope="module", params=[True, False], ids=["legacy", "not_legacy"])
def legacy(request: pytest.FixtureRequest) -> bool:
    return request.param


@pytest.fixture(scope="module")
def tokenizer(proto: bytes, legacy: bool) -> Tokenizer:
    return Tokenizer.from_proto(proto, legacy=legacy)


@pytest.fixture(scope="module")
def hugging_face(tokenizer: Tokenizer) -> Any:
    """The installed transformers with the same vocabulary, in the way that `tokenizer.legacy` says."""
    transformers = pytest.importorskip("transformers")
    normalizers = pytest.importorskip("tokenizers").normalizers
    model = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.proto)
    vocab = {model.IdToPiece(i): i for i in range(model.GetPieceSize())}
    # A pair merges where its result is a piece, the better piece first.
    scored: list[tuple[float, tuple[str, str]]] = []
    for piece, i in vocab.items():
        if not (model.IsByte(i) or model.IsControl(i) or model.IsUnknown(i)):
            pairs = [(piece[:at], piece[at:]) for at in range(1, len(piece))]
            scored += [(-model.GetScore(i), pair) for pair in pairs if pair[0] in vocab and pair[1] in vocab]
    merges = [pair for _, pair in sorted(scored, key=lambda merge: merge[0])]
    found = transformers.LlamaTokenizer(vocab=vocab, merges=merges)
    found.add_tokens(list(VIDEO_TOKENS), special_tokens=True)
    if tokenizer.legacy:  # as the tokenizer.json of Meta's LLaMA-2 folders has it
        backend = found.backend_tokenizer
        backend.pre_tokenizer = None
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return found


def random_texts(count: int, seed: int) -> list[str]:
    line = (
        "the man walks Video 3 12.5 0.1, seconds. [INST] [/INST] <<SYS>> <VID <VIDEO TOKEN> </ <0x0A> 你好 视频 "
        "男人 １２ ² café ﬁ 😀 👨\u200d👩\u200d👧 नमस्ते Ⅳ ▁ ▁x \u200b \ufeff \xa0 \x07 aaaa hello!!!! ……"
    )
    words = line.split(" ")
    marks = ["<s>", "</s>", "<unk>", *VIDEO_TOKENS]
    spaces = [" ", "  ", "   ", "\n", "\n\n", "\t", "\r\n"]
    rng = random.Random(seed)

    def part() -> str:
        kind = rng.randrange(9)
        if kind < 6:
            return rng.choice((marks, spaces, words)[kind % 3])
        first, last = ((32, 0x7E), (0x4E00, 0x9FFF), (0x10000, 0x1F000))[kind - 6]
        return "".join(chr(rng.randint(first, last)) for _ in range(rng.randrange(1, 7)))

    return ["".join(part() for _ in range(rng.randrange(14))) for _ in range(count)]


def dialogues() -> list[list[dict[str, str]]]:
    shown = ",".join(f"<VID> {i} </VID> <VIDEO> <VIDEOTOKEN> </VIDEO>" for i in range(1, 11))
    times = ", ".join(f"{i / 7:.1f}" for i in range(64))
    english = [
        ("system", "You are an excellent video retrieval AI assistant."),
        ("user", f"Candidate videos : {shown}.find the man  who walks away"),
        ("assistant", "The video you want is video 3. A man walks away."),
        (
            "user",
            f"Current video : <VID> 3 </VID> <VIDEO> <VIDEOTOKEN> </VIDEO>. It has {times} seconds.When?",
        ),
        ("assistant", " The given query happens in 4.2s-8.3s.\n"),
        ("user", "Thanks! 😀"),
    ]
    chinese = [
        ("user", f"候选视频：{shown}。一个穿着蓝色背心的男人正在做俯卧撑。"),
        ("assistant", "你要找的是视频 2。"),
        ("user", "当前视频：<VID> 2 </VID> <VIDEO> <VIDEOTOKEN> </VIDEO>。什么时候？"),
        ("assistant", "0.0s-12.5s，\n他在健身房里。"),
    ]
    return [[{"role": role, "content": text} for role, text in turns] for turns in (english, chinese)]


# --- Parity


@pytest.mark.parametrize("row", GOLDEN["rows"], ids=lambda row: row["text"][:20].encode("ascii", "replace").decode())
def test_ids_and_texts_of_transformers_4(row: dict[str, Any], model: str, legacy: bool, tokenizer: Tokenizer) -> None:
    expected = row[model]
    assert tokenizer.encode(row["text"]) == expected["legacy" if legacy else "not_legacy"]
    assert tokenizer.decode(expected["legacy"]) == expected["decoded"]
    assert tokenizer.decode(expected["legacy"], skip_special_tokens=True) == expected["skipped"]


def test_the_two_ways_differ_on_a_prompt(real: pathlib.Path) -> None:
    texts = {True: "▁[ INST ] ▁▁ 1", False: "[ INST ] ▁ 1"}
    for legacy, pieces in texts.items():
        tokenizer = Tokenizer.load(real / "mistral_v1.tokenizer.model", legacy=legacy)
        sp = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.proto)
        middle = tokenizer.encode("<s>[INST]<VID> 1")
        assert [middle[0], middle[-3]] == [1, 32000]
        assert " ".join(sp.IdToPiece([*middle[1:-3], *middle[-2:]])) == pieces


def test_ids_and_texts_of_installed_transformers(tokenizer: Tokenizer, hugging_face: Any) -> None:
    texts = random_texts(1500, seed=1)
    assert sum("<" in text for text in texts) > 500
    for text in texts:
        # Without `legacy`, transformers 5 alone puts no "▁" before a text that begins with one.
        if not tokenizer.legacy:
            text = text.lstrip(" ▁")
        ids = hugging_face.encode(text, add_special_tokens=False)
        assert tokenizer.encode(text) == ids, text
        assert tokenizer.decode(ids) == hugging_face.decode(ids), text
        skipped = hugging_face.decode(ids, skip_special_tokens=True)
        assert tokenizer.decode(ids, skip_special_tokens=True) == skipped, text


@pytest.mark.parametrize("one_line", [True, False])
def test_chat_prompts_of_installed_transformers(
    tokenizer: Tokenizer, hugging_face: Any, real: pathlib.Path, one_line: bool
) -> None:
    pytest.importorskip("jinja2")
    template = (real / "llama-2-chat.jinja").read_text("utf-8")
    if one_line:  # as in a tokenizer_config.json; the file's own line breaks and indents would be written out
        template = "".join(line.strip() for line in template.splitlines())
    for messages in dialogues():
        text = hugging_face.apply_chat_template(messages, chat_template=template, tokenize=False)
        assert text.startswith("<s>[INST] ") == one_line and text.count("<VIDEOTOKEN>") == 11
        ids = tokenizer.encode(text)
        assert ids == hugging_face.encode(text, add_special_tokens=False)
        assert tokenizer.decode(ids) == hugging_face.decode(ids)
        assert ids.count(tokenizer.ids["<VIDEOTOKEN>"]) == 11


def test_decode_of_any_ids_of_installed_transformers(tokenizer: Tokenizer, hugging_face: Any) -> None:
    sp = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.proto)
    whole = [i for i in range(tokenizer.vocab_size) if i >= sp.GetPieceSize() or not sp.IsByte(i)]
    rng = random.Random(3)
    for _ in range(300):
        ids = rng.choices(whole, k=rng.randrange(1, 20)) + rng.choices(list(tokenizer.ids.values()), k=2)
        rng.shuffle(ids)
        assert tokenizer.decode(ids) == hugging_face.decode(ids)
        skipped = hugging_face.decode(ids, skip_special_tokens=True)
        assert tokenizer.decode(ids, skip_special_tokens=True) == skipped


@pytest.mark.parametrize("name", ["mistral_v1", "spm_test_model"])
def test_ids_of_sentencepiece(real: pathlib.Path, name: str) -> None:
    golden = json.loads((real / "golden_encodings.json").read_text("utf-8"))
    path = real.parent / golden["models"][name]["file"]
    tokenizers = [Tokenizer.load(path)]
    if name == "mistral_v1":
        tokenizers.append(Tokenizer.load(path, legacy=False))
    seen = 0
    for row in golden["rows"]:
        for tokenizer in tokenizers:
            if not any(token in row["text"] for token in tokenizer.ids):
                seen += 1
                assert tokenizer.encode(row["text"]) == row[name]["ids"]
                # SentencePiece writes an unknown piece as " ⁇ ", Hugging Face and we as its name.
                expected = row[name]["decoded"].replace(" ⁇ ", "<unk>")
                assert tokenizer.decode(row[name]["ids"]) == expected
    assert seen == (len(golden["rows"]) - 3) * len(tokenizers)


# --- Encoding and decoding


@pytest.mark.parametrize("num_threads", [1, 2])
def test_a_batch_is_its_texts(tokenizer: Tokenizer, num_threads: int) -> None:
    texts = [*random_texts(500, seed=2), "", "", "<s>", " 1 "]
    assert tokenizer.encode_batch(texts, num_threads) == [tokenizer.encode(text) for text in texts]
    assert tokenizer.encode_batch([]) == []


def test_batch_rows_are_lists_of_their_own(demo: Tokenizer) -> None:
    first, second = demo.encode_batch(["The man", "The man"])
    first.append(0)
    assert second == demo.encode("The man")


def test_text_can_be_cut_before_a_special_token(tokenizer: Tokenizer) -> None:
    turns = ["<s>[INST] find 3 <VID> 1 </VID> [/INST] Video 1. </s>", "<s>[INST] 再见 [/INST] Bye </s>"]
    assert tokenizer.encode("".join(turns)) == [i for turn in turns for i in tokenizer.encode(turn)]


def test_text_without_special_tokens_comes_back(tokenizer: Tokenizer) -> None:
    for text in random_texts(500, seed=4):
        if not any(token in text for token in tokenizer.ids):
            assert tokenizer.decode(tokenizer.encode(text)) == text.replace("▁", " ")


def test_decoding_a_stream_of_bytes(demo: Tokenizer) -> None:
    text = "ok 鑫😀!"
    ids = demo.encode(text)
    assert len(ids) > len(text), "the rare characters must be spelt in bytes"
    shown = [demo.decode(ids[:length]) for length in range(len(ids) + 1)]
    assert shown[-1] == text
    for partial in shown:
        whole = partial.rstrip("\ufffd")
        assert text.startswith(whole) and len(partial) - len(whole) <= 1
    assert any(partial.endswith("鑫\ufffd") for partial in shown)
    assert demo.decode(ids[-3:-1]).startswith("\ufffd")


def test_decode_takes_whatever_is_an_integer(demo: Tokenizer) -> None:
    class Scalar:  # has no hash, as a JAX scalar has none
        __hash__ = None  # type: ignore[assignment]

        def __init__(self, value: int) -> None:
            self.value = value

        def __index__(self) -> int:
            return self.value

    ids: list[Any] = [Scalar(i) for i in demo.encode("<s>The man")]
    assert demo.decode(ids, skip_special_tokens=True) == "The man"
    with pytest.raises(TypeError):
        demo.decode([1.0])  # type: ignore[list-item]


@pytest.mark.parametrize("bad", [-1, 485])
def test_decode_names_an_id_out_of_range(demo: Tokenizer, bad: int) -> None:
    assert demo.vocab_size == 485
    with pytest.raises(ValueError, match=rf"ids\[1\]: found {bad}, expected one in 0..484"):
        demo.decode([5, bad])


def test_half_a_surrogate_pair_is_no_text(demo: Tokenizer) -> None:
    with pytest.raises(ValueError, match="surrogates not allowed"):
        demo.encode("a\ud83d")
    with pytest.raises(ValueError, match="surrogates not allowed"):
        demo.encode_batch(["<s>a\ud83d"])


# --- Ids and settings


def test_video_tokens_have_the_published_ids(real: pathlib.Path) -> None:
    tokenizer = Tokenizer.load(real / "mistral_v1.tokenizer.model")
    assert [tokenizer.ids[token] for token in VIDEO_TOKENS] == [32000, 32001, 32002, 32003, 32004]
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (32005, 1, 2)
    assert VIDEO_TOKENS == ("<VID>", "</VID>", "<VIDEO>", "</VIDEO>", "<VIDEOTOKEN>")


def trained(**options: Any) -> bytes:
    model = io.BytesIO()
    defaults: dict[str, Any] = {
        "vocab_size": 400,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
    }
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(SENTENCES),
        model_writer=model,
        model_type="bpe",
        minloglevel=2,
        **defaults | options,
    )
    return model.getvalue()


def test_special_tokens_already_in_the_model_keep_their_ids() -> None:
    tokenizer = Tokenizer.from_proto(trained(user_defined_symbols=["<VIDEO>", "<VID>"]))
    assert [tokenizer.ids[token] for token in VIDEO_TOKENS] == [4, 400, 3, 401, 402]
    assert tokenizer.vocab_size == 403
    ids = tokenizer.encode("<VIDEO>he</VID>")
    assert (ids[0], ids[-1]) == (3, 400) and tokenizer.decode(ids) == "<VIDEO> he</VID>"


def test_longest_special_token_wins() -> None:
    tokenizer = Tokenizer.from_proto(DEMO_PROTO, ("<a>", "<a><b>"))
    assert tokenizer.encode("<a><b><a>") == [481, 480]


def test_pad_is_the_models_or_end(demo: Tokenizer) -> None:
    assert demo.pad_id == demo.eos_id == 2
    assert Tokenizer.from_proto(trained(pad_id=3)).pad_id == 3


def test_model_without_a_prefix_gets_none(legacy: bool) -> None:
    proto = trained(add_dummy_prefix=False, remove_extra_whitespaces=False)
    tokenizer = Tokenizer.from_proto(proto, legacy=legacy)
    sp = sentencepiece.SentencePieceProcessor(model_proto=proto)
    he = sp.EncodeAsIds("he")
    assert not sp.IdToPiece(he[0]).startswith("▁")
    assert tokenizer.encode("he<s>he") == [*he, tokenizer.bos_id, *he]
    assert tokenizer.decode(tokenizer.encode(" he<s> he")) == " he<s> he"


def test_pickle_and_fingerprint(tokenizer: Tokenizer, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(tokenizer.proto)
    copies = [pickle.loads(pickle.dumps(tokenizer)), Tokenizer.load(str(path), legacy=tokenizer.legacy)]
    for copy in copies:
        assert copy.encode("<s>[INST] 视频 <VID> 1") == tokenizer.encode("<s>[INST] 视频 <VID> 1")
        assert copy.fingerprint == tokenizer.fingerprint
        assert copy.proto == tokenizer.proto
    assert re.fullmatch("[0-9a-f]{64}", tokenizer.fingerprint)


def test_fingerprint_tells_all_settings_apart() -> None:
    other = train_demo(SENTENCES, 400).proto
    found = {
        Tokenizer.from_proto(proto, tokens, legacy).fingerprint
        for proto in (DEMO_PROTO, other)
        for tokens in (VIDEO_TOKENS, VIDEO_TOKENS[::-1], ())
        for legacy in (True, False)
    }
    assert len(found) == 12


@pytest.mark.parametrize("content", [b"", b'{"model": {"type": "BPE"}}', b"\0" * 9, DEMO_PROTO[:3000]])
def test_no_model(content: bytes, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"tokenizer\.json: found \d+ bytes .*expected a whole SentencePiece"):
        Tokenizer.load(path)


def test_no_file(tmp_path: pathlib.Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"x\.model: found nothing, expected a SentencePiece"):
        Tokenizer.load(tmp_path / "x.model")
    with pytest.raises(FileNotFoundError, match="found a folder, expected a SentencePiece"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("tokens", [("<VID>", "<VID>"), ("<s>",), ("<unk>",), ("<VID>", "")])
def test_special_tokens_must_be_new(tokens: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=f"found {tokens[-1]!r} .*expected distinct"):
        Tokenizer.from_proto(DEMO_PROTO, tokens)


def test_model_needs_begin_and_end() -> None:
    with pytest.raises(ValueError, match="found begin id -1, end id 1, expected"):
        Tokenizer.from_proto(trained(bos_id=-1, eos_id=1))


def test_model_that_collapses_space_has_one_way_only() -> None:
    proto = trained(remove_extra_whitespaces=True)
    assert Tokenizer.from_proto(proto).encode("he")
    with pytest.raises(ValueError, match="collapses white space"):
        Tokenizer.from_proto(proto, legacy=False)


# --- Digits


def test_splits_digits(tokenizer: Tokenizer) -> None:
    assert tokenizer.splits_digits()
    rng = random.Random(5)
    for _ in range(300):
        glue = [rng.choice(["", " ", ", ", ".", "s-", "视频", "<VID>", "a", ":"]) for _ in range(6)]
        text = "".join(part + str(rng.randrange(10 ** rng.randrange(1, 6))) for part in glue)
        ids = tokenizer.encode(text)
        digits = [i for i in ids if re.search("[0-9]", tokenizer.decode([i]))]
        assert [tokenizer.decode([i]) for i in digits] == re.findall("[0-9]", text)
        assert all(tokenizer.decode([tokenizer.bos_id, i]) == "<s>" + tokenizer.decode([i]) for i in digits)
        # Other digits, and not another token.
        changed = tokenizer.encode(re.sub("[0-9]", lambda digit: str(9 - int(digit[0])), text))
        other = dict(zip("0123456789", (tokenizer.encode(f"a{i}")[-1] for i in range(10)), strict=True))
        swap = {other[str(i)]: other[str(9 - i)] for i in range(10)}
        assert changed == [swap.get(i, i) for i in ids]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"split_digits": True}, True),
        ({"split_digits": False, "vocab_size": 500}, False),
        ({"user_defined_symbols": ["<h1>", "[x=0]"]}, True),
        ({"user_defined_symbols": ["▁7"]}, False),
        ({"user_defined_symbols": ["10"]}, False),
        ({"user_defined_symbols": ["3s"]}, False),
        ({"required_chars": "123"}, True),  # the other digits are bytes
        ({"required_chars": "123", "byte_fallback": False, "vocab_size": 150}, False),  # "44": one <unk>
        ({"user_defined_symbols": ["[1]"]}, False),
        ({"user_defined_symbols": ["<1>"]}, False),
    ],
)
def test_splits_digits_reads_the_vocabulary(options: dict[str, Any], expected: bool) -> None:
    proto = trained(**{"split_digits": True, "required_chars": "0123456789"} | options)
    assert Tokenizer.from_proto(proto).splits_digits() is expected


def test_real_model_with_pieces_of_digits(real: pathlib.Path) -> None:
    assert not Tokenizer.load(real / "spm_test_model.model").splits_digits()


# --- The demo


def test_demo_is_the_same_every_time(tmp_path: pathlib.Path) -> None:
    first = train_demo(SENTENCES, 400, tmp_path / "demo.model")
    assert train_demo(iter(SENTENCES), 400).proto == first.proto == (tmp_path / "demo.model").read_bytes()
    assert train_demo(SENTENCES[:-5], 400).proto != first.proto
    assert first.vocab_size == 405 and first.splits_digits()
    sp = sentencepiece.SentencePieceProcessor(model_proto=first.proto)
    assert sp.PieceToId("4") != sp.unk_id() and not any("4" in sentence for sentence in SENTENCES)


def test_no_piece_of_the_demo_holds_more_than_two_chinese_characters() -> None:
    clause = "一个红色的大正方形上下来回移动, 中途离开画面"
    sp = sentencepiece.SentencePieceProcessor(model_proto=train_demo([f"{clause} video", *SENTENCES] * 50, 500).proto)
    pieces = [sp.IdToPiece(index) for index in range(sp.GetPieceSize())]
    assert {"▁video", "移动", "红"} <= {*pieces}
    assert max(len(piece) for piece in pieces if re.search("[\u4e00-\u9fff]", piece)) == 2
    ids = sp.EncodeAsPieces(clause)
    assert len(ids) < 0.8 * len(clause) and sp.DecodePieces(ids) == clause


def test_demo_of_many_sentences() -> None:
    rng = random.Random(6)
    words = [word for sentence in SENTENCES for word in sentence.split()]
    texts = [" ".join(rng.choices(words, k=8)) for _ in range(20_000)]
    tokenizer = train_demo(texts, 700)
    assert tokenizer.proto == train_demo(texts, 700).proto
    assert all(tokenizer.decode(tokenizer.encode(text)) == text for text in texts[:200])


def test_demo_knows_its_chinese() -> None:
    tokenizer = train_demo(SENTENCES, 420)
    text = "一个穿蓝色背心的男人正在做俯卧撑，然后离开。"
    ids = tokenizer.encode(text)
    assert len(ids) < len(text) and tokenizer.decode(ids) == text


def test_demo_learns_no_part_of_a_special_token() -> None:
    texts = [f"<s>[INST] <VID> 1 </VID> <VIDEO> <VIDEOTOKEN> </VIDEO>\n{sentence} </s>" for sentence in SENTENCES]
    tokenizer = train_demo(texts, 500)
    sp = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.proto)
    learnt = [sp.IdToPiece(i) for i in range(sp.GetPieceSize()) if not sp.IsByte(i) and i > 2]
    assert not [piece for piece in learnt if "<" in piece or "VID" in piece or "\n" in piece]
    assert tokenizer.encode("<VIDEOTOKEN>") == [tokenizer.vocab_size - 1]


def test_demo_uses_long_lines() -> None:
    tokenizer = train_demo(["鑫淼 " * 5000], 300)
    assert tokenizer.decode(tokenizer.encode("鑫淼")) == "鑫淼" and len(tokenizer.encode("鑫淼")) <= 2


def test_demo_grows_no_larger_than_its_texts() -> None:
    assert 259 < train_demo(["ab ab 好"], 5000).vocab_size < 300


def test_demo_errors() -> None:
    with pytest.raises(ValueError, match="found none with a character"):
        train_demo(["", " \n", "<s>"], 400)
    with pytest.raises(ValueError, match=r"vocab_size: found 260, expected .* 260 vs \d+"):
        train_demo(SENTENCES, 260)


def test_light_import() -> None:
    code = (
        "import sys; import ivcr_jax.data.tokenizer;"
        "heavy = {'jax', 'flax', 'numpy', 'grain', 'tensorflow_datasets', 'transformers', 'av'};"
        "sys.exit(str(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=pathlib.Path(__file__).parents[2], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
