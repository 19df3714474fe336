"""Questions, sentences and dialogs of the built-in world against a reading of their words that counts objects one by
one, and the files that they are written to, read by what reads the official ones."""

import collections
import json
import re

import numpy as np
import pytest

from blip_jax.config import source
from blip_jax.data.formats import open_source
from blip_jax.data.scenes import crowd, dialogs, official, questions, sentences, words
from blip_jax.eval import vqa

SIZE, N = 32, 150
SHAPES = {"shape": None, **{shape: shape for shape in crowd.SHAPES}}
THING = rf"(?P<{{0}}>(?:(?:{'|'.join(crowd.COLOURS)}) )?(?:{'|'.join(SHAPES)}|crosses)s?)"


def number_of(scene: dict, words: str) -> int:
    """How many objects "red squares" names."""
    *colour, noun = words.split()
    shape = SHAPES["cross" if noun.startswith("cross") else noun if noun in SHAPES else noun.removesuffix("s")]
    return sum((not colour or o["colour"] == colour[0]) and shape in (None, o["shape"]) for o in scene["objects"])


def those(scene: dict, words: str) -> list[dict]:
    return [o for o in scene["objects"] if number_of({"objects": [o]}, words)]


def pattern(text: str) -> re.Pattern:
    return re.compile(text.replace("A THING", "a " + THING.format("a")).replace("THINGS", THING.format("a")))


def answer_to(question: str, scene: dict) -> str:
    """By the words of the question."""
    if m := pattern("how many THINGS are there").fullmatch(question):
        return str(number_of(scene, m["a"]))
    if m := pattern("is there A THING").fullmatch(question):
        return "yes" if number_of(scene, m["a"]) else "no"
    if question == "what colour is the background":
        return scene["background"]["tone"]
    m = pattern("what (?P<what>colour|shape) (?P<verb>is|are) the THINGS").fullmatch(question)
    found = {o[m["what"]] for o in those(scene, m["a"])}
    assert (m["verb"] == "is") == (number_of(scene, m["a"]) == 1) and len(found) == 1
    return found.pop()


def test_a_scene_is_inside_of_the_picture_and_a_function_of_seed_and_number():
    for i in range(20):
        scene = crowd.scene(3, i, SIZE)
        assert scene == crowd.scene(3, i, SIZE) != crowd.scene(4, i, SIZE)
        assert len({(o["row"], o["col"]) for o in scene["objects"]}) == len(scene["objects"]) <= crowd.MOST
        assert all(0 <= o[side] <= SIZE - o["diameter"] for o in scene["objects"] for side in ("left", "top"))
        assert all(words.is_true(scene, text) for text in crowd.captions(3, i, SIZE, 5))
    many = [len({(o["colour"], o["shape"]) for o in crowd.scene(3, i, SIZE)["objects"]}) for i in range(N)]
    assert sum(n < len(crowd.scene(3, i, SIZE)["objects"]) for i, n in enumerate(many)) > N // 10  # some are alike


def test_questions_are_answered_by_counting():
    seen = collections.Counter()
    for i in range(N):
        scene = crowd.scene(3, i, SIZE)
        asked = questions.questions(3, i, SIZE, 4)
        assert asked == questions.questions(3, i, SIZE, 4) and len({q.kind for q in asked}) == 4
        for q in asked:
            assert answer_to(q.text.removesuffix("?"), scene) == q.answer, (q, scene)
            assert q.answer in questions.ANSWERS[q.kind]
            seen[q.kind, q.answer] += 1
    assert {kind for kind, _ in seen} == set(questions.ASKED)
    # what is asked does not tell the answer: no answer of a kind is much more frequent than all others
    for kind in questions.ASKED:
        own = {answer: n for (k, answer), n in seen.items() if k == kind}
        assert max(own.values()) < 0.65 * sum(own.values()), (kind, own)


def test_the_answer_that_is_true_has_full_accuracy():
    rng, said = np.random.default_rng(0), collections.Counter()
    for i in range(N):
        for q in questions.questions(5, i, SIZE, 3):
            ten = questions.people(rng, q)
            assert len(ten) == questions.PEOPLE and len(set(ten)) <= 3 and vqa.accuracy(q.answer, ten) == 1
            said[ten.count(q.answer)] += 1
    assert len(said) > 3 and said[10] < 0.5 * said.total()  # they do not always agree


def truth_of(text: str, x: dict, y: dict) -> bool:
    """By the words of the sentence."""
    sides = {"left": x, "right": y}
    if m := pattern("both pictures show A THING").fullmatch(text):
        return number_of(x, m["a"]) > 0 and number_of(y, m["a"]) > 0
    if m := pattern("neither picture shows A THING").fullmatch(text):
        return number_of(x, m["a"]) == 0 and number_of(y, m["a"]) == 0
    if m := pattern("only one of the pictures shows A THING").fullmatch(text):
        return (number_of(x, m["a"]) > 0) != (number_of(y, m["a"]) > 0)
    if m := pattern("there is A THING in the (?P<side>left|right) picture").fullmatch(text):
        return number_of(sides[m["side"]], m["a"]) > 0
    a, b = THING.format("a"), THING.format("b")
    m = re.fullmatch(f"one picture shows a {a} and the other a {b}", text)
    one = lambda p, q: number_of(p, m["a"]) > 0 and number_of(q, m["b"]) > 0
    return one(x, y) or one(y, x)


