"""Reading videos, against frames that carry their own number and against real clips decoded the slow way."""

import concurrent.futures
import functools
import io
import json
import os
import pathlib
import pickle
import weakref
from fractions import Fraction

import av
import numpy as np
import pytest
from av.video.reformatter import Interpolation

from ivcr_jax.data import media, video
from tests.conftest import REALDATA
from tests.data.video_fixtures import (
    HEIGHT,
    WIDTH,
    barcode,
    choose_slowly,
    number_of,
    packets_of,
    tear,
    write_audio,
    write_video,
)

SIZE = (HEIGHT, WIDTH)
FPS = 25
COUNT = 60

X264_OPEN = {"x264-params": "keyint=12:min-keyint=12:open-gop=1:bframes=4:scenecut=0"}
X265_OPEN = {"x265-params": "keyint=12:min-keyint=12:open-gop=1:bframes=4:scenecut=0:log-level=0"}
X264_REFRESH = {"x264-params": "keyint=12:intra-refresh=1:bframes=0:scenecut=0"}
KINDS: dict[str, tuple[str, str, dict[str, str], int | None]] = {
    "h264 long": ("a.mp4", "libx264", {"g": "250", "bf": "3"}, None),
    "h264 short": ("a.mp4", "libx264", {"g": "8", "bf": "3"}, None),
    "h264 open groups": ("a.mkv", "libx264", X264_OPEN, None),
    "h264 intra refresh": ("a.mkv", "libx264", X264_REFRESH, None),
    "h264 transport stream": ("a.ts", "libx264", {"g": "12", "bf": "3"}, None),
    "h264 in avi, times wrong": ("a.avi", "libx264", {"g": "12", "bf": "3"}, None),
    "h264 raw, no times": ("a.h264", "libx264", {"g": "12", "bf": "3"}, None),
    "hevc open groups": ("a.mkv", "libx265", X265_OPEN, None),
    "vp9": ("a.webm", "libvpx-vp9", {"g": "20", "deadline": "realtime", "cpu-used": "8"}, None),
    "vp8": ("a.webm", "libvpx", {"g": "20", "deadline": "realtime", "cpu-used": "8"}, None),
    "mpeg4 avi": ("a.avi", "mpeg4", {"g": "12"}, 0),
    "mpeg4 avi, b-frames": ("a.avi", "mpeg4", {"g": "12"}, 2),
    "av1": ("a.mp4", "libsvtav1", {"preset": "12", "g": "20"}, None),
}


@pytest.fixture(scope="module", params=KINDS)
def numbered(request, tmp_path_factory):
    """A video of 60 numbered frames at 25 per second, in each of the kinds."""
    name, codec, options, b_frames = KINDS[request.param]
    try:
        av.Codec(codec, "w")
    except ValueError:
        pytest.skip(f"this PyAV has no encoder {codec}")
    path = tmp_path_factory.mktemp("kind") / name
    return write_video(path, codec, COUNT, fps=FPS, options=options, b_frames=b_frames)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """60 numbered frames in H.264 with B-frames and a key frame every 12."""
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    return write_video(path, options={"g": "12", "bf": "3"})


def decode_plainly(path, size, limit=10**6):
    """(pts, RGB) of the first frames of a file, every one decoded and none chosen, and the length of a tick."""
    frames = []
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1  # what hides a damaged part depends on the threads
        for packet in container.demux(stream):
            try:
                decoded = stream.decode(packet)
            except av.FFmpegError:
                continue
            for frame in decoded:
                small = frame.to_ndarray(
                    format="rgb24", width=size[1], height=size[0], interpolation=Interpolation.BILINEAR, threads=1
                )
                frames.append((frame.pts, np.rot90(small, round(frame.rotation / 90))))
            if len(frames) >= limit:
                break
        return frames[:limit], Fraction(stream.time_base)


@functools.cache
def all_pictures(path):
    return np.stack([picture for _, picture in decode_plainly(path, SIZE)[0]])


def check_uniform(path, count):
    times = [Fraction(number, FPS) for number in range(COUNT)]
    expected = choose_slowly(times, Fraction(COUNT, FPS), count)
    got = video.sample_frames(path, count, size=SIZE)
    assert [number_of(image) for image in got.images] == expected
    np.testing.assert_array_equal(got.images, all_pictures(path)[expected])
    np.testing.assert_allclose(got.times, np.array(expected) / FPS, atol=1e-6)
    assert got.images.dtype == np.uint8 and got.images.shape[1:] == (*SIZE, 3)
    assert got.times.dtype == np.float32
    assert (got.damaged, got.substituted) == (0, 0)


