"""What every stage of a run is handed: what is asked, where it is done, and what this process holds for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainers import attention, bases, encoding, loop, memory, ranks, texts
from trainers.attempts import Attempt, Progress
from trainers.data import Example
from trainers.encoding import LeftOut
from trainers.spec import Base, Spec
from trainers.stopping import Stop


@dataclass(frozen=True, slots=True)
class Work:
    """What every stage of a run needs: what is asked, where it is done, and the bases that this process holds."""

    spec: Spec
    attempt: Attempt
    progress: Progress
    stop: Stop
    held: bases.Bases
    tokenizer: Any
    budget: memory.Budget
    together: ranks.Ranks = ranks.ALONE

    @property
    def row_limit(self) -> int:
        """How many tokens a row may have."""
        return self._limit(self.spec.base)

    def _limit(self, base: Base) -> int:
        return encoding.row_limit(self.spec.options, bases.read_context(base))

    def read_texts(self, path: Path, base: Base) -> texts.TokenFile:
        """Texts as the tokens of a base, made once for all attempts."""
        cache = self.attempt.run_dir / "tokens"
        with self.progress.alive():  # which corpus it is, only reading it tells
            return texts.tokenize(path, self.held.tokenizer(base), self._limit(base), cache, base.digest, self.beat)

    def load_to_train(self) -> Any:
        """The weights of the run's base; from here on a run is no longer refused but fails."""
        return self._load(self.spec.base, in_4bit=self.spec.options.load_in_4bit)

    def load_to_score(self, base: Base | None) -> Any:
        """The weights of a base, the run's own unless named, as servers hold them."""
        return self._load(base or self.spec.base, in_4bit=self.spec.options.serve_in_4bit)

    def _load(self, base: Base, *, in_4bit: bool) -> Any:
        self.progress.write("loading", now=True)
        with self.progress.alive():
            return self.held.load(base, self.spec.device, in_4bit=in_4bit)[0]

    def beat(self) -> None:
        """What long work calls after each piece of it: a sign of life. Raises `StoppedError` when the run was asked to stop.

        Of several processes none stops here by itself, for the others would wait for it: they agree after a step.
        """
        if self.together.size == 1:
            self.stop.check()
        self.progress.beat()

    def note_left_out(self, left_out: Sequence[LeftOut]) -> None:
        """Tell of rows without a prompt as soon as that is known."""
        for one in left_out:
            self.progress.write("rendering", now=True, set=one.set, rows_left_out=len(one.row_ids), first_left_out=one.row_ids[0])

    def measure_loss(self, model: Any, examples: Sequence[Example]) -> float | None:
        """The mean loss on examples, in nats for each graded token; None where there are none."""
        if not examples:
            return None
        self.progress.write("measuring", now=True)
        share = self.spec.options.share_prefixes
        with attention.packed(model):
            return self.budget.fit(lambda tokens: loop.mean_loss(model, examples, tokens, share_prefixes=share, beat=self.beat))
