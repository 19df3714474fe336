"""What a CapFilt run reads: the records of its shards in order, pictures decoded ahead in threads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import grain

from blip_jax.capfilt.shards import Plan, storable
from blip_jax.data import image, pairs
from blip_jax.data.batches import decoded, threads
from blip_jax.data.source import BadRecord
from blip_jax.data.text.clean import plain_text


class Batch(NamedTuple):
    """Consecutive records of one shard, in order; fewer than the devices take at its end."""

    shard: int
    last: bool  # whether the shard ends here
    examples: list[dict]


class Records:
    """The records of the shards `todo` as examples in batches.

    An example is {"dataset", "record": its number there, "key", "reason": "" or why it cannot be used, "texts": its
    cleaned web captions ("" where nothing is left), "fields": the record as its source has it, "img": {size:
    u8[size,size,3]}, "events": what `Ledger.add` takes in}. Of one that cannot be used, "fields" is None and there
    is no "img".
    """

    def __init__(self, cfg, sources: dict, plan: Plan, todo: list[int], img_sizes: tuple[int, ...]):
        self.cfg, self.sources, self.plan, self.todo, self.img_sizes = cfg, sources, plan, todo, sorted(set(img_sizes))

    def batches(self, size: int) -> Iterator[Batch]:
        """Batches of at most `size` examples, none across two shards. Close it."""
        spans = {shard: self.plan.span(shard) for shard in self.todo}
        places = [(shard, span[at : at + size]) for shard, span in spans.items() for at in range(0, len(span), size)]

        def example(i: int) -> dict:
            span, at = places[i // size][1], i % size
            return self.example(span[at]) if at < len(span) else {}

        ds = grain.MapDataset.range(len(places) * size).map(example)
        examples = threads(ds, self.cfg, self.cfg.data.prefetch * size)
        try:
            for shard, span in places:
                rows = [next(examples) for _ in range(size)]
                yield Batch(shard, span.stop == spans[shard].stop, rows[: len(span)])
        finally:
            examples.close()

    def example(self, i: int) -> dict:
        """Record `i` of the plan."""
        dataset, number = self.plan.locate(i)
        known = {"dataset": dataset, "record": number, "reason": "", "texts": [], "fields": None}
        notes: list[str] = []
        try:
            fields = storable(self.sources[dataset][number], dataset)
            known |= {"key": fields["key"], "texts": [self._cleaned(caption, notes) for caption in fields["captions"]]}
            with decoded(fields, [fields["image"]], self.cfg) as [(picture, irregular)]:
                img = {size: image.eval_transform(picture, size) for size in self.img_sizes}
        except BadRecord as e:
            key = plain_text(e.key)[0]
            return {**known, "key": key, "reason": e.reason, "events": [(dataset, key, e.reason, False)]}
        return {
            **known,
            "fields": fields,
            "img": img,
            "events": [(dataset, fields["key"], note, True) for note in dict.fromkeys(irregular + notes)],
        }

    def _cleaned(self, raw: str, notes: list[str]) -> str:
        """A caption as training cleans it; what is irregular about it is added to `notes`."""
        try:
            captions, found = pairs.captions({"key": "", "captions": [raw]}, self.cfg.text.max_words)
        except BadRecord:  # nothing is left of it: the decision table says so
            return ""
        notes += found
        return captions[0]
