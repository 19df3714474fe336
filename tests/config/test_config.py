"""validate(): every problem at once, each with its remedy; the files in configs/ are valid."""

import inspect
import pathlib
import re
import runpy

import pytest

from blip_jax.capfilt import settings
from blip_jax.config import base, layer_decay, source
from blip_jax.data.text.wordpiece import Tokenizer
from blip_jax.tasks import validate

CAPTION = {"objective": "caption"}
CONFIGS = pathlib.Path(__file__).parents[2] / "configs"


def changed(cfg, changes):
    for path, value in changes.items():
        *parents, leaf = path.split(".")
        node = cfg
        for name in parents:
            node = node[name]
        node[leaf] = value
    return cfg


def words(cfg) -> Tokenizer:
    return Tokenizer(cfg.text.vocab)


def test_the_tiny_config_is_valid(tiny_cfg):
    validate(tiny_cfg, words(tiny_cfg), 1, 8)
    validate(changed(tiny_cfg, {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2}), words(tiny_cfg), 2, 8)


def test_a_captioner_is_valid_also_with_micro_batches_of_one(tiny_cfg):
    tiny_cfg.text.prompt = "a picture of "
    validate(changed(tiny_cfg, CAPTION), words(tiny_cfg), 1, 8)
    tiny_cfg.optim.accumulate = 16
    tiny_cfg.mesh.data = 1
    validate(tiny_cfg, words(tiny_cfg), 1, 1)
    with pytest.raises(ValueError, match="a micro-batch needs 2 examples"):
        validate(changed(tiny_cfg, {"objective": "pretrain", "text.prompt": ""}), words(tiny_cfg), 1, 1)


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"objective": "vqa2"}, ["objective is 'vqa2'", "caption, dialog, language, nlvr"]),
        ({"model.dtype": "f16"}, ["model.dtype is 'f16'", "bfloat16, float32"]),
        ({"model.remat": "all"}, ["model.remat", "none, dots, full"]),
        ({"optim.schedule": "linear"}, ["optim.schedule is 'linear'"]),
        ({"train.steps": 0}, ["train.steps is 0: it must be at least 1"]),
        ({"train.batch": 20, "loss.queue": 40}, ["train.batch is 20", "multiple of 8", "16 or 24"]),
        (
            {"train.batch": 24, "loss.queue": 48, "optim.accumulate": 2},
            ["train.batch is 24", "multiple of 16", "16 or 32"],
        ),
        ({"mesh.data": 3}, ["(3, 1, 1)", "8 are here"]),
        ({"mesh.data": -1, "mesh.fsdp": -1}, ["at most one of them is -1"]),
        ({"mesh.tensor": 3}, ["mesh", "8 are here"]),
        ({"loss.queue": 40}, ["loss.queue is 40", "train.batch = 16", "32 or 48"]),
        ({"loss.momentum": False}, ["loss.queue is 32", "loss.queue=0 or loss.momentum=True"]),
        ({"loss.group_size": 5}, ["loss.group_size is 5", "4 or 8"]),
        ({"loss.negatives": "all"}, ["loss.negatives is 'all': choose group or batch"]),
        ({"loss.negatives": "batch"}, ["objective is pretrain: only retrieval", "set loss.negatives=group"]),
        ({"loss.group_size": 1}, ["loss.group_size is 1", "at least 2"]),
        ({"model.img_size": 20}, ["model.img_size is 20", "16 or 24"]),
        ({"model.vit.heads": 5}, ["model.vit.width is 48", "45 or 50"]),
        ({"model.med.heads": 5}, ["model.med.width is 32", "30 or 35"]),
        ({"model.med.vocab_size": 130}, ["model.med.vocab_size=120"]),
        ({"text.max_len": 41}, ["text.max_len is 41", "model.med.positions = 40"]),
        ({"text.vocab": ""}, ["text.vocab is empty", "blip-jax vocab"]),
        ({"data.train.world.weight": 0.0}, ["data.train.world.weight is 0.0"]),
        ({"data.train.world.kind": "xlsx"}, ["data.train.world.kind is 'xlsx'"]),
        ({"data.train.world.kind": "json"}, ["data.train.world.path is empty"]),
        ({"data.train.world.count": 0}, ["data.train.world.count is 0"]),
        ({"data.crop_scale": (0.9, 0.2)}, ["data.crop_scale is (0.9, 0.2)"]),
        ({"data.max_bad_share": 1.5}, ["data.max_bad_share is 1.5", "between 0 and 1"]),
        ({"optim.lr": 0.0}, ["optim.lr is 0.0: it must be positive"]),
        ({"seed": -1}, ["seed is -1: it must not be negative"]),
        ({"optim.b2": 1.0}, ["optim.b2 is 1.0", "below 1"]),
        ({"optim.freeze": ("vit/(",)}, ["optim.freeze holds 'vit/('"]),
        ({"optim.lr_factors": (("vit/(", 0.1),)}, ["optim.lr_factors holds 'vit/('"]),
        ({"optim.lr_factors": (("vit/.*", 0),)}, ["optim.lr_factors has 0 for 'vit/.*'", "name them in optim.freeze"]),
        ({"optim.lr_factors": (("vit/.*", (0.5, -1.0)),)}, ["optim.lr_factors has (0.5, -1.0) for 'vit/.*'"]),
        ({"optim.lr_factors": ("vit/.*", 0.1)}, ["give (regex, factor) pairs"]),
        ({"optim.lr_factors": ("ab", 0.1)}, ["give (regex, factor) pairs"]),
        ({"optim.lr_factors": (("vit/.*", "0.1"),)}, ["optim.lr_factors has '0.1' for 'vit/.*'", "positive numbers"]),
        ({"optim.freeze": ("vit/.*", 1)}, ["optim.freeze holds 1, which is no regular expression"]),
        ({"data.crop_scale": ("0.2", 1.0)}, ["data.crop_scale is ('0.2', 1.0)"]),
        ({"train.keep_best": True}, ["train.keep_best is set, but objective pretrain has no rule"]),
        ({"train.keep_every": -1}, ["train.keep_every is -1: it must not be negative"]),
        ({"train.keep_every": 4}, ["train.keep_every is 4", "every 3 steps (train.save_every)", "as 3 or 6"]),
        ({**CAPTION, "text.prompt": "a picture of"}, ["text.prompt is 'a picture of'", "end it with a space"]),
        ({"text.prompt": "a picture of "}, ["text.prompt is 'a picture of ' but objective is pretrain"]),
    ],
)
def test_each_problem_names_value_and_remedy(tiny_cfg, changes, expected):
    tokenizer = words(tiny_cfg)
    with pytest.raises(ValueError) as e:
        validate(changed(tiny_cfg, changes), tokenizer, 1, 8)
    assert str(e.value).startswith("the config has 1 problem:\n"), e.value
    for part in expected:
        assert part in str(e.value)


