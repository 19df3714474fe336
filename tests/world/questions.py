"""Questions about pictures with the answers of people, as VQA's official files and as BLIP's lists."""

import json
import pathlib

from world.pictures import encode, noise

PEOPLE = {1: ["ring"] * 10, 2: ["yes"] * 7 + ["no"] * 3, 3: ["red"] * 4 + ["blue"] * 6, 4: ["2"] * 9 + ["two"]}
QUESTIONS = {1: "What is it?", 2: "Is it a ring?", 3: "Which color is it?", 4: "How many rings?"}


def write_files(folder: pathlib.Path) -> pathlib.Path:
    """The same four questions about two pictures in BLIP's layout and the official one, two of Visual Genome, and a
    list of answers.
    """
    name = lambda number: f"train2014/COCO_train2014_{number % 2:012d}.jpg"
    for path in [name(0), name(1), "image/5.jpg"]:
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_bytes(encode(noise(len(path))))
    write = lambda file, content: (folder / file).write_text(json.dumps(content))
    write(
        "vqa_train.json",
        [
            {"question_id": n, "question": QUESTIONS[n], "image": name(n), "dataset": "vqa", "answer": PEOPLE[n]}
            for n in QUESTIONS
        ],
    )
    write(
        "v2_train2014_questions.json",
        {
            "data_subtype": "train2014",
            "questions": [{"question_id": n, "image_id": n % 2, "question": text} for n, text in QUESTIONS.items()],
        },
    )
    write(
        "v2_train2014_annotations.json",
        {
            "annotations": [
                {
                    "question_id": n,
                    "image_id": n % 2,
                    "answer_type": "other",
                    "question_type": "what",
                    "answers": [{"answer": a, "answer_id": i} for i, a in enumerate(answers, 1)],
                }
                for n, answers in reversed(PEOPLE.items())
            ]
        },
    )
    write(
        "vg_qa.json",
        [
            {"image": "image/5.jpg", "question": "What is shown?", "answer": a, "dataset": "vg"}
            for a in ("ring", "star")
        ],
    )
    write("answer_list.json", ["ring", "yes", "no", "red", "blue", "2"])
    return folder
