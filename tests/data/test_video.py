"""Frames of videos: those that the original's decoder gives, by number and by value; files that are no videos, or cost
too much; videos for evaluation, each once with its texts."""

import json
import math
import os
import pathlib
import re
import struct
import sys
import zlib
from fractions import Fraction

import av
import numpy as np
import pytest
from world.golden import folder

from blip_jax import config
from blip_jax.data import pairs, video
from blip_jax.data.evaluation import EvalVideos

HERE = pathlib.Path(__file__).parent.parent
GOLDEN = folder("scores/video_retrieval")
CLIPS = {path.name: path for data in ("msrvtt", "msvd_qa") for path in (HERE / "mini" / data / "videos").iterdir()}
FRAMES = 40  # of a clip that is made here; frame i has the grey value 20 + 5 * i


def written(path: pathlib.Path, codec="libx264", size=32, count=FRAMES, times=None, **options) -> pathlib.Path:
    """A grey clip, whose frames are told apart by their values; times: of each frame, in 1/1000 s, else 25 a second."""
    step = Fraction(1, 1000 if times else 25)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options=options)
        stream.width = stream.height = size
        stream.pix_fmt = "yuv420p"
        stream.time_base = stream.codec_context.time_base = step
        for i in range(count):
            frame = av.VideoFrame.from_ndarray(np.full((size, size, 3), 20 + 5 * i, np.uint8), "rgb24")
            frame.pts, frame.time_base = times[i] if times else i, step
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def numbers(path, n, size=16) -> list[int]:
    """The numbers of the frames that are given of a clip of `written`."""
    return [round((float(frame.mean()) - 20) / 5) for frame in video.frames(str(path), n, size)[0]]


# --- which frames, and their values -----------------------------------------------------------------------------------
def test_golden_frames_are_the_original_decoders_to_the_last_bit():
    found = np.load(GOLDEN / "decord_frames_mini.npz")
    names = {name.split("/")[0] for name in found.files}
    assert names == {*CLIPS}
    for name in names:
        theirs = found[f"{name}/frames"]
        ours, notes = video.frames(str(CLIPS[name]), len(theirs), theirs.shape[1])
        np.testing.assert_array_equal(ours, theirs, err_msg=name)
        assert video.places(int(found[f"{name}/count"]), len(theirs)) == found[f"{name}/indices"].tolist()
        short = int(found[f"{name}/count"]) < len(theirs)
        assert [note.split(":")[0] for note in notes] == ["short video"] * short, name


@pytest.mark.parametrize(
    "degrees, checksums",  # of three frames of each clip at 64 px as decord 0.6.0 gives them
    [
        (0, (0xD9670178, 0x133BA5B5, 0x1D4DB65F)),
        (45, (0xD9670178, 0x133BA5B5, 0x1D4DB65F)),
        (90, (0x1D2E3E9C, 0xEDA4D107, 0x257F5505)),
        (180, (0x83063773, 0x38E2D031, 0xA2E86666)),
        (270, (0xEE626BDF, 0x8DC594D8, 0x99AB5FC7)),
    ],
)
def test_pictures_are_turned_upright_as_by_the_original_decoder(degrees, checksums, tmp_path):
    cos, sin = (round(f(math.radians(degrees)) * (1 << 16)) for f in (math.cos, math.sin))
    matrix = struct.pack(">9i", cos, sin, 0, -sin, cos, 0, 0, 0, 1 << 30)
    for number, checksum in zip((7010, 7011, 7012), checksums, strict=True):
        data = bytearray(CLIPS[f"video{number}.mp4"].read_bytes())
        at = data.index(b"tkhd") + 8 + (32 if data[data.index(b"tkhd") + 4] else 20) + 16  # version 1 has longer times
        data[at : at + len(matrix)] = matrix
        (tmp_path / "turned.mp4").write_bytes(data)
        assert zlib.crc32(video.frames(str(tmp_path / "turned.mp4"), 3, 64)[0].tobytes()) == checksum


def test_golden_places_of_frames():
    wanted = json.loads((GOLDEN / "frame_indices.json").read_text())["blip"]
    assert wanted
    for case, places in wanted.items():
        assert video.places(*map(int, case.split(","))) == places, case


