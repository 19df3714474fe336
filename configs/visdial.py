"""Visual Dialog 1.0, which of a hundred answers continues a dialog about a picture: fine-tuning at 384 px, 20 epochs.

Paper row: VisDial (BLIP, arXiv 2201.12086, table 9; settings of table 14).
Command: blip-jax train --config=configs/visdial.py --workdir=runs/visdial
         blip-jax evaluate --config=configs/visdial.py --workdir=runs/visdial      the numbers, and the server's file
         and for the server's test split --config.data.eval.val.path=data/visdial/visdial_1.0_test.json
Data: visdial_1.0_{train,val,test}.json and visdial_1.0_val_dense_annotations.json (visualdialog.org) in data/visdial,
123,287, 2,064 and 8,000 dialogs; pictures of train in train2014 and val2014 below data/coco, of the others in
VisualDialog_val2018 and VisualDialog_test2018 below data/visdial. Starts from runs/pretrain_vitb_14m;
--config.train.init_from names another pre-trained workdir of the same sizes, or a VQA model, whose matching head then
starts random. Its position table is resized to 384 px; decoder and projections are left out.
Hardware: the paper's authors used 16 A100. Unverified here: no run of this size was made.
Expected on val, of the paper: MRR 69.41, R@1 56.44, R@5 85.90, R@10 93.30 percent, mean rank 3.20; no NDCG.
Differences: none is known, as neither code nor weights were published. Known are the forward pass (by the author), and
batch 240, learning rate and epochs (table 14). Chosen here: the batch is 48 dialogs, of each one round, drawn, with the
true answer and four wrong ones, drawn, weighed alike; the whole history is read, joined by [SEP], in 256 positions at
most, the oldest rounds left out; the caption in 40; options are ranked by the logit; the best epoch by MRR stays in
best/ of the workdir.
"""

from blip_jax.config import base, source
from blip_jax.tasks import dialog

EPOCHS = 20
DIALOGS = 123_287


def get_config():
    c = base("base")
    c.objective = "dialog"
    c.task = dialog.leaves()
    c.model.img_size = 384
    c.text.vocab = "data/bert-base-uncased-vocab.txt"
    c.text.max_len = 256
    with c.data.unlocked():
        c.data.train.visdial = source("visdial", "data/visdial/visdial_1.0_train.json", images="data/coco")
        c.data.eval.val = source("visdial", "data/visdial/visdial_1.0_val*.json", images="data/visdial")
    c.data.epoch_examples = DIALOGS
    c.data.crop_scale = (0.5, 1.0)
    c.optim.lr = 2e-5
    c.optim.min_lr = 0.0
    c.optim.schedule = "epoch_cosine"
    c.optim.warmup_steps = 0
    c.train.batch = 48  # dialogs; of 1 + task.negatives texts each, 240
    c.train.steps = EPOCHS * (DIALOGS // c.train.batch)
    c.train.save_every = DIALOGS // c.train.batch
    c.train.eval_every = DIALOGS // c.train.batch
    c.train.keep_best = True
    c.train.init_from = "runs/pretrain_vitb_14m"
    c.eval.batch = 8  # dialogs at a time, at least one for each device
    c.eval.rerank_texts = 100  # texts of each of them
    return c
