"""Checkpoints of BLIP-2: parts put together, what does not fit, and how little of one is in memory."""

import json
import tracemalloc

import numpy as np
import pytest
from safetensors.numpy import load_file
from world import blip2 as cases
from world import official
from world.convert import same_bits

from blip_jax import config, trees
from blip_jax.convert import hf_blip2, origins, read, write
from blip_jax.convert.source import official as lavis_names
from blip_jax.inference.load import read_for

HEADS = dict(vit=4, qformer=3, llm=4)


def flat(state):
    return {path: np.asarray(x) for path, x in trees.paths(state)}


def refused(*args, **how):
    with pytest.raises(ValueError) as e:
        read.read(*args, **how)
    return str(e.value)


def tokenizer(path, kind, entries=40):
    """A tokenizer.json that says no more than its kind and its words."""
    words = {f"w{i}": i for i in range(entries)}
    vocab = [[word, 0.0] for word in words] if kind == "Unigram" else words
    path.write_text(json.dumps({"model": {"type": kind, "vocab": vocab}}))
    return path


@pytest.fixture
def cut(tmp_path):
    """A function: second-stage case -> files of what LAVIS saves and of the tower, folder of the language model."""

    def make(case):
        left, tower, llm = cases.parts(case)
        folder = tmp_path / f"{case}-llm"
        folder.mkdir()
        kind = "opt" if "opt" in case else "t5"
        (folder / "config.json").write_text(json.dumps(cases.meta(case)["llm"] | {"model_type": kind}))
        cases.save(folder / "model.safetensors", llm)
        own = cases.save(tmp_path / f"{case}.safetensors", left)
        return own, cases.save(tmp_path / f"{case}-tower.safetensors", tower), folder

    return make


# --- parts ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("case", ["stage2_opt_full", "stage2_t5_full"])
def test_parts_put_together_are_the_whole(case, cut, tmp_path):
    own, tower, llm = cut(case)
    whole = read.read(cases.save(tmp_path / "whole.safetensors", cases.weights(case)), heads=HEADS)
    alone = read.read(own, heads=HEADS)
    assert alone.state["params"].keys() == {"ln_vision", "query_tokens", "qformer", "llm_proj"}
    assert [note.split(",")[0] for note in alone.notes[:2]] == [
        "the image encoder is not in the file",
        "the language model is not in the file",
    ]
    assert not alone.cfg.model.vit and not alone.cfg.model.llm  # of no published width
    got = read.read(f"{own},{tower},{llm}", heads=HEADS)
    same_bits(flat(got.state), flat(whole.state))
    with whole.cfg.unlocked():  # no file of weights shows it, a config.json does
        whole.cfg.model.llm.update({k: got.cfg.model.llm[k] for k in ("max_distance",) if k in got.cfg.model.llm})
    assert json.loads(got.cfg.to_json()) == json.loads(whole.cfg.to_json())
    assert f"image encoder from {tower}" in got.notes and f"language model from {llm}" in got.notes
    assert not any("not in the file" in note for note in got.notes)
    write.convert(f"{own}, {tower}, {llm}", tmp_path / "hf", to="hf", heads=HEADS)
    same_bits(flat(read.read(tmp_path / "hf").state), flat(whole.state))
    with pytest.raises(ValueError, match="needs all parts, and there is no image encoder and no language model: name"):
        write.convert(own, tmp_path / "no", to="hf", heads=HEADS)


def test_init_from_names_parts_and_says_where_each_comes_from(cut):
    own, tower, llm = cut("stage2_opt_full")
    cfg = config.blip2(llm="opt_tiny")
    sources = [(str(path), read.read(path, heads=HEADS)) for path in (own, tower, llm)]
    given = origins.together(cfg, sources)
    assert given.parts == {
        **dict.fromkeys(("ln_vision", "llm_proj", "qformer", "query_tokens"), str(own)),
        "vit": str(tower),
        "llm": str(llm),
    }
    # a checkpoint of this task and parts for it: nothing of it starts from another place, nothing may be missing
    assert given.start.origin("llm_proj/kernel") == "llm_proj/kernel" and not given.start.new and not given.partial


