"""What the BLIP paper reports of CapFilt (arXiv 2201.12086, tables 1 and 2): ViT-B, 14M images, CapFilt of size B; and
the BLIP-2 paper (arXiv 2301.12597, table 6) of its first stage's objectives."""

import itertools

NAMES = {  # (captioner used, filter used) -> name of the corpus
    (False, False): "neither",
    (False, True): "filter only",
    (True, False): "captioner only",
    (True, True): "both",
}
COLUMNS = (  # (data, metric): COCO after fine-tuning, Flickr30K zero-shot
    ("COCO", "TR@1"), ("COCO", "IR@1"), ("COCO", "CIDEr"), ("Flickr", "TR@1"), ("Flickr", "IR@1"),
)  # fmt: skip

TABLE1 = {  # (captioner used, filter used) -> COLUMNS
    (False, False): (78.4, 60.7, 127.8, 93.9, 82.1),
    (False, True): (79.1, 61.5, 128.2, 94.1, 82.8),
    (True, False): (79.7, 62.0, 128.9, 94.4, 83.6),
    (True, True): (80.6, 63.1, 129.7, 94.8, 84.9),
}

NOISE_REMOVED = {"beam": 0.19, "nucleus": 0.25}  # decoding of the synthetic captions -> share the filter dropped

OBJECTIVES = {False: (84.5, 67.2), True: (85.4, 68.3)}  # BLIP-2 without and with ITG -> TR@1, IR@1 on COCO, fine-tuned


def relations() -> list[tuple[str, str]]:
    """(better, worse) of all pairs of corpora that every column of table 1 orders alike."""
    pairs = itertools.permutations(TABLE1, 2)
    return [(NAMES[a], NAMES[b]) for a, b in pairs if all(x > y for x, y in zip(TABLE1[a], TABLE1[b]))]