@pytest.mark.parametrize(
    "name, how",
    [
        ("b-frames.mp4", {"bf": "3", "g": "12"}),
        ("one-key-frame.mkv", {"bf": "2", "g": "1000"}),
        ("uneven.mp4", {"bf": "2", "times": [round(40 * i**1.5) for i in range(FRAMES)]}),
        ("old.avi", {"codec": "mpeg4", "bf": "2", "qmin": "1", "qmax": "1"}),
    ],
)
def test_frames_are_counted_in_the_order_of_display(name, how, tmp_path):
    clip = written(tmp_path / name, **how)
    assert numbers(clip, 8) == [0, 5, 10, 15, 20, 25, 30, 35]
    assert numbers(clip, 16) == [2 * i for i in range(16)]
    assert numbers(clip, 1) == [0]


def test_a_video_of_fewer_frames_than_wanted_is_its_first_frame_and_said(tmp_path):
    clip = written(tmp_path / "short.mp4", count=5)
    assert numbers(clip, 5) == [0, 1, 2, 3, 4] and numbers(clip, 6) == [0] * 6
    assert video.frames(str(clip), 6, 16)[1] == ["short video: 5 frames, of which the first stands for all 6"]
    assert video.frames(str(clip), 5, 16)[1] == []


# --- files that are none, or cost too much ----------------------------------------------------------------------------
def refusal(path, n=8, **how) -> str:
    with pytest.raises(video.BadVideo) as e:
        video.frames(str(path), n, 16, **how)
    return str(e.value)


def test_files_that_are_no_videos(tmp_path):
    whole = written(tmp_path / "whole.mp4")
    for name, content, expected in (
        ("empty.mp4", b"", "broken video: InvalidDataError"),
        ("noise.mp4", np.random.default_rng(0).bytes(5000), "broken video: InvalidDataError"),
        ("cut.mp4", whole.read_bytes()[:700], "broken video: InvalidDataError"),  # before the index at its end
        ("words.mp4", b"a dog\n" * 100, "broken video: InvalidDataError"),
        # lists that name other files, which nothing may open
        ("concat.mp4", f"ffconcat version 1.0\nfile {whole.name}\n".encode(), "not a video: none of"),
    ):
        (tmp_path / name).write_bytes(content)
        assert refusal(tmp_path / name).startswith(expected), name
    assert refusal(tmp_path / "none.mp4") == "broken video: FileNotFoundError: No such file or directory"
    assert refusal(tmp_path) == "not a video: not a regular file"
    os.mkfifo(tmp_path / "pipe.mp4")
    assert refusal(tmp_path / "pipe.mp4") == "not a video: not a regular file"  # and does not wait for a writer
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), "fltp", "mono")
        sound.sample_rate = 16000
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    assert refusal(tmp_path / "sound.mp4") == "not a video: no stream of pictures"


