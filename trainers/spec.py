"""What a run folder asks for: the one contract between the daemon and the GPU programs.

The daemon writes `RUN_DIR/spec.json`; a trainer reads it, works in `RUN_DIR/attempts/N/` and writes `result.json` there last.
Nothing here imports torch, so the daemon may import it.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, Self

import jinja2.sandbox
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from storage.artifacts import write_atomically

SCHEMA = 1
SEEDS = range(2**31)
"""What may be a seed: every generator takes it, also times a million and with a step added."""
LOCK, LOG = "process.lock", "log.txt"
"""Files of an attempt: the process id of who works on it, locked meanwhile, and what it printed."""
PROGRESS, CHECKPOINTS, STATE, RESULT = "progress.jsonl", "checkpoints", "state.json", "result.json"
"""Its signs of life, its checkpoints, the file of a checkpoint that is written last (one that has it is whole), and how it ended."""
CHECKPOINTS_KEPT = 2
"""So many of an attempt's checkpoints are kept: should the furthest be damaged, a run goes on from the one before."""
EXIT_DONE, EXIT_REFUSED, EXIT_RESUMABLE = 0, 2, 75

Kind = Literal["train", "score", "export"]
Method = Literal["lora", "qlora", "full", "pretrain"]
Policy = Literal["cumulative", "replay", "delta"]
FormName = Literal["plain", "instruction", "chat"]
Optimizer = Literal["adamw", "adamw_8bit", "paged_adamw_8bit"]


class SpecRefusedError(ValueError):
    """The run folder asks for something that can't be done; raised before any weights are loaded (exit 2)."""


class Frozen(BaseModel):
    """A value that is checked once and never changes. Its numbers are finite, for JSON has no others."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)


class Prompt(Frozen):
    """A Jinja2 prompt template, pinned by digest. `{{ input.FIELD }}` and `{% for name, value in input.items() %}` work.

    `form` is what stands around its words, see `trainers.forms`.
    """

    text: str
    form: FormName = "plain"

    @property
    def digest(self) -> str:
        """`sha256:` over the template's bytes, the form's name before them unless it is plain."""
        return digest_text(self.text if self.form == "plain" else f"{self.form}\0{self.text}")

    def render(self, fields: Mapping[str, Any]) -> str:
        """The prompt of one claim; a field that it lacks renders as nothing.

        Raises `SpecRefusedError` when the template is no template, uses something of a missing field, or does what the sandbox forbids.
        """
        try:
            return compile_template(self.text).render(input=dict(fields))
        except (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            message = f"the prompt template can't be rendered: {_tell(error, fields)}"
            raise SpecRefusedError(message) from error


def _tell(error: Exception, fields: Mapping[str, Any]) -> str:
    """What went wrong in a template, without a word of the claim: where a message may quote it, only the kind of error."""
    said = str(error)
    quotes = isinstance(error, LookupError | ValueError) or any(isinstance(text, str) and repr(text) in said for text in fields.values())
    return type(error).__name__ if quotes else said


class Base(Frozen):
    """A Hugging Face checkpoint folder on disk and the digest of its files."""

    path: Path
    digest: str


class Model(Frozen):
    """One model that answers: a base, at most one adapter on it, and how it is asked and calibrated.

    `base` None is the run's. `adapter` is a folder; None is the bare base. `temperature` divides the label log-probabilities.
    """

    name: str
    base: Base | None = None
    adapter: Path | None = None
    adapter_digest: str | None = None
    prompt: Prompt
    labels: tuple[str, ...] = Field(min_length=2)
    temperature: float = Field(default=1.0, gt=0)


class LoraOptions(Frozen):
    """Plain LoRA on all linear layers: no DoRA, no rsLoRA, so that it exports to GGUF as it is."""

    rank: int = Field(default=16, ge=1, le=512, description="Rank of the adapter's matrices.")
    alpha: int = Field(default=32, ge=1, description="The adapter counts alpha / rank times.")
    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32", description="Of the adapter while it learns; `bfloat16` where there is no room for `float32`."
    )


class PretrainOptions(Frozen):
    """What continued pre-training changes, and what keeps it from forgetting."""

    weights: Literal["adapter", "all"] = Field(
        default="adapter", description="`adapter`: LoRA, merged into the base at the end; `all`: every weight."
    )
    general_share: float = Field(
        default=0.05, ge=0, lt=1, description="Share of general text among the tokens, to the nearest piece, where general texts are given."
    )


ALL_WEIGHTS: Mapping[str, Any] = {
    "learning_rate": 1e-5,
    "optimizer": "paged_adamw_8bit",
    "accumulation": 8,
    "recompute_layers": 1,
    "checkpoint_steps": 200,
}
IN_BACKWARD: Mapping[str, Any] = {"accumulation": 1, "clip": 0.0}
PRESETS: Mapping[Method, Mapping[str, Any]] = {
    "lora": {},
    "qlora": {"load_in_4bit": True, "serve_in_4bit": True, "epochs": 3.0, "lora": {"rank": 64, "alpha": 128, "dtype": "bfloat16"}},
    "full": {**ALL_WEIGHTS, "epochs": 5.0, "batch_rows": 16},
    "pretrain": {"epochs": 1.0},
}
"""What each method sets where the user sets nothing; everything else is the default of `Options`."""
DECIDING = ("method", "optimizer_in_backward", "pretrain")
"""The options that other options' defaults depend on."""


