"""What went wrong with records: counted by reason, and each named once in skipped.jsonl."""

from __future__ import annotations

import collections
import json
import pathlib

from blip_jax import buckets

ENOUGH = 100  # records tried before max_bad_share can stop a run


class Ledger:
    """Counts of records read, skipped and noted, and the skipped.jsonl file, to which each record is written once."""

    def __init__(self, path, max_bad_share: float):
        self.path, self.max_bad_share = pathlib.Path(path), max_bad_share
        self.read, self.skipped, self.noted = 0, collections.Counter(), collections.Counter()
        self._written: set[int] = set()
        self._torn = False  # a killed run may have left half a line
        if self.path.exists():
            lines = self.path.read_text(encoding="utf-8", errors="replace")
            self._torn = bool(lines) and not lines.endswith("\n")
            for line in lines.splitlines():
                try:
                    row = json.loads(line)
                    self._written.add(_event(row["source"], row["key"], row["reason"], row["used"]))
                except (ValueError, TypeError, KeyError):
                    continue  # the half line: its record is written again when it is met

    def add(self, read: int, events: list[tuple[str, str, str, bool]]) -> None:
        """Takes in records tried and their events (source, key, reason, used). ValueError: too many are unusable."""
        self.read += read
        rows = []
        for source, key, reason, used in events:
            (self.noted if used else self.skipped)[reason.split(":")[0]] += 1
            if (name := _event(source, key, reason, used)) not in self._written:
                self._written.add(name)
                rows.append(json.dumps({"source": source, "key": key, "reason": reason, "used": used}) + "\n")
        if rows:
            with self.path.open("a", encoding="utf-8") as f:
                f.write("\n" * self._torn + "".join(rows))
            self._torn = False
        self.check()

    def check(self) -> None:
        bad = self.skipped.total()
        if self.read >= ENOUGH and bad > self.max_bad_share * self.read:
            worst = ", ".join(f"{reason} ({n})" for reason, n in self.skipped.most_common(3))
            raise ValueError(
                f"{bad} of {self.read} records read ({100 * bad / self.read:.1f} %) cannot be used, more than "
                f"data.max_bad_share={self.max_bad_share:g} allows. Commonest: {worst}. They are named in "
                f"{buckets.spelled(self.path)}: repair the data, or raise data.max_bad_share"
            )

    def counts(self) -> dict:
        return {"read": self.read, "skipped": dict(self.skipped), "noted": dict(self.noted)}


def _event(source: str, key: str, reason: str, used: bool) -> int:
    """What is written once: a bad record, or one note of a used one. A number, as there may be millions."""
    return hash((source, key, reason if used else None))
