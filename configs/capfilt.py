"""CapFilt over the web part of the 14M images: one synthetic caption per picture, then the filter on both texts.

Paper row: CapFilt with ViT-B captioner and filter, nucleus sampling, p = 0.9 (BLIP, arXiv 2201.12086, tables 1 and 2).
Command: blip-jax capfilt --config=configs/capfilt.py --out=data/capfilt_14m
Over LAION, the same with:
          --config.data.sources.web.kind=tar --config.data.sources.web.path='data/laion/*.tar' --out=data/capfilt_laion
CapFilt-L over LAION, the same with:
          --config.captioner=runs/caption_coco_vitl --config.filter=runs/retrieval_coco_vitl
          --config.data.sources.web.kind=tar --config.data.sources.web.path='data/laion/*.tar'
          --out=data/capfilt_laion_l
Captions of a language model, judged by BLIP-2's first stage, the same with:
          --config.captioner=Salesforce/blip2-opt-2.7b --config.filter=Salesforce/blip2-itm-vit-g
          --config.text.prompt='a photo of' --out=data/capfilt_blip2
Another threshold afterwards, without an accelerator:
          blip-jax capfilt refilter --run=data/capfilt_14m --threshold=0.7 --out=data/capfilt_14m_07
Data: CC3M + CC12M + SBU with their web texts as ArrayRecord shards, as pretrain.py has them, 13.86M pictures. Human
captions are not filtered, so COCO and Visual Genome are not here. The checkpoints are those of caption_coco.py:vitb and
retrieval_coco.py:vitb.
Hardware: any; several hosts each run the command and take shards in turn. Unverified here: no run of this size was
made.
Expected: the paper's filter removes 25 % of nucleus captions, 19 % of beam captions.
"""

from blip_jax.config import capfilt, source


def get_config():
    c = capfilt()
    c.captioner = "runs/caption_coco_vitb"
    c.filter = "runs/retrieval_coco_vitb"
    with c.data.unlocked():
        c.data.sources.web = source("array_record", "data/ccs/*.array_record")
    return c