class Options(Frozen):
    """How to train. What is not given comes from the method's preset, then from the defaults, which `docs/experiments.md` measured."""

    method: Method = Field(
        default="lora", description="`lora`, `qlora` (the base in 4 bits), `full` (all weights) or `pretrain` (on texts)."
    )
    policy: Policy = Field(
        default="replay",
        description="`cumulative`: all rows, from scratch; `replay`: warm, new rows and a share of the old; `delta`: warm, new rows alone.",
    )
    learning_rate: float = Field(default=2e-4, gt=0, le=1, description="AdamW's, at its peak.")
    epochs: float = Field(default=4, gt=0, le=1000, description="Passes over the training rows.")
    batch_rows: int = Field(default=32, ge=1, description="Rows per optimizer step (the effective batch).")
    max_tokens: int = Field(default=4096, ge=16, description="Token budget of one packed forward pass.")
    accumulation: int = Field(
        default=1, ge=1, description="A step is spread over so many passes at least, as far as its rows go; more where they don't fit."
    )
    max_row_tokens: int = Field(default=2048, ge=16, description="Longer prompts are cut in their input fields.")
    share_prefixes: bool = Field(
        default=True, description="Read what prompts have in common once for a whole pass, where that saves tokens."
    )
    warmup: float = Field(default=0.05, ge=0, lt=1, description="Share of the steps.")
    weight_decay: float = Field(default=0.0, ge=0, description="AdamW's.")
    clip: float = Field(default=1.0, ge=0, description="The gradient's norm, at most; 0: not clipped.")
    optimizer: Optimizer = Field(
        default="adamw", description="`adamw`, or bitsandbytes' with 8-bit states, which may be paged to the host."
    )
    optimizer_in_backward: bool = Field(
        default=False, description="Update each weight as soon as its gradient is there, and drop that: one layer's gradients in memory."
    )
    recompute_layers: int = Field(
        default=0, ge=0, description="Recompute every n-th layer's activations in the backward pass: 1 is all layers, 0 none."
    )
    load_in_4bit: bool = Field(default=False, description="The base in NF4 with double quantisation; with `qlora`, and only there.")
    serve_in_4bit: bool = Field(
        default=False, description="Servers hold the base in 4 bits, and so does an exam. Of the agent, not of a single run."
    )
    new_weight: float = Field(default=5.0, gt=0, description="Loss weight of a row that was not imported.")
    replay_share: float = Field(default=1.0, ge=0, le=1, description="`replay`: share of the rows learned before that are learned again.")
    replay_rows: int = Field(default=2000, ge=0, description="`replay`: at most so many imported rows are learned again.")
    replay_half_life_days: float = Field(
        default=0, ge=0, description="`replay`: a row so many days older is half as likely to be learned again; 0: age does not matter."
    )
    patience: int = Field(default=0, ge=0, description="Stop after so many epochs without a better dev loss; 0: never.")
    checkpoint_steps: int = Field(default=50, ge=1, description="Optimizer steps between two checkpoints.")
    lora: LoraOptions = LoraOptions()
    pretrain: PretrainOptions = PretrainOptions()

    @model_validator(mode="before")
    @classmethod
    def _take_preset(cls, given: Any) -> Any:
        return merge(choose_preset(given), given) if isinstance(given, Mapping) else given

    @model_validator(mode="after")
    def _mix_is_right(self) -> Self:
        if self.load_in_4bit and self.method != "qlora":
            remedy = "use method qlora" if self.method == "lora" else "use method qlora for the labels, or leave load_in_4bit out"
            raise ValueError(f"method {self.method} can't load_in_4bit: {remedy}")
        if self.method == "qlora" and not self.load_in_4bit:
            raise ValueError("method qlora without load_in_4bit is plain LoRA: use method lora")
        if self.optimizer_in_backward and not self.trains_all_weights:
            raise ValueError("optimizer_in_backward is for methods that train all weights: use method full, or pretrain.weights all")
        if self.optimizer_in_backward and (self.accumulation, self.clip) != (1, 0):
            raise ValueError("optimizer_in_backward keeps no gradients to sum or to clip: leave accumulation and clip out (1 and 0)")
        return self

    @property
    def trains_all_weights(self) -> bool:
        """Whether training changes the base's own weights."""
        return self.method == "full" or (self.method == "pretrain" and self.pretrain.weights == "all")

    @property
    def needs_learned(self) -> bool:
        """Whether a warm start has to know which rows are old."""
        return self.policy == "delta" or (self.policy == "replay" and self.replay_share < 1)

    @property
    def makes_base(self) -> bool:
        """Whether the result is a base of its own, not an adapter."""
        return self.method in {"full", "pretrain"}

    def choices(self) -> dict[str, Any]:
        """What was chosen against the method's defaults: with another method only this is kept."""
        chosen = self.model_dump()
        usual = Options.model_validate({name: chosen[name] for name in DECIDING}).model_dump()
        return {name: chosen[name] for name in DECIDING} | difference(chosen, usual)


