"""Videos with captions: MSR-VTT's test pairs as BLIP has them, and its official file, told apart by content.

`path` names one file: msrvtt_test.jsonl, a line {clip_name, caption} each, or *_videodatainfo.json with `videos` and
`sentences`. Videos lie below `images`, in it or in one of the folders of the published archives.
"""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Sequence

from blip_jax.data.folders import Folder, first_there, image_folder, locate
from blip_jax.data.pieces import parsed
from blip_jax.data.source import Source, as_captions, expand, in_keys

ENDINGS = (".mp4", ".avi", ".webm", ".mkv")
FOLDERS = ("", "videos/", "TestVideo/", "TrainValVideo/", "YouTubeClips/")  # below `images`


class Clips(Source):
    """Records {"key", "video", "image_id", "captions"}: the path of a video, its name, its captions.

    The key is "<source>:<file>#<number of the clip>:<name>".
    """

    def __init__(self, name: str, cfg):
        files = expand(name, cfg)
        self._folder = image_folder(name, cfg, files[0])
        self._clips: list[tuple[str, list]] = []
        self._keys: list[str] = []
        for path, file in zip(files, in_keys(files)):
            clips = _content(name, path)
            self._clips += list(clips.items())
            self._keys += [f"{name}:{file}#{i}:{clip}" for i, clip in enumerate(clips)]

    def __len__(self) -> int:
        return len(self._clips)

    def captions_of(self, i: int) -> list[str]:
        return as_captions(self._keys[i], self._clips[i][1])

    def __getitem__(self, i: int) -> dict:
        key, clip = self._keys[i], self._clips[i][0]
        captions = self.captions_of(i)
        return {"key": key, "video": video(key, self._folder, clip), "image_id": clip, "captions": captions}


def open(name: str, cfg) -> Clips:
    """Opens the files of a config.source. ValueError: they are not MSR-VTT's."""
    return Clips(name, cfg)


def video(key: str, folder: Folder, clip: str, endings: Sequence[str] = ENDINGS) -> str:
    """The path of a clip, which is named with its ending or without. BadRecord: it is not there."""
    names = [clip] if os.path.splitext(clip)[1] in ENDINGS else [clip + ending for ending in endings]
    return locate(key, folder, first_there(folder, [below + name for below in FOLDERS for name in names]))[0]


def rows(name: str, path: str):
    """What a file holds: JSON, or the list of JSON lines. ValueError: it is neither."""
    text = pathlib.Path(path).read_text(encoding="utf-8-sig").strip()
    try:
        try:
            return parsed(text)
        except ValueError:
            return [json.loads(line) for line in text.split("\n") if line.strip()]
    except (ValueError, RecursionError) as e:
        raise ValueError(f"data source {name!r}: {path} is neither JSON nor JSON lines ({e})") from e


def _content(name: str, path: str) -> dict[str, list]:
    """Clip -> its captions, in the order of the file."""
    content = rows(name, path)
    official = isinstance(content, dict) and "sentences" in content
    content = [content] if isinstance(content, dict) and not official else content
    found, field = (content.get("sentences"), "video_id") if official else (content, "clip_name")
    clips: dict[str, list] = {row["video_id"]: [] for row in content.get("videos", [])} if official else {}
    for row in found if isinstance(found, list) else [None]:
        if not isinstance(row, dict) or not isinstance(row.get(field), str) or "caption" not in row:
            raise ValueError(
                f"data source {name!r}: {path} holds neither lines {{clip_name, caption}} nor MSR-VTT's official "
                f"`videos` and `sentences`: {str(row)[:120]}"
            )
        clips.setdefault(row[field], []).append(row["caption"])
    return clips
