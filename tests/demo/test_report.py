"""The report: one file that needs nothing else.

Text is escaped, numbers are as given, charts survive odd data; also in a real browser.
"""

import copy
import html.parser
import itertools
import math
import re
import shutil
import subprocess

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from world.pictures import encode, noise

from blip_jax.demo import report
from blip_jax.demo.relations import DROPPED, RECALL, Relation
from blip_jax.demo.report import charts, markup, page, paper, style

HOSTILE = """<script>alert(1)</script> "'><img src=x onerror=alert(2)> & \udcff </style></title>"""
METRICS = [f"{side}_r{k}" for side in ("txt", "img") for k in (1, 5, 10)] + ["r_mean"]
PICTURES = [encode(noise(i, 16, 16), "PNG") for i in range(3)]


def metrics(first: float) -> dict:
    return {name: first + 0.1 * i for i, name in enumerate(METRICS)}


def decided(*values) -> dict:
    names = ("share_dropped", "false_dropped", "false_kept", "difference", "error", "verdict")
    return dict(zip(names, values, strict=True))


def results() -> dict:
    """A report with every part."""
    corpora = (
        (False, False, 31.0, 0.412),
        (False, True, 33.0, 0.083),
        (True, False, 34.0, 0.236),
        (True, True, 36.0, 0.071),
    )
    return {
        "title": "Miniature",
        "intro": "What was done.",
        "facts": [("revision", "abc123"), ("hardware", "2 cores")],
        "table1": [
            {"captioner": c, "filter": f, "images": 5000, "texts": 6789 + i, "noise": share, "metrics": metrics(r)}
            for i, (c, f, r, share) in enumerate(corpora)
        ],
        "table2": [
            {"method": m, "noise_removed": a, "true": b, "metrics": metrics(r)}
            for m, a, b, r in (
                ("none", None, None, 31.0),
                ("beam", 0.123, 0.914, 35.0),
                ("nucleus", 0.187, 0.842, 36.0),
            )
        ],
        "relations": [
            {"table": 1, **relation._asdict(), "verdict": relation.verdict}
            for relation in (
                Relation(RECALL, "both", "neither", 5.0, 1.25),
                Relation(RECALL, "captioner only", "filter only", 0.4, 0.55),
                Relation(RECALL, "both", "captioner only", -2.0, 1.5),
            )
        ]
        + [{"table": 2, **Relation(DROPPED, "nucleus", "beam", 6.4, 1.0)._asdict(), "verdict": "holds"}],
        "curves": {
            run: {"loss_itc": [(10 * i, 4 / (i + 1)) for i in range(90)], "loss_lm": [(10, 5.5), (20, 2.125)]}
            for run in ("pre-training", "both")
        },
        "noise": {
            "before": 0.412,
            "after": 0.071,
            "web_before": 0.401,
            "web_after": 0.062,
            "synthetic_before": 0.158,
            "rows": [("wrong", 1931, 0.937), ("file_name", 433, 1.0), ("partly", 90, 0.6), ("none", 80, 0.3)],
            "threshold": 0.5,
            "precision": 0.929,
            "recall": 0.953,
            "auc": 0.9731,
            "auc_wrong": 0.9957,
            "decided": {
                "web": decided(0.6, 0.9, 0.1, 0.8, 0.02, "holds"),
                "synthetic": decided(0.31, 0.059, 0.061, -0.002, 0.012, "undecided"),
            },
            "roc": [(0.0, 0.0), (0.1, 0.9), (1.0, 1.0)],
            "hist": {"edges": [0, 0.5, 1], "true": [7, 93], "false": [88, 12]},
        },
        "gallery": [
            {
                "image": PICTURES[0],
                "web": "a web text",
                "web_kept": False,
                "web_itm": 0.031,
                "web_true": False,
                "synthetic": "a written text",
                "synthetic_kept": True,
                "synthetic_itm": 0.972,
                "synthetic_true": True,
            },
            {
                "image": PICTURES[1],
                "web": "",
                "web_kept": False,
                "web_itm": 0.4,
                "web_true": True,
                "synthetic": "so wrong",
                "synthetic_kept": True,
                "synthetic_itm": 0.61,
                "synthetic_true": False,
            },
        ],
        "retrieval": [
            {
                "query": "a red ring",
                "images": [{"image": p, "right": i == 1, "score": 7.25 - i} for i, p in enumerate(PICTURES)],
            }
        ],
        "phases": [("pre-training", 141.4), ("CapFilt", 3700.0)],
    }


