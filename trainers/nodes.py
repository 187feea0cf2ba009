"""What a reference node holds and answers: bases, the versions on them, and which one serves each agent."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from http import HTTPStatus
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import structlog
import torch
from pydantic import Field, field_validator

from storage import artifacts
from trainers import adapters, bases, encoding, forms, score
from trainers.spec import FormName, Frozen, Options, Prompt, SpecRefusedError, compile_template

# Tokens per forward pass. On CPU 1,024 to 4,096 measured alike and 16,384 slower; on a GPU nothing is measured yet.
BATCH_TOKENS = {"cpu": 2048}
BATCH_TOKENS_ON_GPU = 16_384

log = structlog.get_logger()


class RequestRefusedError(Exception):
    """A request that gets a 4xx answer; the message is the sentence the client reads."""

    def __init__(self, status: HTTPStatus, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


class Load(Frozen):
    """The body of `POST /load`: which version answers for an agent from now on.

    `adapter` None is the bare base. Without `base_digest` it is the base that the node was started with, else the one in the folder `base`.
    `in_4bit` says how the base is held; without it, as the node was told at its start.
    """

    agent: str = Field(min_length=1)
    version: str
    serving_name: str
    base: Path | None = None
    base_digest: str | None = None
    in_4bit: bool | None = None
    adapter: Path | None = None
    adapter_digest: str | None = None
    prompt: str
    prompt_form: FormName = "plain"
    labels: tuple[str, ...] = Field(min_length=2)
    temperature: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    max_row_tokens: int = Field(default=Options().max_row_tokens, ge=16)

    @property
    def asked(self) -> Prompt:
        """The prompt with its form."""
        return Prompt(text=self.prompt, form=self.prompt_form)

    @field_validator("adapter", "base")
    @classmethod
    def name_folder(cls, folder: Path | None) -> Path | None:
        """The folder's absolute path, for a state file outlives the working directory."""
        return folder and folder.absolute()


class Claim(Frozen):
    """One claim to answer."""

    input: dict[str, Any]


class Ask(Frozen):
    """The body of `POST /score`."""

    agent: str
    claims: tuple[Claim, ...]


class Served(Frozen):
    """A version in service: what was asked for, the digest of the files that were loaded, and its name on the model."""

    load: Load
    adapter_digest: str | None
    adapter_name: str | None
    loaded_at: datetime


class Held(NamedTuple):
    """Which base, and how it lies in memory."""

    digest: str
    in_4bit: bool


@dataclass(slots=True)
class Loaded:
    """A base in memory, with the adapters of the versions that are served on it."""

    model: Any
    tokenizer: Any


