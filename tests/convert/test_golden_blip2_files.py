"""Checkpoints of BLIP-2 both ways: goldens under LAVIS's and transformers' names, in tests/golden (or $GOLDEN_DIR)."""

import json
import math

import numpy as np
import pytest
from safetensors.numpy import load_file
from world import blip2 as cases
from world.convert import same_bits

from blip_jax import trees
from blip_jax.convert import hf_blip2, read, write
from blip_jax.convert.source import official

HF, LAVIS = (
    ("hf_opt", "hf_t5", "hf_itm"),
    ("stage1_eva", "stage1_clip", "stage2_opt_full", "stage2_t5_full", "instruct_t5"),
)
FAMILIES = {
    "hf_opt": "blip2_opt",
    "hf_t5": "blip2_t5",
    "hf_itm": "blip2_itm",
    "stage1_eva": "blip2",
    "stage1_clip": "blip2",
    "stage2_opt_full": "blip2_opt",
    "stage2_t5_full": "blip2_t5",
    "instruct_t5": "instruct_t5",
}


def words_of(tmp_path, case):
    """The vocabulary that a case needs, if its texts are BERT's."""
    size = cases.meta(case)["config"].get("vocab") or cases.meta(case)["config"]["qformer_config"]["vocab_size"]
    matching = FAMILIES[case] in ("blip2", "blip2_itm")
    return {"vocab": cases.vocab(tmp_path / f"{case}.txt", size)} if matching else {}


def lavis(tmp_path, case):
    """A case of LAVIS's names as it is read from a file."""
    path = cases.save(tmp_path / f"{case}.safetensors", cases.weights(case))
    return read.read(path, heads=cases.heads(case), **words_of(tmp_path, case))


def arrays(state):
    return {path: np.asarray(x) for path, x in trees.paths(state)}


# --- LAVIS ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("case", LAVIS)
def test_golden_lavis_there_and_back_has_the_same_names_and_bits(case, tmp_path):
    got, theirs = lavis(tmp_path, case), cases.weights(case)
    assert got.family == FAMILIES[case]
    same_bits(official(got), theirs)
    c, m = cases.meta(case)["config"], got.cfg.model
    assert (m.vit.kind, m.vit.depth, m.vit.heads) == (
        "clip" if "clip" in case else "eva",
        c["vdepth"],
        cases.heads(case)["vit"],
    )
    assert (m.qformer.width, m.qformer.layers, m.qformer.heads, m.qformer.mlp) == (c["tw"], c["tl"], c["th"], c["ti"])
    assert (m.qformer.queries, m.img_size, m.vision_eps) == (c["nq"], c["img"], 1e-5)
    if "llm" in cases.meta(case):
        llm = cases.meta(case)["llm"]
        assert m.llm.vocab_size == llm["vocab_size"] and m.llm.heads == cases.heads(case)["llm"]
        assert m.llm.width == llm.get("hidden_size", llm.get("d_model"))
        if m.llm.kind == "t5":
            assert (m.llm.head_dim, m.llm.buckets) == (llm["d_kv"], llm["relative_attention_num_buckets"])
        else:
            assert (m.llm.positions, m.llm.pre_norm) == (llm["max_position_embeddings"], llm["do_layer_norm_before"])


def test_golden_lavis_through_a_workdir_and_a_file_of_torch(tmp_path):
    pytest.importorskip("torch", reason="torch is not installed; pip install -e '.[convert]'")
    case, words = "stage1_eva", words_of(tmp_path, "stage1_eva")
    path = cases.save(tmp_path / "stage1.safetensors", cases.weights(case))
    write.convert(path, tmp_path / "ours", heads=cases.heads(case), **words)
    write.convert(tmp_path / "ours", tmp_path / "out.pth")
    got = read.read(tmp_path / "out.pth", heads=cases.heads(case), **words)
    same_bits(official(got), cases.weights(case))
    assert json.loads(got.cfg.model.to_json()) == json.loads(read.read(tmp_path / "ours").cfg.model.to_json())


