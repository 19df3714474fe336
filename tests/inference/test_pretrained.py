"""A model in two lines: what the verbs give is what the model gives, whatever the batch, the padding and the mesh."""

import functools
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image
from world.pictures import encode
from world.verbs import QUESTIONS, TEXTS, apply, close, folder, models, photos, seen, tokens  # noqa: F401 (fixtures)

import blip_jax
from blip_jax.convert import hub
from blip_jax.data import image
from blip_jax.data.text.clean import clean_question
from blip_jax.decode import beam
from blip_jax.inference import batching, programs, verbs
from blip_jax.parallel import sharding


def test_caption_is_the_captioner_s_own(models):
    model, imgs = models("caption"), photos(5)
    how, start = (
        programs.Method("beam", 2, repetition_penalty=1.0, max_length=12),
        len(programs.prompt_ids(model.tokenizer, "a small ")),
    )
    make = jax.jit(programs.captioner(model.model, model.tokenizer, "a small ", how))
    found = model.caption(imgs, 2, max_length=12)
    for img, own in zip(imgs, found):
        got = make(model.params, image.eval_transform(Image.fromarray(img), 16)[None], np.zeros((1, 2), np.uint32))
        assert [c["caption"] for c in own] == [programs.text_of(model.tokenizer, row, start) for row in got["ids"][0]]
        close([c["log_prob"] for c in own], got["log_prob"][0])
    assert model.caption(imgs[0], 2, max_length=12)[0]["caption"] == found[0][0]["caption"]
    assert len({own[0]["caption"] for own in found}) > 1, "the pictures do not matter: this test shows nothing"


def test_prompts_are_as_trained_or_as_given(models):
    captioner, both = models("caption"), models("pretrain")
    img, how = photos(1)[0], {"max_length": 14, "min_length": 12}
    for model, own, other in ((captioner, "a small ", "a large "), (both, "a picture of ", "")):
        assert (
            model.caption(img, **how)
            == model.caption(img, prompt=own, **how)
            != model.caption(img, prompt=other, **how)
        )


def test_sampled_captions_depend_on_picture_and_seed_alone(models):
    model, imgs = models("caption"), photos(3)
    make = lambda images, seed=0: model.caption(images, 2, "nucleus", seed=seed)
    words = lambda found: [[c["caption"] for c in own] for own in found]
    first = words(make(imgs))
    assert words(make(imgs[::-1]))[::-1] == first and words([make(imgs[1])]) == first[1:2]
    assert words(make([imgs[0], encode(Image.fromarray(imgs[0]), "PNG")])) == [first[0]] * 2
    assert words(make(imgs, seed=1)) != first and first[0][0] != first[0][1]


@pytest.mark.parametrize(
    "how, expected",
    [
        (dict(method="greedy"), "method is greedy: choose beam or nucleus"),
        (dict(n=4), "n is 4: 3 beams give at most so many; raise beams"),
        (
            dict(n=0, top_p=0.0, method="nucleus", temperature=-1),
            "n is 0: .*; top_p is 0.0: .*; temperature is -1: it must be positive",
        ),
        (dict(length_penalty=np.nan), "length_penalty is nan: give a finite number"),
        (dict(length_penalty=11), "length_penalty is 11: it must lie between -10 and 10"),
        (dict(n=10**9, method="nucleus"), "n is 1000000000: at most 256 texts of an image"),
        (dict(beams=10**6), "beams is 1000000: at most 64 are searched"),
        (dict(beams=2000, n=2000), "n is 2000: at most 256.*; beams is 2000: at most 64"),
        (dict(n=10**5000), "n is a number of thousands of digits: at most 256"),
        (dict(n=1.5), "n is 1.5: give a whole number"),
        (dict(n="2"), "n is '2': give a whole number"),
        (dict(top_k=1.5), "top_k is 1.5: give a whole"),
        (dict(top_p="0.9"), "top_p is '0.9': give a finite number"),
        (dict(temperature=None), "temperature is None: give a finite"),
        (dict(temperature=1e-30), "temperature is 1e-30: give 1e-06 or more"),
        (dict(max_length="20"), "max_length is '20'"),
        (dict(seed=1.5), "seed is 1.5: give a whole number"),
        (dict(seed="a", method="nucleus"), "seed is 'a'"),
        (dict(seed=None), "seed is None"),
        (dict(seed=1 << 64), "seed is 18446744073709551616: give one of at most 64 bits"),
        (dict(method=["beam"]), r"method is \['beam'\]: choose beam"),
        (dict(max_length=2), r"max_length is 2: it must be more than the \d tokens of the prompt"),
        (dict(max_length=41), "at most the model's 40 positions"),
        (dict(min_length=21), "min_length is 21: it must lie between 0 and max_length = 20"),
        (dict(prompt=7), "prompt is of type int"),
    ],
)
def test_wrong_arguments_of_caption(models, how, expected):
    with pytest.raises(ValueError, match=expected):
        models("caption").caption(photos(1)[0], **how)