def test_a_video_that_ends_early_is_used_and_said_and_a_broken_one_is_not(tmp_path):
    clip = written(tmp_path / "whole.avi", "mpeg4", qmin="1", qmax="1")
    content = clip.read_bytes()
    pieces = [match.start() for match in re.finditer(b"00dc", content) if match.start() > content.index(b"movi")]
    at = pieces[FRAMES // 2]  # where frame 20 begins
    (tmp_path / "half.avi").write_bytes(content[:at])
    found, notes = video.frames(str(tmp_path / "half.avi"), 2, 16)
    assert notes == [f"fewer frames than the file says: {FRAMES // 2} of {FRAMES}"]
    assert [round((float(frame.mean()) - 20) / 5) for frame in found] == [0, FRAMES // 4]

    clip = written(tmp_path / "whole.mp4", size=64)
    content = bytearray(clip.read_bytes())
    at = content.index(b"mdat") + 4
    content[at : at + 4000] = bytes(len(content[at : at + 4000]))
    (tmp_path / "hole.mp4").write_bytes(content)
    assert refusal(tmp_path / "hole.mp4").startswith("broken video: ")


def test_what_a_file_may_cost_is_bounded_before_it_is_spent(tmp_path, monkeypatch):
    clip = written(tmp_path / "clip.mp4")
    assert refusal(clip, max_pixels=1000) == "large video: 32x32, 1024 pixels, at most 1000"
    assert video.frames(str(clip), 8, 16, max_pixels=1024)
    monkeypatch.setattr(video, "WORK", 36 * 1024 - 1)  # frame 35 is the last that is wanted
    assert refusal(clip).startswith("large video: the frames up to the last that is wanted have more than")
    assert numbers(clip, 2) == [0, 20]
    monkeypatch.setattr(video, "WORK", (FRAMES + 1) * 1024)
    assert numbers(clip, 8)[-1] == 35
    monkeypatch.setattr(video, "FRAMES", FRAMES - 1)
    monkeypatch.setattr(video, "_decoded", None)  # nothing is decoded
    assert refusal(clip) == f"long video: more than {FRAMES - 1} frames"


def test_without_pyav_the_remedy_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ValueError, match=r"videos are read with PyAV .*: pip install 'blip-jax\[video\]'"):
        video.frames("x.mp4", 8, 16)


# --- for evaluation ---------------------------------------------------------------------------------------------------
def of_rows(tmp_path, rows, **leaves) -> EvalVideos:
    """EvalVideos of four frames of MSR-VTT's lines (clip, caption) about files in `tmp_path`."""
    lines = [json.dumps({"clip_name": clip, "caption": caption}) for clip, caption in rows]
    (tmp_path / "test.jsonl").write_text("\n".join(lines))
    cfg = config.base("tiny")
    cfg.model.img_size = 16
    for leaf, value in leaves.items():
        cfg.eval[leaf] = value
    sources = {"clips": config.source("video_text", str(tmp_path / "test.jsonl"), images=str(tmp_path))}
    own = lambda record: pairs.captions(record, cfg.text.max_words)
    return EvalVideos(cfg, sources, own, 4, skipped_path=tmp_path / "skipped.jsonl")


def test_every_video_comes_once_with_its_texts_and_what_is_wrong_is_named(tmp_path):
    written(tmp_path / "a.mp4")
    written(tmp_path / "short.mp4", count=3)
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    rows = [("a", "A ring."), ("gone", "x"), ("broken", "a star"), ("short", "two"), ("a", "a red ring"), ("short", "")]
    data = of_rows(tmp_path, rows)
    assert (data.captions, data.text_image.tolist()) == (["a ring", "a red ring", "a star", "two"], [0, 0, 1, 2])
    assert len(data) == data.n_images == 3 and [record["image_id"] for record in data.records] == [
        "a",
        "a",
        "broken",
        "short",
    ]
    for _ in range(2):  # a second pass counts nothing twice
        first, second = data.image_batches(2)
        assert [batch["index"].tolist() for batch in (first, second)] == [[0, -1], [2, -1]]
    assert first["img"].shape == (2, 4, 16, 16, 3) and not first["img"][1].any()
    np.testing.assert_array_equal(first["img"][0], video.frames(str(tmp_path / "a.mp4"), 4, 16)[0])
    told = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert [(row["key"].split(":")[2], row["reason"].split(":")[0], row["used"]) for row in told] == [
        ("gone", "missing file", False),
        ("broken", "broken video", False),
        ("short", "short video", True),
    ]
    assert data.counts() == {
        "read": 4,  # lines of one clip are one record
        "skipped": {"missing file": 1, "broken video": 1},
        "noted": {"short video": 1},
    }


def test_the_first_videos_alone_and_none_at_all(tmp_path):
    written(tmp_path / "a.mp4", count=8)
    rows = [("a", "one"), ("a", "two"), ("b", "three"), ("a", "four")]
    assert of_rows(tmp_path, rows[:2] + [("gone", "x")]).captions == ["one", "two"]
    written(tmp_path / "b.mp4", count=8)
    assert of_rows(tmp_path, rows, limit=1).n_images == 1
    with pytest.raises(ValueError, match=r"no record of \['clips'\] can be used: {'missing file': 1}"):
        of_rows(tmp_path, [("gone", "x")])
