"""Zero-shot text-to-video retrieval: the retrieval model of COCO on MSR-VTT's 1000 test pairs. Nothing is trained.

Paper row: text-to-video retrieval (BLIP, arXiv 2201.12086, table 10).
Command, with the argument msrvtt:
  blip-jax evaluate --config=configs/video_retrieval.py:msrvtt --workdir=runs/video_retrieval
           --checkpoint=model_base_retrieval_coco.pth
Data: msrvtt_test.jsonl, a line {clip_name, caption} for each of the 1000 clips (the split 1k-A, of JSFusion), and the
clips as CLIP_NAME.mp4 below data/msrvtt, in it, in videos or in TestVideo.
Hardware: unknown, and the paper does not say which model either. Unverified here: no run of this size was made.
Expected, text to video: R@1 43.3, R@5 65.6, R@10 74.7, median rank 2.
Differences: a clip that cannot be read is left out and named; the original ends there.
"""

from blip_jax.config import base, source
from blip_jax.tasks import video_retrieval

ARGUMENTS = ("msrvtt",)


def get_config(argument=""):
    if argument not in ARGUMENTS:
        raise ValueError(
            f"configs/video_retrieval.py has no run {argument!r}: give one of "
            f"{', '.join(f':{a}' for a in ARGUMENTS)} after it"
        )
    c = base("base")
    c.objective = "video_retrieval"
    c.task = video_retrieval.leaves()
    c.model.img_size = 384
    c.text.vocab = "data/bert-base-uncased-vocab.txt"
    c.text.max_len = 35
    c.text.max_words = 40
    with c.data.unlocked():
        c.data.eval.msrvtt = source("video_text", "data/msrvtt/msrvtt_test.jsonl", images="data/msrvtt")
    c.eval.k = 128
    c.eval.batch = 8  # videos, of 8 pictures each
    c.eval.rerank_texts = 64  # keys and values of a video's 4616 positions cost as much as some ten texts
    return c