class TestChosenFrames:
    @pytest.mark.parametrize("count", [1, 7, 30, 59, 65])
    def test_are_those_shown_at_the_centres(self, numbered, count):
        check_uniform(numbered, count)

    @pytest.mark.parametrize("wrong", [-1, 1])
    def test_would_not_match_an_off_by_one_sampler(self, clip, monkeypatch, wrong):
        right = video.choose_frames
        monkeypatch.setattr(video, "choose_frames", lambda *a: np.clip(right(*a) + wrong, 0, COUNT - 1))
        for count in (2, 7, 30):
            with pytest.raises(AssertionError):
                check_uniform(clip, count)

    def test_random_ones_lie_in_their_intervals(self, numbered):
        for seed in range(4):
            got = video.sample_frames(numbered, 6, size=SIZE, rng=np.random.default_rng(seed))
            numbers = [number_of(image) for image in got.images]
            assert [number // 10 for number in numbers] == list(range(6))
            np.testing.assert_array_equal(got.images, all_pictures(numbered)[numbers])
            np.testing.assert_allclose(got.times, np.array(numbers) / FPS, atol=1e-6)

    def test_random_ones_follow_the_seed(self, clip):
        def numbers(seed):
            got = video.sample_frames(clip, 6, size=SIZE, rng=np.random.default_rng(seed))
            return [number_of(image) for image in got.images]

        assert numbers(3) == numbers(3)
        assert len({tuple(numbers(seed)) for seed in range(5)}) == 5

    @pytest.mark.parametrize("suffix", ["mp4", "mkv"])
    @pytest.mark.parametrize("count", [1, 5, 12, 29, 40])
    def test_follow_time_where_the_rate_varies(self, tmp_path, suffix, count):
        gaps = np.random.default_rng(1).choice([10, 20, 40, 200, 700], 29)
        stamps = [0, *np.cumsum(gaps).tolist()]
        path = write_video(tmp_path / f"vfr.{suffix}", count=30, pts=stamps, options={"bf": "2"})
        info = video.probe(path)
        assert stamps[-1] / 1000 < info.duration < stamps[-1] / 1000 + 1
        got = video.sample_frames(path, count, size=SIZE)
        expected = choose_slowly(
            [Fraction(stamp, 1000) for stamp in stamps], Fraction(info.duration).limit_denominator(10**6), count
        )
        assert [number_of(image) for image in got.images] == expected
        np.testing.assert_allclose(got.times, [stamps[number] / 1000 for number in expected], atol=1e-6)

    def test_are_the_same_with_more_threads(self, numbered):
        one, two = (video.sample_frames(numbered, 9, size=SIZE, threads=threads) for threads in (1, 2))
        np.testing.assert_array_equal(one.images, two.images)

    def test_are_the_same_in_parallel_calls(self, clip):
        alone = video.sample_jpegs(clip, 8, size=SIZE, quality=90)
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            calls = [pool.submit(video.sample_jpegs, clip, 8, size=SIZE, quality=90) for _ in range(12)]
        assert all(call.result().jpegs == alone.jpegs for call in calls)

    def test_cost_only_the_groups_they_are_in(self, clip, monkeypatch):
        fed = []
        feed = media.feed
        monkeypatch.setattr(media, "feed", lambda context, packet: fed.append(packet) or feed(context, packet))
        got = video.sample_frames(clip, 2, size=SIZE)
        assert [number_of(image) for image in got.images] == [15, 45]
        assert sum(packet is not None for packet in fed) <= 24  # two groups of twelve, out of five

    @pytest.mark.parametrize("kind", ["h264 short", "h264 open groups", "hevc open groups", "mpeg4 avi, b-frames"])
    def test_are_found_at_the_first_attempt(self, kind, tmp_path, monkeypatch):
        name, codec, options, b_frames = KINDS[kind]
        path = write_video(tmp_path / name, codec, COUNT, options=options, b_frames=b_frames)
        line = media.scan(path)
        calls = []
        decode = video._decode
        monkeypatch.setattr(video, "_decode", lambda *a, **k: calls.append(k) or decode(*a, **k))
        for index in range(COUNT):
            monkeypatch.setattr(video, "choose_frames", lambda *a, index=index: np.array([index]))
            image = video.sample_frames(path, 1, size=SIZE).images[0]
            np.testing.assert_array_equal(image, all_pictures(path)[index])
        assert len(calls) == COUNT
        assert sum("ranges" in call for call in calls) >= COUNT - line.packet[line.key][1] - 5

    @pytest.mark.parametrize("kind", ["h264 open groups", "mpeg4 avi, b-frames"])
    def test_are_the_same_in_a_file_too_large_to_keep(self, kind, tmp_path, monkeypatch):
        name, codec, options, b_frames = KINDS[kind]
        path = write_video(tmp_path / name, codec, COUNT, options=options, b_frames=b_frames)
        kept = video.sample_frames(path, 9, size=SIZE)
        monkeypatch.setattr(media, "KEPT_BYTES", 0)
        assert media.scan(path).packets is None
        np.testing.assert_array_equal(video.sample_frames(path, 9, size=SIZE).images, kept.images)

    def test_are_held_one_at_a_time(self, clip, monkeypatch):
        class Held:
            def __init__(self, frame):
                self.frame = frame

            def __getattr__(self, name):
                return getattr(self.frame, name)

        decoded = media.decoded
        monkeypatch.setattr(media, "decoded", lambda *a: (Held(frame) for frame in decoded(*a)))
        made = weakref.WeakSet()
        most = []

        def convert(frame):
            made.add(frame)
            most.append(len(made))

        video._pick(clip, COUNT, None, convert, 1)
        assert len(most) == COUNT and max(most) <= 2  # the one at hand and the one before


class TestChooseFrames:
    @pytest.mark.parametrize("seed", range(20))
    def test_agrees_with_rational_arithmetic(self, seed):
        rng = np.random.default_rng(seed)
        total, count = int(rng.integers(1, 200)), int(rng.integers(1, 100))
        gaps = rng.integers(1, 50, total) if seed % 2 else np.full(total, 3)
        pts = np.cumsum(gaps) - gaps
        end = int(gaps.sum())
        expected = choose_slowly([Fraction(int(p)) for p in pts], Fraction(end), count)
        assert video.choose_frames(pts, end, count).tolist() == expected

    def test_takes_the_frame_that_starts_at_the_centre(self):
        assert video.choose_frames(np.arange(8) * 512, 8 * 512, 4).tolist() == [1, 3, 5, 7]
        assert video.choose_frames(np.arange(96) * 1001, 96 * 1001, 48).tolist() == list(range(1, 96, 2))
        assert video.choose_frames(np.arange(30), 30, 11)[5] == 15  # where 5.5 * (30 / 11) is below 15

    def test_never_repeats_a_frame(self):
        assert video.choose_frames(np.array([0, 1, 2, 3, 4, 900]), 1000, 5).tolist() == [4, 5]
        chosen = video.choose_frames(np.arange(10), 10, 9, np.random.default_rng(0))
        assert len(set(chosen.tolist())) == len(chosen) <= 9

    def test_draws_once_in_each_interval(self):
        pts = np.arange(1000)
        draws = np.stack([video.choose_frames(pts, 1000, 10, np.random.default_rng(s)) for s in range(200)])
        assert (draws // 100 == np.arange(10)).all()
        assert draws.min() < 10 and draws.max() > 990  # both ends of an interval are in reach

    def test_needs_a_number(self):
        with pytest.raises(ValueError, match="num_frames"):
            video.choose_frames(np.arange(3), 3, 0)


class TestProbe:
    def test_counts_what_is_presented(self, numbered):
        info = video.probe(numbered)
        assert info.num_frames == COUNT
        assert info.duration == pytest.approx(COUNT / FPS, abs=1e-6)
        assert info.fps == pytest.approx(FPS, abs=1e-3)
        assert (info.width, info.height, info.rotation) == (WIDTH, HEIGHT, 0)
        assert not info.truncated
        header = video.probe(numbered, scan=False)
        assert header.duration == pytest.approx(info.duration, abs=0.1)
        assert header.num_frames == pytest.approx(COUNT, abs=2)

    def test_reads_a_still(self, tmp_path):
        path = write_video(tmp_path / "still.png", "png", 1, pix_fmt="rgb24", container_format="image2")
        info = video.probe(path)
        assert info.num_frames == 1 and info.duration > 0
        got = video.sample_frames(path, 8, size=SIZE)
        np.testing.assert_array_equal(got.images[0], barcode(0))
        assert got.times.tolist() == [0.0]

    @pytest.mark.parametrize("turn", [90, 180, 270])
    def test_turns_the_picture_upright(self, tmp_path, turn):
        picture = np.zeros((64, 96, 3), np.uint8)
        for index, color in enumerate([(230, 20, 20), (20, 230, 20), (20, 20, 230), (230, 230, 230)]):
            row, column = divmod(index, 2)
            picture[32 * row : 32 * row + 32, 48 * column : 48 * column + 48] = color
        stored = np.ascontiguousarray(np.rot90(picture, turn // 90))  # counter-clockwise
        path = write_video(tmp_path / "t.mp4", pictures=[stored] * 3, rotation=-turn if turn < 270 else 90)
        info = video.probe(path)
        assert (info.rotation, info.width, info.height) == (turn, 96, 64)
        upright = video.sample_frames(path, 1, size=(64, 96)).images
        jpegs = video.sample_jpegs(path, 1, size=(64, 96), quality=95).jpegs
        assert b"Exif" not in jpegs[0]
        for images in (upright, video.decode_jpegs(jpegs, (64, 96))):
            assert np.abs(images[0, 8:-8:8, 8:-8:8].astype(int) - picture[8:-8:8, 8:-8:8]).mean() < 12


def cut(path, part):
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * part)])
    return path


class TestUnusableFiles:
    @pytest.mark.parametrize(
        ("reason", "error", "make"),
        [
            ("video_missing", media.VideoMissingError, lambda path: None),
            ("video_unreadable", media.VideoUnreadableError, lambda path: path.mkdir()),
            ("video_unreadable", media.VideoUnreadableError, lambda path: path.write_bytes(b"")),
            ("video_unreadable", media.VideoUnreadableError, lambda path: path.write_text("no film\n" * 50)),
            ("video_unreadable", media.VideoUnreadableError, lambda path: cut(write_video(path), 0.5)),
            ("video_no_stream", media.VideoNoStreamError, write_audio),
        ],
        ids=["missing", "folder", "empty", "text", "cut mp4", "sound only"],
    )
    def test_are_named_with_a_reason(self, tmp_path, reason, error, make):
        path = tmp_path / "影片 clip.mp4"
        make(path)
        for call in (
            lambda: video.probe(path),
            lambda: video.probe(path, scan=False),
            lambda: video.sample_frames(path, 4, size=SIZE),
            lambda: video.sample_jpegs(path, 4, size=SIZE, quality=90),
        ):
            with pytest.raises(error, match="影片 clip.mp4") as caught:
                call()
            assert caught.value.reason == reason
            assert caught.value.path == str(path)
            assert "expected" in str(caught.value)

    def test_nothing_decodes(self, tmp_path):
        path = tear(write_video(tmp_path / "noise.avi", "mpeg4", 5), *range(5))
        for call in (video.probe, lambda path: video.sample_frames(path, 4, size=SIZE)):
            with pytest.raises(video.VideoNoFramesError, match="noise.avi") as caught:
                call(path)
            assert caught.value.reason == "video_no_frames"

    def test_errors_survive_pickling(self, tmp_path):
        with pytest.raises(video.VideoError) as caught:
            video.probe(tmp_path / "none.mp4")
        copy = pickle.loads(pickle.dumps(caught.value))
        assert type(copy) is media.VideoMissingError
        assert (str(copy), copy.path) == (str(caught.value), caught.value.path)


class TestDamage:
    def test_a_cut_matroska_file_ends_where_it_ends(self, tmp_path):
        path = cut(write_video(tmp_path / "cut.mkv", count=200, options={"g": "12", "bf": "3"}), 0.5)
        info = video.probe(path)
        assert 40 < info.num_frames < 160
        assert info.duration == pytest.approx(info.num_frames / FPS, abs=0.2)
        assert info.declared_duration == pytest.approx(8.0, abs=0.1)
        assert info.truncated
        got = video.sample_frames(path, 8, size=SIZE)
        numbers = [number_of(image) for image in got.images]
        assert numbers == [round(time * FPS) for time in got.times.tolist()]
        assert len(numbers) == 8

    def test_a_cut_mp4_with_its_index_first(self, tmp_path):
        options = {"movflags": "faststart"}
        path = cut(write_video(tmp_path / "cut.mp4", count=200, container_options=options), 0.6)
        info = video.probe(path)
        assert 40 < info.num_frames < 200 and info.truncated
        got = video.sample_frames(path, 6, size=SIZE)
        assert len(got.images) >= 5
        sound = [(number_of(image), round(time * FPS)) for image, time in zip(got.images, got.times, strict=True)]
        assert all(number == place for number, place in sound[:-1])  # the very last packet may be torn

    def test_the_frame_before_stands_in(self, tmp_path):
        path = tear(write_video(tmp_path / "torn.mkv", "libx264", 20, options={"g": "1"}), 7, 8, 13)
        got = video.sample_frames(path, 20, size=SIZE)
        assert [number_of(image) for image in got.images] == [n for n in range(20) if n not in (7, 8, 13)]
        assert (got.damaged, got.substituted) == (3, 3)
        got = video.sample_frames(path, 10, size=SIZE)  # 1, 3, 5, ... of which 7 and 13 are torn
        assert got.damaged == 3
        assert [number_of(image) for image in got.images] == [1, 3, 5, 6, 9, 11, 12, 15, 17, 19]
        np.testing.assert_allclose(got.times * FPS, [1, 3, 5, 6, 9, 11, 12, 15, 17, 19], atol=1e-4)
        assert got.substituted == 2

    def test_torn_last_frames_are_left_out(self, tmp_path):
        path = tear(write_video(tmp_path / "torn.avi", "mjpeg", 6, pix_fmt="yuvj420p"), 4, 5)
        got = video.sample_frames(path, 6, size=SIZE)
        assert [number_of(image) for image in got.images] == [0, 1, 2, 3]
        assert (got.damaged, got.substituted) == (2, 2)

    def test_a_torn_first_frame_is_replaced_by_the_next(self, tmp_path):
        path = tear(write_video(tmp_path / "torn.avi", "mjpeg", 6, pix_fmt="yuvj420p"), 0)
        got = video.sample_frames(path, 6, size=SIZE)
        assert [number_of(image) for image in got.images] == [1, 2, 3, 4, 5]
        assert (got.damaged, got.substituted) == (1, 1)
        assert video.probe(path) == got.info and got.info.num_frames == 6
        path = tear(write_video(tmp_path / "more.avi", "mjpeg", 3, pix_fmt="yuvj420p"), 0, 1)
        got = video.sample_frames(path, 1, size=SIZE)  # the middle one of three
        assert [number_of(image) for image in got.images] == [2]


class TestOddFiles:
    def test_names_libav_might_take_for_something_else(self, clip, tmp_path, monkeypatch):
        data = clip.read_bytes()
        monkeypatch.chdir(tmp_path)
        for name in ("a:b.mp4", "100%d.mp4", "-i.mp4", "视频 一.mp4", os.fsdecode(b"latin\xe9.mp4")):
            path = tmp_path / name
            path.write_bytes(data)
            for spelled in (path, str(path), name):
                assert video.probe(spelled).num_frames == COUNT

    def test_a_title_in_another_encoding(self, tmp_path):
        path = write_video(tmp_path / "t.mkv", count=3, title="XXXX")
        path.write_bytes(path.read_bytes().replace(b"XXXX", b"\xe9\xff\xfeX"))
        assert video.probe(path).num_frames == 3

    def test_an_index_that_calls_every_frame_a_key_frame(self, tmp_path):
        path = write_video(tmp_path / "a.avi", "msmpeg4", COUNT, options={"g": "250"})
        data = bytearray(path.read_bytes())
        index = data.rindex(b"idx1") + 8
        for entry in range(COUNT):
            data[index + 16 * entry + 4] |= 16
        path.write_bytes(data)
        with av.open(str(path)) as container:
            assert all(packet.is_keyframe for packet in container.demux(video=0) if packet.size)
        check_uniform(path, 4)

    def test_vp8_packets_that_are_not_shown(self, tmp_path):
        source = write_video(tmp_path / "a.webm", "libvpx", 30, options={"deadline": "realtime"})
        path = tmp_path / "hidden.webm"
        with av.open(str(source)) as given, av.open(str(path), "w") as made:
            stream = made.add_stream_from_template(given.streams.video[0])
            for packet in given.demux(video=0):
                if not packet.size:
                    continue
                hidden = bytearray(bytes(packet))
                pts, base = packet.pts, packet.time_base
                packet.stream = stream
                made.mux(packet)
                if pts and pts % 200 == 0:
                    hidden[0] &= ~16
                    extra = av.Packet(bytes(hidden))
                    extra.pts = extra.dts = pts + 10
                    extra.time_base, extra.stream = base, stream
                    made.mux(extra)
        assert len(packets_of(path)) == 35
        assert video.probe(path).num_frames == 30
        got = video.sample_frames(path, 30, size=SIZE)
        np.testing.assert_allclose(got.times, np.arange(30) / FPS, atol=1e-6)
        assert len(got.images) == 30 and got.substituted == 0

    def test_cover_art_is_not_a_video(self, tmp_path):
        cover = write_video(tmp_path / "c.png", "png", 1, pix_fmt="rgb24", container_format="image2")
        body = b"\0image/png\0\3\0" + cover.read_bytes()  # an ID3 tag with a picture of type 3, front cover
        picture = b"APIC" + len(body).to_bytes(4, "big") + b"\0\0" + body
        seven_bits = bytes(len(picture) >> shift & 127 for shift in (21, 14, 7, 0))
        path = tmp_path / "song.aac"
        path.write_bytes(b"ID3\3\0\0" + seven_bits + picture + write_audio(tmp_path / "s.aac").read_bytes())
        with av.open(str(path)) as container:
            assert len(container.streams.video) == 1
        with pytest.raises(media.VideoNoStreamError, match=r"song\.aac"):
            video.probe(path)


def rgb_of(y, u, v, red_weight, blue_weight, full):
    """The colour of a YCbCr triple by the textbook: f64[3], 0..255."""
    luma, chroma = ((0, 255), 255) if full else ((16, 219), 224)
    y, u, v = (y - luma[0]) / luma[1], (u - 128) / chroma, (v - 128) / chroma
    red, blue = y + 2 * (1 - red_weight) * v, y + 2 * (1 - blue_weight) * u
    green = (y - red_weight * red - blue_weight * blue) / (1 - red_weight - blue_weight)
    return np.clip(np.array([red, green, blue]) * 255, 0, 255)


class TestColor:
    @pytest.mark.parametrize(
        ("colorspace", "full", "weights"),
        [
            ("bt709", False, (0.2126, 0.0722)),
            ("smpte170m", False, (0.299, 0.114)),
            ("unspecified", False, (0.299, 0.114)),
            ("bt709", True, (0.2126, 0.0722)),
        ],
    )
    def test_follows_the_tags(self, tmp_path, colorspace, full, weights):
        codes = {"bt709": 1, "unspecified": 2, "smpte170m": 6}
        path = tmp_path / "color.mkv"
        triples = [(90, 100, 170), (150, 160, 90), (120, 128, 128), (100, 150, 150)]
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=FPS, options={"qp": "0"})
            stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
            stream.codec_context.colorspace = codes[colorspace]
            stream.codec_context.color_range = 2 if full else 1
            for triple in triples:
                frame = av.VideoFrame(64, 64, "yuv420p")
                for plane, value in zip(frame.planes, triple, strict=True):
                    plane.update(bytes([value]) * plane.buffer_size)
                frame.colorspace, frame.color_range = codes[colorspace], 2 if full else 1
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        images = video.sample_frames(path, 4, size=(32, 48)).images
        jpegs = video.sample_jpegs(path, 4, size=(32, 48), quality=95).jpegs
        for image, coded, triple in zip(images, video.decode_jpegs(jpegs, (32, 48)), triples, strict=True):
            right = rgb_of(*triple, *weights, full)
            assert np.abs(image - right).max() < 5  # swscale rounds its tables and dithers
            assert np.abs(coded - right).max() < 8  # and a quantiser of 2 on the mean of a block


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A film of smooth and of busy parts in colour."""
    rows, columns = np.indices((240, 320))
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 40, (60, 80)).repeat(4, 0).repeat(4, 1)
    frames = []
    for number in range(12):
        red = 128 + 100 * np.sin((rows + 9 * number) / 30)
        green = 128 + 100 * np.cos((columns - 7 * number) / 40)
        blue = 60 + noise + 60 * (rows > columns)
        frames.append(np.stack([red, green, blue], -1).clip(0, 255).astype(np.uint8))
    path = tmp_path_factory.mktemp("pictures") / "p.mp4"
    return write_video(path, pictures=frames, options={"crf": "10"})


class TestJpeg:
    @pytest.mark.parametrize("quality", [100, 90, 75, 40])
    @pytest.mark.parametrize("size", [(224, 224), (97, 131)])
    def test_round_trip_is_near_the_frames(self, pictures, quality, size):
        frames = video.sample_frames(pictures, 5, size=size)
        coded = video.sample_jpegs(pictures, 5, size=size, quality=quality)
        np.testing.assert_array_equal(coded.times, frames.times)
        assert coded.info == frames.info
        error = video.decode_jpegs(coded.jpegs, size).astype(int) - frames.images
        # Colour at half size costs up to 3 levels on these edges. Every unit of the quantiser widens the steps
        # by 2 to 10 levels (MPEG's matrix over 8), few of whose coefficients are not zero.
        assert np.abs(error).mean() < 3 + 0.3 * (1 + (100 - quality) / 5)
        assert np.abs(error.mean((0, 1, 2))).max() < 1.5  # no cast: a wrong range or matrix gives over 5

    def test_quality_orders_size_and_error(self, pictures):
        frames = video.sample_frames(pictures, 4, size=(224, 224)).images.astype(int)
        bytes_, errors = [], []
        for quality in (20, 50, 75, 90, 100):
            coded = video.sample_jpegs(pictures, 4, size=(224, 224), quality=quality).jpegs
            bytes_.append(sum(map(len, coded)))
            errors.append(np.abs(video.decode_jpegs(coded, (224, 224)) - frames).mean())
        assert bytes_ == sorted(bytes_) and errors == sorted(errors, reverse=True)

    def test_any_reader_reads_them(self, pictures):
        image_module = pytest.importorskip("PIL.Image")
        coded = video.sample_jpegs(pictures, 4, size=(224, 224), quality=90).jpegs
        decoded = video.decode_jpegs(coded, (224, 224))
        for data, ours in zip(coded, decoded, strict=True):
            image = image_module.open(io.BytesIO(data))
            assert (image.format, image.size, image.mode) == ("JPEG", (224, 224), "RGB")
            assert image.info["jfif_density"] == (1, 1)
            assert not image.getexif()
            assert np.abs(np.asarray(image).astype(int) - ours).mean() < 3

    @pytest.mark.parametrize("options", [{"subsampling": 0}, {"progressive": True}, {"gray": True}])
    def test_reads_what_others_write(self, options):
        image_module = pytest.importorskip("PIL.Image")
        image = image_module.fromarray(barcode(77))
        if options.pop("gray", False):
            image = image.convert("L")
        file = io.BytesIO()
        image.save(file, "JPEG", quality=95, **options)
        theirs = np.asarray(image_module.open(file).convert("RGB")).astype(int)
        assert np.abs(video.decode_jpegs([file.getvalue()], SIZE)[0] - theirs).mean() < 3

    def test_decodes_into_a_given_array(self, pictures):
        coded = video.sample_jpegs(pictures, 3, size=(64, 80), quality=90).jpegs
        batch = np.zeros((2, 3, 64, 80, 3), np.uint8)
        assert video.decode_jpegs(coded, (64, 80), out=batch[1]) is not None
        np.testing.assert_array_equal(batch[1], video.decode_jpegs(coded, (64, 80)))
        assert not batch[0].any()
        assert video.decode_jpegs([], (64, 80)).shape == (0, 64, 80, 3)
        assert video.decode_jpegs(coded, (32, 40)).shape == (3, 32, 40, 3)
        with pytest.raises(ValueError, match="expected uint8"):
            video.decode_jpegs(coded, (64, 80), out=np.zeros((3, 64, 80, 3), np.float32))

    @pytest.mark.parametrize("bad", [b"", b"text", b"\xff\xd8\xff\xd9", "half"])
    def test_names_the_one_that_does_not_decode(self, pictures, bad):
        coded = video.sample_jpegs(pictures, 3, size=(64, 80), quality=90).jpegs
        coded[1] = coded[1][: len(coded[1]) // 2] if bad == "half" else bad
        with pytest.raises(video.JpegError, match="jpeg 1 of 3"):
            video.decode_jpegs(coded, (64, 80))

    @pytest.mark.parametrize("quality", [0, 101])
    def test_refuses_an_impossible_quality(self, pictures, quality):
        with pytest.raises(ValueError, match="quality"):
            video.sample_jpegs(pictures, 1, size=(32, 32), quality=quality)


def media_of(kind):
    if not REALDATA.is_dir():
        return [pytest.param(None, marks=pytest.mark.skip(reason=f"the folder of real media is absent: {REALDATA}"))]
    files = json.loads((REALDATA / "MANIFEST.json").read_text(encoding="utf-8"))["files"]
    return [pytest.param(f, id=pathlib.Path(f["file"]).name) for f in files if "media" in f and kind in f["file"]]


class TestRealClips:
    @pytest.mark.parametrize("entry", media_of("clips/"))
    def test_match_their_measurements_and_a_plain_decoder(self, entry):
        path, media = REALDATA / entry["file"], entry["media"]
        info = video.probe(path)
        assert info.num_frames == media["decoded_frames"] + media["undecodable_packets"]
        assert info.codec == media["codec"]
        assert info.rotation == -media["display_rotation"] % 360
        sides = (media["width"], media["height"])
        assert (info.width, info.height) == (sides if info.rotation in (0, 180) else sides[::-1])
        span = media["last_pts"] - media["first_pts"]
        assert span < info.duration < span + 1.5 / min(media["avg_fps"], info.fps)
        # Every presented frame has a packet, so the plain list of packet times holds the frames' times.
        with av.open(str(path)) as container:
            shown = sorted(p.pts for p in container.demux(video=0) if p.size and not p.is_discard)
        plain, tick = decode_plainly(path, (16, 16), min(300, 45_000_000 // (sides[0] * sides[1])))
        assert (shown[-1] - shown[0]) * tick == pytest.approx(span, abs=1e-6)
        times = [(pts - shown[0]) * tick for pts in shown]
        got = video.sample_frames(path, 9, size=(16, 16))
        expected = choose_slowly(times, Fraction(info.duration).limit_denominator(10**6), 9)
        if not media["undecodable_packets"]:
            np.testing.assert_allclose(got.times, [float(times[i]) for i in expected], atol=1e-5)
        known = np.array([float((pts - shown[0]) * tick) for pts, _ in plain])
        compared = 0
        for image, time in zip(got.images, got.times, strict=True):
            if time < known[-1] + 1e-3:
                nearest = int(np.abs(known - time).argmin())
                assert abs(known[nearest] - time) < 1e-4
                np.testing.assert_array_equal(image, plain[nearest][1])
                compared += 1
        assert compared >= 1
        assert got.info == info
        assert got.damaged == media["undecodable_packets"]

    def test_numbers_painted_on_hevc_frames(self, realdata):
        got = video.sample_frames(realdata / "clips/edge/frame_numbers_h265.mp4", 10, size=(128, 128))
        assert len({image.tobytes() for image in got.images}) == 10
        for count, numbers in ((5, [1, 3, 5, 7, 9]), (2, [2, 7]), (1, [5])):
            few = video.sample_frames(realdata / "clips/edge/frame_numbers_h265.mp4", count, size=(128, 128))
            np.testing.assert_array_equal(few.images, got.images[numbers])
            np.testing.assert_allclose(few.times, np.array(numbers) / 10, atol=1e-6)

    def test_a_frame_for_each_second_shown_in_av1(self, realdata):
        got = video.sample_frames(realdata / "clips/edge/seconds_av1.mkv", 5, size=(90, 160))
        np.testing.assert_allclose(got.times, [0.48, 1.48, 2.48, 3.48, 4.48], atol=0.021)
        again = video.sample_frames(
            realdata / "clips/edge/seconds_av1.mkv", 5, size=(90, 160), rng=np.random.default_rng(1)
        )
        assert again.times.astype(int).tolist() == [0, 1, 2, 3, 4]

    def test_a_packet_that_does_not_decode(self, realdata):
        path = realdata / "clips/edge/corrupted.mp4"
        got = video.sample_jpegs(path, 50, size=(36, 64), quality=90)
        assert (len(got.jpegs), got.damaged, got.substituted) == (49, 1, 1)
        assert 3.0 not in got.times.round(3).tolist()
        assert video.sample_jpegs(path, 2, size=(36, 64), quality=90).substituted == 0

    def test_edit_lists_hide_what_the_header_counts(self, realdata):
        info = video.probe(realdata / "clips/city_drone_fly.m4v")
        assert info.num_frames == 149  # of 287 in the header
        assert info.fps == pytest.approx(24000 / 1001, abs=0.001)

    def test_a_turned_clip_shows_the_scene_upright(self, realdata):
        """The same keyboard, filmed upright and sideways: part of one is found in the other only upright."""
        straight = video.sample_frames(realdata / "clips/edge/rotated_0.mov", 1, size=(80, 142)).images[0].mean(-1)
        turned = video.sample_frames(realdata / "clips/edge/rotated_90.mov", 1, size=(142, 80)).images[0].mean(-1)
        part = straight[:, 80:120]

        def best_match(picture):
            windows = np.lib.stride_tricks.sliding_window_view(picture, part.shape)
            centred = windows - windows.mean((2, 3), keepdims=True)
            mine = part - part.mean()
            if not windows.size:
                return 0.0
            return ((centred * mine).sum((2, 3)) / np.sqrt((centred**2).sum((2, 3)) * (mine**2).sum())).max()

        upright, *others = [best_match(np.rot90(turned, turns)) for turns in range(4)]
        assert upright > 1.5 * max(others)


class TestViews:
    def test_are_the_frames_at_each_size_from_one_pass(self, pictures, monkeypatch):
        opened = []
        open_video = media.open_video
        monkeypatch.setattr(media, "open_video", lambda path: opened.append(path) or open_video(path))
        sizes = [(48, 48), (30, 64)]
        views = video.sample_views(pictures, 5, sizes=sizes, thumbnail_height=40, quality=90)
        assert len(opened) == 2  # for its times, and to decode
        for size in sizes:
            frames = video.sample_frames(pictures, 5, size=size)
            np.testing.assert_array_equal(views.images[size], frames.images)
            np.testing.assert_array_equal(views.times, frames.times)
            assert views.info == frames.info
        height, width = 40, round(40 * frames.info.width / frames.info.height)
        jpegs = video.sample_jpegs(pictures, 5, size=(height, width), quality=90).jpegs
        assert views.thumbnails == jpegs and [*views.images] == sizes

    @pytest.mark.parametrize(("rotation", "most", "size"), [(0, 24, (24, 40)), (90, 40, (40, 24)), (0, 100, SIZE)])
    def test_thumbnails_keep_the_aspect_and_do_not_grow(self, tmp_path, rotation, most, size):
        path = write_video(tmp_path / "a.mov", count=4, rotation=rotation)
        views = video.sample_views(path, 2, sizes=[(16, 16)], thumbnail_height=most, quality=90)
        for jpeg in views.thumbnails:
            (frame,) = av.CodecContext.create("mjpeg", "r").decode(av.Packet(jpeg))
            assert (frame.height, frame.width) == size
