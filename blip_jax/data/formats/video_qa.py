"""Questions about videos, MSRVTT-QA and MSVD-QA: the official files and those of LAVIS, told apart by content.

`path` names one file or a glob. Official: {train,val,test}_qa.json, rows {id, video_id, question, answer}, MSRVTT's
with category_id; MSVD's need youtube_mapping.txt, in `path` or beside them. LAVIS's: qa_*.json, rows {video, question,
answer, question_id}, and maybe qa_ans2label.json. Videos lie below `images` as in video_text.
"""

from __future__ import annotations

import os
import pathlib
import sys
from typing import NamedTuple

from blip_jax.data.folders import image_folder
from blip_jax.data.formats.video_text import rows, video
from blip_jax.data.source import BadRecord, Source, expand, in_keys

MAPPING = "youtube_mapping.txt"


class Question(NamedTuple):
    """One row, texts that repeat stored once."""

    number: str
    clip: str
    question: str
    answer: str


class Questions(Source):
    """Records {"key", "video", "image_id", "question_id", "question", "answer"}: the path of a video, its name.

    answers: those of qa_ans2label.json in its order, or (): LAVIS counts another answer as wrong. The key is
    "<source>:<file>#<row>:<question_id>".
    """

    def __init__(self, name: str, cfg):
        files = expand(name, cfg)
        self._folder = image_folder(name, cfg, files[0])
        self.answers: tuple[str, ...] = ()
        self._rows: list[Question | None] = []
        self._keys: list[str] = []
        names = _mapping(files)
        for path, file in zip(files, in_keys(files)):
            if path.endswith(".txt"):
                continue
            content = rows(name, path)
            if isinstance(content, dict) and content and all(isinstance(n, int) for n in content.values()):
                self.answers = tuple(sorted(content, key=content.get))
                continue
            if not isinstance(content, list) or not any(isinstance(row, dict) and "answer" in row for row in content):
                raise ValueError(f"data source {name!r}: {path} holds no questions with answers about videos")
            found = [_question(row, names) for row in content]
            self._rows += found
            self._keys += [f"{name}:{file}#{i}" + (f":{row.number}" if row else "") for i, row in enumerate(found)]
        if unnamed := next((row for row in self._rows if row and not row.clip), None):
            raise ValueError(
                f"data source {name!r}: question {unnamed.number} is of a video of MSVD that {MAPPING} does not name: "
                f"lay {MAPPING} beside {files[0]!r}, or let path name it"
            )

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, i: int) -> dict:
        key, row = self._keys[i], self._rows[i]
        if row is None:
            raise BadRecord(key, "malformed row: a question, an answer and the number or file of a video are expected")
        return {
            "key": key,
            "video": video(key, self._folder, row.clip),
            "image_id": row.clip,
            "question_id": row.number,
            "question": row.question,
            "answer": row.answer,
        }


def open(name: str, cfg) -> Questions:
    """Opens the files of a config.source. ValueError: they are no questions, or the names of the videos are missing."""
    return Questions(name, cfg)


def _mapping(files: list[str]) -> dict[int, str]:
    """Number of an MSVD video -> its name, of the mapping among the files or beside the first; {}: there is none."""
    beside = os.path.join(os.path.dirname(files[0]), MAPPING)
    path = next((file for file in files if file.endswith(".txt")), beside)
    if not os.path.exists(path):
        return {}
    lines = [line.split() for line in pathlib.Path(path).read_text(encoding="utf-8-sig").splitlines()]
    pairs = [words for words in lines if len(words) == 2 and words[1].removeprefix("vid").isdecimal()]
    return {int(number.removeprefix("vid")): clip for clip, number in pairs}


def _question(row, names: dict[int, str]) -> Question | None:
    """None: it is no question. A clip "" has no name."""
    if not isinstance(row, dict) or not all(isinstance(row.get(field), str) for field in ("question", "answer")):
        return None
    clip, number = row.get("video"), row.get("video_id")
    if isinstance(number, int) and not isinstance(clip, str):
        clip = f"video{number}" if "category_id" in row else names.get(number, "")
    if not isinstance(clip, str):
        return None
    number = str(row.get("question_id", row.get("id", "")))
    return Question(number, sys.intern(clip), sys.intern(row["question"]), sys.intern(row["answer"]))
