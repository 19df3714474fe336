"""transformers' BLIP captioner with our weights, the peer of `bench/caption.py`; needs torch and transformers."""

from __future__ import annotations

from typing import Mapping

import numpy as np
import torch
from transformers import BlipConfig, BlipForConditionalGeneration, BlipForImageTextRetrieval, BlipForQuestionAnswering

from blip_jax.convert.apply import to_torch
from blip_jax.convert.hf import to_hf
from blip_jax.convert.hf_config import model_json
from blip_jax.models.vit import PIXEL_MEAN, PIXEL_STD

CLASSES = {"caption": BlipForConditionalGeneration, "itm": BlipForImageTextRetrieval, "vqa": BlipForQuestionAnswering}


def peer_config(model, *, eos: int, pad: int) -> BlipConfig:
    """The sizes of our `cfg.model`, with the constants of the original where transformers' defaults differ (heads, eps)."""
    return BlipConfig.from_dict(model_json("caption", model, sep=eos, pad=pad))


class Peer:
    """BlipForConditionalGeneration with the parameters of our captioner, on the CPU, and its parts as functions of arrays.

    Args: model: our `cfg.model`; params: nested dict of f32 arrays; dtype: float32 | bfloat16; eos, pad: ids that end and fill.
    Raises: RuntimeError (torch's) if a tensor is missing, left over or misshapen.
    """

    def __init__(self, model, params: Mapping, dtype: str, *, eos: int, pad: int):
        tensors = to_torch("caption", {"params": params}, vocab_size=model.med.vocab_size)
        self.net = BlipForConditionalGeneration(peer_config(model, eos=eos, pad=pad)).eval()
        self.net.load_state_dict({to_hf(k): torch.from_numpy(np.array(x)) for k, x in tensors.items()}, strict=True)
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


@torch.inference_mode()
def outputs(family: str, model, params: Mapping, img: np.ndarray, ids: np.ndarray) -> dict[str, np.ndarray]:
    """What transformers' model of a family (a key of CLASSES) with our parameters makes of random input: name -> f32.

    model: our `cfg.model`; img: normalised f32[B,S,S,3]; ids: i32[B,T], all real; decoders begin with [DEC] in their place.
    """
    tensors = to_torch(family, {"params": params}, vocab_size=model.med.vocab_size)
    net = CLASSES[family](BlipConfig.from_dict(model_json(family, model, sep=0, pad=0))).eval()
    missing, unexpected = net.load_state_dict({to_hf(k): torch.from_numpy(x) for k, x in tensors.items()}, strict=False)
    if missing or any("decoder.weight" not in k and "decoder.bias" not in k for k in unexpected):
        raise ValueError(f"transformers' {type(net).__name__} lacks {missing} and does not know {unexpected}")
    pixels, ids = torch.from_numpy(np.ascontiguousarray(img.transpose(0, 3, 1, 2))), torch.from_numpy(ids.astype(np.int64))
    decoded = torch.cat([torch.full_like(ids[:, :1], model.med.vocab_size - 2), ids[:, 1:]], dim=1)
    mask = torch.ones_like(ids)
    if family == "caption":
        out = {"caption logits": net(pixel_values=pixels, input_ids=decoded, attention_mask=mask).logits[:, :-1]}
    elif family == "itm":
        score = lambda head: net(pixel_values=pixels, input_ids=ids, attention_mask=mask, use_itm_head=head)[0]
        out = {"matching logits": score(True), "cosines": score(False)}
    else:
        img_tok = net.vision_model(pixel_values=pixels)[0]
        states = net.text_encoder(input_ids=ids, attention_mask=mask, encoder_hidden_states=img_tok)[0]
        answers = net.text_decoder(input_ids=decoded, attention_mask=mask, encoder_hidden_states=states)
        out = {"question states": states, "answer logits": answers.logits[:, :-1]}
    return {name: x.numpy() for name, x in out.items()}