def test_a_second_stage_starts_from_a_first_one_whatever_its_words(tmp_path):
    """text.vocab is then the language model's, and the Q-Former reads no text."""
    cfg = config.blip2(llm="opt_tiny")
    with cfg.unlocked():
        cfg.text.vocab = str(tokenizer(tmp_path / "opt.json", "BPE"))
        cfg.model.vit.heads, cfg.model.qformer.heads = (cases.heads("stage1_eva")[part] for part in ("vit", "qformer"))
    path = cases.save(tmp_path / "stage1.safetensors", cases.weights("stage1_eva"))
    found = read_for(cfg, path)
    assert found.family == "blip2" and found.vocab is None
    assert "its language model" not in refused(path, vocab=cfg.text.vocab, heads=cases.heads("stage1_eva"))


def test_an_opt_of_which_the_head_is_saved_and_one_without_are_the_same(cut):
    _, _, llm = cut("stage2_opt_full")
    with_head = read.read(llm)
    assert with_head.family == "opt" and with_head.cfg.model.llm.heads == 4
    tensors = load_file(llm / "model.safetensors")
    del tensors["lm_head.weight"]
    cases.save(llm / "model.safetensors", tensors)
    same_bits(flat(read.read(llm).state), flat(with_head.state))


def test_t5s_word_table_never_comes_from_its_head(cut):
    _, _, llm = cut("stage2_t5_full")
    tensors = load_file(llm / "model.safetensors")
    words = tensors["shared.weight"]
    assert (words != tensors["lm_head.weight"]).any()
    for name in ("shared.weight", "decoder.embed_tokens.weight"):
        del tensors[name]
    cases.save(llm / "model.safetensors", tensors)
    got = read.read(llm)
    np.testing.assert_array_equal(np.asarray(got.state["params"]["llm"]["embed"]["word"]["embedding"])[:100], words)
    head = np.asarray(got.state["params"]["llm"]["lm_head"]["kernel"])
    np.testing.assert_array_equal(head[:, :100].T, tensors["lm_head.weight"])
    del tensors["encoder.embed_tokens.weight"]
    cases.save(llm / "model.safetensors", tensors)
    assert "there is no word table" in refused(llm)


