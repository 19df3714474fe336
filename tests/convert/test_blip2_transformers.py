"""Live against transformers' classes of BLIP-2 on random weights: their folders in, ours out, loaded by them again."""

import functools

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
from world import blip2 as cases
from world import towers
from world.convert import same_bits
from world.golden import folder

from blip_jax import trees
from blip_jax.convert import read, write

torch = pytest.importorskip("torch", reason="torch is not installed; pip install -e '.[peers]'")
transformers = pytest.importorskip("transformers", reason="transformers is not installed; pip install -e '.[peers]'")
VISION = dict(
    hidden_size=44, intermediate_size=70, num_hidden_layers=3, num_attention_heads=2, image_size=24, patch_size=8
)
QFORMER = dict(
    vocab_size=61,
    hidden_size=36,
    num_hidden_layers=4,
    num_attention_heads=3,
    intermediate_size=50,
    max_position_embeddings=40,
    encoder_hidden_size=44,
)
OPT = dict(
    model_type="opt",
    vocab_size=90,
    hidden_size=40,
    word_embed_proj_dim=40,
    num_hidden_layers=2,
    ffn_dim=56,
    num_attention_heads=4,
    max_position_embeddings=48,
)
T5 = dict(
    model_type="t5",
    vocab_size=90,
    d_model=32,
    d_kv=6,
    d_ff=48,
    num_layers=3,
    num_decoder_layers=2,
    num_heads=4,
    relative_attention_num_buckets=8,
    relative_attention_max_distance=24,
    feed_forward_proj="gated-gelu",
    dense_act_fn="gelu",
    tie_word_embeddings=False,
    decoder_start_token_id=0,
)
QUERIES, IMAGE_ID = 5, 7
MODELS = {  # name -> class, what its config has besides
    "opt": ("Blip2ForConditionalGeneration", dict(text_config=OPT)),
    "t5": ("Blip2ForConditionalGeneration", dict(text_config=T5)),
    "itm": ("Blip2ForImageTextRetrieval", dict(image_text_hidden_size=20)),
    "instruct": ("InstructBlipForConditionalGeneration", dict(text_config=T5)),
}


