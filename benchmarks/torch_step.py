"""BLIP's pre-training step in plain PyTorch, the peer of `python benchmarks/against.py train`; needs torch.

Written as one would today: attention by `scaled_dot_product_attention`, bfloat16 by autocast, on a GPU fused AdamW.
Wired as the original is (paper section 3.2): each of the passes over an image - matching positives, two groups of
negatives, language modelling - projects the image's keys and values for itself, matching computes every position of the
last layer, texts are padded to `text.max_len`. Modules carry the names of the published checkpoints, so that
`convert.apply.to_torch` gives their weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from blip_jax.models.vision.vit import PIXEL_MEAN, PIXEL_STD

HIDDEN = -10000.0  # added to the scores of what is not attended to


def _norm(width: int, eps: float = 1e-12) -> nn.LayerNorm:
    return nn.LayerNorm(width, eps=eps)


class VitBlock(nn.Module):
    """x += DP(attn(norm1(x))); x += DP(mlp(norm2(x)))"""

    def __init__(self, width: int, heads: int, mlp: int, rate: float):
        super().__init__()
        self.heads, self.rate = heads, rate
        self.norm1, self.norm2 = _norm(width, 1e-6), _norm(width, 1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, mlp), "fc2": nn.Linear(mlp, width)})

    def forward(self, x):
        B, P, D = x.shape
        q, k, v = self.attn["qkv"](self.norm1(x)).reshape(B, P, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v)
        x = x + self._drop_path(self.attn["proj"](mixed.transpose(1, 2).reshape(B, P, D)))
        return x + self._drop_path(self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x)))))

    def _drop_path(self, y):
        if not self.rate or not self.training:
            return y
        keep = torch.rand(len(y), 1, 1, device=y.device) >= self.rate
        return y * keep / (1 - self.rate)


class Vit(nn.Module):
    """Normalised pixels [B,3,S,S] -> image states [B,P,D]"""

    def __init__(self, model):
        super().__init__()
        v, positions = model.vit, (model.img_size // model.vit.patch) ** 2 + 1
        self.cls_token = nn.Parameter(torch.zeros(1, 1, v.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, positions, v.width))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, v.width, v.patch, v.patch)})
        rates = np.linspace(0, model.drop_path, v.depth)
        self.blocks = nn.ModuleList(VitBlock(v.width, v.heads, v.mlp, float(rate)) for rate in rates)
        self.norm = _norm(v.width, 1e-6)

    def forward(self, pixels):
        x = self.patch_embed["proj"](pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class Attention(nn.Module):
    """norm(x + drop(dense(attention of x over `source`))), with dropout on the probabilities too"""

    def __init__(self, med, dropout: float, source_width: int):
        super().__init__()
        W = med.width
        self.heads, self.drop = med.heads, nn.Dropout(dropout)
        self.self = nn.ModuleDict(
            {"query": nn.Linear(W, W), "key": nn.Linear(source_width, W), "value": nn.Linear(source_width, W)}
        )
        self.output = nn.ModuleDict({"dense": nn.Linear(W, W), "LayerNorm": _norm(W)})

    def forward(self, x, source, mask=None):
        split = lambda name, y: self.self[name](y).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        q, k, v = split("query", x), split("key", source), split("value", source)
        rate = self.drop.p if self.training else 0.0
        hidden = None if mask is None else mask.to(q.dtype)
        mixed = F.scaled_dot_product_attention(q, k, v, hidden, dropout_p=rate).transpose(1, 2).flatten(2)
        return self.output["LayerNorm"](self.drop(self.output["dense"](mixed)) + x)


class TextLayer(nn.Module):
    """Self-attention, cross-attention where there is an image, feed-forward"""

    def __init__(self, med, dropout: float, image_width: int):
        super().__init__()
        self.attention = Attention(med, dropout, med.width)
        self.crossattention = Attention(med, dropout, image_width)
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(med.width, med.mlp)})
        self.output = nn.ModuleDict({"dense": nn.Linear(med.mlp, med.width), "LayerNorm": _norm(med.width)})
        self.drop = nn.Dropout(dropout)

    def forward(self, x, mask, img_tok):
        x = self.attention(x, x, mask)
        if img_tok is not None:
            x = self.crossattention(x, img_tok)
        return self.output["LayerNorm"](self.drop(self.output["dense"](F.gelu(self.intermediate["dense"](x)))) + x)


class Text(nn.Module):
    """Ids i64[B,T] and additive mask [B,1,1|T,T] -> states [B,T,W]; with `img_tok` image-grounded"""

    def __init__(self, med, dropout: float, image_width: int):
        super().__init__()
        self.embeddings = nn.ModuleDict(
            {
                "word_embeddings": nn.Embedding(med.vocab_size, med.width),
                "position_embeddings": nn.Embedding(med.positions, med.width),
                "LayerNorm": _norm(med.width),
            }
        )
        self.encoder = nn.ModuleDict(
            {"layer": nn.ModuleList(TextLayer(med, dropout, image_width) for _ in range(med.layers))}
        )
        self.drop = nn.Dropout(dropout)

    def share(self, other: Text) -> None:
        """Makes all of `other`'s modules but its self-attention this one's (paper section 3.1)."""
        self.embeddings = other.embeddings
        for mine, theirs in zip(self.encoder["layer"], other.encoder["layer"]):
            mine.crossattention, mine.intermediate, mine.output = (
                theirs.crossattention,
                theirs.intermediate,
                theirs.output,
            )

    def forward(self, ids, mask, img_tok=None):
        positions = torch.arange(ids.shape[1], device=ids.device)
        x = self.embeddings["word_embeddings"](ids) + self.embeddings["position_embeddings"](positions)
        x = self.drop(self.embeddings["LayerNorm"](x))
        for layer in self.encoder["layer"]:
            x = layer(x, mask, img_tok)
        return x


class Predictions(nn.Module):
    """The language-modelling head: f32 logits [B,T,V] from states [B,T,W]"""

    def __init__(self, med):
        super().__init__()
        self.transform = nn.ModuleDict({"dense": nn.Linear(med.width, med.width), "LayerNorm": _norm(med.width)})
        self.decoder = nn.Linear(med.width, med.vocab_size)
        self.bias = self.decoder.bias

    def forward(self, x):
        return self.decoder(self.transform["LayerNorm"](F.gelu(self.transform["dense"](x)))).float()


class Pretrain(nn.Module):
    """The whole pre-training model of `cfg.model`, with momentum encoder and queues; calling it gives the losses."""

    def __init__(self, cfg):
        super().__init__()
        m, E = cfg.model, cfg.model.embed_dim
        text = lambda: Text(m.med, m.dropout, m.vit.width)
        self.dec_id, self.enc_id, self.smoothing = m.med.vocab_size - 2, m.med.vocab_size - 1, cfg.loss.label_smoothing
        self.temp = nn.Parameter(torch.tensor(0.07))
        self.visual_encoder, self.text_encoder = Vit(m), text()
        self.text_decoder = nn.ModuleDict({"bert": text(), "cls": nn.ModuleDict({"predictions": Predictions(m.med)})})
        self.text_decoder["bert"].share(self.text_encoder)
        self.text_decoder["cls"]["predictions"].decoder.weight = self.text_encoder.embeddings["word_embeddings"].weight
        self.vision_proj, self.text_proj, self.itm_head = (
            nn.Linear(m.vit.width, E),
            nn.Linear(m.med.width, E),
            nn.Linear(m.med.width, 2),
        )
        self.visual_encoder_m, self.text_encoder_m = Vit(m), text()
        self.vision_proj_m, self.text_proj_m = nn.Linear(m.vit.width, E), nn.Linear(m.med.width, E)
        for name in ("image_queue", "text_queue"):
            self.register_buffer(name, torch.zeros(E, cfg.loss.queue))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))
        for _, copy in self.pairs():
            copy.requires_grad_(False)

    def pairs(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """(parameter, its momentum copy)"""
        names = ("visual_encoder", "text_encoder", "vision_proj", "text_proj")
        return [
            pair
            for name in names
            for pair in zip(getattr(self, name).parameters(), getattr(self, name + "_m").parameters())
        ]

    def forward(self, pixels, ids, txt_mask, alpha, draw: Callable):
        """Losses {"loss_itc", "loss_itm", "loss_lm"} and momentum features (img, txt), f32[B,E] each; `draw` as in
        `Step`."""
        hide = lambda mask: (~mask)[:, None] * HIDDEN
        mask = hide(txt_mask[:, None])
        img_tok = self.visual_encoder(pixels)
        img_emb = _unit(self.vision_proj(img_tok[:, 0]))
        txt_emb = _unit(self.text_proj(self.text_encoder(ids, mask)[:, 0]))
        with torch.no_grad():
            img_m = _unit(self.vision_proj_m(self.visual_encoder_m(pixels)[:, 0]))
            txt_m = _unit(self.text_proj_m(self.text_encoder_m(ids, mask)[:, 0]))
        itc, sim_t2i, sim_i2t = self._contrastive(img_emb, txt_emb, img_m, txt_m, alpha)
        itm = self._matching(ids, mask, img_tok, draw(_weights(sim_t2i)), draw(_weights(sim_i2t)))

        dec_ids, T = torch.cat([torch.full_like(ids[:, :1], self.dec_id), ids[:, 1:]], dim=1), ids.shape[1]
        causal = torch.ones(T, T, dtype=torch.bool, device=ids.device).tril() & txt_mask[:, None]
        logits = self.text_decoder["cls"]["predictions"](self.text_decoder["bert"](dec_ids, hide(causal), img_tok))
        targets = dec_ids.masked_fill(~txt_mask, -100)[:, 1:]
        lm = F.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten(), label_smoothing=self.smoothing)
        return {"loss_itc": itc, "loss_itm": itm, "loss_lm": lm}, (img_m, txt_m)

    def _contrastive(self, img_emb, txt_emb, img_m, txt_m, alpha):
        """ITC loss, and the similarities with the batch's own columns, text to image and image to text, f32[B,B]"""
        B = len(img_emb)
        columns = lambda batch, queue: torch.cat([batch.T, queue.clone()], dim=1)
        img_all, txt_all = columns(img_m, self.image_queue), columns(txt_m, self.text_queue)
        total, sims = 0.0, []
        for emb, own, cols in ((txt_emb, txt_m, img_all), (img_emb, img_m, txt_all)):
            sim = emb @ cols / self.temp
            with torch.no_grad():
                target = (1 - alpha) * torch.eye(B, sim.shape[1], device=sim.device) + alpha * (
                    own @ cols / self.temp
                ).softmax(-1)
            total = total - (sim.log_softmax(-1) * target).sum(-1).mean() / 2
            sims.append(sim[:, :B].detach())
        return total, *sims

    def _matching(self, ids, mask, img_tok, neg_img, neg_txt):
        ids = torch.cat([torch.full_like(ids[:, :1], self.enc_id), ids[:, 1:]], dim=1)
        B = len(ids)
        positive = self.text_encoder(ids, mask, img_tok)
        negative = self.text_encoder(
            torch.cat([ids, ids[neg_txt]]), torch.cat([mask, mask[neg_txt]]), torch.cat([img_tok[neg_img], img_tok])
        )
        labels = (torch.arange(3 * B, device=ids.device) < B).long()
        return F.cross_entropy(self.itm_head(torch.cat([positive[:, 0], negative[:, 0]])).float(), labels)


