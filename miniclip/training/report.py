"""What a run tells: lines in its log, and aloud whatever its user should know."""

from __future__ import annotations

import json
import sys
from collections import Counter, deque
from pathlib import Path

from tqdm import tqdm

STUCK_AFTER = 100  # steps whose mean loss is compared with that at chance
STUCK_WITHIN = 0.02  # as a share of the loss at chance; untrained models begin a little above it


class Reporter:
    """Speaks on stderr, above the progress bar, and writes log.jsonl and problems.txt in the run's folder. Of several
    processes only the main one speaks and logs."""

    def __init__(self, output: Path, speaks: bool, chance: float):
        self.output, self.speaks, self.chance = output, speaks, chance
        self.losses: deque[float] = deque(maxlen=STUCK_AFTER)
        self.problem_list = output / "problems.txt"
        self.listed: set[str] = set()
        self.said: set[str] = set()

    def say(self, message: str) -> None:
        if self.speaks:
            tqdm.write(f"miniclip train: {message}", file=sys.stderr)

    def say_once(self, topic: str, message: str) -> None:
        if topic not in self.said:
            self.said.add(topic)
            self.say(message)

    def log(self, line: dict) -> None:
        """Append one JSON object to log.jsonl."""
        if self.speaks:
            with (self.output / "log.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def problems(self, lines: list[str], remedy: str) -> None:
        """List each picture that can't be used once in problems.txt, whichever process found it. Aloud the user hears
        of the first that have the same `remedy` (what was done about them), and at the end how many there are."""
        new = [line for line in dict.fromkeys(lines) if line not in self.listed]
        if new:
            self.listed.update(new)
            with self.problem_list.open("a", encoding="utf-8") as file:
                file.write("".join(line + "\n" for line in new))
            self.say_once(remedy, f"{new[0]}; {len(new)} such now, {remedy}, all listed in {self.problem_list}")

    def watch_texts(self, texts: list[str]) -> int:
        """Say it aloud when a batch holds a text several times. Returns how many texts are repetitions."""
        repeated = len(texts) - len(set(texts))
        if repeated:
            text, times = Counter(texts).most_common(1)[0]
            self.say_once(
                "repeated",
                f"{repeated} of {len(texts)} captions in this batch repeat others ({text!r}: {times} times). Each such "
                "pair is called the other's negative, and the loss can't come near 0; a smaller --batch-size or more "
                "varied captions help. Logged from now on as repeated_captions",
            )
        return repeated

    def watch_loss(self, loss: float, warming_up: bool) -> None:
        """Say it aloud when the loss stays at `chance`, that of a model that can't tell the pairs of a batch apart."""
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
        """Repeat at the end how many pictures were of no use."""
        if self.problem_list.exists():
            count = len(set(self.problem_list.read_text(encoding="utf-8").splitlines()))
            self.say(f"{count} pictures could not be used; see {self.problem_list}")
