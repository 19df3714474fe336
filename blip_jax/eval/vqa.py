"""VQA v2's official accuracy (Antol et al., arXiv 1505.00468; rules of the evaluation code of visualqa.org): strings
in, numbers out.

An answer counts as correct as far as three of the ten people gave it, averaged over all choices of nine of them: 0, 30,
60, 90, 100 % for 0, 1, 2, 3 and more people. Texts are brought into a common form first, unless all ten people agree.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

# What people write without its apostrophe, by how it is written right; below those that lack another one, wrong=right.
_WHOLE = (
    "ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's "
    "I'm I've isn't it'd it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't "
    "should've shouldn't somebody'll somebody's someone'd someone'll someone's something'd something'll that's "
    "there'd there're there's they'd they'll they're they've 'twas wasn't we've weren't what'll what're what's "
    "what've when's where'd where's where've who'd who'll who's who've why'll why're why's won't would've wouldn't "
    "y'all you'd you'll you're you've"
).split()
_PART = (
    "couldn'tve=couldn't've couldnt've=couldn't've hadnt've=hadn't've hadn'tve=hadn't've hed've=he'd've he'dve=he'd've "
    "Id've=I'd've I'dve=I'd've itd've=it'd've it'dve=it'd've let's=let's mightnt've=mightn't've mightn'tve=mightn't've "
    "ow's'at='ow's'at 'ows'at='ow's'at 'ow'sat='ow's'at shed've=she'd've she'dve=she'd've she's=she's "
    "shouldnt've=shouldn't've shouldn'tve=shouldn't've somebody'd=somebodyd somebodyd've=somebody'd've "
    "somebody'dve=somebody'd've someoned've=someone'd've someone'dve=someone'd've somethingd've=something'd've "
    "something'dve=something'd've thered've=there'd've there'dve=there'd've theyd've=they'd've they'dve=they'd've "
    "wed've=we'd've we'dve=we'd've whod've=who'd've who'dve=who'd've wouldnt've=wouldn't've wouldn'tve=wouldn't've "
    "yall'll=y'all'll y'allll=y'all'll yall'd've=y'all'd've y'alld've=y'all'd've y'all'dve=y'all'd've youd've=you'd've "
    "you'dve=you'd've "
).split()
CONTRACTIONS = {right.replace("'", ""): right for right in _WHOLE} | dict(pair.split("=") for pair in _PART)
NUMBERS = {word: str(n) for n, word in enumerate("zero one two three four five six seven eight nine ten".split())} | {
    "none": "0"
}
ARTICLES = ("a", "an", "the")
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
PERIODS = 32  # that are deleted at most: the original passes a flag where the count belongs


def without_punctuation(text: str) -> str:
    """The official treatment of marks: each is deleted, or becomes a space, by where the text as it came has it."""
    out = text
    in_number = re.search(r"\d,\d", text)
    for mark in PUNCTUATION:
        out = out.replace(mark, "" if in_number or f"{mark} " in text or f" {mark}" in text else " ")
    return re.sub(r"\.(?!\d)", "", out, count=PERIODS)


def plain_words(text: str) -> str:
    """Lower case, numbers up to ten as digits, without articles, contractions with their apostrophes."""
    words = (NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def accuracy(prediction: str, answers: Sequence[str], *, as_lavis: bool = False) -> float:
    """Accuracy of one answer, 0 to 1, against those of (ten) people.

    as_lavis: LAVIS's own copy of the program, by which BLIP-2's zero-shot results were measured: the answer is brought
    into the common form always, those of people lose their punctuation alone, and only unless all agree. So no answer
    scores against ten times "t-shirt", "Red" or "two".
    """
    prediction, *answers = (text.replace("\n", " ").replace("\t", " ").strip() for text in (prediction, *answers))
    differ = len(set(answers)) > 1
    if differ or as_lavis:
        prediction = plain_words(without_punctuation(prediction))
    if differ:
        answers = [without_punctuation(text) for text in answers]
        answers = answers if as_lavis else [plain_words(text) for text in answers]
    agreeing = answers.count(prediction)
    others = [agreeing - (answer == prediction) for answer in answers]  # without one of the people, in turn
    return sum(min(1.0, n / 3) for n in others) / len(others)


def score(
    predictions: Mapping[int, str], questions: Mapping[int, Mapping], *, as_lavis: bool = False
) -> dict[str, float]:
    """Accuracies in percent, rounded to two places as the official program prints them: "accuracy", and per type where
    types are known.

    predictions: question id -> answer. questions: question id -> {"answers": texts of people, and maybe "answer_type",
    "question_type"}. as_lavis: as in `accuracy`.
    Returns {"accuracy", "answer_type/yes/no", "question_type/how many", ...}. ValueError: a question without a
    prediction.
    """
    if missing := sorted(questions.keys() - predictions.keys()):
        raise ValueError(
            f"{len(missing)} questions have no prediction, such as {missing[:3]}: predict an answer to every question"
        )
    found: dict[str, list[float]] = {}
    for number, question in questions.items():
        value = accuracy(predictions[number], question["answers"], as_lavis=as_lavis)
        kinds = [f"{kind}/{question[kind]}" for kind in ("answer_type", "question_type") if question.get(kind)]
        for name in ("accuracy", *kinds):
            found.setdefault(name, []).append(value)
    return {name: round(100 * sum(values) / len(values), 2) for name, values in found.items()}


def common_answers(answers: Iterable[Sequence[str]], at_least: int = 9) -> list[str]:
    """The answers that models choose from where no list of them is given: those that the majority of people gave, in
    the common form, to at least so many questions; the most frequent first, equal ones by the alphabet.

    answers: those of people to each question. Questions without answers count for nothing.
    """
    most = (max(given, key=list(given).count) for given in answers if given)  # of equally many the first
    counts = Counter(plain_words(without_punctuation(text)) for text in most)
    return sorted(
        (text for text, n in counts.items() if text and n >= at_least), key=lambda text: (-counts[text], text)
    )