class Step:
    """The training step: temperature clamped, momentum encoder moved, losses, gradients, AdamW, queue.

    Args: cfg: a pre-training config that `against_torch.check` lets pass; tensors: name -> array, as
      `to_torch("pretrain", ...)` gives them, None: torch's random ones; device: "cpu" or "cuda"; compiled: through
      `torch.compile`; dtype of autocast.
    """

    def __init__(
        self,
        cfg,
        tensors: Mapping[str, np.ndarray] | None,
        device: str = "cpu",
        compiled: bool = False,
        dtype: str = "float32",
    ):
        self.net, self.cfg, self.dtype, self.device, self.compiled = Pretrain(cfg), cfg, dtype, device, compiled
        if tensors is not None:
            self.net.load_state_dict({k: torch.from_numpy(np.array(x)) for k, x in tensors.items()}, strict=True)
        self.start = int(self.net.queue_ptr)  # kept on the host, so that no step waits for the GPU
        self.net.to(device).train()
        self.losses = torch.compile(self.net) if compiled else self.net
        o = cfg.optim
        self.opt = torch.optim.AdamW(
            [p for p in self.net.parameters() if p.requires_grad],
            lr=o.lr,
            betas=(o.b1, o.b2),
            eps=o.eps,
            weight_decay=o.weight_decay,
            fused=device == "cuda",
        )

    def batch(self, img: np.ndarray, ids: np.ndarray, txt_mask: np.ndarray) -> tuple:
        """u8 or normalised f32 [B,S,S,3], i32[B,T], bool[B,T] -> what `__call__` takes, on the device"""
        if img.dtype == np.uint8:
            img = (img.astype(np.float32) / 255 - np.float32(PIXEL_MEAN)) / np.float32(PIXEL_STD)
        arrays = np.ascontiguousarray(img.transpose(0, 3, 1, 2)), ids.astype(np.int64), np.array(txt_mask)
        return tuple(torch.from_numpy(x).to(self.device) for x in arrays)

    def gradients(self, batch: tuple, alpha: float, draw: Callable | None = None):
        """Momentum moved, losses {name: f32[]} computed and their sum differentiated; also the features to enqueue.

        draw: f32[B,B] sampling weights -> i64[B] negatives, called for texts' images and then for images' texts; None:
        multinomial.
        """
        net, decay = self.net, self.cfg.loss.ema
        with torch.no_grad():
            net.temp.clamp_(0.001, 0.5)
            params, copies = zip(*net.pairs(), strict=True)
            torch._foreach_lerp_(copies, params, 1 - decay)
        self.opt.zero_grad(set_to_none=True)
        losses, features = self._forward(batch, alpha, draw or (lambda weights: torch.multinomial(weights, 1)[:, 0]))
        sum(losses.values()).backward()
        return losses, features

    def _forward(self, batch: tuple, alpha: float, draw: Callable):
        with torch.autocast(self.device, torch.bfloat16, enabled=self.dtype == "bfloat16"):
            return self.losses(*batch, alpha, draw)

    def evaluate(self, batch: tuple, alpha: float) -> dict[str, float]:
        """The losses without dropout, each row's negative being the next row's text or image; nothing is changed."""
        self.net.eval()
        with torch.no_grad():
            losses, _ = self._forward(
                batch, alpha, lambda weights: torch.arange(len(weights), device=weights.device).roll(-1)
            )
        self.net.train()
        return {name: float(x) for name, x in losses.items()}

    def __call__(self, batch: tuple, alpha: float, lr: float, draw: Callable | None = None) -> dict:
        """One step; returns the losses, which may still be on their way on a GPU."""
        losses, features = self.gradients(batch, alpha, draw)
        for group in self.opt.param_groups:
            group["lr"] = lr
        self.opt.step()
        net, B = self.net, len(batch[0])
        for queue, new in zip((net.image_queue, net.text_queue), features):
            queue[:, self.start : self.start + B] = new.T
        self.start = (self.start + B) % self.cfg.loss.queue
        net.queue_ptr.fill_(self.start)
        return {name: x.detach() for name, x in losses.items()}


def _unit(x):
    return F.normalize(x.float(), dim=-1)


def _weights(sim):
    """Sampling weights of hard negatives: softmax + 1e-4, none on the diagonal"""
    return (sim.float().softmax(-1) + 1e-4).fill_diagonal_(0)
