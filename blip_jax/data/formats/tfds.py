"""A prepared TensorFlow Datasets data set, read without TensorFlow."""

from __future__ import annotations

import numpy as np

from blip_jax.data.source import BadRecord, Source, as_captions, image_id


class Tfds(Source):
    """A prepared TFDS data set in a random-access format.

    cfg.path is "name/split" (or "name/config:version/split"), cfg.images its data_dir. Fields are named by
    cfg.image_key and cfg.caption_key; "captions/text" goes into a nested field. The key is "<source>:<path>#<record>".
    """

    def __init__(self, name: str, cfg):
        try:
            import tensorflow_datasets as tfds
        except ImportError as e:
            raise ValueError(f"data source {name!r} is of kind tfds: pip install tensorflow-datasets ({e})") from e
        dataset, _, split = cfg.path.rpartition("/")
        self._rows = f"{name}:{cfg.path}"
        self._fields = cfg.image_key, cfg.caption_key.split("/")
        try:
            builder = tfds.builder(dataset, data_dir=cfg.images or None)
            self._data = builder.as_data_source(split, decoders={cfg.image_key: tfds.decode.SkipDecoding()})
        except Exception as e:  # not found, not prepared, TFRecord files, no such split or field: each has its own type
            raise ValueError(
                f"data source {name!r}: TFDS cannot open {cfg.path!r} in {cfg.images or 'its default folder'!r} "
                f"({type(e).__name__}: {e}); it must be prepared there with file_format='array_record', and the "
                "path reads 'name/split'"
            ) from e
        missing = [f for f in (cfg.image_key, self._fields[1][0]) if f not in builder.info.features]
        if missing:
            raise ValueError(
                f"data source {name!r}: {cfg.path!r} has no field {missing}; it has {sorted(builder.info.features)}: "
                "set `image_key` and `caption_key`"
            )

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, i: int) -> dict:
        key = f"{self._rows}#{i}"
        try:
            row = self._data[i]
            image, value = row[self._fields[0]], row
            for field in self._fields[1]:
                value = value[field]
            captions = [_utf8(c) for c in np.atleast_1d(np.asarray(value, object)).tolist()]
            number = np.asarray(row.get("image_id", row.get("image/id")), object).item()
            named = image_id(number.decode() if isinstance(number, bytes) else number, key)
        except Exception as e:
            raise BadRecord(key, f"malformed record: {type(e).__name__}: {e}") from None
        return {"key": key, "image": bytes(image), "captions": as_captions(key, captions), "image_id": named}


def _utf8(value) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