class Document(html.parser.HTMLParser):
    """Checks that elements are closed in the order they were opened, and keeps tags, ids and the text."""

    VOID = {"meta", "link", "img", "br"}

    def __init__(self, source: str):
        super().__init__()
        self.open, self.tags, self.attributes, self.said = [], [], [], []
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.said.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.said).split())


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "new" / "report.html"
    report.write(path, results())
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]
    return path


def coordinates(source: str) -> list[float]:
    """Every number in the shapes of a page's drawings."""
    shapes = re.findall(r' (?:d|x|y|width|height|viewBox|transform)="([^"]*)"', source)
    assert not any(word in shape for shape in shapes for word in ("nan", "inf"))
    return [float(n) for shape in shapes for n in re.findall(r"-?\d+\.?\d*(?:e[-+]?\d+)?", shape)]


# ---- the file


def test_the_file_needs_nothing_else(written):
    source = written.read_text(encoding="utf-8")
    document = Document(source)
    links = [
        value for name, value in document.attributes if name in ("src", "href", "srcset", "data", "action", "poster")
    ]
    assert len(links) > 6 and all(value.startswith(("data:", "#")) for value in links)
    assert "http:" not in source and "https:" not in source and "url(" not in source and "@import" not in source
    assert not {"script", "iframe", "object", "embed", "form"} & set(document.tags)
    assert document.tags.count("link") == 1 and ("lang", "en") in document.attributes


def test_ids_are_unique_and_every_reference_has_its_target(written):
    attributes = Document(written.read_text(encoding="utf-8")).attributes
    ids = [value for name, value in attributes if name == "id"]
    wanted = [v for name, value in attributes if name == "aria-labelledby" for v in value.split()]
    wanted += [value[1:] for name, value in attributes if name == "href" and value.startswith("#")]
    assert len(ids) == len(set(ids)) and len(wanted) >= 15 and set(wanted) <= set(ids)


