"""Captions made and scored: the evaluation that BLIP's captioner and BLIP-2's have in common (BLIP paper, section 5.2).

Every picture of data.eval gets one caption, by beam search as cfg.eval says. What people wrote about it are the
captions of its record. Pictures are known by the number at the end of their image_id, as COCO's results name them, or,
where that does not tell them apart, by their image_id; those of NoCaps have domains, each of which is scored as a
corpus of its own.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable, Iterator
from typing import NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from blip_jax.console import say
from blip_jax.data.evaluation import EvalRows
from blip_jax.data.source import BadRecord, expand
from blip_jax.decode import limits
from blip_jax.eval import captions, files, java, spice
from blip_jax.eval import submission as servers
from blip_jax.inference import language, programs
from blip_jax.inference.batching import Pass, Runner, at_most
from blip_jax.inference.programs import Method
from blip_jax.models import flops as counts
from blip_jax.parallel import processes

# of `curve`: fractions, of which CIDEr decides nearly alone, as in the original
BEST = tuple(f"{captions.MARK}{name}" for name in ("CIDEr", "Bleu_4"))
ENTIRE = "entire"  # all domains together


def problems(cfg, least: int = 1, most: int = 0) -> list[str]:
    """What of the settings of captions does not fit, where there is something to caption; least, most: tokens that
    eval.max_length may be, most 0 for any."""
    how, out = cfg.eval, []
    if not len(cfg.data.eval):
        return []
    if not 1 <= how.beams <= programs.MOST_BEAMS:
        out.append(f"eval.beams is {how.beams}: it must be 1 to {programs.MOST_BEAMS}")
    if not 0 <= how.min_length <= how.max_length or how.max_length < least:
        out.append(
            f"eval.min_length and eval.max_length are {how.min_length} and {how.max_length}: the second must be at "
            f"least {least}, with the prompt where that counts, and the first at most as much as the second"
        )
    if most and how.max_length > most:
        out.append(f"eval.max_length is {how.max_length}, but the text model has {most} positions: lower it")
    if not how.repetition_penalty > 0:
        out.append(f"eval.repetition_penalty is {how.repetition_penalty}: it must be positive; 1 is none")
    return out


def eval_data(cfg, tokenizer, skipped_path) -> EvalRows:
    """The pictures of cfg.data.eval, with captions of people or without. ValueError: eval.spice is no CoreNLP."""
    if cfg.eval.spice:
        spice.check(cfg.eval.spice)
    return EvalRows(cfg, tokenizer, _picture, cfg.data.eval, skipped_path=skipped_path, texts=False)


def _picture(record: dict, cfg, tokenizer) -> dict:
    if "captions" not in record:
        raise BadRecord(record["key"], "no record of captions")
    return {"img": record["image"], "notes": []}


def evaluate(loaded, data: EvalRows, mesh) -> dict:
    """The official scores of the captions (`eval.captions`), fractions, and "pictures", how many have one.

    Of NoCaps they are "in-domain/CIDEr" and so on, with "entire/CIDEr" of all. "predictions": [{"image_id",
    "caption"}], the form of COCO's server. Without Java, pycocoevalcap or captions of people there are predictions
    alone, which is said.
    """
    return _evaluated(loaded, data, mesh, approximate=False)


def curve(loaded, data: EvalRows, mesh) -> dict:
    """As `evaluate`, with tokens that need no Java, hence without METEOR and SPICE: every name has "approximate/"."""
    return _evaluated(loaded, data, mesh, approximate=True)


def table(result: dict) -> str:
    """The scores, a line each."""
    numbers = {name: value for name, value in result.items() if name not in ("pictures", "predictions")}
    rows = [f"{name:28} " + (f"{x:8.4f}" if isinstance(x, float) else f"{x:8}") for name, x in numbers.items()]
    return "\n".join([f"{result['pictures']} pictures", *rows])


def submission(result: dict, cfg) -> tuple[str, str]:
    """(file name, content) for COCO's and NoCaps' servers. ValueError: it would not be every picture of data.eval once,
    or they are of several files or of one that no such file belongs to."""
    asked = [path for name, source in cfg.data.eval.items() for path in expand(name, source)]
    if len(asked) != 1:
        raise ValueError(f"data.eval has {len(asked)} files: a server takes the captions of one")
    texts = {row["image_id"]: row["caption"] for row in result["predictions"]}
    return servers.captions(texts, asked[0], "blip2" if "qformer" in cfg.model else "blip")


# --- making them ------------------------------------------------------------------------------------------------------
class Writer(NamedTuple):
    """What makes captions of pictures."""

    program: Callable  # jitted: (params, img u8[B,S,S,3], keys u32[B,2]) -> {"ids": i32[B,1,L]}
    text: Callable  # i32[L] -> the caption


def passes(cfg, model, unit: int) -> list[Pass]:
    """What `evaluate` runs, for plans, which know no vocabulary: which ids a prompt has, begin or end a text does not
    change what is computed, and a word counts as a token. unit: as of `Runner`."""
    how, B, words = method(cfg), at_most(cfg.eval.batch, unit), 1 + len(cfg.text.prompt.split())
    if hasattr(model, "llm_sizes"):
        new = how.max_length - 1  # behind a start id
        T = language.prompt_positions(model, words, new)
        given = np.ones((1, T), np.int32), np.ones((1, T), bool)
        function = language.continuing(model, given, how, language.Ids(0, 1, 2))
        flops = counts.blip2_caption_image(cfg.model, T, new, how.beams)
    else:
        new = how.max_length - words
        function = programs.continuing(model, [1] * words, how, eos=2, pad=0)
        flops = counts.caption_image(cfg.model, words, new, how.beams)
    size = cfg.model.img_size
    rows = jax.ShapeDtypeStruct((B, size, size, 3), np.uint8), jax.ShapeDtypeStruct((B, 2), np.uint32)
    return [Pass("captions", function, rows, flops, pictures=1, trips=new - 1)]


@functools.cache
def writer(model, tokenizer, prompt: str, how: Method) -> Writer:
    """Of a captioner, kept from one evaluation of a run to the next."""
    if hasattr(model, "llm_sizes"):
        return Writer(
            jax.jit(language.captioner(model, tokenizer, prompt.strip(), how)),
            lambda ids: tokenizer.decode(ids[1:]).strip(),  # the first is a start id
        )
    begun = len(programs.prompt_ids(tokenizer, prompt))
    return Writer(
        jax.jit(programs.captioner(model, tokenizer, prompt, how)),
        lambda ids: programs.text_of(tokenizer, ids, begun),
    )


def method(cfg) -> Method:
    """How cfg.eval has captions made; of a language model as LAVIS scores beams, lengths being new tokens."""
    how = cfg.eval
    found = Method(
        "beam",
        beams=how.beams,
        length_penalty=how.length_penalty,
        repetition_penalty=how.repetition_penalty,
        min_length=how.min_length,
        max_length=how.max_length,
    )
    if not cfg.model.get("llm"):
        return found
    return found._replace(rule="lavis", **limits.lengths(1, how.min_length, how.max_length))


def samples(loaded, data: EvalRows, mesh) -> Iterator[tuple[dict, str]]:
    """(record, caption) of each picture in order; each once, whatever fills the last batch."""
    cfg, runner = loaded.cfg, Runner(mesh)
    size = runner.size(len(data), cfg.eval.batch)
    make = writer(loaded.model, loaded.tokenizer, cfg.text.prompt, method(cfg))
    bar = {"unit": "batch", "disable": jax.process_index() != 0, "mininterval": 1.0}

    def passes():
        for records, rows in tqdm(data.batches(size), desc="captions", total=math.ceil(len(data) / size), **bar):
            keys = np.zeros((len(records), 2), np.uint32)  # beams draw nothing
            yield records, make.program(loaded.params, runner.put(rows["img"], size), runner.put(keys, size))

    with jax.set_mesh(mesh):
        for records, found in runner.fetched(passes()):
            yield from ((record, make.text(ids[0])) for record, ids in zip(records, found["ids"]))


# --- scoring them -----------------------------------------------------------------------------------------------------
def _evaluated(loaded, data: EvalRows, mesh, approximate: bool) -> dict:
    unable = _unable(approximate)
    if unable:
        say(f"captions are made but not scored: {unable}; `blip-jax score` scores result files elsewhere")
    elif not approximate and not loaded.cfg.eval.spice:
        say(f"SPICE: {spice.NOT_COMPUTED.format(flag='config.eval.spice')}")
    told: dict[Hashable, str] = {}
    people: dict[Hashable, list[str]] = {}
    domains: dict[Hashable, str] = {}
    for record, text in samples(loaded, data, mesh):
        own = record["source"], record["image_id"]
        told.setdefault(own, text)  # rows of one picture, a caption of people each
        people.setdefault(own, []).extend(record["captions"])
        domains |= {own: record["domain"]} if record.get("domain") else {}
    names = called(list(told))
    told, people, domains = ({names[own]: x for own, x in each.items()} for each in (told, people, domains))
    scores = {} if unable else _scores(loaded.cfg, told, people, domains, approximate)
    return {
        "pictures": len(told),
        **scores,
        "predictions": [{"image_id": key, "caption": text} for key, text in told.items()],
    }


def called(pictures: list[tuple[str, str]]) -> dict[tuple[str, str], Hashable]:
    """What results call pictures, (source, image_id) each: by number, or all by image_id, or with the source before."""
    kinds = (
        [files.image_number(image_id) for _, image_id in pictures],
        [image_id for _, image_id in pictures],
        [f"{source}:{image_id}" for source, image_id in pictures],
    )
    fits = [None not in found and len(set(found)) == len(pictures) for found in kinds[:-1]] + [True]
    return dict(zip(pictures, kinds[fits.index(True)]))


def _unable(approximate: bool) -> str:
    """Why captions cannot be scored here, "" if they can: as process 0 finds it."""
    problem = ""
    try:
        java.folder()
        if not approximate:
            java.find()
    except ValueError as e:
        problem = str(e)
    return processes.gather(problem)[0]


def _scores(cfg, told: dict, people: dict, domains: dict, approximate: bool) -> dict[str, float]:
    """What process 0 finds, on every process: the numbers of all pictures that people wrote about."""
    known = [key for key in told if people[key]]
    if len(known) < len(told):
        say(f"{len(told) - len(known)} of {len(told)} pictures have no captions of people and are not scored")
    if not known:
        return {}
    groups = {"": known}
    if domains:
        groups = {name: [key for key in known if domains.get(key) == name] for name in sorted({*domains.values()})}
        groups |= {ENTIRE: known}
    out, problem = {}, ""
    if jax.process_index() == 0:
        try:
            found = captions.by_group(
                told, people, groups, corenlp="" if approximate else cfg.eval.spice, approximate=approximate
            )
            out = {f"{name}/{n}" if name else n: x for name, own in found.items() for n, x in own.corpus.items()}
        except ValueError as e:  # a program of Java's that failed: the captions are not lost with it
            problem = str(e)
    out, problem = processes.gather((out, problem))[0]
    if problem:
        say(f"captions are not scored: {problem}")
    return out
