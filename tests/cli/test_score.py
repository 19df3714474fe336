"""`blip-jax score` on the golden cases of every task, and on files that are not what they should be."""

import json
import subprocess
import sys

import numpy as np
import pytest
from world.golden import folder

from blip_jax.cli import main
from blip_jax.data.formats import video_text
from blip_jax.eval import recall

NAMES = ("vqa_accuracy", "nlvr_consistency", "visdial", "video_retrieval")
VQA, NLVR, VISDIAL, VIDEO = (folder(f"scores/{name}") for name in NAMES)
EXAMPLES = next(path for path in NLVR.glob("*.json") if path.name != "expected.json")


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def write(path, value):
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return path


def scores(capsys, task, results, references, *more):
    assert main.main(["score", task, f"--results={results}", f"--references={references}", "--json", *more]) == 0
    return json.loads(capsys.readouterr().out)


def fails(capsys, task, results, references, *more):
    assert main.main(["score", task, f"--results={results}", f"--references={references}", *more]) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("error: ") and err.count("\n") == 1
    return err


# ---- the official numbers


def test_vqa(capsys, tmp_path):
    want = read(VQA / "cases.json")
    official = next(VQA.glob("*_annotations.json"))
    got = scores(capsys, "vqa", VQA / "results.json", official, f"--out={tmp_path / 'all.json'}")
    assert got.pop("accuracy") == want["overall"]
    by_type = {f"answer_type/{k}": v for k, v in want["perAnswerType"].items()}
    assert got == by_type | {f"question_type/{k}": v for k, v in want["perQuestionType"].items()}
    each = {row["question_id"]: row["accuracy"] for row in read(tmp_path / "all.json")["each"]}
    assert each == {case["question_id"]: case["accuracy_percent"] for case in want["cases"]}
    listed = [{"question_id": c["question_id"], "answer": c["answers"]} for c in want["cases"]]  # as BLIP has them
    blip = write(tmp_path / "blip.json", listed)
    assert scores(capsys, "vqa", VQA / "results.json", blip) == {"accuracy": want["overall"]}
    assert scores(capsys, "vqa", VQA / "results.json", blip, "--as_lavis") != {"accuracy": want["overall"]}


def test_nlvr2(capsys, tmp_path):
    want = read(NLVR / "expected.json")
    whole = {"accuracy": 100 * want["accuracy"], "consistency": 100 * want["consistency"]}
    whole |= {"examples": want["examples"], "sentences": want["sentences"]}
    assert scores(capsys, "nlvr2", NLVR / "predictions.csv", EXAMPLES) == pytest.approx(whole)
    told = [line.split(",") for line in (NLVR / "predictions.csv").read_text().split()]
    rows = write(tmp_path / "rows.json", [{"identifier": name, "label": label == "True"} for name, label in told])
    assert scores(capsys, "nlvr2", rows, EXAMPLES)["examples"] == want["examples"]
    part = write(tmp_path / "balanced.json", "\n".join(EXAMPLES.read_text().split("\n")[:5]))
    got = scores(capsys, "nlvr2", NLVR / "predictions.csv", EXAMPLES, f"--subset={part}")
    assert got["balanced/examples"] == 5 and got["accuracy"] == pytest.approx(whole["accuracy"])


def visdial_files(folder, name):
    """The official files that would hold a golden case: dialogs, dense annotations, ranks."""
    with np.load(VISDIAL / "cases.npz") as found:
        case = {key.split("/")[1]: found[key] for key in found if key.startswith(f"{name}/")}
    ranks = next(iter(VISDIAL.glob(f"submission_{name}.json")), None)
    ids = list(dict.fromkeys(row["image_id"] for row in read(ranks))) if ranks else range(len(case["ranks"]))
    options = list(range(case["ranks"].shape[-1]))
    turns = [
        [{"question": 0, "answer": 0, "answer_options": options, "gt_index": int(n)} for n in own]
        for own in case["ans_ind"]
    ]
    dialogs = [{"image_id": i, "caption": "", "dialog": own} for i, own in zip(ids, turns)]
    dense = [
        {"image_id": i, "round_id": int(n), "gt_relevance": own.tolist()}
        for i, n, own in zip(ids, case["round_id"], case["gt_relevance"])
    ]
    rows = [
        {"image_id": i, "round_id": r, "ranks": one.tolist()}
        for i, own in zip(ids, case["ranks"])
        for r, one in enumerate(own, 1)
    ]
    whole = {"version": "1.0", "split": "val2018", "data": {"questions": ["?"], "answers": ["!"], "dialogs": dialogs}}
    return ranks or write(folder / "r.json", rows), write(folder / "d.json", whole), write(folder / "dense.json", dense)