def choose_preset(given: Mapping[str, Any]) -> Mapping[str, Any]:
    """What the method sets by itself, for options of which some are given."""
    preset = PRESETS.get(given.get("method", "lora"), {})
    details = given.get("pretrain")
    if given.get("method") == "pretrain" and isinstance(details, Mapping) and details.get("weights") == "all":
        preset = {**ALL_WEIGHTS, **preset}
    return {**preset, **IN_BACKWARD} if given.get("optimizer_in_backward") is True else preset


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Both, section by section; what is above counts."""
    merged = {**below, **above}
    for name in below.keys() & above.keys():
        if isinstance(below[name], Mapping) and isinstance(above[name], Mapping):
            merged[name] = merge(below[name], above[name])
    return merged


def difference(values: Mapping[str, Any], usual: Mapping[str, Any]) -> dict[str, Any]:
    """What is not as usual, section by section."""
    found = {name: difference(value, usual[name]) if isinstance(value, Mapping) else value for name, value in values.items()}
    return {name: value for name, value in found.items() if value != ({} if isinstance(value, Mapping) else usual[name])}


class ScoreSet(Frozen):
    """Rows that every model of the run answers: a Parquet file with columns `row_id` and `input` (JSON text)."""

    name: str
    path: Path


class Spec(Frozen):
    """`spec.json`. `dataset` is a snapshot folder (see `storage.snapshots`); `texts` is what `pretrain` reads, see `trainers.texts`."""

    schema_: Literal[1] = Field(default=1, alias="schema")
    run_id: str
    kind: Kind
    agent: str
    base: Base
    dataset: Path | None = None
    dataset_digest: str | None = None
    texts: Path | None = None
    general_texts: Path | None = Field(default=None, description="What `pretrain` replays so that less is forgotten.")
    init_adapter: Path | None = Field(default=None, description="Warm start from this adapter; None starts from scratch.")
    init_adapter_digest: str | None = None
    learned: Path | None = Field(
        default=None, description="The snapshot that the beginning has learned already: what tells old rows from new."
    )
    candidate: Model | None = Field(default=None, description="What is trained: name, prompt and labels; adapter stays None.")
    others: tuple[Model, ...] = Field(default=(), description="Models scored beside the candidate, e.g. the champion.")
    score_sets: tuple[ScoreSet, ...] = ()
    options: Options = Options()
    plan: Mapping[str, Any] | None = Field(default=None, description="What `daemon.plan` expects it to take of the device.")
    seed: int = Field(default=1, ge=SEEDS.start, lt=SEEDS.stop, strict=True)
    device: str = Field(
        default="cpu", description="`cuda:0+cuda:1` runs a process on each, with the whole model (DDP); FSDP is not in this version."
    )
    threads: int = Field(default=0, ge=0, description="CPU threads; 0 leaves torch's default.")

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), populate_by_name=True)


def read_spec(run_dir: Path) -> Spec:
    """Read and check `RUN_DIR/spec.json`. Raises `SpecRefusedError` with the key, the value and what would be right."""
    path = run_dir / "spec.json"
    try:
        return Spec.model_validate_json(path.read_bytes())
    except FileNotFoundError as error:
        message = f"{path} is missing: a run folder holds spec.json"
        raise SpecRefusedError(message) from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        message = f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']} (got {first['input']!r:.200})"
        raise SpecRefusedError(message) from error


def note_phase(attempt: Path, phase: str) -> None:
    """A sign of life in an attempt's folder while no trainer is at work on it."""
    with (attempt / PROGRESS).open("a", encoding="utf-8") as file:
        file.write(json.dumps({"at": datetime.now(UTC).isoformat(), "phase": phase}) + "\n")


