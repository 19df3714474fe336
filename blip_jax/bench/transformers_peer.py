"""transformers' BLIP captioner with our weights, the peer of `bench/caption.py`: the only module here that needs torch."""

from __future__ import annotations

import re
from typing import Mapping

import numpy as np
import torch
from transformers import BlipConfig, BlipForConditionalGeneration

from blip_jax.convert.apply import to_torch
from blip_jax.models.vit import PIXEL_MEAN, PIXEL_STD

VISION_NAMES = (  # the original's names of the vision tower -> transformers', in this order
    (r"^visual_encoder\.(cls_token|pos_embed|patch_embed\.proj)", r"vision_model.embeddings.\1"),
    (r"embeddings\.cls_token", "embeddings.class_embedding"),
    (r"embeddings\.pos_embed", "embeddings.position_embedding"),
    (r"embeddings\.patch_embed\.proj", "embeddings.patch_embedding"),
    (r"^visual_encoder\.norm", "vision_model.post_layernorm"),
    (r"^visual_encoder\.blocks", "vision_model.encoder.layers"),
    (r"^(vision_model\.encoder\.layers\.\d+)\.attn\.proj", r"\1.self_attn.projection"),
    (r"^(vision_model\.encoder\.layers\.\d+)\.attn", r"\1.self_attn"),
    (r"^(vision_model\.encoder\.layers\.\d+)\.norm", r"\1.layer_norm"),
)


def peer_name(name: str) -> str:
    """The name that transformers gives to a tensor of the original's caption checkpoint; text names are the same."""
    for pattern, new in VISION_NAMES:
        name = re.sub(pattern, new, name)
    return name


def peer_config(model, *, eos: int, pad: int) -> BlipConfig:
    """The sizes of our `cfg.model`, with the constants of the original where transformers' defaults differ (heads, eps)."""
    vit, med = model.vit, model.med
    text = dict(vocab_size=med.vocab_size, hidden_size=med.width, encoder_hidden_size=vit.width, intermediate_size=med.mlp,
                num_hidden_layers=med.layers, num_attention_heads=med.heads, max_position_embeddings=med.positions,
                layer_norm_eps=1e-12, bos_token_id=med.vocab_size - 2, eos_token_id=eos, sep_token_id=eos, pad_token_id=pad)
    vision = dict(hidden_size=vit.width, intermediate_size=vit.mlp, num_hidden_layers=vit.depth, num_attention_heads=vit.heads,
                  image_size=model.img_size, patch_size=vit.patch, layer_norm_eps=1e-6)
    return BlipConfig(text_config=text, vision_config=vision)


class Peer:
    """BlipForConditionalGeneration with the parameters of our captioner, on the CPU, and its parts as functions of arrays.

    Args: model: our `cfg.model`; params: nested dict of f32 arrays; dtype: float32 | bfloat16; eos, pad: ids that end and fill.
    Raises: RuntimeError (torch's) if a tensor is missing, left over or misshapen.
    """

    def __init__(self, model, params: Mapping, dtype: str, *, eos: int, pad: int):
        tensors = to_torch("caption", {"params": params}, vocab_size=model.med.vocab_size)
        self.net = BlipForConditionalGeneration(peer_config(model, eos=eos, pad=pad)).eval()
        self.net.load_state_dict({peer_name(k): torch.from_numpy(np.array(x)) for k, x in tensors.items()}, strict=True)
        self.net = self.net.to(getattr(torch, dtype))
        self.eos, self.pad = eos, pad

    def pixels(self, img: np.ndarray) -> torch.Tensor:
        """u8[B,S,S,3] -> normalised [B,3,S,S] in the model's dtype"""
        x = (img.astype(np.float32) / 255.0 - np.float32(PIXEL_MEAN)) / np.float32(PIXEL_STD)
        return torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2))).to(self.net.dtype)

    @torch.inference_mode()
    def vision(self, pixels) -> torch.Tensor:
        """[B,3,S,S] -> image states [B,P,D]"""
        return self.net.vision_model(pixel_values=pixels)[0]

    @torch.inference_mode()
    def image_kv(self, states) -> list:
        """The cross-attention keys and values of all layers, as the first step of decoding computes them."""
        layers = [layer.crossattention.self for layer in self.net.text_decoder.bert.encoder.layer]
        return [(x.key(states), x.value(states)) for x in layers]

    @torch.inference_mode()
    def logits(self, pixels, ids: np.ndarray) -> np.ndarray:
        """f32[B,T,V], teacher-forced"""
        ids = torch.from_numpy(ids.astype(np.int64))
        return self.net(pixel_values=pixels, input_ids=ids, attention_mask=torch.ones_like(ids)).logits.float().numpy()

    @torch.inference_mode()
    def generate(self, pixels, prompt: list[int], **how) -> np.ndarray:
        """i64[B*n,t+tokens]: the whole of its `generate`; `how` goes to transformers."""
        ids = torch.tensor([[*prompt, self.eos]] * len(pixels))  # it cuts the last one off
        return self.net.generate(pixel_values=pixels, input_ids=ids, **how).numpy()

    @torch.inference_mode()
    def decode(self, states, prompt: list[int], **how) -> np.ndarray:
        """`generate` from image states on: image keys and values and the token loop."""
        return self.net.text_decoder.generate(
            input_ids=torch.tensor([prompt] * len(states)), encoder_hidden_states=states, eos_token_id=self.eos,
            pad_token_id=self.pad, encoder_attention_mask=torch.ones(states.shape[:2], dtype=torch.long), **how).numpy()
