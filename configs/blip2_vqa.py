"""BLIP-2 fine-tuned for visual question answering at 490 px, 5 epochs: tower and Q-Former, which reads the question
too, are trained, the language model is not.

Paper rows: BLIP-2, arXiv 2301.12597, table 4 (settings of table 7).
Command, with one of the arguments below:
  blip-jax train --config=configs/blip2_vqa.py:opt2.7b --workdir=runs/blip2_vqa_opt2.7b
  blip-jax evaluate --config=configs/blip2_vqa.py:opt2.7b --workdir=runs/blip2_vqa_opt2.7b

  opt2.7b    OPT 2.7B       opt6.7b    OPT 6.7B, layer decay 0.9       flant5xl   FlanT5-XL

Starts from a first stage, which has the Q-Former's words and the feed-forwards of texts, from a second stage, whose
parameters take the place of the first one's, from the tower, whose position table is resized from 224 to 490 px, and
from the language model. It is asked "Question: {} Answer:", the Q-Former the question alone.
Data: VQA v2's questions and annotations (visualqa.org) of train2014 and val2014 with COCO's pictures below data/coco,
and Visual Genome's questions in BLIP's list vg_qa.json, as for BLIP (configs/vqa.py); evaluation writes the answers to
test2015's questions as the challenge's server takes them. For a val2014 that training has not seen:
--config.data.train.vqa.path='data/vqa/v2_*train2014*.json' --config.data.eval.vqa.path='data/vqa/v2_*val2014*.json'
Hardware: unknown. Unverified here: no run of this size was made, and nobody has published code or weights of it.
Expected, test-dev and test-std: opt2.7b 81.59, 81.74; opt6.7b 82.19, 82.30; flant5xl 81.55, 81.66.
Hyper-parameters, the paper's: batch 128, rate 1e-5, 5 beams; warm-up and beta2, which it does not say apart, are those
of its fine-tuning for captions.
Differences: the paper says no more of the Q-Former's question than a figure: it is wired as InstructBLIP's, by the same
authors. Of several answers of people one is drawn at each visit, as likely as people gave it. Of a question that is too
long the last words are left out, before "Answer:".
"""

from blip_jax.config import blip2, layer_decay, source
from blip_jax.tasks import blip2_vqa

EPOCHS = 5
VQA = 443_757 + 214_354  # questions of train2014 and val2014
VG = 700_000  # rows of vg_qa.json, about: set it to the length of your list
MODELS = {
    "opt2.7b": ("opt_2.7b", "opt-2.7b", 0.95),
    "opt6.7b": ("opt_6.7b", "opt-6.7b", 0.9),
    "flant5xl": ("flant5_xl", "flan-t5-xl", 0.95),
}
ARGUMENTS = tuple(MODELS)


def get_config(argument=""):
    if argument not in ARGUMENTS:
        raise ValueError(
            f"configs/blip2_vqa.py has no run {argument!r}: give one of "
            f"{', '.join(f':{a}' for a in ARGUMENTS)} after it"
        )
    size, folder, decay = MODELS[argument]
    c = blip2("eva_g", llm=size)
    c.objective = "blip2_vqa"
    c.task = blip2_vqa.leaves()
    c.model.img_size = 490
    c.model.remat = "full"
    words = "spiece.model" if argument.startswith("flan") else "vocab.json"
    c.text.vocab = f"data/{folder}/{words},data/bert-base-uncased-vocab.txt"
    c.text.prompt, c.text.question = "Question: {} Answer:", "{}"
    c.text.max_len = 48
    with c.data.unlocked():
        c.data.train.vqa = source("vqa", "data/vqa/v2_*[nl]2014*.json", images="data/coco", weight=float(VQA))
        c.data.train.vg = source("vqa", "data/vg_qa.json", images="data/vg", weight=float(VG))
        c.data.eval.vqa = source("vqa", "data/vqa/v2_OpenEnded_mscoco_test2015_questions.json", images="data/coco")
    c.data.epoch_examples = VQA + VG
    c.optim.freeze = ("llm/.*",)
    c.optim.lr, c.optim.min_lr, c.optim.warmup_lr, c.optim.warmup_steps = 1e-5, 0.0, 1e-8, 1000
    c.optim.b2 = 0.999
    c.optim.lr_factors = layer_decay(decay, c.model.vit.depth)
    c.train.batch = 128
    c.train.steps = EPOCHS * (c.data.epoch_examples // c.train.batch)
    c.train.save_every = c.data.epoch_examples // c.train.batch
    c.train.keep = EPOCHS
    own = f"data/blip2_pretrained.pth,data/blip2_pretrained_{argument}.pth"
    c.train.init_from = f"{own},data/eva_vit_g.pth,data/{folder}"
    c.eval.batch = 32
    return c