def is_stored_in_4bit(model_config: Mapping[str, Any]) -> bool:
    """Whether a base's `config.json` says that its weights are stored in bitsandbytes' 4 bits."""
    stored = model_config.get("quantization_config")
    return isinstance(stored, Mapping) and stored.get("quant_method", "bitsandbytes") == "bitsandbytes" and bool(stored.get("load_in_4bit"))


def read_device(run_dir: Path) -> str:
    """The device that `RUN_DIR/spec.json` names, read without checking the rest; `cpu` where it names none."""
    try:
        return str(json.loads((run_dir / "spec.json").read_bytes()).get("device", "cpu"))
    except (OSError, ValueError, AttributeError):
        return "cpu"


def write_spec(run_dir: Path, spec: Spec) -> None:
    """Write `RUN_DIR/spec.json`, whole or not at all."""
    run_dir.mkdir(parents=True, exist_ok=True)
    write_atomically(run_dir / "spec.json", spec.model_dump_json(by_alias=True, indent=2).encode())


def map_inputs(asked: Spec, move: Callable[[Path], Path]) -> Spec:
    """The spec with `move` applied to the path of everything that is read but the bases."""
    names = ("dataset", "init_adapter", "learned", "texts", "general_texts")
    single = {name: path and move(path) for name in names for path in [getattr(asked, name)]}
    others = tuple(one.model_copy(update={"adapter": one.adapter and move(one.adapter)}) for one in asked.others)
    score_sets = tuple(one.model_copy(update={"path": move(one.path)}) for one in asked.score_sets)
    return asked.model_copy(update={**single, "others": others, "score_sets": score_sets})


@functools.lru_cache(maxsize=64)
def compile_template(text: str) -> jinja2.Template:
    """The template in the sandbox, kept: compiling takes longer than rendering."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(autoescape=False, keep_trailing_newline=True)
    return environment.from_string(text)


def digest_text(text: str) -> str:
    """`sha256:` and the hex digest of the UTF-8 bytes."""
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def digest_labels(labels: Sequence[str]) -> str:
    """The digest of a label set: the same labels in another order are another set, for the order is that of the probabilities."""
    return digest_text(json.dumps(list(labels), ensure_ascii=False))