def test_all_problems_are_listed_at_once(tiny_cfg):
    changes = {
        "train.steps": -1,
        "loss.queue": 31,
        "model.img_size": 20,
        "text.max_len": 99,
        "optim.schedule": "linear",
        "optim.lr": -1.0,
        "text.prompt": "a ",
    }
    cfg = changed(tiny_cfg, changes)
    with cfg.data.unlocked():
        del cfg.data.train["world"]
    with pytest.raises(ValueError) as e:
        validate(cfg, words(cfg), 1, 8)
    assert str(e.value).startswith("the config has 8 problems:")
    for part in (*changes, "data.train is empty"):
        assert f"  {part}" in str(e.value)


def test_processes_divide_the_batch(tiny_cfg):
    with pytest.raises(ValueError, match="3 processes"):
        validate(changed(tiny_cfg, {"train.batch": 16, "mesh.data": 3}), words(tiny_cfg), 3, 3)


RUNS = [
    (path.stem, argument)
    for path in sorted(CONFIGS.glob("*.py"))
    # name of the file, what stands after the colon
    for argument in runpy.run_path(str(path)).get("ARGUMENTS", ("",))
]


def load(name, argument=""):
    return runpy.run_path(str(CONFIGS / f"{name}.py"))["get_config"](*[argument] * bool(argument))