class Node:
    """Base models with the versions on them. One request at a time touches them, so every answer is wholly one version's.

    The base that the node was started with stays; another one comes with the first version on it and goes with the last.
    """

    def __init__(self, base: Path, device: str, state: Path | None, *, in_4bit: bool = False) -> None:
        self.device = device
        self.own = Held(artifacts.digest_folder(base), in_4bit)
        self.bases = {self.own: Loaded(*bases.load_base(base, device, in_4bit=in_4bit))}
        self.batch_tokens = BATCH_TOKENS.get(device, BATCH_TOKENS_ON_GPU)
        self.state = state
        self.served: dict[str, Served] = {}
        self.lock = threading.Lock()
        self.loading = threading.Lock()
        self.names = (f"served_{number}" for number in itertools.count())

    def load(self, request: Load) -> dict[str, Any]:
        """Serve another version for an agent; until this succeeds the one before stays. Returns what `describe` says of it."""
        started = time.monotonic()
        with self.loading:
            digest = self.verify(request)
            self.hold_base(request)
            try:
                new = self.swap(request, digest)
            finally:
                self.release_bases()
        seconds = round(time.monotonic() - started, 3)
        log.info("version_served", agent=request.agent, serving_name=request.serving_name, adapter_digest=digest, seconds=seconds)
        return self.describe(new)

    def swap(self, request: Load, digest: str | None) -> Served:
        """Let the version answer in place of the one before, or leave all as it was."""
        with self.lock:
            new = self.attach(request, digest)
            served = {**self.served, request.agent: new}
            try:
                self.probe(new)
                self.verify(request)  # once more: the files that were loaded lie between two looks at them
                self.write_state(served)
            except BaseException:
                self.detach(new)
                raise
            before, self.served = self.served.get(request.agent), served
            if before:
                self.detach(before)
        return new

    def base_of(self, request: Load) -> Held:
        """The base that a version sits on."""
        in_4bit = self.own.in_4bit if request.in_4bit is None else request.in_4bit
        return Held(request.base_digest or self.own.digest, in_4bit)

    def hold_base(self, request: Load) -> None:
        """Read another base than those in memory; the versions that are served go on answering meanwhile."""
        wanted = self.base_of(request)
        if wanted in self.bases:
            return
        if request.base is None:
            way_out = "give its folder as `base`, or load the version on a node that was started with it"
            raise RequestRefusedError(HTTPStatus.CONFLICT, f"this node has no base {wanted.digest}: {way_out}")
        artifacts.check(request.base, wanted.digest)
        try:
            loaded = Loaded(*bases.load_base(request.base, self.device, in_4bit=wanted.in_4bit))
        except torch.OutOfMemoryError as error:
            start = f"--base {request.base}{' --in-4bit' if wanted.in_4bit else ''}"
            sentence = f"there is no memory for another base beside {len(self.bases)}: restart the node with {start}"
            raise RequestRefusedError(HTTPStatus.INSUFFICIENT_STORAGE, sentence) from error
        with self.lock:
            self.bases[wanted] = loaded

    def release_bases(self) -> None:
        """Let go of bases that no version sits on any more."""
        with self.lock:
            used = {self.own, *(self.base_of(served.load) for served in self.served.values())}
            self.bases = {held: loaded for held, loaded in self.bases.items() if held in used}

    def verify(self, request: Load) -> str | None:
        """The digest of the adapter's files. Refused unless they are the ones asked for and were trained on this base."""
        if request.adapter is None:
            if request.adapter_digest is not None:
                raise RequestRefusedError(HTTPStatus.UNPROCESSABLE_ENTITY, "adapter_digest without adapter: give both or neither")
            return None
        adapters.read_adapter_config(request.adapter)
        pinned = artifacts.pinned_base(request.adapter)
        if pinned != self.base_of(request).digest:
            sentence = f"the adapter was trained on base {pinned}, not on {self.base_of(request).digest}: load it with its own base"
            raise RequestRefusedError(HTTPStatus.CONFLICT, sentence)
        if request.adapter_digest is None:
            raise RequestRefusedError(HTTPStatus.UNPROCESSABLE_ENTITY, "adapter without adapter_digest: give both or neither")
        artifacts.check(request.adapter, request.adapter_digest)
        return request.adapter_digest

    def attach(self, request: Load, digest: str | None) -> Served:
        """Put the version's adapter onto the model beside the others; it answers nothing yet."""
        name = None
        if request.adapter is not None:
            name = next(self.names)
            loaded = self.bases[self.base_of(request)]
            loaded.model = adapters.load_adapter(loaded.model, name, request.adapter)
        return Served(load=request, adapter_digest=digest, adapter_name=name, loaded_at=datetime.now(UTC))

    def detach(self, served: Served) -> None:
        """Take the version's adapter off the model."""
        if served.adapter_name is not None:
            loaded = self.bases[self.base_of(served.load)]
            loaded.model = adapters.drop_adapter(loaded.model, served.adapter_name)

    def probe(self, served: Served) -> None:
        """Refuse a version that could not answer: a template that doesn't compile, labels without difference, weights that give NaN."""
        try:
            compile_template(served.load.prompt)
        except jinja2.TemplateError as error:
            raise SpecRefusedError(f"the prompt is no template: {error}") from error
        self.ask(served, [self.form_of(served).wrap("Is anybody there?")])

    def ask(self, served: Served, prompts: Sequence[str]) -> list[score.Score]:
        """The version's answers to rendered prompts."""
        labels, form, loaded = served.load.labels, self.form_of(served), self.bases[self.base_of(served.load)]
        with adapters.answering_with(loaded.model, served.adapter_name) as model:
            spoken = [form.say(label) for label in labels]
            logprobs = score.score_prompts(model, loaded.tokenizer, prompts, spoken, max_tokens=self.batch_tokens)
        return score.judge("", [""] * len(prompts), served.load.version, labels, logprobs, served.load.temperature)

    def form_of(self, served: Served) -> forms.Form:
        """What stands around the version's prompts."""
        return forms.find(self.bases[self.base_of(served.load)].tokenizer, served.load.prompt_form)

    def answer(self, request: Ask) -> list[dict[str, Any]]:
        """The decision, confidence and probabilities for each claim, all by the version that serves the agent now."""
        with self.lock:
            served = self.find(request.agent)
            load = served.load
            loaded = self.bases[self.base_of(load)]
            context = min(load.max_row_tokens, getattr(loaded.model.config, "max_position_embeddings", load.max_row_tokens))
            limit = encoding.prompt_limit(loaded.tokenizer, self.form_of(served), load.labels, context)
            inputs = [claim.input for claim in request.claims]
            prompts, _ = encoding.build_prompts(loaded.tokenizer, load.asked, inputs, [limit] * len(inputs))
            answers = self.ask(served, prompts)
        return [
            {
                "decision": answer.decision,
                "confidence": answer.confidence,
                "probabilities": answer.probabilities,
                "version": load.version,
                "serving_name": load.serving_name,
            }
            for answer in answers
        ]

    def find(self, agent: str) -> Served:
        """What serves the agent. Refused when nothing does."""
        if agent not in self.served:
            raise RequestRefusedError(HTTPStatus.NOT_FOUND, f"no version serves agent {agent!r}: load one by POST /load")
        return self.served[agent]

    def describe(self, served: Served) -> dict[str, Any]:
        """What a publisher compares to know that its request took effect."""
        return {
            "agent": served.load.agent,
            "version": served.load.version,
            "serving_name": served.load.serving_name,
            "adapter_digest": served.adapter_digest,
            "base_digest": self.base_of(served.load).digest,
            "in_4bit": self.base_of(served.load).in_4bit,
            "prompt_digest": served.load.asked.digest,
            "labels": list(served.load.labels),
            "temperature": served.load.temperature,
            "loaded_at": served.loaded_at.isoformat(),
        }

    def write_state(self, served: dict[str, Served]) -> None:
        """Keep what is served for the next start."""
        if self.state is not None:
            loads = [one.load.model_dump(mode="json") for one in served.values()]
            artifacts.write_atomically(self.state, json.dumps({"base_digest": self.own.digest, "served": loads}, indent=2).encode())

    def restore(self) -> None:
        """Serve again what the state file names. A version whose files changed is left out and logged; the others serve."""
        if self.state is None or not self.state.exists():
            return
        try:
            kept = json.loads(self.state.read_text())
            loads = [Load.model_validate(one) for one in kept["served"]]
            if kept["base_digest"] != self.own.digest:
                raise SpecRefusedError(f"it was written with base {kept['base_digest']}, this one is {self.own.digest}")
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise SpecRefusedError(f"the state file {self.state} doesn't fit: {error}; move it away to start empty") from error
        for load in loads:
            try:
                self.load(load)
            except (RequestRefusedError, SpecRefusedError, OSError, artifacts.DigestMismatchError, score.LogitsNotFiniteError) as error:
                log.warning("version_not_restored", agent=load.agent, serving_name=load.serving_name, reason=str(error))