def test_vocabularies_of_other_sizes_are_kept_as_they_are(cut, tmp_path):
    """The hub's OPT has 50304 rows for 50272 words, T5 32128: what the file has is what comes back."""
    own, tower, llm = cut("stage2_opt_full")
    tensors = load_file(llm / "model.safetensors")
    for name in ("model.decoder.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = np.pad(tensors[name], [(0, 28), (0, 0)], constant_values=0.5)
    cases.save(llm / "model.safetensors", tensors)
    assert "vocab_size is 100, but the weights have 128" in refused(llm)
    settings = json.loads((llm / "config.json").read_text()) | {"vocab_size": 128}
    (llm / "config.json").write_text(json.dumps(settings))
    got = read.read(f"{own},{tower},{llm}", heads=HEADS)
    assert got.cfg.model.llm.vocab_size == 128
    same_bits({"x": lavis_names(got)["opt_model.lm_head.weight"]}, {"x": tensors["lm_head.weight"]})


def test_a_whole_eva_tower_loses_its_last_block(cut):
    own, tower, _ = cut("stage2_opt_full")
    tensors = load_file(tower)
    block = {name.replace("blocks.2.", "blocks.3."): x for name, x in tensors.items() if name.startswith("blocks.2.")}
    norm = {"norm.weight": tensors["blocks.0.norm1.weight"], "norm.bias": tensors["blocks.0.norm1.bias"]}
    cases.save(tower.with_name("eva.safetensors"), tensors | block | norm)
    got = read.read(tower.with_name("eva.safetensors"), heads=HEADS)
    same_bits(flat(got.state), flat(read.read(tower, heads=HEADS).state))
    assert any("of the 4 blocks of the eva tower the first 3 are read" in note for note in got.notes)


# --- what does not fit ------------------------------------------------------------------------------------------------
def test_parts_that_do_not_fit_are_named(cut, tmp_path):
    own, tower, opt = cut("stage2_opt_full")
    other, _, t5 = cut("stage2_t5_full")
    clip = {name.removeprefix("visual_encoder."): x for name, x in cases.weights("stage1_clip").items()}
    clip = cases.save(
        tmp_path / "clip.safetensors", {n: x for n, x in clip.items() if n.startswith(("c", "p", "ln_pre", "tr"))}
    )
    heads = dict(HEADS, vit=1)
    assert "its ln_vision is for an image encoder of width 48, but" in refused(f"{own},{clip}", heads=heads)
    assert "its projection is opt_proj, for OPT, but" in refused(f"{own},{t5}", heads=HEADS)
    assert "its projection is t5_proj, for T5, but" in refused(f"{other},{opt}", heads=HEADS)
    assert "of several files one must be a checkpoint of BLIP-2" in refused(f"{tower},{opt}", heads=HEADS)
    whole = cases.save(tmp_path / "whole.safetensors", cases.weights("stage2_opt_full"))
    assert "has its image encoder itself: leave out" in refused(f"{whole},{tower}", heads=HEADS)
    # the published ones by name: ViT-L where ViT-g is due
    stage = load_file(own)
    for name, x in list(stage.items()):
        if "crossattention.self.key.weight" in name or "crossattention.self.value.weight" in name:
            stage[name] = np.zeros((x.shape[0], 1408), np.float32)
    stage |= {f"ln_vision.{leaf}": np.ones(1408, np.float32) for leaf in ("weight", "bias")}
    wide = cases.save(tmp_path / "g.safetensors", stage)
    assert "give that of eva_g" in refused(f"{wide},{clip}", heads=heads)
    assert any("settings are those of eva_g" in note for note in read.read(wide, heads=HEADS).notes)


def test_a_first_stage_file_is_no_second_stage(tmp_path):
    path = cases.save(tmp_path / "stage1.safetensors", cases.weights("stage1_eva"))
    said = refused(path, family="blip2_opt", heads=cases.heads("stage1_eva"))
    assert "holds a first-stage model of BLIP-2 (family blip2), not a second-stage model of BLIP-2 with OPT" in said


def test_the_last_row_of_the_q_formers_vocabulary_is_dec(tmp_path):
    """30522 words where 30523 are due: BERT's without [DEC]."""
    tensors, heads = cases.weights("stage1_eva"), cases.heads("stage1_eva")
    size = len(tensors["Qformer.cls.predictions.bias"])
    words = cases.vocab(tmp_path / "words.txt", size)
    for name in list(tensors):
        if name.startswith("Qformer.cls.predictions.") and name.endswith(("predictions.bias", "decoder.bias")):
            tensors[name] = tensors[name][:-1]
        elif name.endswith(("decoder.weight", "word_embeddings.weight")):
            tensors[name] = tensors[name][:-1]
    path = cases.save(tmp_path / "short.safetensors", tensors)
    assert f"has {size} entries with [DEC], but the model has {size - 1}" in refused(path, vocab=words, heads=heads)


def test_tokenizers_of_other_language_models_are_refused(tmp_path):
    t5, opt = (cases.folder(tmp_path / case, case) for case in ("hf_t5", "hf_opt"))
    bpe, pieces = tokenizer(tmp_path / "bpe.json", "BPE"), tokenizer(tmp_path / "pieces.json", "Unigram")
    assert "is OPT's byte-level BPE, but" in refused(t5, vocab=str(bpe))
    assert "is T5's SentencePiece, but" in refused(opt, vocab=str(pieces))
    assert "is BERT's WordPiece, but" in refused(opt, vocab=official.vocabulary(tmp_path / "bert.txt"))
    large = tokenizer(tmp_path / "large.json", "BPE", 101)
    assert "has 101 entries, but the language model" in refused(opt, vocab=str(large))
    tokenizer(opt / "tokenizer.json", "Unigram")
    assert "is T5's SentencePiece, but" in refused(opt)
    tokenizer(opt / "tokenizer.json", "BPE")
    assert read.read(opt).vocab == opt / "tokenizer.json"


def test_a_t5_in_float16_is_refused_and_half_a_tower_is_not(cut):
    own, tower, llm = cut("stage2_t5_full")
    cases.save(tower, {name: x.astype(np.float16) for name, x in load_file(tower).items()})
    assert any("in float16 became float32" in note for note in read.read(tower, heads=HEADS).notes)
    cases.save(
        llm / "model.safetensors", {n: x.astype(np.float16) for n, x in load_file(llm / "model.safetensors").items()}
    )
    assert "tensors of T5 are float16, in which its layers overflow" in refused(llm)


def test_a_bias_of_keys_that_is_not_zero_is_refused(tmp_path):
    tensors = cases.weights("hf_opt")
    name = "vision_model.encoder.layers.1.self_attn.qkv.bias"
    tensors[name] = tensors[name].copy()
    tensors[name][len(tensors[name]) // 3] = 1e-9
    said = refused(cases.folder(tmp_path / "drifted", "hf_opt", tensors=tensors))
    assert f"the middle third of {name}, is not zero" in said


@pytest.mark.parametrize(
    "case, part, change, said",
    [
        ("hf_opt", "", {"num_query_tokens": 6}, "num_query_tokens is 6, but the weights have 5"),
        ("hf_opt", "", {"use_decoder_only_language_model": False}, "is False, but text_config is opt"),
        ("hf_opt", "", {"architectures": ["LlavaForConditionalGeneration"]}, "known are Blip2ForConditionalGeneration"),
        ("hf_opt", "vision_config", {"layer_norm_eps": 1e-3}, "layer_norm_eps is 0.001: known are 1e-06 and 1e-05"),
        ("hf_opt", "vision_config", {"image_size": 48}, "image_size is 48 with patches of 8, but the weights have"),
        ("hf_opt", "vision_config", {"num_attention_heads": 5}, "it must divide the width 48"),
        ("hf_opt", "vision_config", {"hidden_act": "quick_gelu"}, "vision_config.hidden_act is 'quick_gelu'"),
        ("hf_opt", "qformer_config", {"cross_attention_frequency": 3}, "cross_attention_frequency is 3: the models"),
        ("hf_opt", "qformer_config", {"num_hidden_layers": 5}, "num_hidden_layers is 5, but the weights have 4"),
        ("hf_opt", "text_config", {"ffn_dim": 77}, "text_config.ffn_dim is 77, but the weights have 76"),
        ("hf_opt", "text_config", {"do_layer_norm_before": False}, "do_layer_norm_before is False, but the weights"),
        ("hf_opt", "text_config", {"activation_function": "gelu"}, "activation_function is 'gelu': the models here"),
        ("hf_opt", "text_config", {"model_type": "llama"}, "text_config.model_type is 'llama': here are opt and t5"),
        ("hf_opt", "text_config", {"model_type": [["opt"]]}, "model_type is [['opt']]: here are opt and t5"),
        ("hf_t5", "text_config", {"num_heads": 2}, "text_config.num_heads is 2, but the weights have 4"),
        ("hf_t5", "text_config", {"feed_forward_proj": "relu"}, "feed_forward_proj is 'relu': the models here have"),
        ("hf_t5", "text_config", {"tie_word_embeddings": True}, "scores of such a T5 are scaled"),
        ("hf_t5", "text_config", {"scale_decoder_outputs": True}, "scale_decoder_outputs is True: the models here"),
        ("hf_itm", "qformer_config", {"vocab_size": 129}, "qformer_config.vocab_size is 129, but the weights have 130"),
        ("hf_itm", "qformer_config", {"use_qformer_text_input": False}, "model's Q-Former reads text"),
    ],
)  # fmt: skip
def test_settings_that_contradict_weights_or_models_are_refused(case, part, change, said, tmp_path):
    settings = cases.settings(case)
    (settings[part] if part else settings).update(change)
    assert said in refused(cases.folder(tmp_path / "folder", case, settings))


def test_settings_that_are_taken_otherwise_are_said(tmp_path):
    settings = cases.settings("hf_t5")
    settings["vision_config"]["layer_norm_eps"] = 1e-5
    del settings["text_config"]["dense_act_fn"]
    settings["no_such_field"] = 7
    got = read.read(cases.folder(tmp_path / "folder", "hf_t5", settings))
    assert got.cfg.model.vision_eps == 1e-5 and got.cfg.model.llm.act == "gelu_new"
    said = " ".join(got.notes)
    assert "vision_config.layer_norm_eps is 1e-05" in said and "dense_act_fn is gelu_new" in said
    assert "image_token_index 3" in said and "no_such_field" in said


def test_weights_that_are_not_complete_are_named_by_transformers_names(tmp_path):
    tensors = cases.weights("hf_opt")
    del tensors["qformer.encoder.layer.2.crossattention.attention.key.weight"]
    tensors["more"] = np.zeros(1, np.float32)
    said = refused(cases.folder(tmp_path / "folder", "hf_opt", tensors=tensors))
    assert "missing: qformer.encoder.layer.2.crossattention.attention.key.weight" in said and "more" in said


def test_vicuna_is_not_here(tmp_path):
    tensors = {n.replace("t5_proj", "llm_proj"): x for n, x in cases.parts("instruct_t5")[0].items()}
    assert "is an InstructBLIP with Vicuna" in refused(cases.save(tmp_path / "vicuna.safetensors", tensors))


def test_there_is_no_folder_for_clip_or_a_narrow_embedding(tmp_path):
    words = cases.vocab(tmp_path / "v.txt", cases.meta("stage1_clip")["config"]["vocab"])
    path = cases.save(tmp_path / "clip.safetensors", cases.weights("stage1_clip"))
    with pytest.raises(ValueError, match="transformers' BLIP-2 has no CLIP image encoder"):
        write.convert(path, tmp_path / "out", to="hf", vocab=words, heads=cases.heads("stage1_clip"))
    assert not (tmp_path / "out").exists()


def test_a_first_stage_with_a_language_model_is_no_second_stage(cut, tmp_path):
    _, _, llm = cut("stage2_opt_full")
    tensors = {name: x for name, x in cases.weights("stage1_eva").items() if not name.startswith(cases.TOWER)}
    path = cases.save(tmp_path / "stage1.safetensors", tensors)
    said = refused(f"{path},{llm}", heads=cases.heads("stage1_eva") | {"llm": HEADS["llm"]})
    assert "has no language model, and" in said and "give a second-stage checkpoint" in said


def test_the_number_of_queries_is_that_of_the_weights(tmp_path):
    """Processors of transformers without num_query_tokens put no image into a text, or fail."""
    settings = cases.settings("hf_opt")
    queries = settings.pop("num_query_tokens")
    got = read.read(cases.folder(tmp_path / "in", "hf_opt", settings))
    assert got.cfg.model.qformer.queries == queries
    hf_blip2.write(tmp_path / "out", got)
    for name in ("config.json", "processor_config.json"):
        assert json.loads((tmp_path / "out" / name).read_text())["num_query_tokens"] == queries


# --- memory -----------------------------------------------------------------------------------------------------------
@pytest.fixture
def large(tmp_path):
    """A folder whose language model is most of it, and the bytes of that."""
    settings, tensors = cases.settings("hf_opt"), cases.weights("hf_opt")
    C, layers = 256, 4
    wide = {"embed_positions.weight": (66, C), "final_layer_norm.weight": (C,), "final_layer_norm.bias": (C,)}
    for i in range(layers):
        rows = {"fc1": (4 * C, C), "fc2": (C, 4 * C)} | {f"self_attn.{x}_proj": (C, C) for x in ("q", "k", "v", "out")}
        rows |= {norm: (C,) for norm in ("self_attn_layer_norm", "final_layer_norm")}
        for name, shape in rows.items():
            wide |= {f"layers.{i}.{name}.weight": shape, f"layers.{i}.{name}.bias": shape[:1]}
    llm = {f"language_model.model.decoder.{name}": np.ones(shape, np.float32) for name, shape in wide.items()}
    llm["language_model.model.decoder.embed_tokens.weight"] = np.ones((100, C), np.float32)
    tensors = {n: x for n, x in tensors.items() if not n.startswith("language_")} | llm
    tensors |= {
        "language_projection.weight": np.ones((C, 36), np.float32),
        "language_projection.bias": np.ones(C, np.float32),
    }
    settings["text_config"] |= dict(hidden_size=C, ffn_dim=4 * C, word_embed_proj_dim=C, num_hidden_layers=layers)
    return cases.folder(tmp_path / "large", "hf_opt", settings, tensors), sum(x.nbytes for x in llm.values())


def peak_of(function):
    """The most bytes that Python and NumPy hold while it runs."""
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_large_language_model_is_never_in_memory_twice(large, tmp_path, monkeypatch):
    """From a folder to a workdir and back: 1.3 times the largest part at most."""
    folder, part = large
    monkeypatch.setattr(hf_blip2, "SHARD", part // 4)

    def there_and_back():
        write.convert(folder, tmp_path / "ours")
        write.convert(tmp_path / "ours", tmp_path / "again", to="hf")

    peak = peak_of(there_and_back)
    assert peak < 1.3 * part, peak / part
    same_bits(flat(read.read(tmp_path / "again").state), flat(read.read(folder).state))


def test_a_file_of_torch_with_a_language_model_is_written_and_read_array_by_array(large, tmp_path):
    pytest.importorskip("torch", reason="torch is not installed; pip install -e '.[convert]'")
    (folder, part), heads = large, cases.settings("hf_opt")
    heads = {
        "vit": heads["vision_config"]["num_attention_heads"],
        "qformer": heads["qformer_config"]["num_attention_heads"],
        "llm": heads["text_config"]["num_attention_heads"],
    }

    def there_and_back():
        write.convert(folder, tmp_path / "whole.pth")
        write.convert(tmp_path / "whole.pth", tmp_path / "ours", heads=heads)

    peak = peak_of(there_and_back)
    assert peak < 0.95 * part, peak / part  # less than the language model: two stacks of its layers and their copies
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith(".arrays")] == []
    same_bits(flat(read.read(tmp_path / "ours").state), flat(read.read(folder).state))