@pytest.mark.parametrize("name, argument", RUNS)
def test_configs_are_valid_and_documented(name, argument):
    cfg = load(name, argument)
    assert cfg.is_locked
    if name == "capfilt":
        settings.validate(cfg)
    else:
        if not cfg.text.vocab:  # the demo trains it
            cfg.text.vocab = "vocab.txt"
        validate(cfg, None, 1, 1)
    header = (CONFIGS / f"{name}.py").read_text(encoding="utf-8").split('"""')[1]
    for part in ("Command", "Data", argument):
        assert part in header, f"{name}.py: its header lacks {part}"
    assert f"`{name}.py{':' * bool(argument)}{argument}`" in (CONFIGS / "README.md").read_text(encoding="utf-8")


def wrong_arguments():
    """(name of a file, argument that it has not); "" is none, of files that have one of their own then."""
    for name in sorted({name for name, argument in RUNS if argument}):
        get_config = runpy.run_path(str(CONFIGS / f"{name}.py"))["get_config"]
        own = inspect.signature(get_config).parameters["argument"].default
        wrong = ["vith"] if own else ["", "vith"]
        yield from [(name, argument) for argument in wrong if (name, argument) not in RUNS]


@pytest.mark.parametrize("name, argument", list(wrong_arguments()))
def test_a_wrong_argument_is_answered_with_the_right_ones(name, argument):
    first = next(right for run, right in RUNS if run == name)
    with pytest.raises(ValueError, match=f"configs/{name}.py has no run '{argument}': give one of .*:{first}"):
        load(name, argument)


