"""Zero-shot retrieval of videos by texts, MSR-VTT (paper section 5.6, table 10): a model fine-tuned for the retrieval
of pictures, measured as it is. Nothing is trained.

Every frame goes through the ViT by itself. A video's embedding is the mean of those of its frames, before it is scaled
to unit norm; the matching head looks at the tokens of all frames, one frame behind the other. Shortlist and re-ranking
are those of pictures (`two_stage`).
"""

from __future__ import annotations

from ml_collections import ConfigDict

from blip_jax.data import pairs
from blip_jax.data.evaluation import EvalVideos
from blip_jax.eval import recall
from blip_jax.tasks import retrieval, two_stage

INSTEAD = "train objective retrieval, and evaluate this one with --checkpoint"
build, passes = retrieval.build, two_stage.passes
WAYS = (("text to video", "vid"), ("video to text", "txt"))


def leaves() -> ConfigDict:
    """c.task of this objective."""
    c = ConfigDict()
    c.frames = 8  # of a video, at equal distances from the first on (`data.video.places`)
    return c


def check(cfg, tokenizer=None) -> list[str]:
    out = []
    if cfg.task.frames < 1:
        out.append(f"task.frames is {cfg.task.frames}: it must be at least 1")
    if cfg.text.prompt:
        out.append(
            f"text.prompt is {cfg.text.prompt!r} but objective is video_retrieval, whose texts have none: set "
            "text.prompt to the empty string"
        )
    return out


def eval_data(cfg, tokenizer, skipped_path) -> EvalVideos:
    """Every video and caption of cfg.data.eval."""
    own = lambda record: pairs.captions(record, cfg.text.max_words)
    return EvalVideos(cfg, cfg.data.eval, own, cfg.task.frames, skipped_path=skipped_path)


def evaluate(loaded, data: EvalVideos, mesh) -> dict:
    """As `two_stage.evaluate`, of "videos" and "texts": "vid_*" retrieves videos, the paper's direction, with the
    median rank "vid_mdR", from 1; "txt_*" retrieves texts; "itc_*" by cosine alone; "scores" as there, a video in the
    place of an image.

    Host memory: n_videos * task.frames * P * D values in the compute dtype.
    """
    scores = two_stage.two_stage_scores(loaded.cfg, loaded.model, loaded.params, data, loaded.tokenizer, mesh)
    by_cosine = recall.video(scores.cosine, scores.cosine, scores.text_image)
    videos, texts = scores.cosine.shape
    return {
        "videos": videos,
        "texts": texts,
        **recall.video(scores.i2t, scores.t2i, scores.text_image),
        **{f"itc_{name}": value for name, value in by_cosine.items()},
        "scores": two_stage.ranked(scores),
    }


def table(result: dict) -> str:
    """Recalls of both directions in percent, re-ranked and by cosine alone, and the median rank of videos."""
    head = f"{result['videos']} videos, {result['texts']} captions"
    lines = [f"{head:30} {'R@1':>7} {'R@5':>7} {'R@10':>7} {'MdR':>7}"]
    for what, side in WAYS:
        for suffix, prefix in (("", ""), (", cosine alone", "itc_")):
            numbers = [f"{result[f'{prefix}{side}_r{k}']:7.1f}" for k in recall.RECALLS]
            numbers += [f"{result[f'{prefix}vid_mdR']:7.1f}"] if side == "vid" else []
            lines.append(f"{what + suffix:30} " + " ".join(numbers))
    return "\n".join(lines)
