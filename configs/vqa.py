"""Visual question answering: fine-tuning on VQA v2 and Visual Genome at 480 px, 10 epochs.

Paper rows: VQA (BLIP, arXiv 2201.12086, table 8; settings of table 14), by what a run starts from:
vitb,14m,bootstrapped, vitb,129m,bootstrapped, and vitb,129m,capfilt_l, the published file's, where none is named.
Command: blip-jax train --config=configs/vqa.py --workdir=runs/vqa
         blip-jax evaluate --config=configs/vqa.py --workdir=runs/vqa      accuracy where people's answers are known;
         the server's file
Data: VQA v2's questions and annotations (visualqa.org) of train2014 and val2014 with COCO's pictures below data/coco,
as the paper trains on both; Visual Genome's questions in BLIP's list vg_qa.json; answer_list.json, the 3,128 answers
that are ranked. BLIP's own lists vqa_train.json, vqa_val.json, vqa_test.json are read as well: set the paths to them.
For a val2014 that training has not seen: --config.data.train.vqa.path='data/vqa/v2_*train2014*.json'
--config.data.eval.vqa.path='data/vqa/v2_*val2014*.json' Starts from the workdir of pretrain.py that belongs to the row
(ARGUMENTS); --config.train.init_from names another one of the same sizes. Its position table is resized to 480 px, text
encoder and decoder become two models, projections and matching head are left out.
Hardware: the paper's authors used 16 A100. Unverified here: no run of this size was made.
Expected, test-dev and test-std of the paper: 77.54, 77.62 from 14M; 78.24, 78.17 from 129M; 78.25, 78.32 from
CapFilt-L.
Differences: each question has task.answers rows of the decoder, the original's as many as it has different answers;
rows that only fill weigh nothing. Answers of more than task.answer_len positions are cut, and noted in skipped.jsonl;
the original cuts none. Generating answers masks a question's padding, so that an answer does not depend on its
neighbours; the original attends to it. ViT-L: the decoder looks at question states, so that its keys and values start
random; the paper has no such model.
"""

from blip_jax.config import base, source
from blip_jax.tasks import vqa

ARGUMENTS = {  # row -> what it starts from
    "vitb,14m,bootstrapped": "runs/pretrain_vitb_14m_bootstrapped",
    "vitb,129m,bootstrapped": "runs/pretrain_vitb_129m_bootstrapped",
    "vitb,129m,capfilt_l": "runs/pretrain_vitb_129m_capfilt_l",
}
EPOCHS = 10
VQA = 443_757 + 214_354  # questions of train2014 and val2014
VG = 700_000  # rows of vg_qa.json, about: set it to the length of your list


def get_config(argument="vitb,129m,capfilt_l"):
    if argument not in ARGUMENTS:
        raise ValueError(
            f"configs/vqa.py has no run {argument!r}: give one of {', '.join(f':{a}' for a in ARGUMENTS)} after it"
        )
    c = base("base")
    c.objective = "vqa"
    c.task = vqa.leaves()
    c.task.answer_list = "data/vqa/answer_list.json"
    c.model.img_size = 480
    c.model.drop_path = 0.1
    c.model.remat = "dots"
    c.text.vocab = "data/bert-base-uncased-vocab.txt"
    c.text.max_len = 35
    with c.data.unlocked():
        c.data.train.vqa = source("vqa", "data/vqa/v2_*[nl]2014*.json", images="data/coco", weight=float(VQA))
        c.data.train.vg = source("vqa", "data/vg_qa.json", images="data/vg", weight=float(VG))
        c.data.eval.vqa = source("vqa", "data/vqa/v2_OpenEnded_mscoco_test2015_questions.json", images="data/coco")
    c.data.epoch_examples = VQA + VG
    c.data.crop_scale = (0.5, 1.0)
    c.loss.smoothing_over = "all"  # as the published run; evaluation ranks so, too
    c.optim.lr = 2e-5
    c.optim.min_lr = 0.0
    c.optim.schedule = "epoch_cosine"
    c.optim.warmup_steps = 0
    c.train.batch = 256
    c.train.steps = EPOCHS * (c.data.epoch_examples // c.train.batch)
    c.train.save_every = c.data.epoch_examples // c.train.batch
    c.train.keep = EPOCHS
    c.train.init_from = ARGUMENTS[argument]
    c.eval.batch = 32
    return c