def test_paper_configs_have_the_papers_numbers():
    """BLIP paper, section 4.1: batch 2880 (B) and 2400 (L), learning rate 3e-4 and 2e-4, 20 epochs, decay 0.05."""
    for argument, batch, lr, width in (
        ("vitb,14m", 2880, 3e-4, 768),
        ("vitb,129m", 2880, 3e-4, 768),
        ("vitl,129m", 2400, 2e-4, 1024),
    ):
        c = load("pretrain", argument)
        assert (c.train.batch, c.optim.lr, c.model.vit.width, c.model.img_size) == (batch, lr, width, 224)
        assert (c.loss.queue, c.optim.weight_decay, c.optim.schedule) == (57600, 0.05, "epoch_decay")
        assert c.train.steps == 20 * (c.data.epoch_examples // batch)


def test_every_row_of_the_papers_tables_starts_from_its_own_pretraining():
    """BLIP paper, tables 5, 7 and 8: 14M and 129M bootstrapped by ViT-B, 129M by ViT-L, and ViT-L."""
    rows = ["vitb,14m,bootstrapped", "vitb,129m,bootstrapped", "vitb,129m,capfilt_l"]
    for name, mine in (("retrieval_coco", 1), ("retrieval_flickr", 1), ("caption_coco", 1), ("vqa", 0), ("nlvr", 0)):
        for argument in rows + ["vitl,129m,capfilt_l"] * mine:
            c, first = load(name, argument), load("pretrain", argument)
            assert c.train.init_from == f"runs/pretrain_{argument.replace(',', '_')}"
            assert (c.model.vit, c.model.med) == (first.model.vit.copy_and_resolve_references(), first.model.med)
    assert load("vqa") == load("vqa", rows[2]) and load("nlvr") == load("nlvr", rows[1])


@pytest.mark.parametrize("size, lr_caption, lr_filter, batch_filter", [("b", 1e-5, 1e-5, 256), ("l", 2e-6, 5e-6, 256)])
def test_fine_tuning_configs_have_the_papers_numbers(size, lr_caption, lr_filter, batch_filter):
    """BLIP paper, appendix, and configs/caption_coco.yaml, retrieval_coco.yaml of the published code."""
    captioner, judge = load("caption_coco", f"vit{size}"), load("retrieval_coco", f"vit{size}")
    assert (captioner.optim.lr, captioner.train.batch, captioner.text.max_len) == (lr_caption, 256, 40)
    assert (judge.optim.lr, judge.train.batch, judge.text.max_len) == (lr_filter, batch_filter, 35)
    assert (judge.loss.group_size, judge.loss.negatives) == ({"b": 32, "l": 16}[size], "batch")
    flickr = load("retrieval_flickr", {"b": "vitb,129m,bootstrapped", "l": "vitl,129m,capfilt_l"}[size])
    assert (flickr.loss.group_size, flickr.loss.negatives) == (judge.loss.group_size, "group")
    assert (captioner.text.prompt, captioner.loss.smoothing_over, judge.eval.k) == ("a picture of ", "all", 256)
    for c, epochs in ((captioner, 5), (judge, 6)):
        assert (
            c.model.img_size == 384
            and c.optim.schedule == "epoch_cosine"
            and c.optim.min_lr == c.optim.warmup_steps == 0
        )
        assert c.train.steps == epochs * (566_747 // c.train.batch) and c.data.crop_scale == (0.5, 1.0)
        assert c.model.vit.width == {"b": 768, "l": 1024}[size]


def test_capfilt_takes_what_the_fine_tuning_configs_make():
    header = lambda name: (CONFIGS / f"{name}.py").read_text(encoding="utf-8").split('"""')[1]
    c = load("capfilt")
    assert f"--workdir={c.captioner}\n" in header("caption_coco")
    assert f"--workdir={c.filter}\n" in header("retrieval_coco")
    assert c.text.prompt == load("caption_coco", "vitb").text.prompt
    assert (c.method.kind, c.method.top_p, c.threshold) == ("nucleus", 0.9, 0.5)


@pytest.mark.parametrize("name, first", [("14m,bootstrapped", "14m"), ("129m,capfilt_l", "129m")])
def test_the_second_round_reads_shards_and_gives_every_pair_the_same_weight(name, first):
    c, before = load("pretrain", f"vitb,{name}"), load("pretrain", f"vitb,{first}")
    weights = {source: s.weight for source, s in c.data.train.items()}
    assert sum(weights.values()) == c.data.epoch_examples == pytest.approx(c.train.steps * c.train.batch / 20, rel=1e-3)
    kinds = {path.rsplit("/", 1)[1] for s in c.data.train.values() if "/shards/*/" in (path := s.path)}
    assert kinds == {"web.array_record", "synthetic.array_record"}
    assert weights["coco"] / weights["vg"] == pytest.approx(567 / 769, rel=1e-3)
    for part in ("model", "text", "loss", "optim"):
        assert c[part] == before[part], part


def test_unknown_leaves_are_errors():
    c = base("tiny")
    with pytest.raises(AttributeError, match="momentun"):
        c.loss.momentun = True
    with pytest.raises(ValueError, match="wieght"):
        source("json", "x.json", wieght=2)
    with pytest.raises(ValueError, match="huge"):
        base("huge")


def test_layer_decay_shrinks_towards_the_input():
    (blocks, factors), (embedding, least) = layer_decay(0.5, 3)
    assert factors == (0.125, 0.25, 0.5) and least == 0.0625
    assert re.fullmatch(blocks, "vit/blocks/mlp/fc1/kernel") and not re.fullmatch(blocks, "vit/ln_post/scale")
    assert all(re.fullmatch(embedding, f"vit/{name}") for name in ("cls", "pos_embed", "patch_embed/kernel"))
