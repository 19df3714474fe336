"""What each collective of a compiled program moves, and why: told from its kind, its place in our code and its axis."""

from __future__ import annotations

import re

KEPT = "features and scores", "every process of an evaluation keeps those of all images and texts"

REASONS = (  # kind, part of the name in our code, axis -> what moves, why; first match wins
    (
        r"all-gather|collective-permute",
        r"^$",
        "data, between slices",
        "features and texts",
        "the queue takes those of the whole batch",
    ),
    (
        r"all-reduce|reduce-scatter",
        r"^$",
        "data, between slices",
        "gradients",
        "summed over slices, each device its part",
    ),
    (
        r".*",
        r"^$",
        r"data in parts of \d+",
        "gradients of image keys and values",
        "hard negatives were drawn across these devices; the compiler left no name",
    ),
    (
        r"reduce-scatter",
        r"^$",
        "data.*",
        "gradients",
        "a sum over slices begins within each, of which a device gets its part",
    ),
    (
        r"all-gather",
        r"^$",
        "data.*",
        "gradients and features",
        "the parts of a sum over slices are put together again, and the queue takes the whole batch's features",
    ),
    (
        r".*",
        r"^$",
        "data.*",
        "gradients and features",
        "sums that do not divide among the devices, and others that the compiler makes along all links of a slice "
        "instead of along one ring in parts",
    ),
    (
        r"all-gather|all-to-all|collective-permute",
        r"word_table",
        ".*",
        "gradients of the word table",
        "summed in parts by rows, then cut anew along its width",
    ),
    (
        r".*",
        r"transpose\(jvp",
        "tensor",
        "activations and their gradients",
        "products whose kernel is split over tensor are partial sums",
    ),
    (
        r"reduce-scatter",
        r"cross_attention.*shard_map",
        ".*",
        "gradients of image keys and values",
        "hard negatives are drawn across devices, each gets its own rows'",
    ),
    (
        r"all-reduce|reduce-scatter",
        r"transpose\(jvp",
        ".*",
        "gradients",
        "each device has its own rows' share of every gradient",
    ),
    (
        r"all-gather|all-to-all|collective-permute",
        r"enqueue|dynamic_update_slice",
        ".*",
        "momentum features",
        "the queue is whole on every device and takes the whole batch's features",
    ),
    (
        r"all-gather|all-to-all|collective-permute",
        r"cross_attention.*gather$",
        ".*",
        "image keys and values",
        "hard negatives are drawn across devices",
    ),
    (
        r"all-gather|all-to-all|collective-permute",
        r"embed/scatter-add",
        ".*",
        "gradients of word states and their ids",
        "each device adds up those of its part of the word table",
    ),
    (
        r"all-gather|all-to-all|collective-permute",
        r"gather$|take",
        ".*",
        "ids and masks of texts",
        "hard negatives are drawn across devices",
    ),
    (
        r"all-gather",
        r"jit\((view|embed|rerank)\)",
        "data.*",
        *KEPT,
    ),
    (r"all-reduce", r"while/cond", ".*", "whether every text has ended", "a loop over tokens is one for all rows"),
    (
        r"all-gather",
        r"",
        ".*fsdp.*",
        "parameters",
        "a kernel that fsdp splits is gathered whole where it is used, and dropped",
    ),
    (
        r"all-reduce",
        r"jvp|dot_general",
        "tensor",
        "activations",
        "products whose kernel is split over tensor are partial sums",
    ),
    (
        r"reduce-scatter|all-reduce",
        r"",
        ".*fsdp.*",
        "gradients",
        "each device has its own rows' share of every gradient",
    ),
    (r".*", r"reduce_sum|reduce_max|norm", ".*", "sums for losses and metrics", "means over the global batch"),
    (r".*", r"similarity|jvp", ".*", "features and similarities", "contrastive columns come from the whole group"),
)


JOINED = "gradients", "sums that the GPU compiler joined to one, of which it left no name"


def reason(kind: str, op: str, axis: str, platform: str = "tpu", trains: bool = True) -> tuple[str, str]:
    """(what a collective moves, why it has to) by the table REASONS, whose rows without a name are of training on TPUs;
    a program that does not train has results alone to exchange over the data axis."""
    if not (trains or op) and axis.startswith("data"):
        return KEPT
    if platform == "gpu" and kind in ("all-reduce", "reduce-scatter") and not op:
        return JOINED
    for kinds, name, axes, what, why in REASONS:
        if re.fullmatch(kinds, kind) and re.search(name, op) and re.fullmatch(axes, axis):
            return what, why
    return "other", f"made by the compiler ({op or 'no name'})"
