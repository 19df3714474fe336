"""Zero-shot questions about videos: the VQA model on MSRVTT-QA and MSVD-QA. Nothing is trained.

Paper rows: video question answering (BLIP, arXiv 2201.12086, table 11).
Command, with one of the arguments msrvtt and msvd:
  blip-jax evaluate --config=configs/video_qa.py:msrvtt --workdir=runs/video_qa_msrvtt
           --checkpoint=model_base_vqa_capfilt_large.pth
Data, below data/msrvtt_qa or data/msvd_qa: the official test_qa.json and train_qa.json (xudejing/video-question-
answering), of MSVD with youtube_mapping.txt, and the videos as they come, video7010.mp4 or the .avi of YouTubeClips.
LAVIS's qa_test.json is read as well. data/vqa/answer_list.json, the 3,128 answers of VQA.
Hardware: unknown. Unverified here: no run of this size was made, and the authors published no code.
Expected, top-1 accuracy on the test questions: msrvtt 19.2, msvd 35.2.
Reported: accuracy of generated answers, which the authors say they made; rank_vqa of answers ranked among VQA's;
rank_train among those of the training questions. --config.task.vqa_answers= leaves one out, and saves its time.
Differences: which model, resolution and decoding are the paper's is not published: these are the released model's 480
px. Generating masks a question's padding, as configs/vqa.py says.
"""

from blip_jax.config import base, source
from blip_jax.tasks import video_qa

ARGUMENTS = ("msrvtt", "msvd")


def get_config(argument=""):
    if argument not in ARGUMENTS:
        raise ValueError(
            f"configs/video_qa.py has no run {argument!r}: give one of {', '.join(f':{a}' for a in ARGUMENTS)} after it"
        )
    folder = f"data/{argument}_qa"
    c = base("base")
    c.objective = "video_qa"
    c.task = video_qa.leaves()
    c.task.vqa_answers = "data/vqa/answer_list.json"
    c.task.train_answers = f"{folder}/train_qa.json"
    c.model.img_size = 480
    c.text.vocab = "data/bert-base-uncased-vocab.txt"
    c.text.max_len = 35
    with c.data.unlocked():
        c.data.eval[argument] = source("video_qa", f"{folder}/test_qa.json", images=folder)
    c.eval.batch = 4  # videos, of 16 pictures each; their keys and values take half a GB each in bfloat16
    c.eval.rerank_texts = 8  # questions about each in a pass, and 128 answers to each question
    return c