# --- transformers -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("case", HF)
def test_golden_hf_there_and_back_has_the_same_names_and_bits(case, tmp_path, monkeypatch):
    folder, words = cases.folder(tmp_path / case, case), words_of(tmp_path, case)
    theirs, key_map, tied = cases.weights(case), cases.meta(case)["key_map"], cases.meta(case).get("tied", {})
    got = read.read(folder, **words)
    assert got.family == FAMILIES[case]

    mine, none = official(got), {"Qformer.bert.embeddings.position_ids"}
    assert mine.keys() - none == {name for name, other in key_map.items() if other is not None}
    for name, other in key_map.items():
        if other is None:
            assert name not in mine or name in none
        elif other.endswith("qkv.bias"):
            q, zeros, v = np.split(theirs[other], 3)
            assert not zeros.any()
            same_bits({name: mine[name]}, {name: v if name.endswith("v_bias") else q})
        else:
            same_bits({name: mine[name]}, {name: theirs[other]})

    monkeypatch.setattr(hf_blip2, "SHARD", sum(x.nbytes for x in theirs.values()) // 5)
    write.convert(folder, tmp_path / "ours", **words)
    write.convert(tmp_path / "ours", tmp_path / "out", to="hf", verify=True)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "out").glob("model-*.safetensors"))
    assert len(files) > 2 and set(index["weight_map"].values()) == {path.name for path in files}
    back = {}
    for path in files:
        assert {n for n, file in index["weight_map"].items() if file == path.name} == load_file(path).keys()
        back |= load_file(path)
    same_bits(back, {name: x for name, x in theirs.items() if name not in tied})  # as transformers leaves them out
    config, want = json.loads((tmp_path / "out" / "config.json").read_text()), cases.settings(case)
    for part in ("vision_config", "qformer_config", "text_config"):
        for field, value in want.get(part, {}).items():
            if "dropout" not in field and field != "eos_token_id":
                assert config[part][field] == value, (part, field)
    assert all(config[field] == want[field] for field in ("num_query_tokens", "image_token_index"))


@pytest.mark.parametrize("case", HF)
def test_golden_hf_says_the_settings(case, tmp_path):
    got, c = read.read(cases.folder(tmp_path / case, case), **words_of(tmp_path, case)), cases.meta(case)["config"]
    m, vision, qformer, text = got.cfg.model, c["vision_config"], c["qformer_config"], c.get("text_config")
    assert m.vision_eps == vision["layer_norm_eps"] and m.img_size == vision["image_size"]
    assert (m.vit.heads, m.vit.depth, m.vit.mlp) == tuple(
        vision[k] for k in ("num_attention_heads", "num_hidden_layers", "intermediate_size")
    )
    assert (m.qformer.heads, m.qformer.positions) == (
        qformer["num_attention_heads"],
        qformer["max_position_embeddings"],
    )
    if text and m.llm.kind == "t5":
        assert (m.llm.heads, m.llm.head_dim) == (text["num_heads"], text["d_kv"])
        assert m.llm.max_distance == text["relative_attention_max_distance"] and "act" not in m.llm
    elif text:
        assert (m.llm.heads, m.llm.embed_width) == (text["num_attention_heads"], text["word_embed_proj_dim"])
    else:
        assert not m.llm


def test_golden_instruct_blip_under_transformers_names(tmp_path):
    key_map, theirs, made = (
        cases.meta("instruct_t5")["hf_key_map"],
        cases.weights("instruct_t5"),
        lavis(tmp_path, "instruct_t5"),
    )
    hf_blip2.write(tmp_path / "hf", made)
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    copies = {f"language_model.{half}.embed_tokens.weight" for half in ("encoder", "decoder")}
    assert tensors.keys() == {name for name in key_map.values() if name} - copies
    for name, other in key_map.items():
        if other and other not in copies and not other.endswith("qkv.bias"):
            same_bits({other: tensors[other]}, {other: theirs[name]})
    again = read.read(tmp_path / "hf")
    assert again.family == "instruct_t5" and again.cfg.objective == "blip2_vqa"
    same_bits(arrays(again.state), arrays(made.state))


def test_golden_first_stage_as_a_folder_keeps_the_temperature(tmp_path):
    """transformers' class has no place for it: a logit_scale of -log(temp), in float64, from which it comes back."""
    made = lavis(tmp_path, "stage1_eva")
    made.state["params"]["temp"] = np.float32(0.0437)
    hf_blip2.write(tmp_path / "hf", made)
    scale = load_file(tmp_path / "hf" / "model.safetensors")["logit_scale"]
    assert math.isclose(float(scale), -math.log(0.0437), rel_tol=1e-6)
    again = read.read(tmp_path / "hf", **words_of(tmp_path, "stage1_eva"))
    assert again.family == "blip2_itm" and np.asarray(again.state["params"]["temp"]) == np.float32(0.0437)
    left = {path for path, _ in trees.paths(made.state)} - {path for path, _ in trees.paths(again.state)}
    assert left and all(path.startswith("params/qformer/lm_head/") for path in left)