@pytest.mark.parametrize("name", read(VISDIAL / "expected.json"))
def test_visdial(name, capsys, tmp_path):
    results, dialogs, dense = visdial_files(tmp_path, name)
    want = {
        key: pytest.approx(value, abs=1e-6, rel=1e-6) for key, value in read(VISDIAL / "expected.json")[name].items()
    }
    assert scores(capsys, "visdial", results, dialogs, f"--dense={dense}") == want
    del want["ndcg"]
    assert scores(capsys, "visdial", results, dialogs) == want


@pytest.mark.parametrize("name", read(VIDEO / "expected.json"))
def test_videos(name, capsys, tmp_path):
    with np.load(VIDEO / "cases.npz") as found:
        v2t, t2v = found[f"{name}/scores_v2t"], found[f"{name}/scores_t2v"]
    np.savez(tmp_path / "s.npz", scores_v2t=v2t, scores_t2v=t2v)
    lines = "\n".join(json.dumps({"clip_name": f"video{i}", "caption": "text"}) for i in range(len(v2t)))
    want = {key: pytest.approx(value) for key, value in read(VIDEO / "expected.json")[name].items()}
    assert scores(capsys, "retrieval", tmp_path / "s.npz", write(tmp_path / "v.jsonl", lines)) == want


def test_pictures_with_several_captions(capsys, tmp_path):
    lists = write(tmp_path / "l.json", [{"image": "a", "caption": ["1", "2"]}, {"image": "b", "caption": "3"}])
    np.save(tmp_path / "s.npy", np.array([[3.0, 1.0, 2.0], [0.0, 2.0, 1.0]]))
    got = scores(capsys, "retrieval", tmp_path / "s.npy", lists)
    assert got["txt_r1"] == 50 and got["img_r1"] == pytest.approx(100 / 3) and "vid_mdR" not in got


def test_ranks_are_of_the_pictures_that_have_texts(capsys, tmp_path):
    lists = [{"image": name, "caption": own} for name, own in (("a", ["1"]), ("none", []), ("b", ["2", "3"]))]
    np.save(tmp_path / "s.npy", np.array([[3.0, 1.0, 2.0], [0.0, 0.0, 0.0], [4.0, 2.0, 1.0]]))
    scores(capsys, "retrieval", tmp_path / "s.npy", write(tmp_path / "l.json", lists), f"--out={tmp_path}/each.json")
    each = read(tmp_path / "each.json")["each"]
    assert [(row["image"], row["rank"]) for row in each if "image" in row] == [(0, 1), (2, 2)]


def test_json_lines_end_where_lines_of_json_do(capsys, tmp_path):
    """U+2028 and others, which Python takes for the end of a line, may stand in a text of JSON."""
    rows = [{"clip_name": f"v{i}", "caption": f"a\u2028b\x85c {i}"} for i in range(2)]
    lines = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    np.save(tmp_path / "s.npy", np.eye(2))
    assert scores(capsys, "retrieval", tmp_path / "s.npy", write(tmp_path / "l.jsonl", lines))["vid_r1"] == 100
    assert list(video_text.rows("name", str(tmp_path / "l.jsonl"))) == rows