def test_whole_numbers_of_numpy_are_the_same_numbers(models):
    model, img = models("caption"), photos(1)[0]
    plain = model.caption(img, 2, "nucleus", seed=3, top_p=0.5)
    assert model.caption(img, np.int64(2), "nucleus", seed=np.uint32(3), top_p=np.float64(0.5)) == plain


def test_prompts_of_one_length_share_a_program_and_few_programs_are_kept(folder, monkeypatch):
    model, img = blip_jax.from_pretrained(folder / "caption"), photos(1)[0]
    how = dict(max_length=7, beams=1)
    prompts = ("a large ", "the large ", "large a ")
    own = {prompt: model.caption(img, prompt=prompt, **how)[0] for prompt in prompts}
    assert len({row["log_prob"] for row in own.values()}) == 3
    (program,) = model._programs.values()
    assert program._cache_size() == 1

    # the one that was not used for longest goes, with what was compiled for it
    monkeypatch.setattr(verbs, "PROGRAMS", 2)
    model.features(img)
    model.caption(img, prompt="the large ", **how)
    first = list(model._programs)
    model.caption(img, prompt="the ", **how)
    assert list(model._programs) == [first[1], ("caption", first[1][1], 2)] and first[0] == ("image features",)
    assert model.caption(img, prompt="the large ", **how)[0] == own["the large "] and program._cache_size() == 1
    model.features(img)
    model.caption(img, prompt="the ", **how)
    assert program._cache_size() == 0
    assert model.caption(img, prompt="a large ", **how)[0] == own["a large "]  # compiled anew, from the disk