def test_sentences_are_judged_by_counting_and_say_nothing_by_themselves():
    kinds = collections.Counter()
    for i in range(N):
        said, pairs = sentences.sentence(3, i, SIZE)
        kinds[said.kind] += 1
        assert [label for *_, label in pairs].count(True) * 2 == len(pairs) == sentences.PAIRS
        for x, y, label in pairs:
            assert truth_of(said.text, x, y) == label, (said.text, x, y)
    assert set(kinds) == set(sentences.KINDS)


def test_a_dialog_keeps_its_manner_and_has_a_hundred_options_of_which_what_is_relevant_is_true():
    manners, pronouns, places = set(), 0, []
    for i in range(60):
        scene, found = crowd.scene(3, i, SIZE), dialogs.dialog(3, i, SIZE)
        assert found == dialogs.dialog(3, i, SIZE) and words.is_true(scene, found.caption)
        assert len(words.read(found.caption).objects) == 1  # the rest is for the picture to tell
        assert len(found.rounds) == len({r.question.text for r in found.rounds}) == dialogs.ROUNDS
        own = set()
        for before, r in zip((None, *found.rounds), found.rounds):
            text = r.question.text.removesuffix("?")
            if text.endswith(" is it"):  # about the one thing that was just asked for
                pronouns += 1
                text = text.replace(" it", f" the {crowd.named(before.question.thing)}")
                assert before.question.answer in ("1", "yes")
            truth = answer_to(text, scene)
            assert r.question.answer == truth
            both = {m: dialogs.said(r.question, truth, m) for m in dialogs.MANNERS}
            own.add(next(m for m in both if both[m] == r.answer))
            assert len(set(r.options)) == len(r.options) == len(r.relevance) == dialogs.OPTIONS
            assert r.options[r.truth] == r.answer
            assert {o for o, x in zip(r.options, r.relevance) if x == 1} == set(both.values())
            assert {0.0, 1.0} == set(r.relevance)
            wrong = {dialogs.said(r.question, answer, r_m) for answer in questions.ANSWERS[r.question.kind]
                     if answer != truth for r_m in own}  # fmt: skip
            assert wrong < set(r.options)  # other answers to this very question
            places.append(r.truth)
        assert len(own) == 1
        manners |= own
    assert manners == set(dialogs.MANNERS) and pronouns > 10
    assert 30 < np.mean(places) < 70  # the place of the answer tells nothing


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for n, split in enumerate(("train", "test")):
        official.write(folder, split, official.Sizes(6, 5, 3, 2, 3), 7 + n, SIZE)
    return folder


def records(files, split: str, kind: str, name: str, images: str) -> list[dict]:
    at = official.paths(files, split)
    opened = open_source("s", source(kind, getattr(at, name), images=getattr(at, images)))
    return [opened[i] for i in range(len(opened))]


@pytest.mark.parametrize(("split", "seed"), [("train", 7), ("test", 8)])
def test_what_is_written_is_read_as_the_official_files_are(files, split, seed):
    drawn = [crowd.png(crowd.scene(seed, i, SIZE), SIZE) for i in range(6)]
    told = records(files, split, "json", "captions", "coco")
    assert [r["image"] for r in told] == drawn
    assert [r["captions"] for r in told] == [crowd.captions(seed, i, SIZE, 5) for i in range(6)]

    asked = records(files, split, "vqa", "vqa", "vqa_images")
    assert [r["image"] for r in asked] == [picture for picture in drawn for _ in range(3)]
    said = [q for i in range(6) for q in questions.questions(seed, i, SIZE, 3)]
    assert [(r["question"], r["question_type"]) for r in asked] == [(q.text, q.kind) for q in said]
    assert all(vqa.accuracy(q.answer, r["answers"]) == 1 and len(r["answers"]) == 10 for q, r in zip(said, asked))
    assert {r["answer_type"] for r in asked} <= {"number", "other", "yes/no"}

    compared = records(files, split, "nlvr", "nlvr2", "nlvr2_images")
    expected = [(s.text, *pair) for s, pairs in (sentences.sentence(seed, i, SIZE) for i in range(2)) for pair in pairs]
    assert [(r["sentence"], *r["images"], r["label"]) for r in compared] == [
        (text, crowd.png(x, SIZE), crowd.png(y, SIZE), label) for text, x, y, label in expected
    ]
    assert len({r["group"] for r in compared}) == 2  # consistency is of a sentence

    talked = records(files, split, "visdial", "visdial", "visdial_images")
    assert [r["image"] for r in talked] == drawn[:3]
    for i, record in enumerate(talked):
        found = dialogs.dialog(seed, i, SIZE)
        assert record["caption"] == found.caption
        assert record["rounds"] == [
            {
                "question": r.question.text.removesuffix("?"),
                "answer": r.answer,
                "options": r.options,
                "truth": r.truth,
                "relevance": r.relevance if split == "test" else None,
            }
            for r in found.rounds
        ]


def test_the_vocabulary_is_of_all_that_is_written(files):
    said = " ".join(official.texts(official.Sizes(60, 5, 4, 60, 0), 1, SIZE))
    known = set(re.findall(r"\w+", said))
    for path in files.rglob("*.json"):
        if path.parent.name == "nlvr2":
            texts = [json.loads(line)["sentence"] for line in path.read_text().splitlines()]
        elif "visdial" in path.name:
            content = json.loads(path.read_text())
            texts = content["data"]["answers"] + content["data"]["questions"] if isinstance(content, dict) else []
        else:
            content = json.loads(path.read_text())
            rows = content.get("questions", content.get("annotations"))
            texts = [row.get("question", row.get("caption", "")) for row in rows]
        assert set(re.findall(r"\w+", " ".join(texts))) <= known, path
