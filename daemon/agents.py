"""What `[agents.NAME]` in `ratchet.toml` says: one decision point of the user's and all that governs it."""

from __future__ import annotations

import json
import zoneinfo
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from apscheduler.triggers.cron import CronTrigger
from pydantic import Field, field_validator, model_validator

from consumers import rules
from daemon.prompts import PromptPath
from daemon.sections import HomePath, Name, Section, Share
from daemon.triggers import TriggerPolicy
from trainers import spec

if TYPE_CHECKING:
    from daemon.gate import ExamPolicy
    from daemon.watch import WatchPolicy

POLICY = (
    "name",
    "kind",
    "labels",
    "approved",
    "denied",
    "threshold",
    "budget",
    "audit_share",
    "explore_share",
    "exam_share",
    "watch_share",
    "window",
    "must_review",
    "slices",
    "exam",
    "watch",
)
"""The keys that, with the prompt's digest, make a policy version."""
LEAST_AUDITED = 0.001


class Budget(Section):
    """How much of the traffic experts can review; with neither key the fixed threshold decides alone."""

    share: float | None = Field(default=None, gt=0, le=1, description="Share of the predictions that may be reviewed.")
    per_day: int | None = Field(default=None, gt=0, description="Reviews per day, at most.")


class Rule(Section):
    """A case that an expert must always see; a claim that lacks the field does not match."""

    field: str = Field(pattern=r"^(decision|(input|attributes)\..+)$", description="`decision`, `input.NAME` or `attributes.NAME`.")
    op: Literal["equals", "in", "above", "below"] = Field(description="How the field is compared.")
    value: str | float | bool | tuple[str | float, ...] = Field(
        description="What it is compared with: a list for `in`, a number for `above` and `below`."
    )

    @model_validator(mode="after")
    def _value_suits_the_comparison(self) -> Self:
        is_number = isinstance(self.value, int | float) and not isinstance(self.value, bool)
        if self.op in {"above", "below"} and not is_number:
            raise ValueError(f"`{self.op}` compares with a number, not with {self.value!r}")
        if (self.op == "in") != isinstance(self.value, tuple):
            raise ValueError("a list of values belongs to `in`, and to `in` alone")
        return self


class Review(Section):
    """How long a case is an expert's, and how long it is worth asking about."""

    lease_seconds: int = Field(default=900, gt=0, description="A case is shown to one expert for so long, then it returns to the queue.")
    expires_days: float = Field(default=30, gt=0, description="An unanswered review is dropped after so many days; audits never are.")


class Exam(Section):
    """How a candidate is judged against the champion, and the harm that must not be shown."""

    rule: Literal["posterior", "anytime"] = Field(
        default="posterior", description="A Bayesian posterior, or an e-value that is valid at every look."
    )
    prior: float = Field(default=6, gt=0, description="Both parameters of the Beta prior on how often the candidate is right.")
    confidence: float = Field(default=0.9, gt=0.5, lt=1, description="Rule `posterior`: promote when so sure that the candidate is better.")
    last_confidence: float = Field(
        default=0.8, gt=0.5, lt=1, description="The same at the last look: when the next candidate is there and would supersede this one."
    )
    alpha: float = Field(default=0.1, gt=0, lt=0.5, description="Rule `anytime`: the chance to promote an equal, at most.")
    claims: int = Field(default=500, ge=1, description="Recent unlabelled claims that both models answer.")
    max_asked: int = Field(default=60, ge=1, description="Reviews opened for one candidate, at most.")
    gold_limit: float = Field(default=0.03, ge=0, lt=1, description="Gold accuracy may not be shown to fall by more.")
    slice_limit: float = Field(default=0.05, ge=0, lt=1, description="A slice's share of right answers may not be shown to fall by more.")
    slice_min: int = Field(default=30, ge=1, description="A slice with fewer labels is not judged.")
    limit_confidence: float = Field(default=0.95, gt=0.5, lt=1, description="How sure is *shown*, one-sided.")


class Watch(Section):
    """How a promoted version is watched against its predecessor."""

    alpha: float = Field(default=0.1, gt=0, lt=0.5, description="The chance to roll back an equal, at most.")
    max_asked: int = Field(default=60, ge=1, description="The watch ends after so many answers.")
    max_days: float = Field(default=30, gt=0, description="The watch ends after so many days.")
    audit_min: int = Field(default=100, ge=1, description="Audited labels that a drift alarm needs, at least.")
    confidence: float = Field(default=0.95, gt=0.5, lt=1, description="How sure a drift alarm is, one-sided.")