def test_many_texts_of_an_image_are_made_in_smaller_passes(models):
    model = models("caption")
    assert [model._images_of(rows) for rows in (1, 3, 8, 16, 256)] == [model.batch] * 3 + [max(1, model.batch // 2), 1]


def test_match_is_the_model_s_own(models):
    model, imgs = models("retrieval"), photos(3)
    img_tok = [apply(model, "encode_image", seen(img)) for img in imgs]
    img_emb, kv = [apply(model, "project_image", x)[0] for x in img_tok], [apply(model, "image_kv", x) for x in img_tok]
    words = [tokens(model, text_) for text_ in TEXTS]
    score = jax.jit(
        lambda params, first_id, *args: model.model.apply({"params": params}, *args, first_id=first_id, method="match")
    )
    txt_emb = [apply(model, "encode_text", *own)[1][0] for own in words]
    itc = np.array([[a @ b for b in txt_emb] for a in img_emb])
    for first, first_id in (("[ENC]", model.tokenizer.enc), ("[CLS]", model.tokenizer.cls)):
        itm = np.zeros((3, 3), np.float32)
        for t, own in enumerate(words):
            itm[:, t] = [jax.nn.softmax(score(model.params, first_id, *own, x))[0, 1] for x in kv]
        for got, want in (
            (model.match(imgs, TEXTS, first=first, every_pair=True), (itm, itc)),
            (model.match(imgs, TEXTS, first=first), (np.diag(itm), np.diag(itc))),
            (model.match(imgs[1], TEXTS, first=first), (itm[1], itc[1])),
            (model.match(imgs, TEXTS[1:2], first=first), (itm[:, 1], itc[:, 1])),
        ):
            close(got["probability"], want[0])
            close(got["cosine"], want[1])
        one = model.match(imgs[2], TEXTS[0], first=first)
        assert all(isinstance(x, float) for x in one.values())
        close([one["probability"], one["cosine"]], [itm[2, 0], itc[2, 0]])
    assert np.ptp(itm) > 1e-3 and np.ptp(itc) > 0.1, "pictures and texts do not matter: this test shows nothing"
    many = [f"{i % 7} {text_}" for i in range(4) for text_ in TEXTS]  # more texts than fit a pass
    close(model.match(imgs, many, every_pair=True)["cosine"][:, 3], model.match(imgs, many[3])["cosine"])
    with pytest.raises(ValueError, match="first is 'CLS'"):
        model.match(imgs[0], "a", first="CLS")
    with pytest.raises(ValueError, match="every_pair is 'no': give True or False"):
        model.match(imgs[0], "a", every_pair="no")


def test_texts_are_cleaned_as_in_training(models):
    model, img = models("retrieval"), photos(1)[0]
    assert model.match(img, "A  Small, RED star!\0") == model.match(img, "a small, red star")


def test_generated_answers_are_the_model_s_own_whatever_the_padding(models):
    model, imgs = models("vqa"), photos(3)
    found = model.answer(imgs, QUESTIONS, max_length=7)
    how = beam.Beam(3, min_length=1, max_length=7)
    for img, question, got in zip(imgs, QUESTIONS, found):
        ids, mask = tokens(model, question)
        states = apply(
            model, "encode_question", ids, mask, apply(model, "image_kv", apply(model, "encode_image", seen(img)))
        )
        kv = apply(model, "question_kv", states)

        def search(kv):
            def extend(tokens_, at, cache):
                return model.model.apply({"params": model.params}, tokens_, at, cache, kv, method="extend")

            start = jnp.full((1, 1), model.tokenizer.dec, jnp.int32)
            logits, cache = extend(start, jnp.int32(0), model.model.empty_cache(1, 6))
            cache = jax.tree.map(lambda x: x.repeat(3, axis=1), cache)
            return beam.search(extend, logits, cache, start, how, 1, eos=model.tokenizer.sep, pad=model.tokenizer.pad)

        ids, log_prob, _ = jax.jit(search)(kv)
        assert got["answer"] == model.tokenizer.decode(ids[0, 0])
        close(got["log_prob"], log_prob[0, 0])
    single = model.answer(imgs[1], QUESTIONS[1], max_length=7)
    assert single["answer"] == found[1]["answer"]
    several = model.answer(imgs[1], QUESTIONS, max_length=7)
    assert several[1]["answer"] == single["answer"] and len(several) == 3


def test_ranked_answers_are_the_model_s_own(models):
    model, imgs = models("vqa"), photos(3)
    answers = ["red", "blue", "a small star", "left", "the green ring", "square"]
    ids, mask = map(jnp.asarray, model.tokenizer.encode(answers, 30))
    for k in (2, 99):
        rank = jax.jit(functools.partial(programs.rank_answers, model.model, k=k))
        found = model.answer(imgs, QUESTIONS, method="rank", answers=answers, k=k)
        for img, question, got in zip(imgs, QUESTIONS, found):
            q_ids, q_mask = tokens(model, question)
            states = apply(
                model,
                "encode_question",
                q_ids,
                q_mask,
                apply(model, "image_kv", apply(model, "encode_image", seen(img))),
            )
            best, score = rank(model.params, ids, mask, apply(model, "question_kv", states))
            assert got["answer"] == answers[best[0, 0]]
            close(got["score"], score[0, 0])


@pytest.mark.parametrize(
    "question, how, expected",
    [
        ("", {}, "questions is empty"),
        (["why", "...!"], {}, r"questions\[1\] is '...!', of which cleaning leaves no word"),
        ("why", dict(method="guess"), "method is 'guess': choose generate, or rank"),
        ("why", dict(method="rank"), "without answers="),
        ("why", dict(method="rank", answers=["a", " "]), r"answers\[1\] is empty"),
        ("why", dict(method="rank", answers=["a"], k=0), "k is 0"),
        ("why", dict(answers=["a"]), "set method='rank'"),
        ("why", dict(method="rank", answers=["a"], k=1.5), "k is 1.5: give a whole number"),
        ("why", dict(method="rank", answers=["a"], k=float("nan")), "k is nan: give a whole number"),
        ("why", dict(beams=2.5), "beams is 2.5: give a whole number"),
        ("why", dict(beams=100_000), "beams is 100000: at most 64 are searched"),
        ("why", dict(max_length="7"), "max_length is '7': give a whole number"),
        ("why", dict(method=7), "method is 7: choose generate, or rank"),
        ("why", dict(beams=0), "at least 1 beam"),
        ("why", dict(max_length=1), "more than 1 token"),
    ],
)
def test_wrong_questions(models, question, how, expected):
    with pytest.raises(ValueError, match=expected):
        models("vqa").answer(photos(1)[0], question, **how)


def test_a_question_of_500_words_is_cut_as_the_original_cuts_it(models):
    model, img = models("vqa"), photos(1)[0]
    words = [("ring", "star", "square")[i % 3] for i in range(500)]
    assert len(clean_question(" ".join(words)).split()) == 50
    assert model.answer(img, " ".join(words)) == model.answer(img, " ".join(words[:50]))


def test_features_are_the_model_s_own(models):
    model, imgs = models("pretrain"), photos(3)
    of_images, of_texts, of_both = model.features(imgs), model.features(texts=TEXTS), model.features(imgs, TEXTS)
    assert sorted(of_images) == ["image_embeds", "image_embeds_proj"] and of_images["image_embeds_proj"].shape == (
        3,
        5,
        16,
    )
    assert sorted(of_texts) == ["text_embeds", "text_embeds_proj", "text_mask"] and sorted(of_both) == [
        "multimodal_embeds",
        "text_mask",
    ]
    multimodal = lambda blip, ids, mask, kv: blip.med(ids, mask, kv=kv)
    for i, (img, text_) in enumerate(zip(imgs, TEXTS)):
        ids, mask = tokens(model, text_)
        t, img_tok = ids.shape[1], apply(model, "encode_image", seen(img))
        txt_tok, txt_emb = apply(model, "encode_text", ids, mask)
        begun = np.where(np.arange(t) == 0, model.tokenizer.enc, ids)
        both = apply(model, multimodal, begun, mask, apply(model, "image_kv", img_tok))
        close(of_images["image_embeds"][i], img_tok[0])
        close(of_images["image_embeds_proj"][i, 0], apply(model, "project_image", img_tok)[0])
        close(of_texts["text_embeds"][i, :t], txt_tok[0])
        close(of_texts["text_embeds_proj"][i, 0], txt_emb[0])
        close(of_both["multimodal_embeds"][i, :t], both[0])
        for name in ("text_embeds", "text_embeds_proj"):
            assert not of_texts[name][i, t:].any()
        assert of_texts["text_mask"][i].sum() == of_both["text_mask"][i].sum() == t
    assert of_texts["text_embeds"].shape[1] == of_texts["text_mask"].sum(1).max()
    for x in (*of_images.values(), *of_texts.values()):
        assert x.dtype in (np.float32, bool)
    norms = np.linalg.norm(of_images["image_embeds_proj"], axis=-1)
    close(norms, np.ones_like(norms))
    cosine = of_images["image_embeds_proj"][:, 0] @ of_texts["text_embeds_proj"][:, 0].T
    close(cosine, model.match(imgs, TEXTS, every_pair=True)["cosine"])
    one = model.features(imgs[1], TEXTS[1], mode="multimodal")
    close(one["multimodal_embeds"], of_both["multimodal_embeds"][1, : one["text_mask"].sum()])
    assert model.features(imgs[0])["image_embeds"].shape == (5, 48)


@pytest.mark.parametrize(
    "args, expected",
    [
        ((), "mode is 'image' with no images and no texts"),
        ((photos(1)[0], "a", "image"), "mode is 'image' with images and texts: image takes images alone"),
        ((photos(1)[0], None, "multimodal"), "multimodal takes both"),
        ((photos(1)[0], None, "audio"), "mode is 'audio'"),
        ((photos(1)[0], None, ["image"]), r"mode is \['image'\] with images"),
        ((photos(1)[0], None, 7), "mode is 7 with images"),
    ],
)
def test_wrong_modes(models, args, expected):
    with pytest.raises(ValueError, match=expected):
        models("pretrain").features(*args)


def test_a_checkpoint_says_what_it_cannot_do(models):
    img = photos(1)[0]
    for name, verb, args, expected in (
        (
            "retrieval",
            "caption",
            (img,),
            r"retrieval \(retrieval\) cannot do caption: it has no text decoder; give a captioner or a pre-",
        ),
        (
            "caption",
            "match",
            (img, "a"),
            "it has no text encoder and no projections and no matching head; give a retrieval or",
        ),
        ("pretrain", "answer", (img, "why"), "it has no question encoder and answer decoder; give a VQA checkpoint"),
        ("vqa", "caption", (img,), "no text decoder"),
        ("vqa", "features", (img, "a"), "text and multimodal features: it has no text encoder"),
        ("nlvr", "match", (img, "a"), "no text encoder and no projections"),
        ("nlvr", "features", (None, "a"), "no text encoder"),
    ):
        with pytest.raises(ValueError, match=expected):
            getattr(models(name), verb)(*args)
        assert (
            sorted(models(name).features(img))
            == ["image_embeds", "image_embeds_proj"][: 1 + (name in ("pretrain", "retrieval"))]
        )
    assert "text decoder" in repr(models("caption")) and "16 px, float32" in repr(models("caption"))


# --- batches, shapes, devices -----------------------------------------------------------------------------------------
def test_buckets():
    assert [batching.at_least(n) for n in (1, 2, 3, 4, 5, 64, 65)] == [1, 2, 4, 4, 8, 64, 128]
    assert [batching.at_most(n) for n in (1, 2, 3, 4, 7, 8)] == [1, 2, 2, 4, 4, 8]
    assert [batching.at_least(n, 6) for n in (1, 6, 7, 13)] == [6, 6, 12, 24]
    assert [batching.at_most(n, 6) for n in (1, 6, 11, 30)] == [6, 6, 6, 24]


def test_each_bucket_compiles_once(folder):
    model, imgs = blip_jax.from_pretrained(folder / "pretrain", batch=4), photos(9)
    calls = lambda: sum(program._cache_size() for program in model._programs.values())
    model.caption(imgs[0])
    assert calls() == 1
    model.caption(imgs[1:4])  # 3 rows in a batch of 4
    assert calls() == 2
    for n in (1, 4, 9, 6):  # several batches are of 4, the last one too
        model.caption(imgs[:n], prompt="a picture of ")
    assert calls() == 2
    longest = lambda texts: model._tokens(texts)[0].shape[1]
    # 14: as trained
    assert [longest(texts) for texts in (["star"], ["red", "star", "blue ring"], TEXTS[1:2])] == [8, 8, 14]
    model.features(texts=["star"] * 3)
    before = calls()
    model.features(texts=["red", "star", "blue ring", "ring"])
    assert calls() == before
    model.features(texts=[TEXTS[1]] * 3)
    assert calls() == before + 1
    model.match(imgs, ["star"] * 9)
    before = calls()
    model.match(imgs + imgs[:5], ["ring", "red"] * 7)
    assert calls() == before


def test_batches_and_their_padding_change_nothing(folder, models):
    imgs, texts = photos(7), [f"{TEXTS[i % 3]} {'red ' * (i % 4)}" for i in range(7)]
    want = models("pretrain")
    for batch in (2, 64):
        model = blip_jax.from_pretrained(folder / "pretrain", batch=batch)
        assert model.batch == batch
        a, b = (m.caption(imgs, method="beam" if batch == 2 else "nucleus") for m in (model, want))
        assert [x[0]["caption"] for x in a] == [x[0]["caption"] for x in b]
        close([x[0]["log_prob"] for x in a], [x[0]["log_prob"] for x in b], 1e-4)
        for every_pair in (True, False):
            a, b = (m.match(imgs, texts, every_pair=every_pair) for m in (model, want))
            close(a["probability"], b["probability"])
            close(a["cosine"], b["cosine"])
        close(model.features(imgs, texts)["multimodal_embeds"], want.features(imgs, texts)["multimodal_embeds"])
        for i in (0, 3, 6):
            alone = model.match(imgs[i], texts[i])
            close([alone["probability"], alone["cosine"]], [a["probability"][i], a["cosine"][i]])


def test_a_mesh_of_eight_devices_gives_the_same(folder, models):
    mesh = sharding.make_mesh(ConfigDict({"data": 2, "fsdp": 2, "tensor": 2}))
    imgs = photos(5)
    model, one = blip_jax.from_pretrained(folder / "pretrain", mesh=mesh), models("pretrain")
    kernel = model.params["med"]["blocks"]["self_attn"]["q"]["kernel"]
    assert len(kernel.sharding.device_set) == 8 and len(one.params["temp"].sharding.device_set) == 1
    a, b = model.caption(imgs), one.caption(imgs)
    assert [x[0]["caption"] for x in a] == [x[0]["caption"] for x in b]
    for every_pair, texts in ((True, TEXTS), (False, TEXTS[:1])):
        a, b = (m.match(imgs, texts, every_pair=every_pair) for m in (model, one))
        close(a["probability"], b["probability"])
        close(a["cosine"], b["cosine"])
    close(
        model.features(imgs, "a red star")["multimodal_embeds"], one.features(imgs, "a red star")["multimodal_embeds"]
    )
    vqa, single = blip_jax.from_pretrained(folder / "vqa", mesh=mesh), models("vqa")
    answers = lambda m: [a["answer"] for a in m.answer(imgs, QUESTIONS[0])]
    assert answers(vqa) == answers(single)
    rank = lambda m: [
        a["answer"] for a in m.answer(imgs, QUESTIONS[0], method="rank", answers=["red", "blue", "a star"])
    ]
    assert rank(vqa) == rank(single)


def test_a_mesh_with_other_axes_is_refused(folder):
    with pytest.raises(ValueError, match="make it with blip_jax.parallel.sharding.make_mesh"):
        blip_jax.from_pretrained(folder / "pretrain", mesh=jax.make_mesh((8,), ("x",)))


def test_bfloat16_rounds_the_matrices_once(folder, models):
    model, imgs = blip_jax.from_pretrained(folder / "retrieval", dtype="bfloat16"), photos(2)
    vit, whole = model.params["vit"], models("retrieval").params
    assert (
        vit["blocks"]["mlp"]["fc1"]["kernel"].dtype
        == model.params["med"]["embed"]["word"]["embedding"].dtype
        == "bfloat16"
    )
    assert vit["ln_post"]["scale"].dtype == model.params["itm_head"]["kernel"].dtype == "float32"
    encode = jax.jit(lambda params, img: model.model.apply({"params": params}, img, method="encode_image"))
    rounded, whole = encode(model.params, seen(imgs[0])), encode(whole, seen(imgs[0]))
    np.testing.assert_array_equal(rounded, whole)
    assert model.features(imgs)["image_embeds"].dtype == np.float32
    close(model.match(imgs, TEXTS[:2])["cosine"], models("retrieval").match(imgs, TEXTS[:2])["cosine"], 0.05)
    with pytest.raises(ValueError, match="dtype is 'float16': choose"):
        blip_jax.from_pretrained(folder / "retrieval", dtype="float16")


# --- where a model comes from -----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "how, expected",
    [
        (dict(name_or_path=None), "name_or_path is None: give a file, a folder or a name on the hub"),
        (dict(name_or_path=""), "name_or_path is ''"),
        (dict(name_or_path=7), "name_or_path is 7"),
        (dict(name_or_path=b"runs"), "name_or_path is b'runs'"),
        (dict(batch=1.5), "batch is 1.5: give a whole number"),
        (dict(batch="2"), "batch is '2': give a whole number"),
        (dict(batch=None), "batch is None"),
        (dict(batch=-1), "batch is -1: it must be positive"),
        (dict(dtype=32), "dtype is 32: choose float32 or bfloat16"),
        (dict(vocab=7), "vocab is 7: give the path"),
        (dict(mesh=8), "mesh is 8: give one of blip_jax.parallel.sharding.make_mesh"),
    ],
)
def test_wrong_arguments_of_from_pretrained(how, expected):
    with pytest.raises(ValueError, match=f"^{expected}") as e:
        blip_jax.from_pretrained(**{"name_or_path": "x", **how})
    assert "\n" not in str(e.value)


def test_a_checkpoint_folder_and_another_vocabulary(folder, tiny_vocab, tmp_path, models):
    img = photos(1)[0]
    assert blip_jax.from_pretrained(str(folder / "caption" / "checkpoints" / "3")).caption(img) == models(
        "caption"
    ).caption(img)
    short = tmp_path / "vocab.txt"
    short.write_text("\n".join(tiny_vocab.read_text().splitlines()[:-3]))
    with pytest.raises(ValueError, match="117.*120"):
        blip_jax.from_pretrained(folder / "caption", vocab=short)
    lone = shutil.copytree(folder / "caption", tmp_path / "lone")
    (lone / "vocab.txt").unlink()
    assert blip_jax.from_pretrained(lone, vocab=tiny_vocab).caption(img) == models("caption").caption(img)
    with pytest.raises(ValueError, match="vocab"):
        blip_jax.from_pretrained(lone)


class FakeHub:
    """huggingface_hub with a cache: repository -> folder; online or not."""

    def __init__(self, online: dict, cache: dict):
        self.online, self.cache, self.asked = online, cache, []

    def snapshot_download(self, name, allow_patterns, local_files_only=False):
        self.asked.append((name, local_files_only, tuple(allow_patterns)))
        found = self.cache if local_files_only else self.online
        if name not in found:
            raise OSError(f"404 for {name}\nand a long page")
        self.cache[name] = found[name]
        return str(found[name])


def test_names_on_the_hub(folder, models, monkeypatch):
    img, fake = photos(1)[0], FakeHub({"Org/captioner": folder / "caption"}, {})
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    assert blip_jax.from_pretrained("Org/captioner").caption(img) == models("caption").caption(img)
    assert not any("*.bin" in pattern or pattern == "*" for _, _, patterns in fake.asked for pattern in patterns)
    fake.online.clear()  # without a network what the cache holds is used
    assert blip_jax.from_pretrained("Org/captioner").caption(img) == models("caption").caption(img)
    with pytest.raises(
        ValueError, match=r"'Org/other' is no file or folder here, is not in the cache.*\(OSError: 404 for Org/other\)"
    ):
        blip_jax.from_pretrained("Org/other")
    with pytest.raises(
        ValueError, match="'runs/no/such' is no file or folder here, and no name of the form owner/name"
    ):
        blip_jax.from_pretrained("runs/no/such")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match=r"pip install 'blip-jax\[hub\]'"):
        blip_jax.from_pretrained("Org/captioner")


def test_old_weights_are_fetched_only_where_there_are_no_others(tmp_path, monkeypatch):
    fake = FakeHub({"Org/old": tmp_path}, {})
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    assert hub.folder("Org/old") == tmp_path and "pytorch_model*.bin" in fake.asked[-1][2] and len(fake.asked) == 2
    (tmp_path / "model.safetensors").touch()
    hub.folder("Org/old")
    assert "pytorch_model*.bin" not in fake.asked[-1][2]
