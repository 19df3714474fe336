"""Second stage of BLIP-2's pre-training: what the queries found is the soft prompt of a frozen language model.

Paper rows: BLIP-2, arXiv 2301.12597, section 3.4 and table 1.
Command, with one argument for the tower and one for the language model:
  blip-jax train --config=configs/blip2_stage2.py:vitg,opt2.7b --workdir=runs/blip2_vitg_opt2.7b

  vitg,opt2.7b    vitg,opt6.7b    vitg,flant5xl    vitg,flant5xxl    vitl,opt2.7b    vitl,flant5xl

vitg is EVA-CLIP ViT-g/14, vitl CLIP ViT-L/14; batch 1920 with OPT, 1520 with FlanT5.

Starts from a first stage (`configs/blip2_stage1.py`, or LAVIS's file), of which the queries' parts are taken and those
of texts and the heads left out; from the tower's file; and from a Hugging Face folder of the language model. Tower and
language model are frozen and are not in the checkpoints, which refer to these files. The projection starts random.
Data: as the first stage's. OPT learns the caption and its end, T5 reads the beginning of a caption, up to a place drawn
between its first word and its middle, and writes the rest: that split is the authors' word, it is not in LAVIS's code.
Hardware: the paper's authors used 16 A100 40GB; less than 3 days with FlanT5-XXL. Unverified here: no run of this size
was made. Expected, zero-shot VQAv2 test-dev: vitg with opt2.7b 52.3, opt6.7b 52.6, flant5xl 63.0, flant5xxl 65.0; vitl
with opt2.7b 49.7, flant5xl 62.3. Loss of a public run (vitg, opt2.7b, 4.6M pairs): 6.7 in the first step, 2.8 over the
first epoch, 2.2 over the tenth.
On TPUs of 16 GB: --config.mesh.fsdp=8, which splits the frozen parts, too; 32 or 64 chips divide 1536 with FlanT5:
--config.train.batch=1536 (docs/plan.md).
Hyper-parameters, the paper's: AdamW, beta 0.9 and 0.98, weight decay 0.05, peak 1e-4 after 2,000 linear steps, cosine
to 5e-5, 80k steps. LAVIS's released settings differ: batch 1024, beta2 0.999, to 1e-5, 10 epochs.
Differences: the loss is a mean over the tokens of the whole batch; the original averages each GPU's mean:
--config.loss.group_size=120 (T5 95). The frozen language model drops out as in training, as the original's does:
--config.model.llm_dropout=0 turns it off.
"""

from blip_jax.config import blip2, source

TOWERS = {"vitg": ("eva_g", "eva_vit_g.pth"), "vitl": ("clip_l", "clip_vit_L.pth")}
FIRST = {"vitg": "blip2_pretrained.pth", "vitl": "blip2_pretrained_vitL.pth"}
MODELS = {
    "opt2.7b": ("opt_2.7b", "opt-2.7b", 1920),
    "opt6.7b": ("opt_6.7b", "opt-6.7b", 1920),
    "flant5xl": ("flant5_xl", "flan-t5-xl", 1520),
    "flant5xxl": ("flant5_xxl", "flan-t5-xxl", 1520),
}
ARGUMENTS = tuple(f"vitg,{llm}" for llm in MODELS) + ("vitl,opt2.7b", "vitl,flant5xl")
PAIRS = {"coco": 566_747, "vg": 769_000, "ccs": 12_660_000, "laion": 115_000_000}


def get_config(argument=""):
    if argument not in ARGUMENTS:
        raise ValueError(
            f"configs/blip2_stage2.py has no run {argument!r}: give one of "
            f"{', '.join(f':{a}' for a in ARGUMENTS)} after it"
        )
    tower, llm = argument.split(",")
    size, folder, batch = MODELS[llm]
    c = blip2(TOWERS[tower][0], llm=size)
    c.text.vocab = f"data/{folder}/" + ("spiece.model" if llm.startswith("flan") else "vocab.json")
    with c.data.unlocked():
        c.data.train.coco = source("json", "data/coco_karpathy_train.json", images="data/coco")
        c.data.train.vg = source("json", "data/vg_caption.json", images="data/vg")
        c.data.train.ccs = source("array_record", "data/ccs_capfilt/*.array_record")
        c.data.train.laion = source("array_record", "data/laion_capfilt/*.array_record")
    for name, pairs in PAIRS.items():
        c.data.train[name].weight = float(pairs)
    c.data.epoch_examples = sum(PAIRS.values())
    c.train.batch, c.train.steps, c.train.save_every = batch, 80_000, 2000
    c.train.init_from = f"data/{FIRST[tower]},data/{TOWERS[tower][1]},data/{folder}"
    return c
