"""NLVR2, whether a sentence is true of two pictures: fine-tuning at 384 px, 15 epochs.

Paper rows: NLVR2 (BLIP, arXiv 2201.12086, table 8; settings of table 14), by what a run starts from:
vitb,14m,bootstrapped, vitb,129m,capfilt_l, and vitb,129m,bootstrapped, the published file's, where none is named.
Command: blip-jax train --config=configs/nlvr.py --workdir=runs/nlvr
         blip-jax evaluate --config=configs/nlvr.py --workdir=runs/nlvr
         --config.data.eval.dev.path=data/nlvr2/test1.json
Data: train.json, dev.json and test1.json of NLVR2 (github.com/lil-lab/nlvr), 86,373, 6,982 and 6,967 sentences,
pictures below data/nlvr2: images/train/<0-99>, dev, test1. BLIP's own lists nlvr_train.json, nlvr_dev.json,
nlvr_test.json are read as well. Starts from the workdir of pretrain.py that belongs to the row (ARGUMENTS);
--config.train.init_from names another one of the same sizes. Its position table is resized to 384 px; each layer's
cross-attention becomes two; the merging layers and the head start random.
Hardware: the paper's authors used 16 A100. Unverified here: no run of this size was made.
Expected, dev and test-P of the paper: 82.67, 82.30 from 14M; 82.48, 83.08 from 129M; 82.15, 82.24 from CapFilt-L.
Differences: evaluation shows the pictures in their order, the original exchanges them at random there, too. Sentences
are padded to 64 positions, the original's to the longest of the batch. The best epoch on dev, the paper's, stays
in best/ of the workdir.
"""

from blip_jax.config import base, source

ARGUMENTS = {  # row -> what it starts from
    "vitb,14m,bootstrapped": "runs/pretrain_vitb_14m_bootstrapped",
    "vitb,129m,bootstrapped": "runs/pretrain_vitb_129m_bootstrapped",
    "vitb,129m,capfilt_l": "runs/pretrain_vitb_129m_capfilt_l",
}
EPOCHS = 15
EXAMPLES = 86_373


def get_config(argument="vitb,129m,bootstrapped"):
    if argument not in ARGUMENTS:
        raise ValueError(
            f"configs/nlvr.py has no run {argument!r}: give one of {', '.join(f':{a}' for a in ARGUMENTS)} after it"
        )
    c = base("base")
    c.objective = "nlvr"
    c.model.img_size = 384
    c.model.drop_path = 0.1
    c.text.vocab = "data/bert-base-uncased-vocab.txt"
    c.text.max_len = 64
    c.text.max_words = 40
    with c.data.unlocked():
        c.data.train.nlvr = source("nlvr", "data/nlvr2/train.json", images="data/nlvr2")
        c.data.eval.dev = source("nlvr", "data/nlvr2/dev.json", images="data/nlvr2")
    c.data.epoch_examples = EXAMPLES
    c.data.crop_scale = (0.5, 1.0)
    c.optim.lr = 3e-5
    c.optim.min_lr = 0.0
    c.optim.schedule = "epoch_cosine"
    c.optim.warmup_steps = 0
    c.train.batch = 256
    c.train.steps = EPOCHS * (EXAMPLES // c.train.batch)
    c.train.save_every = EXAMPLES // c.train.batch
    c.train.eval_every = EXAMPLES // c.train.batch
    c.train.keep_best = True
    c.train.init_from = ARGUMENTS[argument]
    return c
