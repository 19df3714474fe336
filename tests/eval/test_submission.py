"""Files for servers: in their form, whole, and nothing where they would not be."""

import json

import numpy as np
import pytest
from world.golden import folder

from blip_jax.eval import submission

VISDIAL = folder("scores/visdial")


def write(path, value):
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return str(path)


def test_vqas_is_every_question_once_in_their_order(tmp_path):
    asked = {"data_subtype": "test2015", "questions": [{"question_id": n} for n in (9, 7, 8)]}
    official = write(tmp_path / "q.json", asked)
    beside = write(tmp_path / "a.json", {"annotations": []})
    rows = [{"question_id": n, "answer": "a, b"} for n in (7, 8, 9)]
    name, text = submission.vqa(rows, [beside, official], ["a, b", "c"])
    assert name == "v2_OpenEnded_mscoco_test2015_blip_results.json"
    assert json.loads(text) == [{"question_id": n, "answer": "a, b"} for n in (9, 7, 8)]
    blip = write(tmp_path / "b.json", [{"question_id": n, "image": "test2015/x.jpg"} for n in (7, 8, 9)])
    assert json.loads(submission.vqa(rows, [blip])[1]) == rows
    with pytest.raises(ValueError, match=r"1 of 3 questions have no prediction, such as \[7\]"):
        submission.vqa(rows[1:], [official])
    with pytest.raises(ValueError, match=r"1 questions occur more than once, such as \[7\]"):
        submission.vqa([*rows, rows[0]], [official])
    with pytest.raises(ValueError, match="1 predictions are of questions that .* lacks"):
        submission.vqa([*rows, {"question_id": 6, "answer": "c"}], [official])
    with pytest.raises(ValueError, match=r"3 answers are not of the list that was ranked, such as \['a, b'"):
        submission.vqa(rows, [official], ["c"])
    with pytest.raises(ValueError, match="it is no file of VQA's questions"):
        submission.vqa(rows, [write(tmp_path / "x.json", {"images": []})])


def test_captions_of_coco_and_of_nocaps(tmp_path):
    coco = write(tmp_path / "c.json", {"images": [{"id": 8}, {"id": 7}], "annotations": []})
    nocaps = write(tmp_path / "n.json", [{"image": "val/x.jpg", "img_id": 8}, {"image": "val/y.jpg", "img_id": 7}])
    for pictures in (coco, nocaps):
        name, text = submission.captions({np.int64(7): "a dog", np.int64(8): "a cat"}, pictures)
        assert json.loads(text) == [{"image_id": 8, "caption": "a cat"}, {"image_id": 7, "caption": "a dog"}]
        assert name == "captions_blip_results.json"
    with pytest.raises(ValueError, match=r"1 of 2 pictures have no prediction, such as \[8\]"):
        submission.captions({7: "a dog"}, coco)
    with pytest.raises(ValueError, match=r"1 captions are no text of one line, such as that of \[8\]"):
        submission.captions({7: "a dog", 8: None}, coco)
    with pytest.raises(ValueError, match="neither in COCO's layout"):
        submission.captions({7: "a dog"}, write(tmp_path / "x.json", {"questions": []}))


def test_nlvr2s_lines(tmp_path):
    line = '{"sentence": "s", "label": "True", "identifier": "dev-0-%d-0"}'
    examples = write(tmp_path / "dev.json", "\n".join(line % n for n in (1, 0)))
    labels = [("dev-0-0-0", np.bool_(False)), ("dev-0-1-0", True)]
    assert submission.nlvr2(labels, examples) == ("predictions.csv", "dev-0-1-0,True\ndev-0-0-0,False\n")
    with pytest.raises(ValueError, match="1 of 2 examples have no prediction"):
        submission.nlvr2(labels[:1], examples)
    with pytest.raises(ValueError, match="1 examples occur more than once"):
        submission.nlvr2([*labels, labels[0]], examples)


@pytest.mark.parametrize("path", sorted(VISDIAL.glob("submission_*.json")), ids=lambda path: path.stem)
def test_visdials_ranks_equal_the_golden_file(path, tmp_path):
    want = json.loads(path.read_text())
    with np.load(VISDIAL / "cases.npz") as found:
        ranks = found[f"{path.stem.removeprefix('submission_')}/ranks"]
    ids, options = list(dict.fromkeys(row["image_id"] for row in want)), list(range(ranks.shape[-1]))
    turn = {"question": 0, "answer": 0, "answer_options": options, "gt_index": 0}
    dialogs = [{"image_id": i, "caption": "", "dialog": [turn] * ranks.shape[1]} for i in ids]
    given = {(i, r): one for i, own in zip(ids, ranks) for r, one in enumerate(own, 1)}
    got = submission.visdial(given, write(tmp_path / "val.json", {"data": {"dialogs": dialogs}}))
    assert json.loads(got[1]) == want


def test_visdials_test_split_is_its_last_rounds(tmp_path):
    turns = [{"question": 0, "answer": 0}, {"question": 0, "answer_options": [0, 1, 2]}]
    dialogs = [{"image_id": 7, "dialog": turns}, {"image_id": 8, "dialog": turns[1:]}]
    path = write(tmp_path / "test.json", {"data": {"dialogs": dialogs}})
    given = {(np.int64(7), 2): np.array([3, 1, 2]), (8, 1): np.array([1, 2, 3])}
    assert json.loads(submission.visdial(given, path)[1]) == [
        {"image_id": 7, "round_id": 2, "ranks": [3, 1, 2]},
        {"image_id": 8, "round_id": 1, "ranks": [1, 2, 3]},
    ]
    with pytest.raises(ValueError, match=r"1 predictions are of rounds that .* such as \[\(7, 1\)\]"):
        submission.visdial({**given, (7, 1): [1, 2, 3]}, path)
    with pytest.raises(ValueError, match="the ranks of picture 8, round 1 are not 1 to 3, each once"):
        submission.visdial({**given, (8, 1): np.array([0, 1, 2])}, path)