@functools.cache
def net_of(name):
    """transformers' model with random weights, tied and zero where the released ones are."""
    kind, more = MODELS[name]
    qformer = QFORMER | ({"use_qformer_text_input": True} if name == "itm" else {})
    config = transformers.InstructBlipConfig if name == "instruct" else transformers.Blip2Config
    given = dict(more)
    if "text_config" in given:
        given["text_config"] = dict(given["text_config"])
    settings = config(
        vision_config=dict(VISION),
        qformer_config=qformer,
        num_query_tokens=QUERIES,
        image_token_index=None if name == "itm" else IMAGE_ID,
        **given,
    )
    torch.manual_seed(0)
    net = getattr(transformers, kind)(settings).eval()
    with torch.no_grad():
        for key, x in net.named_parameters():
            x.normal_(1.0 if "norm" in key.lower() and key.endswith("weight") else 0.0, 0.1)
            if key.endswith("self_attn.qkv.bias"):
                x[len(x) // 3 : 2 * len(x) // 3] = 0
        if "t5" in str(getattr(settings, "text_config", "")) and name in ("t5", "instruct"):
            head = net.language_model.lm_head  # FlanT5's own, which the class ties by construction
            head.weight = torch.nn.Parameter(torch.randn_like(head.weight) * 0.1)
    return net


def inputs(name):
    rng = np.random.default_rng(0)
    pixels = torch.from_numpy(rng.standard_normal((2, 3, 24, 24), np.float32))
    ids = torch.from_numpy(rng.integers(8, 60, (2, 6)))
    if name == "itm":
        return dict(
            pixel_values=pixels, input_ids=ids, attention_mask=torch.ones_like(ids), use_image_text_matching_head=True
        )
    out = dict(pixel_values=pixels, input_ids=torch.cat([torch.full((2, QUERIES), IMAGE_ID), ids], dim=1))
    out |= {"decoder_input_ids": ids[:, :4]} if name != "opt" else {}
    return out | ({"qformer_input_ids": ids} if name == "instruct" else {})


def outputs(net, name, **given):
    with torch.inference_mode():
        out = net(**(given or inputs(name)))
    return (out.logits_per_image if name == "itm" else out.logits).numpy()


def words(tmp_path, name):
    return {"vocab": cases.vocab(tmp_path / "words.txt", QFORMER["vocab_size"])} if name == "itm" else {}


@pytest.mark.parametrize("name", MODELS)
def test_a_folder_of_transformers_there_and_back_gives_the_very_same_numbers(name, tmp_path, capsys):
    net = net_of(name)
    net.save_pretrained(tmp_path / "theirs", max_shard_size="100KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    write.convert(tmp_path / "theirs", tmp_path / "ours", **words(tmp_path, name))
    write.convert(tmp_path / "ours", tmp_path / "back", to="hf")
    tensors = load_file(tmp_path / "back" / "model.safetensors")
    saved = {}
    for path in (tmp_path / "theirs").glob("*.safetensors"):
        saved |= load_file(path)
    tied = {key for key in saved.keys() - tensors.keys() if key.endswith(("embed_tokens.weight", "lm_head.weight"))}
    same_bits(tensors, {key: x for key, x in saved.items() if key not in tied})
    again, report = type(net).from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    np.testing.assert_array_equal(outputs(again.eval(), name), outputs(net, name))

    got = read.read(tmp_path / "theirs", **words(tmp_path, name))
    m = got.cfg.model
    assert (m.vit.heads, m.vit.depth, m.qformer.heads, m.qformer.queries, m.img_size) == (2, 3, 3, QUERIES, 24)
    if name in ("t5", "instruct"):
        assert (m.llm.layers, m.llm.decoder_layers, m.llm.head_dim, m.llm.max_distance) == (3, 2, 6, 24)
    # what is not read is said, and of what transformers writes itself it is little
    ignored = [note for note in got.notes if "ignored" in note]
    assert len(ignored) <= 1 and all("num_" not in note and "size" not in note for note in ignored), ignored


def test_golden_folders_that_we_write_give_transformers_numbers(tmp_path):
    for case, key in (("hf_opt", "logits"), ("hf_itm", "itm_logits")):
        size = cases.settings(case)["qformer_config"]["vocab_size"]
        vocab = {"vocab": cases.vocab(tmp_path / "v.txt", size)} if case == "hf_itm" else {}
        write.convert(cases.folder(tmp_path / case, case), tmp_path / f"{case}-out", to="hf", **vocab)
        net = getattr(transformers, cases.CLASSES[case]).from_pretrained(tmp_path / f"{case}-out").eval()
        io = np.load(folder(f"blip2/{case}") / "io.npz")
        text = {name: torch.from_numpy(io[name]) for name in ("input_ids", "attention_mask")}
        if case == "hf_opt":
            queries = cases.settings(case)["num_query_tokens"]
            assert io["logits"].shape[1] == io["input_ids"].shape[1] + queries
            image = torch.full((len(io["input_ids"]), queries), cases.settings(case)["image_token_index"])
            text["input_ids"] = torch.cat([image, text["input_ids"]], dim=1)
            text["attention_mask"] = torch.cat([torch.ones_like(image), text["attention_mask"]], dim=1)
        else:
            text["use_image_text_matching_head"] = True
        got = outputs(net, case.removeprefix("hf_"), pixel_values=torch.from_numpy(io["image"]), **text)
        if case == "hf_opt":  # compared where there is text or an image
            got = got * text["attention_mask"].numpy()[..., None]
        np.testing.assert_allclose(got, io[key], rtol=0, atol=2e-5)


def test_language_models_alone_come_from_their_own_folders(tmp_path):
    for name, kind in (("opt", "OPTForCausalLM"), ("t5", "T5ForConditionalGeneration")):
        settings = dict(OPT if name == "opt" else T5)
        settings.pop("model_type")
        torch.manual_seed(1)
        net = getattr(transformers, kind)(getattr(transformers, f"{name.upper()}Config")(**settings))
        net.save_pretrained(tmp_path / name)
        got = read.read(tmp_path / name)
        assert got.family == name and got.state["params"].keys() == {"llm"}
        assert got.cfg.model.llm.kind == name and got.cfg.model.llm.heads == 4
        words = np.asarray(dict(trees.paths(got.state))["params/llm/embed/word/embedding"])
        assert words.shape[0] == 128
        np.testing.assert_array_equal(words[:90], net.get_input_embeddings().weight.detach().numpy())


@pytest.mark.parametrize("kind", ["CLIPModel", "CLIPVisionModel"])
def test_clip_gives_the_states_before_its_last_block(kind, tmp_path):
    sizes = dict(hidden_size=128, intermediate_size=96, num_hidden_layers=3, num_attention_heads=2)
    vision = transformers.CLIPVisionConfig(**sizes, image_size=24, patch_size=8)
    text = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=49408)
    settings = vision
    if kind == "CLIPModel":
        settings = transformers.CLIPConfig(vision_config=vision.to_dict(), text_config=text, projection_dim=8)
    torch.manual_seed(0)
    net = getattr(transformers, kind)(settings).eval()
    with torch.no_grad():
        for x in net.parameters():
            x += 0.1 * torch.randn_like(x)
    net.save_pretrained(tmp_path / "clip")
    got = read.read(tmp_path / "clip")
    params = {path: np.asarray(x) for path, x in trees.paths(got.state["params"]["vit"])}
    m = got.cfg.model
    assert (m.vit.depth, m.vit.heads, m.img_size) == (2, 2, 24)
    pixels = inputs("itm")["pixel_values"]
    with torch.inference_mode():
        tower = net.vision_model if kind == "CLIPModel" else net
        want = tower(pixel_values=pixels, output_hidden_states=True).hidden_states[-2].numpy()
    vit = towers.of_shapes("clip", trees.nest(params.items()), 2, 24)
    out = jax.jit(vit.apply)({"params": trees.nest(params.items())}, towers.pixels(pixels.numpy()))
    np.testing.assert_allclose(out, want, rtol=0, atol=2e-5)
