"""What a run reports: lines in its log, and on stderr whatever its user should know."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter, deque
from pathlib import Path

from tqdm import tqdm

from miniclip.data.text import DataError
from miniclip.io import explained, printable

LOG, PROBLEMS = "log.jsonl", "problems.txt"
STUCK_AFTER = 100  # steps whose mean loss is compared with that at chance
STUCK_WITHIN = 0.02  # as a share of the loss at chance; untrained models begin a little above it


class Reporter:
    """Prints on stderr, above the progress bar, and writes LOG and PROBLEMS in the run's folder. Only the main one of
    several processes prints and logs. strict: DataError at the first problem."""

    def __init__(self, output: Path, prints: bool, chance: float, strict: bool = False):
        self.output, self.prints, self.chance, self.strict = output, prints, chance, strict
        self.losses: deque[float] = deque(maxlen=STUCK_AFTER)
        self.problem_list = output / PROBLEMS
        self.listed: set[str] = set()
        self.said: set[str] = set()

    def say(self, message: str) -> None:
        if self.prints:
            tqdm.write(f"miniclip train: {printable(message)}", file=sys.stderr)

    def say_once(self, topic: str, message: str) -> None:
        if topic not in self.said:
            self.said.add(topic)
            self.say(message)

    def log(self, line: dict) -> None:
        """Append one JSON object to LOG."""
        if self.prints:
            _append(self.output / LOG, [json.dumps(line)])

    def problems(self, lines: list[str], remedy: str) -> None:
        """List each picture or shard that can't be read once in PROBLEMS, whichever process found it. Print the first
        with the same `remedy` (what was done about it), and at the end how many there are."""
        new = [line for line in dict.fromkeys(lines) if line not in self.listed]
        if new and self.strict:
            raise DataError(f"{new[0]} (--strict)")
        if new:
            self.listed.update(new)
            _append(self.problem_list, new)
            self.say_once(remedy, f"{new[0]}; {len(new)} such so far ({remedy}); see {self.problem_list}")

    def watch_texts(self, texts: list[str]) -> int:
        """Print a warning if a batch holds a text several times. Returns how many texts are repetitions."""
        repeated = len(texts) - len(set(texts))
        if repeated:
            text, times = Counter(texts).most_common(1)[0]
            self.say_once(
                "repeated",
                f"{repeated} of {len(texts)} captions in this batch repeat others ({text!r}: {times} times). Such "
                "pairs are treated as negatives of each other, so that the loss can't come near 0; a smaller "
                "--batch-size or more varied captions help. Logged from now on as repeated_captions",
            )
        return repeated

    def watch_loss(self, loss: float, warming_up: bool) -> None:
        """Print a warning if the loss stays at `chance`, that of a model that can't tell the pairs of a batch apart."""
        if warming_up:
            return
        self.losses.append(loss)
        mean = sum(self.losses) / len(self.losses)
        if len(self.losses) == STUCK_AFTER and mean > (1 - STUCK_WITHIN) * self.chance:
            self.say_once(
                "stuck",
                f"the loss stays at {self.chance:.3f} (mean of {STUCK_AFTER} steps: {mean:.3f}), as if images "
                "and captions had nothing to do with each other. Check that they belong together, and that pictures "
                "and captions differ within a batch; then try a tenth of the --lr, or a longer --warmup",
            )

    def finish(self) -> None:
        """Print at the end how many pictures and shards could not be read."""
        if self.problem_list.exists():
            count = len(set(self.problem_list.read_text(encoding="utf-8", errors="replace").splitlines()))
            self.say(f"{count} pictures or shards could not be used; see {self.problem_list}")


def _append(path: Path, lines: list[str]) -> None:
    """Add lines to a text file, after ending a last line that was cut off, as by a full disk.

    Bytes of file names that are not UTF-8 become escapes. WriteError if the file can't be written.
    """
    with explained(path), path.open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write("".join(f"{printable(line)}\n" for line in lines).encode())