def shortlists(scores, owner):
    """What scores.npz holds of scores [images, texts] that have some pairs unscored, both ways the same."""
    (texts, i2t), (images, t2i) = recall.compact(scores), recall.compact(scores.T)
    return {"i2t": i2t, "i2t_text": texts, "t2i": t2i, "t2i_image": images, "text_image": np.array(owner)}


def test_shortlists_score_as_their_whole_matrix(capsys, tmp_path):
    lists = write(tmp_path / "l.json", [{"image": "a", "caption": ["1", "2"]}, {"image": "b", "caption": "3"}])
    scores_of = np.array([[3.0, recall.UNSCORED, -2e3], [recall.UNSCORED, 2.0, 1.0]], np.float32)
    own = shortlists(scores_of, [0, 0, 1])
    assert own["i2t"].shape == (2, 2) and own["t2i"].shape == (3, 2)  # a row of fewer is filled
    np.savez(tmp_path / "scores.npz", **own)
    np.save(tmp_path / "s.npy", scores_of)
    short, whole = (scores(capsys, "retrieval", tmp_path / name, lists) for name in ("scores.npz", "s.npy"))
    assert short == whole and short["img_r1"] == pytest.approx(200 / 3)
    for change, said in (
        ({"text_image": np.array([0, 1, 1])}, "it is of 2 pictures and 3 texts, in their order, and the references"),
        ({"text_image": np.array([0, 0])}, "it is of 2 pictures and 2 texts"),
        ({"i2t": own["i2t"][:1], "i2t_text": own["i2t_text"][:1]}, "i2t is float32[1, 3], but the references have 2"),
        ({"i2t_text": own["i2t_text"] + 3}, "no scores of retrieval"),
    ):
        np.savez(tmp_path / "scores.npz", **own | change)
        assert said in fails(capsys, "retrieval", tmp_path / "scores.npz", lists)


def test_msrvtts_official_file_has_the_texts_of_each_video_together(capsys, tmp_path):
    sentences = [{"video_id": name, "caption": name} for name in ("b", "a", "b")]
    videos = [{"video_id": name} for name in ("a", "none", "b")]
    np.save(tmp_path / "s.npy", np.array([[3.0, 1.0, 2.0], [0.0, 2.0, 1.0]]))
    official = write(tmp_path / "o.json", {"videos": videos, "sentences": sentences})
    got = scores(capsys, "retrieval", tmp_path / "s.npy", official)
    assert got["vid_r1"] == pytest.approx(200 / 3) and got["txt_r1"] == 100
    del sentences[0]["caption"]
    broken = write(tmp_path / "o.json", {"videos": videos, "sentences": sentences})
    assert "have a `video_id`, these a `caption`" in fails(capsys, "retrieval", tmp_path / "s.npy", broken)


def test_questions_about_videos(capsys, tmp_path):
    rows = lambda *own: write(tmp_path / "r.json", [dict(zip(("question_id", "answer", "rank_vqa"), r)) for r in own])
    right = [{"id": 7, "video_id": 1, "question": "?", "answer": "dog"}, {"id": 8, "question": "?", "answer": "Two"}]
    official = write(tmp_path / "test_qa.json", right)
    ours = rows(("7", "cat", "Dog "), (8, "two", "two"))
    found = scores(capsys, "video_qa", ours, official, f"--out={tmp_path / 'all.json'}")
    assert found == {"accuracy": 50, "rank_vqa": 100, "questions": 2}
    each = read(tmp_path / "all.json")["each"]
    assert each == [
        {"question_id": "7", "accuracy": False, "rank_vqa": True},
        {"question_id": "8", "accuracy": True, "rank_vqa": True},
    ]
    lavis = [
        {"video": "video1.mp4", "question": "?", "question_id": row["id"], "answer": row["answer"]} for row in right
    ]
    other = rows((7, "dog"), (8, "a two"))
    assert scores(capsys, "video_qa", other, write(tmp_path / "l.json", lavis)) == {"accuracy": 50, "questions": 2}
    assert "1 of 2 questions have no prediction, such as ['8']" in fails(capsys, "video_qa", rows((7, "a")), official)
    said = fails(capsys, "video_qa", rows((7, "a"), (8, "a"), (9, "a")), official)
    assert "1 predictions are of questions that" in said
    assert "1 questions occur more than once" in fails(capsys, "video_qa", rows((7, "a"), ("7", "a")), official)
    uneven = rows((7, "a", "b"), (8, "a"))
    assert "row 1 has not texts of ['answer', 'rank_vqa']" in fails(capsys, "video_qa", uneven, official)
    assert "no row of questions about videos" in fails(
        capsys, "video_qa", rows((7, "a")), write(tmp_path / "x.json", ["a"])
    )