class Triggers(Section):
    """What starts a training run, besides `ratchet train`."""

    new_labels: int = Field(
        default=1000,
        ge=1,
        description="So many labels start a run by themselves that no dataset has seen, one of a cancelled or parked run neither.",
    )
    new_labels_min: int = Field(default=1, ge=0, description="Drift, the schedule and a changed threshold or rule need so many.")
    cron: str | None = Field(default=None, description="Five fields, UTC: `0 3 * * sun`.")
    drift: bool = Field(default=True, description="A drift alarm starts a run.")
    policy_change: bool = Field(default=True, description="A changed prompt, label set, base, threshold or rule starts a run.")

    @field_validator("cron")
    @classmethod
    def _cron_is_a_crontab(cls, cron: str | None) -> str | None:
        if cron is not None:
            try:
                CronTrigger.from_crontab(cron)
            except ValueError as error:
                raise ValueError(f"{error}: write it as `0 3 * * sun`") from error
        return cron


class Publisher(Section):
    """How a promoted version reaches the inference server, and how that is confirmed."""

    kind: Literal["pointer", "reference", "none"] = Field(
        default="pointer", description="A file that is replaced atomically, the reference node of `trainers.serve`, or nobody."
    )
    path: HomePath | None = Field(default=None, description="`pointer`: the file; `serving/NAME/current.json` unless given.")
    command: str | None = Field(default=None, description="`pointer`: run after the file was replaced, e.g. `pm2 restart inference-node`.")
    confirm: Literal["url", "command", "none"] = Field(
        default="none", description="`pointer`: who is asked for the served digest; `none` is kept as *unverified*."
    )
    confirm_command: str | None = Field(default=None, description='`confirm = "command"`: prints the digest that is served.')
    url: str | None = Field(
        default=None,
        pattern=r"^https?://",
        description="An http:// or https:// address of the server that is asked, and for `reference` also told.",
    )
    timeout_seconds: float = Field(default=60, gt=0, description="An unconfirmed promotion is reverted after so long.")

    @model_validator(mode="after")
    def _names_whom_to_ask(self) -> Self:
        if self.url is None and (self.kind == "reference" or self.confirm == "url"):
            raise ValueError("`url` is missing: say where the server answers")
        if self.confirm_command is None and self.confirm == "command":
            raise ValueError("`confirm_command` is missing: say which command prints the served digest")
        return self


class Columns(Section):
    """Which columns of an imported file mean what; `ratchet import` reads them."""

    claim_id: Name = Field(default="claim_id", description="The claim's id.")
    group: Name | None = Field(default="group", description="Member or case, never split between training and gold.")
    occurred_at: Name = Field(default="occurred_at", description="When the claim was decided; ISO 8601 with a zone.")
    answer: Name = Field(default="answer", description="The expert's answer, one of the agent's labels.")
    rationale: Name | None = Field(default="rationale", description="The expert's reason, where there is one.")
    input: Name | tuple[Name, ...] = Field(
        default="input", description="One column that holds an object of input fields, or a list of columns that are the fields."
    )
    attributes: Name | tuple[Name, ...] | None = Field(default="attributes", description="The same for the attributes.")
    answers: dict[str, Name] = Field(default={}, description='How the file\'s answers translate: `{ Overturned = "APPROVED" }`.')
    zone: str | None = Field(
        default=None, description="The zone of times that name none, such as `America/Los_Angeles` or `UTC`; without it they are refused."
    )

    @field_validator("input")
    @classmethod
    def _some_column_is_input(cls, columns: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if not columns:
            raise ValueError("should name a column, or several that are the input's fields")
        return columns

    @field_validator("zone")
    @classmethod
    def _zone_is_known(cls, zone: str | None) -> str | None:
        try:
            return zone and str(zoneinfo.ZoneInfo(zone))
        except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError) as error:
            raise ValueError("should be a zone of the IANA database, such as `Europe/Berlin`") from error