def test_pictures_have_alternative_texts(written):
    document = Document(written.read_text(encoding="utf-8"))
    alts = [value for name, value in document.attributes if name == "alt"]
    assert len(alts) == document.tags.count("img") == 5 and all(alts)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    report.write(path, {"title": "old"})
    monkeypatch.setattr(
        "pathlib.Path.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises(OSError, match="No space"):
        report.write(path, {"title": "new"})
    assert "<title>old</title>" in path.read_text() and list(tmp_path.iterdir()) == [path]


# ---- text


def test_hostile_text_stays_text():
    given_ = results()
    given_["title"] = given_["intro"] = HOSTILE
    given_["facts"] = [(HOSTILE, HOSTILE)]
    given_["table2"][0]["method"] = HOSTILE
    given_["noise"]["rows"] = [(HOSTILE, 1, 0.5)]
    given_["curves"] = {HOSTILE: {HOSTILE: [(1, 1.0)]}}
    given_["gallery"][0]["web"] = given_["gallery"][0]["synthetic"] = HOSTILE
    given_["retrieval"][0]["query"] = HOSTILE
    given_["phases"] = [(HOSTILE, 1.0)]
    plain, hostile = Document(page.page(results())), Document(page.page(given_))
    assert not {"script", "x"} & set(hostile.tags)
    assert hostile.tags.count("img") == plain.tags.count("img") and hostile.tags.count("style") == 1
    assert not any(name.startswith("on") for name, _ in hostile.attributes)
    assert hostile.text.count("alert(1)") >= 13


def test_a_lone_surrogate_can_be_written(tmp_path):
    report.write(tmp_path / "report.html", {"title": "odd \udcff name"})
    assert "odd &#56575; name" in (tmp_path / "report.html").read_text(encoding="utf-8")


# ---- parts

PART_OF = {
    "corpora": "table1",
    "decoding": "table2",
    "noise": "noise",
    "gallery": "gallery",
    "retrieval": "retrieval",
    "curves": "curves",
    "time": "phases",
}


@pytest.mark.parametrize("name,part", PART_OF.items())
def test_a_section_is_there_exactly_when_its_data_is(name, part):
    whole = results()
    ids = lambda source: re.findall(r'<section id="(\w+)">', source)
    assert ids(page.page(whole)) == list(PART_OF)
    assert ids(page.page({part: whole[part]})) == [name]
    assert ids(page.page({part: type(whole[part])()})) == []
    del whole[part]
    assert ids(page.page(whole)) == [n for n in PART_OF if n != name]


def test_an_empty_report_is_a_page():
    document = Document(page.page({}))
    assert "h1" in document.tags and not {"section", "nav", "table", "svg"} & set(document.tags)


@pytest.mark.parametrize("key", sorted(page.NOISE))
def test_each_part_of_the_noise_may_be_missing(key):
    whole = results()
    alone, rest = {"noise": {key: whole["noise"][key]}} if key in whole["noise"] else None, copy.deepcopy(whole)
    rest["noise"].pop(key, None)
    for given_ in filter(None, (alone, rest)):
        Document(page.page(given_))


def test_what_cannot_be_shown_is_an_error_that_names_all_of_it():
    wrong = results()
    wrong["tables"] = []
    wrong["noise"]["befor"] = 0.1
    del wrong["table1"][2]["metrics"]
    wrong["gallery"][1]["truth"] = True
    with pytest.raises(ValueError) as error:
        page.page(wrong)
    for words in (
        "'tables' is no part",
        "unknown 'befor'",
        "table1[2] lacks 'metrics'",
        "gallery[1] has an unknown 'truth'",
    ):
        assert words in str(error.value)


def test_a_picture_must_be_png_or_jpeg():
    assert markup.picture(encode(noise(0)), "x").startswith('<img src="data:image/jpeg;base64,/9j/')
    with pytest.raises(ValueError, match="'x' starts with b'GIF89a'; expected the bytes of a PNG or JPEG"):
        markup.picture(b"GIF89a", "x")


# ---- numbers


def cells(source: str, section: str) -> list[list[str]]:
    """Texts of the rows of a section's first table, without markup."""
    table = source[source.index(f'<section id="{section}">') :]
    rows = re.findall(r"<tr>(.*?)</tr>", table[: table.index("</table>")])
    return [[re.sub("<[^>]*>", "", cell) for cell in re.findall(r"<t[hd].*?</t[hd]>", row)] for row in rows]


def test_the_tables_show_the_numbers_given_and_the_papers():
    source = page.page(results())
    head, *rows = cells(source, "corpora")
    assert head == ["CapFilt", "neither", "filter only", "captioner only", "both"]
    assert [row[0] for row in rows if len(row) == 1] == [
        "corpus",
        "both ways, %",
        "image to text, %",
        "text to image, %",
        "the paper",
    ]
    numbers = [(row[0], row[1], row[4]) for row in rows if len(row) > 1]
    assert numbers == [
        ("images", "5,000", "5,000"),
        ("texts", "6,789", "6,792"),
        ("false, %", "41.2", "7.1"),
        ("mean of all", "31.6", "36.6"),
        *((f"R@{k}", f"31.{i}", f"36.{i}") for i, k in enumerate((1, 5, 10))),
        *((f"R@{k}", f"31.{i}", f"36.{i}") for i, k in enumerate((1, 5, 10), 3)),
        ("COCO TR@1", "78.4", "80.6"),
        ("COCO IR@1", "60.7", "63.1"),
        ("COCO CIDEr", "127.8", "129.7"),
        ("Flickr TR@1", "93.9", "94.8"),
        ("Flickr IR@1", "82.1", "84.9"),
    ]
    rows = {row[0]: row[1:] for row in cells(source, "decoding")}
    assert rows["captions by"] == ["none", "beam", "nucleus"]
    assert rows["dropped"] == ["–", "12.3", "18.7"] and rows["true"] == ["–", "91.4", "84.2"]
    assert rows["dropped, %"] == ["–", "19", "25"]


def test_the_papers_numbers_follow_the_corpus_not_the_order_of_the_rows():
    turned = results()
    turned["table1"].reverse()
    rows = {row[0]: row[1:] for row in cells(page.page(turned), "corpora")}
    assert rows["COCO TR@1"] == ["80.6", "79.7", "79.1", "78.4"]
    assert all(len(values) == len(paper.COLUMNS) for values in paper.TABLE1.values())


def test_the_best_of_a_series_is_bold_least_noise_and_most_recall():
    column = lambda values, best: re.findall(
        r"<td.*?>(<strong>)?[^<]", markup.table("t", "c", "abc", [markup.Series("l", values, 1, best)])
    )
    assert column([1.0, 3.0, 2.0], max) == ["", "<strong>", ""]
    assert column([1.0, 3.0, 2.0], min) == ["<strong>", "", ""]
    assert column([3.01, 3.04, None], max) == ["<strong>", "<strong>", ""]  # read the same
    assert column([3.0, 3.0, 3.0], max) == ["", "", ""]  # nothing to point out
    assert column([math.nan, 3.0, 2.0], max) == ["", "<strong>", ""]
    assert column([math.nan, math.nan, 2.0], None) == ["", "", ""]
    row = markup.across("t", "c", "abc", [("g", [markup.Series("l", [1.0, 3.0, 2.0], 1, max)]), ("empty", [])])
    assert "<td>1.0</td><td><strong>3.0</strong></td><td>2.0</td>" in row and "empty" not in row


def test_each_relation_of_the_paper_is_named_with_its_error_and_what_came_of_it():
    text = Document(page.page(results())).text
    for words in (
        "Of 3: 1 as in the paper, 1 within the error, 1 the other way round.",
        "✓ both > neither : here +5.0 ± 1.2, as in the paper",
        "≈ captioner only > filter only : here +0.4 ± 0.6, within the error",
        "✕ both > captioner only : here -2.0 ± 1.5, the other way round",
        "Of 1: 1 as in the paper.",
        "✓ nucleus > beam (share of the synthetic texts that the filter dropped): here +6.4 ± 1.0",
        "Another seed, which is another training, moves the numbers more than that.",
    ):
        assert words in text, words
    # a tick for everything is said of nothing: no words on the order where there is none
    assert "paper’s order" not in text
    without = results()
    del without["relations"]
    assert "What the paper orders" not in page.page(without)


def test_what_the_filter_did_to_either_kind_of_text_is_said():
    text = Document(page.page(results())).text
    web = "Of the web texts the filter dropped 60.0 %. Of those that it dropped 90.0 % are false, of those that it "
    assert web + "kept 10.0 % (+80.0 ± 2.0 points), so it made them cleaner." in text.replace("\u202f", " ")
    assert "(-0.2 ± 1.2 points), a difference within its error, so it did not make them cleaner" in text


def test_noise_and_times_are_written_out():
    text = Document(page.page(results())).text
    for words in (
        "the whole corpus, before 41.2\u202f% the whole corpus, after 7.1\u202f%",
        "synthetic texts, before 15.8",
        "from a matching probability of 0.50: of the texts it kept, 92.9\u202f% are true",
        "AUC 0.973",
        "its ROC curve is 0.973 over all texts; it is 0.996 where that is easy",
        "0.973 area under the filter’s ROC curve, over all texts",
        "wrong the caption of another picture 1,931 93.7",
        "file name the name of a picture file 433 100.0",
        "partly wrong one word of a true caption is changed: a colour, a shape 90 60.0",
        "clean caption says what is in the picture: to drop one is a mistake 80 30.0",
        "pre-training 2 min 21 s",
        "CapFilt 1 h 1 min",
        "total 1 h 4 min",
        "31.6 → 36.6",
        "41.2\u202f% → 7.1\u202f%",
    ):
        assert " ".join(words.split()) in text, words
    assert "synthetic texts, after" not in text


@pytest.mark.parametrize(
    "seconds,text", [(0.04, "0.0 s"), (59.94, "59.9 s"), (59.96, "1 min 0 s"), (3599.6, "1 h 0 min")]
)
def test_durations(seconds, text):
    assert markup.duration(seconds) == text


def test_the_gallery_says_truth_decision_and_score_without_colour():
    source = page.page(results())
    texts = re.findall(r'<p><b class="who">T<sub>(.)</sub></b> (.*?)</p>', source)
    assert [(who, " ".join(Document(f"<p>{told}</p>").said)) for who, told in texts] == [
        ("w", "✕ false   dropped   a web text match 0.03"),
        ("s", "✓ true   kept  a written text match 0.97"),
        ("w", "✓ true   dropped   (empty) match 0.40 ·  mistaken"),
        ("s", "✕ false   kept  so wrong match 0.61 ·  mistaken"),
    ]
    # truth and decision stand side by side, in marks of one size, and only the truth has a colour
    first = texts[0][1]
    assert first.startswith('<span class="chip false">✕ false</span> <span class="chip"><del>dropped</del></span> ')
    colours = re.findall(r"\.chip\.(\w+)\{color", style.sheet())
    assert colours == ["true", "false"] and ".kept" not in style.sheet() and ".dropped" not in style.sheet()


def test_retrieval_marks_the_right_picture():
    found = re.findall(r'<li class="(\w+)">.*?<small>(.*?)</small>', page.page(results()))
    assert found == [("other", "score 7.25"), ("right", "✓ score 6.25"), ("other", "score 5.25")]


def test_the_legend_tells_the_last_values_and_what_is_not_drawn():
    given_ = results()
    given_["curves"]["both"]["loss_lm"].insert(1, (15, math.nan))
    source = page.page(given_)
    rows = cells(source, "curves")[1:]
    assert [row[0] for row in rows] == ["pre-training", "both"] and rows[0][1:] == ["0.044", "2.125"]
    assert "running means, of up to 4 logged values. Not finite and so not drawn: 1 of" in source
    coordinates(source)


# ---- charts


@pytest.mark.parametrize(
    "points",
    [
        [],
        [(5, 2.0)],
        [(1, 3.0), (2, 3.0), (3, 3.0)],
        [(1, 0.0), (2, 0.0)],
        [(7, 1.0), (7, 2.0)],
        [(1, math.nan), (2, math.inf)],
        [(1, 1.0), (2, math.nan), (3, -2.0)],
        [(0, 1e-30), (1, 2e-30)],
        [(10**9, -1e20), (10**9 + 1, 1e20)],
        [(1, 1.0), (2, 1.0 + 1e-15)],
    ],
)
def test_lines_have_finite_coordinates_within_the_panel(points):
    drawn = charts.lines("c", "title", [(0, "run", points)])
    coordinates(drawn)
    good = charts.finite(points)
    assert len(re.findall('class="line s0"', drawn)) == (1 if good else 0)
    path = re.findall(r'class="line s0" d="M([^"]*)"', drawn)
    places = [tuple(map(float, p.split())) for p in path[0].split("L")] if path else []
    assert len(places) == max(len(good), 2 * bool(good))
    assert all(
        charts.LEFT <= x <= charts.WIDTH - charts.RIGHT and charts.TOP <= y <= charts.HEIGHT - charts.BOTTOM
        for x, y in places
    )
    assert ("no values" in drawn) == (not good)


def test_a_line_goes_where_its_values_say():
    drawn = charts.lines("c", "title", [(2, "run", [(0, 0.0), (50, 5.0), (100, 10.0)])])
    foot, right = charts.HEIGHT - charts.BOTTOM, charts.WIDTH - charts.RIGHT
    assert f'class="line s2" d="M{charts.LEFT:.1f} {foot:.1f}L{(charts.LEFT + right) / 2:.1f} ' in drawn
    assert f"L{right:.1f} {charts.TOP:.1f}" in drawn
    assert "run: 0.000 at 0, 10.000 at 100" in drawn


@settings(max_examples=200, deadline=None)
@example([0.0, 5e-324])
@example([1.0, 1.0 + 2e-9])
@given(st.lists(st.floats(-1e30, 1e30), min_size=2, max_size=2))
def test_ticks_are_few_round_and_within(ends):
    low, high = charts.span(ends)
    assert low < high
    found = charts.ticks(low, high)
    slack = 1e-6 * (high - low)
    assert 2 <= len(found) <= 7 and all(low - slack <= t <= high + slack for t in found)
    assert all(b > a for a, b in itertools.pairwise(found))
    first, last = charts.rounded(low, high)
    assert first <= low + slack and last >= high - slack


def test_ticks_by_hand():
    assert charts.ticks(0, 1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    assert charts.ticks(10, 1490) == [500, 1000] and charts.rounded(0.3, 4.2) == (0, 5)
    assert charts.span([]) == (0, 1) and charts.span([3, 3]) == (2.7, 3.3) and charts.span([0]) == (-0.5, 0.5)


def test_running_mean_keeps_ends_and_lines():
    line = [(i, 2.0 * i) for i in range(9)]
    assert charts.running_mean(line, 1) == line
    assert charts.running_mean(line, 3)[1:-1] == line[1:-1] and charts.running_mean(line, 3)[0] == (0, 1.0)
    assert [y for _, y in charts.running_mean([(i, 5.0) for i in range(7)], 4)] == [5.0] * 7


@pytest.mark.parametrize(
    "true,false,edges",
    [
        ([0, 0], [0, 0], [0, 0.5, 1]),
        ([3, 0], [0, 10**9], [0.0, 0.5, 1.0]),
        ([1], [1], [0, 1]),
    ],
)
def test_histograms_have_finite_coordinates(true, false, edges):
    drawn = charts.histogram("h", "title", edges, true, false, 0.5)
    coordinates(drawn)
    assert drawn.count('rect class="true"') == sum(n > 0 for n in true)
    assert drawn.count('rect class="false"') == sum(n > 0 for n in false)


def test_a_histogram_whose_lengths_do_not_fit_is_an_error():
    with pytest.raises(ValueError, match="2 edges for 2 counts of true and 1 of false"):
        charts.histogram("h", "title", [0, 1], [1, 2], [1])


@pytest.mark.parametrize("points", [[(0.5, 0.7)], [(0, 0), (1, 1)], [(math.nan, 0.2), (0.3, 0.9)]])
def test_roc_curves_have_finite_coordinates(points):
    drawn = charts.roc("r", "title", points, 0.5)
    assert max(coordinates(drawn)) <= charts.WIDTH and "AUC 0.500" in drawn


# ---- colours


@pytest.mark.parametrize("scheme", ["_LIGHT", "_DARK"])
def test_text_stands_out_from_its_background(scheme):
    colours = dict(re.findall(r"--(\w+):#(\w{6})", getattr(style, scheme)))
    assert len(colours) == 16

    def luminance(colour: str) -> float:  # of WCAG 2
        parts = [int(colour[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(a: str, b: str) -> float:
        dark, light = sorted((luminance(colours[a]), luminance(colours[b])))
        return (light + 0.05) / (dark + 0.05)

    assert all(contrast(text, "paper") >= 4.5 for text in ("ink", "soft", "accent", "good", "bad"))
    assert all(contrast(f"s{i}", "paper") >= 3 for i in range(8))
    used = set(re.findall(r"var\(--(\w+)\)", page.page(results())))
    assert used == colours.keys()


# ---- a browser

# a window has a least width, a frame has not: the page is shown in a frame and tells its own size to the page around it
PROBE = """<script>addEventListener("load", () => parent.postMessage(
[innerWidth, document.documentElement.scrollWidth, Math.max(0, ...[...document.querySelectorAll(".scroll")].map(
box => box.scrollWidth - box.clientWidth))].join(" "), "*"))</script></body>"""
FRAME = """<!DOCTYPE html>
<script>addEventListener("message", event => document.documentElement.dataset.seen = event.data)</script>
<iframe src="page.html" style="border:0; width:{}px; height:900px"></iframe>"""
HEADLESS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-sync",
    "--disable-background-networking",
    "--disable-component-update",
    "--hide-scrollbars",
    "--enable-logging=stderr",
    "--dump-dom",
]


def opened(source: str, tmp_path, width: int) -> tuple[int, int, int, list[str]]:
    """A page in headless Chromium: width of the frame, width of the page in it, pixels of tables that only scrolling
    shows, lines of the console.
    """
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not chromium:
        pytest.skip("no Chromium on PATH: the page's width and console cannot be looked at")
    (tmp_path / "page.html").write_text(source.replace("</body>", PROBE), encoding="utf-8", errors="xmlcharrefreplace")
    (tmp_path / "frame.html").write_text(FRAME.format(width), encoding="utf-8")
    done = subprocess.run(
        [
            chromium,
            *HEADLESS,
            f"--user-data-dir={tmp_path / 'profile'}",
            "--window-size=1400,1000",
            (tmp_path / "frame.html").as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    inner, scroll, hidden = map(int, re.search(r'data-seen="(\d+) (\d+) (\d+)"', done.stdout).groups())
    return inner, scroll, hidden, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.parametrize("width", [390, 1280])
def test_in_a_browser_nothing_overflows_and_the_console_is_empty(tmp_path, width):
    wide = results()
    wide["gallery"][0]["web"] = wide["retrieval"][0]["query"] = "unbroken" * 40
    wide["facts"] = [("unbroken" * 20, "unbroken" * 20)]
    wide["curves"]["unbroken" * 20] = {"unbroken" * 20: [(1, 1.0)]}
    wide["phases"].append(("unbroken" * 20, 1.0))
    wide["noise"]["rows"].append(("unbroken" * 20, 1, 0.5))
    wide["title"] = "unbroken" * 12
    inner, scroll, _, console = opened(page.page(wide), tmp_path, width)
    assert (inner, scroll, console) == (width, width, [])


def test_a_phone_shows_every_column_of_every_table(tmp_path):
    real = results()
    real["curves"] = {
        f"{kind}: {name}": {loss: [(10, 5.5), (20, 2.125)] for loss in ("loss_itc", "loss_itm", "loss_lm")}
        for kind, name in (("pre-training", "both-beam"), ("fine-tuning", "captioner"))
    }
    assert opened(page.page(real), tmp_path, 390) == (390, 390, 0, [])


def test_the_browser_would_tell_overflow_and_errors(tmp_path):
    bad = '<html><body><div style="width:700px">x</div><script>nothing.here</script></body></html>'
    box = '<div class="scroll" style="overflow-x:auto;width:300px"><p style="width:340px">y</p></div>'
    bad = bad.replace("<body>", f"<body>{box}")
    inner, scroll, hidden, console = opened(bad, tmp_path, 390)
    assert (inner, scroll, hidden) == (390, 708, 40) and "nothing is not defined" in console[0]