# ---- what is wrong with a file is one line


def test_predictions_that_are_missing_too_many_or_twice(capsys, tmp_path):
    people = write(tmp_path / "p.json", [{"question_id": i, "answer": ["a"] * 10} for i in (7, 8)])
    rows = lambda *ids: write(tmp_path / "r.json", [{"question_id": i, "answer": "1,000 dogs, or so"} for i in ids])
    assert scores(capsys, "vqa", rows(7, 8), people) == {"accuracy": 0}  # an answer may have commas
    assert "1 of 2 questions have no prediction, such as [8]" in fails(capsys, "vqa", rows(7), people)
    assert "1 predictions are of questions that" in fails(capsys, "vqa", rows(7, 8, 9), people)
    assert "1 questions occur more than once, such as [7]" in fails(capsys, "vqa", rows(7, 8, 7), people)
    assert "the list is empty" in fails(capsys, "vqa", rows(), people)
    assert 'row 0 is no {"question_id": 7' in fails(capsys, "vqa", rows("x"), people)


def test_files_of_another_kind(capsys, tmp_path):
    results = write(tmp_path / "r.json", [{"question_id": 7, "answer": "a"}])
    asked = write(tmp_path / "q.json", {"questions": [{"question_id": 7}]})
    assert "it holds questions alone: give VQA's annotations" in fails(capsys, "vqa", results, asked)
    assert "neither JSON nor JSON lines" in fails(capsys, "vqa", write(tmp_path / "x", "yes"), asked)
    assert "No such file" in fails(capsys, "vqa", tmp_path / "nowhere.json", asked)
    (tmp_path / "r.zip").write_bytes(b"PK\3\4")
    assert "it is compressed: unpack it first" in fails(capsys, "vqa", tmp_path / "r.zip", asked)
    captions = write(tmp_path / "c.json", [{"image_id": 7, "caption": "a"}])
    assert "it is neither in COCO's layout" in fails(capsys, "caption", captions, asked)
    blip = write(tmp_path / "b.json", [{"image": "val/x7.jpg", "img_id": 7}])
    assert "row 0 is no" in fails(capsys, "nocaps", captions, blip)
    people = {"images": [{"id": 7}], "annotations": [{"image_id": 7, "caption": "a"}]}
    said = fails(capsys, "nocaps", captions, write(tmp_path / "p.json", people))
    assert "1 of 1 pictures have no `domain`, such as [7]" in said
    assert main.main(["score", "vqua"]) == 2 and "did you mean vqa?" in capsys.readouterr().err
    assert main.main(["score", "vqa"]) == 2 and "score vqa needs --results and --refer" in capsys.readouterr().err


