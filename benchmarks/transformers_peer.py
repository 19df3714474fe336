"""transformers' BLIP with our weights, the peer of captioning, filter and vision tower; needs torch and
transformers."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
import transformers  # whose classes take seconds to import, when they are first asked for

from blip_jax.convert.apply import to_torch
from blip_jax.convert.hf import to_hf
from blip_jax.convert.hf_config import model_json
from blip_jax.models.vision.vit import PIXEL_MEAN, PIXEL_STD


def peer_config(model, *, eos: int, pad: int) -> transformers.BlipConfig:
    """The sizes of our `cfg.model`, with the constants of the original where transformers' defaults differ (heads,
    eps)."""
    return transformers.BlipConfig.from_dict(model_json("caption", model, sep=eos, pad=pad))


class Peer:
    """BlipForConditionalGeneration with the parameters of our captioner, on the CPU or the GPU, and its parts as
    functions of arrays, which return when their work is done.

    Args: model: our `cfg.model`; params: nested dict of f32 arrays; dtype: float32 | bfloat16; eos, pad: ids that end
      and fill.
    Raises: RuntimeError (torch's) if a tensor is missing, left over or misshapen.
    """

    def __init__(self, model, params: Mapping, dtype: str, *, eos: int, pad: int):
        tensors = to_torch("caption", {"params": params}, vocab_size=model.med.vocab_size)
        self.net = transformers.BlipForConditionalGeneration(peer_config(model, eos=eos, pad=pad)).eval()
        self.net.load_state_dict({to_hf(k): torch.from_numpy(np.array(x)) for k, x in tensors.items()}, strict=True)
        self.device, self.eos, self.pad = _device(), eos, pad
        self.net = self.net.to(self.device, getattr(torch, dtype))

    def pixels(self, img: np.ndarray) -> torch.Tensor:
        """u8[B,S,S,3] -> normalised [B,3,S,S] in the model's dtype"""
        return _pixels(img).to(self.device, self.net.dtype)

    @torch.inference_mode()
    def vision(self, pixels) -> torch.Tensor:
        """[B,3,S,S] -> image states [B,P,D]"""
        return _done(self.net.vision_model(pixel_values=pixels)[0])

    @torch.inference_mode()
    def image_kv(self, states) -> list:
        """The cross-attention keys and values of all layers, as the first step of decoding computes them."""
        layers = [layer.crossattention.self for layer in self.net.text_decoder.bert.encoder.layer]
        return _done([(x.key(states), x.value(states)) for x in layers])

    @torch.inference_mode()
    def logits(self, pixels, ids: np.ndarray) -> np.ndarray:
        """f32[B,T,V], teacher-forced"""
        ids = torch.from_numpy(ids.astype(np.int64)).to(self.device)
        out = self.net(pixel_values=pixels, input_ids=ids, attention_mask=torch.ones_like(ids))
        return out.logits.float().cpu().numpy()

    @torch.inference_mode()
    def generate(self, pixels, prompt: list[int], **how) -> np.ndarray:
        """i64[B*n,t+tokens]: the whole of its `generate`; `how` goes to transformers."""
        ids = torch.tensor([[*prompt, self.eos]] * len(pixels), device=self.device)  # it cuts the last one off
        return self.net.generate(pixel_values=pixels, input_ids=ids, **how).cpu().numpy()

    @torch.inference_mode()
    def decode(self, states, prompt: list[int], **how) -> np.ndarray:
        """`generate` from image states on: image keys and values and the token loop."""
        ids = self.net.text_decoder.generate(
            input_ids=torch.tensor([prompt] * len(states), device=self.device),
            encoder_hidden_states=states,
            eos_token_id=self.eos,
            pad_token_id=self.pad,
            encoder_attention_mask=torch.ones(states.shape[:2], dtype=torch.long, device=self.device),
            **how,
        )
        return ids.cpu().numpy()


class Matcher:
    """BlipForImageTextRetrieval with the parameters of our `Blip`, on the CPU or the GPU, and its parts as functions of
    arrays.

    Args: model: our `cfg.model`; params: nested dict of f32 arrays; dtype: float32 | bfloat16; threads: of torch, 0:
      its own choice.
    Raises: RuntimeError (torch's) if a tensor is missing, left over or misshapen.
    """

    def __init__(self, model, params: Mapping, dtype: str, threads: int = 0):
        if threads:
            torch.set_num_threads(threads)
        self.device = _device()
        tensors = to_torch("itm", {"params": params}, vocab_size=model.med.vocab_size)
        self.net = transformers.BlipForImageTextRetrieval(
            transformers.BlipConfig.from_dict(model_json("itm", model, sep=0, pad=0))
        ).eval()
        self.net.load_state_dict({to_hf(k): torch.from_numpy(np.array(x)) for k, x in tensors.items()}, strict=True)
        self.net, self.enc_id = self.net.to(self.device, getattr(torch, dtype)), model.med.vocab_size - 1

    def inputs(self, batch: Mapping) -> dict[str, torch.Tensor]:
        """A batch of `blip_jax.bench.inference` on the device, texts as rows b*G + g."""
        out = {"img": _pixels(batch["img"]).to(self.net.dtype)}
        for name in ("ids", "txt_mask") if "ids" in batch else ():
            out[name] = torch.from_numpy(batch[name].reshape(-1, batch[name].shape[-1]).astype(np.int64))
        return {name: x.to(self.device) for name, x in out.items()}

    def job(self, workload: str, inputs: dict) -> Callable:
        """A call that gives the outputs when they are done: encode {"states"}, filter {"itm", "itc"} after one
        pass of the vision tower."""
        work = {"encode": self._encode, "filter": self._filter}[workload]

        @torch.inference_mode()
        def run():
            return _done(work(**inputs))

        return run

    def _encode(self, img):
        return {"states": self.net.vision_model(pixel_values=img)[0]}

    def _filter(self, img, ids, txt_mask):
        net, (states,) = self.net, self._encode(img).values()
        texts = len(ids) // len(img)
        # as trained; its forward leaves [CLS]
        grounded = torch.cat([torch.full_like(ids[:, :1], self.enc_id), ids[:, 1:]], dim=1)
        repeated = states.repeat_interleave(texts, dim=0)
        seen = net.text_encoder(input_ids=grounded, attention_mask=txt_mask, encoder_hidden_states=repeated)[0]
        own = net.text_encoder(input_ids=ids, attention_mask=txt_mask)[0]
        unit = lambda x: torch.nn.functional.normalize(x, dim=-1)
        img_emb, txt_emb = unit(net.vision_proj(states[:, 0])), unit(net.text_proj(own[:, 0]))
        return {
            "itm": net.itm_head(seen[:, 0]).softmax(-1)[:, 1].reshape(-1, texts),
            "itc": torch.einsum("bge,be->bg", txt_emb.reshape(-1, texts, txt_emb.shape[-1]), img_emb),
        }


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _done(out):
    """`out`, when the GPU has computed it."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return out


def _pixels(img: np.ndarray) -> torch.Tensor:
    """u8[B,S,S,3] -> normalised f32[B,3,S,S]"""
    x = (img.astype(np.float32) / 255.0 - np.float32(PIXEL_MEAN)) / np.float32(PIXEL_STD)
    return torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))