class Agent(Section):
    """One decision point of the user's: what it answers, which cases go to experts, and how its models are trained and judged."""

    name: str = Field(
        pattern=r"^[a-z0-9]+([-_][a-z0-9]+)*$",
        max_length=40,
        description="Small letters and digits, parted by `-` or `_`: the name of the agent's table.",
    )
    kind: Literal["decision"] = Field(default="decision", description="`decision`: one answer out of a set of labels.")
    labels: tuple[Name, ...] = Field(min_length=2, description="The answers; their order is that of the probabilities.")
    approved: Name | None = Field(default=None, description="The label that approves; needed for the limit on wrongful denials.")
    denied: Name | None = Field(default=None, description="The label that denies; needed for the limit on wrongful denials.")
    prompt: PromptPath = Field(description="The Jinja2 template file; it sees the claim as `input`.")
    prompt_form: Literal["auto", "chat", "instruction", "plain"] = Field(
        default="auto",
        description="What stands around the prompt: the base's chat template, `### Instruction`, nothing; `auto`: the first that fits.",
    )
    base_model: HomePath = Field(default=Path("models/base"), description="Folder of the Hugging Face checkpoint.")
    threshold: Share = Field(default=0.7, description="A prediction less sure than this goes to an expert.")
    budget: Budget = Budget()
    audit_share: Share = Field(default=0.02, description="Share of all predictions reviewed at random; 0.001 or more.")
    exam_share: Share = Field(default=0.8, description="Share of what the budget leaves a window that an exam may ask for.")
    watch_share: Share = Field(default=0.4, description="Share of what the budget leaves a window that a watch may ask for.")
    explore_share: Share = Field(default=0.0, description="Share of the predictions reviewed for being of a rarely labelled slice.")
    window: int = Field(default=250, ge=1, description="With a budget, a prediction is ranked among so many recent ones.")
    must_review: tuple[Rule, ...] = Field(
        default=(Rule(field="decision", op="equals", value="PENDING"),), description="Cases that an expert always sees."
    )
    slices: tuple[Name, ...] = Field(default=(), description="Attributes by which results are broken down.")
    review: Review = Review()
    warm_start: Literal["candidate", "champion", "never"] = Field(
        default="candidate", description="Train on from the latest candidate that was not rejected, from the champion, or from the base."
    )
    texts: HomePath | None = Field(
        default=None, description="What `pretrain` reads: a `.txt` file, a `.jsonl` file of lines with the key `text`, or a folder of them."
    )
    general_texts: HomePath | None = Field(
        default=None, description="General text: forgetting is measured on its beginning; `pretrain` replays of the rest, to forget less."
    )
    training: spec.Options = spec.Options()
    exam: Exam = Exam()
    watch: Watch = Watch()
    triggers: Triggers = Triggers()
    publisher: Publisher = Publisher()
    columns: Columns = Columns()

    @field_validator("labels")
    @classmethod
    def _labels_differ(cls, labels: tuple[str, ...]) -> tuple[str, ...]:
        if len({label.strip().casefold() for label in labels}) < len(labels):
            raise ValueError("labels should differ in more than case and spaces")
        return labels

    @field_validator("audit_share")
    @classmethod
    def _audit_is_never_off(cls, share: float) -> float:
        if share < LEAST_AUDITED:
            raise ValueError(
                f"should be {LEAST_AUDITED:g} or more: without cases drawn at random nobody can tell how good the served model is; "
                "0.02 is usual"
            )
        return share

    @model_validator(mode="after")
    def _approval_and_denial_are_labels(self) -> Self:
        for key, label in (("approved", self.approved), ("denied", self.denied)):
            if label is not None and label not in self.labels:
                raise ValueError(f"`{key}` = {label!r} should be one of the labels {', '.join(self.labels)}")
        if (self.approved is None) != (self.denied is None) or (self.denied is not None and self.approved == self.denied):
            raise ValueError("`approved` and `denied` should be two different labels, or both left out")
        return self

    @model_validator(mode="after")
    def _pretraining_has_texts(self) -> Self:
        if self.training.method == "pretrain" and self.texts is None:
            raise ValueError("`texts` is missing: training.method `pretrain` reads text files, say where they are")
        return self

    @property
    def policy(self) -> dict[str, Any]:
        """All that makes a policy version: what is asked, how, which cases go to experts, and how versions are judged."""
        return {**self.model_dump(mode="json", include=set(POLICY)), "prompt": self.prompt.digest}

    @property
    def policy_digest(self) -> str:
        """`sha256:` over `policy`; another digest is another policy version."""
        return spec.digest_text(json.dumps(self.policy, sort_keys=True, separators=(",", ":"), ensure_ascii=False))

    @property
    def routing_policy(self) -> rules.RoutingPolicy:
        """What routing needs to know."""
        return rules.RoutingPolicy(
            threshold=self.threshold,
            budget_share=self.budget.share,
            budget_per_day=self.budget.per_day,
            audit_share=self.audit_share,
            explore_share=self.explore_share,
            exam_share=self.exam_share,
            watch_share=self.watch_share,
            must_review=tuple(rules.MustReview(rule.field, rule.op, rule.value) for rule in self.must_review),
            slice_by=self.slices,
            window=self.window,
            labels=self.labels,
        )

    @property
    def trigger_policy(self) -> TriggerPolicy:
        """What `daemon.triggers` needs to know; the schedule is `triggers.cron`."""
        return TriggerPolicy(
            labels=self.triggers.new_labels,
            labels_min=self.triggers.new_labels_min,
            on_drift=self.triggers.drift,
            on_policy_change=self.triggers.policy_change,
        )

    @property
    def exam_policy(self) -> ExamPolicy:
        """What `daemon.gate` needs to know."""
        from daemon import gate  # noqa: PLC0415 — it imports scipy, which most commands never need

        return gate.ExamPolicy(**self.exam.model_dump(exclude={"claims"}), approved=self.approved, denied=self.denied)

    @property
    def watch_policy(self) -> WatchPolicy:
        """What `daemon.watch` needs to know."""
        from daemon import watch  # noqa: PLC0415 — it imports scipy, which most commands never need

        return watch.WatchPolicy(**self.watch.model_dump())