def test_nlvr2s_lines(capsys, tmp_path):
    line = '{"sentence": "s", "label": "%s", "identifier": "dev-0-%d-0"}'
    people = write(tmp_path / "dev.json", line % ("True", 0))
    assert scores(capsys, "nlvr2", write(tmp_path / "p.csv", "dev-0-0-0,TRUE\n\n"), people)["consistency"] == 100
    assert 'line 1 is no "dev-0-0-0,True"' in fails(capsys, "nlvr2", write(tmp_path / "p.csv", "dev-0-0-0,1"), people)
    twice = write(tmp_path / "p.csv", "dev-0-0-0,True\ndev-0-0-0,False")
    assert "1 examples occur more than once" in fails(capsys, "nlvr2", twice, people)
    right = write(tmp_path / "p.csv", "dev-0-0-0,True")
    blip = write(tmp_path / "b.json", [{"images": ["dev/dev-0-0-img0.png"], "sentence": "s", "label": "True"}])
    assert "BLIP's lists have no identifiers" in fails(capsys, "nlvr2", right, blip)
    part = write(tmp_path / "balanced.json", "\n".join(line % ("True", n) for n in (0, 1)))
    assert "1 of 2 examples are not in" in fails(capsys, "nlvr2", right, people, f"--subset={part}")
    hidden = write(tmp_path / "test.json", line % ("-", 0))
    assert "1 of 1 examples have no label" in fails(capsys, "nlvr2", right, hidden)


def test_visdials_rounds(capsys, tmp_path):
    turn = {"question": 0, "answer": 0, "answer_options": [0, 1, 2], "gt_index": 1}
    dialogs = [{"image_id": 7, "caption": "", "dialog": [{"question": 0, "answer": 0}, turn]}]
    people = write(tmp_path / "d.json", {"data": {"dialogs": dialogs}})
    rows = lambda *own: write(tmp_path / "r.json", [dict(zip(("image_id", "round_id", "ranks"), one)) for one in own])
    assert (
        scores(capsys, "visdial", rows((7, 2, [2, 1, 3])), people)["r@1"] == 1
    )  # round 1, without options, is history
    assert "1 predictions are of rounds" in fails(capsys, "visdial", rows((7, 1, [1]), (7, 2, [2, 1, 3])), people)
    assert "are not 1 to 3, each once" in fails(capsys, "visdial", rows((7, 2, [1, 1, 3])), people)
    assert "2 ranks for the 3 options" in fails(capsys, "visdial", rows((7, 2, [2, 1])), people)
    dense = write(tmp_path / "dense.json", [{"image_id": 7, "round_id": 1, "gt_relevance": [0, 1, 0]}])
    assert "1 of 1 rounds (picture, round) are not" in fails(
        capsys, "visdial", rows((7, 2, [2, 1, 3])), people, f"--dense={dense}"
    )
    none = write(tmp_path / "none.json", {"data": {"dialogs": [{"image_id": 7, "dialog": [{"question": 0}]}]}})
    assert "no round has answer_options and gt_index" in fails(capsys, "visdial", rows((7, 2, [1])), none)


@pytest.mark.parametrize(
    "scores_of, said",
    [
        (np.zeros((3, 2)), "the matrix is float64[3, 2], but the references have 2 pictures and 3 texts"),
        (np.full((2, 3), np.nan), "has NaN at [0, 0]"),
        ({"i2t": np.zeros((2, 3))}, "it has ['i2t'], not `i2t` and `t2i`"),
        ({"i2t": np.zeros((2, 3)), "t2i": np.zeros((2, 3))}, "t2i is float64[2, 3], but"),
        (np.array([["a"] * 3] * 2), "numbers [2, 3] are expected"),
        ("not an array", "no scores of retrieval"),
    ],
)
def test_scores_of_retrieval_of_a_wrong_form(scores_of, said, capsys, tmp_path):
    lists = write(tmp_path / "l.json", [{"image": "a", "caption": ["1", "2"]}, {"image": "b", "caption": "3"}])
    path = tmp_path / "s.npz"
    with path.open("wb") as file:
        if isinstance(scores_of, dict):
            np.savez(file, **scores_of)
        elif isinstance(scores_of, str):
            file.write(scores_of.encode())
        else:
            np.save(file, scores_of)
    assert said in fails(capsys, "retrieval", path, lists)


def test_jax_is_not_imported():
    program = (
        "import sys; from blip_jax.cli import main, score\n"
        "try:\n    main.main(['score', 'vqa', '--results=none.json', '--references=none.json'])\n"
        "finally:\n    print([name for name in ('jax', 'flax', 'grain', 'PIL') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "[]\n" and "No such file" in done.stderr
