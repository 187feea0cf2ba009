"""What must hold before any weights are loaded: the spec is whole and every file is the one it names."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from storage import artifacts, snapshots
from trainers import adapters, base_config, bases, encoding, forms, texts
from trainers.spec import LoraOptions, Model, ScoreSet, Spec, SpecRefusedError


def check_spec(spec: Spec, held: bases.Bases) -> Any:
    """Raise `SpecRefusedError` with the reason when the run can't be done as asked; returns the base's tokenizer."""
    bases.check_device(spec.device)
    held.check(spec.base)
    tokenizer = held.tokenizer(spec.base)
    if spec.kind == "export":
        raise SpecRefusedError("kind 'export' is not known to this trainer: use train or score")
    if spec.kind == "train":
        check_training(spec)
    for model in scored_models(spec):
        check_model(model, spec, held)
    if spec.kind == "train" and (spec.options.method == "pretrain" or spec.general_texts):
        check_readers(spec, held)
    for score_set in spec.score_sets:
        check_score_set(score_set)
    return tokenizer


def scored_models(spec: Spec) -> Iterator[Model]:
    """The candidate, when there is one, and the models beside it."""
    if spec.candidate:
        yield spec.candidate
    yield from spec.others


def check_model(model: Model, spec: Spec, held: bases.Bases) -> None:
    """Check what a model that answers is made of: its base, an adapter of that base, labels that its tokenizer tells apart in its form."""
    base = model.base or spec.base
    held.check(base)
    tokenizer = held.tokenizer(base)
    form = forms.find(tokenizer, model.prompt.form)
    encoding.check_labels(tokenizer, [form.say(label) for label in model.labels])
    if model.adapter:
        check_adapter(model.adapter, model.adapter_digest, base.digest)


def check_training(spec: Spec) -> None:
    """Check what a run learns from and where it begins."""
    options = spec.options
    if options.method == "pretrain":
        texts.find_files(the_texts(spec))
    else:
        the_candidate(spec)
        the_dataset(spec)
    if spec.general_texts:
        texts.find_files(spec.general_texts)
    if spec.candidate:
        check_candidate(spec.candidate)
    if spec.dataset:
        check_dataset(spec.dataset, spec.dataset_digest)
    check_stored(spec)
    check_policy(spec)
    if spec.init_adapter and options.trains_all_weights:
        raise SpecRefusedError(
            f"init_adapter is {spec.init_adapter}, but method {options.method} trains all weights: begin from a base, without an adapter"
        )
    if spec.init_adapter:
        check_adapter(spec.init_adapter, spec.init_adapter_digest, spec.base.digest)
        check_shape(spec.init_adapter, options.lora)


def check_readers(spec: Spec, held: bases.Bases) -> None:
    """Check that whoever reads texts, to learn them or to tell what was forgotten, has a token to end one with."""
    for base in [spec.base, *(model.base for model in scored_models(spec) if model.base)]:
        if held.tokenizer(base).eos_token_id is None:
            raise SpecRefusedError(
                f"the tokenizer in {base.path} has no end-of-sequence token, with which every text ends: "
                "name one in its tokenizer_config.json (eos_token)"
            )


def check_stored(spec: Spec) -> None:
    """Check that a base that is stored in 4 bits is trained by the method for such a base."""
    method = spec.options.method
    if base_config.is_in_4bit(spec.base.path) and method != "qlora":
        remedy = "use method qlora" if method == "lora" else "name the same model in 16 bits as base, or use method qlora for the labels"
        raise SpecRefusedError(
            f"{spec.base.path} is stored in 4 bits (quantization_config), and method {method} trains on whole weights: {remedy}"
        )


def check_policy(spec: Spec) -> None:
    """Check that the policy has what it needs: nothing to go on from, or what the beginning has learned."""
    policy = spec.options.policy
    if policy == "cumulative" and (spec.init_adapter or spec.learned):
        raise SpecRefusedError("policy cumulative begins from scratch: leave init_adapter and learned out, or use policy replay")
    if spec.init_adapter and spec.learned is None and spec.options.needs_learned:
        raise SpecRefusedError(
            f"learned is missing: policy {policy} needs the snapshot that {spec.init_adapter} learned, to tell old from new"
        )
    if spec.learned and not spec.init_adapter and not spec.options.makes_base:
        raise SpecRefusedError(
            f"learned is {spec.learned}, but init_adapter is missing: method {spec.options.method} goes on from an adapter that "
            "learned it, name that, or leave learned out to begin from scratch"
        )
    if spec.learned:
        check_dataset(spec.learned, None)


def check_candidate(candidate: Model) -> None:
    """Check that what is to be trained has no weights yet, and a name that can be a folder's."""
    if candidate.adapter is not None:
        raise SpecRefusedError(f"candidate.adapter is {candidate.adapter}: what is trained has none yet, name it as init_adapter")
    if candidate.base is not None:
        raise SpecRefusedError(f"candidate.base is {candidate.base.path}: what is trained begins from the run's base, name it as base")
    if Path(candidate.name).name != candidate.name or candidate.name.startswith("."):
        raise SpecRefusedError(f"candidate.name {candidate.name!r} becomes a folder: use letters, digits, dots and dashes")


def check_shape(adapter: Path, options: LoraOptions) -> None:
    """Check that the adapter to begin from has the shape that is asked for: training on can't change it."""
    config = adapters.read_adapter_config(adapter)
    if (config.r, config.lora_alpha) != (options.rank, options.alpha):
        raise SpecRefusedError(
            f"adapter {adapter} has rank {config.r} and alpha {config.lora_alpha}, asked are {options.rank} and {options.alpha}: "
            "set lora.rank and lora.alpha to the adapter's own, or begin from scratch with warm_start=never"
        )


def check_dataset(dataset: Path, digest: str | None) -> None:
    """Recompute the snapshot's digests, and compare its root with the one that was asked for."""
    try:
        root = snapshots.read_manifest(dataset)["root"]
        problems = snapshots.verify(dataset)
    except snapshots.SnapshotDamagedError as error:
        raise SpecRefusedError(str(error)) from error
    if problems:
        raise SpecRefusedError(f"dataset {dataset} is damaged: {problems[0]}: restore it from a backup or build a new version")
    if digest not in (None, root):
        raise SpecRefusedError(f"dataset {dataset} has root {root}, not {digest}: name the version that the run was planned for")


def check_adapter(adapter: Path, digest: str | None, base_digest: str) -> None:
    """Check an adapter's form, its files and that it was trained on this base."""
    adapters.read_adapter_config(adapter)
    try:
        if digest:
            artifacts.check(adapter, digest)
        pinned = artifacts.pinned_base(adapter)
    except (OSError, ValueError, KeyError, artifacts.DigestMismatchError) as error:
        raise SpecRefusedError(f"adapter {adapter}: {error}") from error
    if pinned != base_digest:
        raise SpecRefusedError(f"adapter {adapter} was trained on base {pinned}, not on {base_digest}: name the base it belongs to")


def check_score_set(score_set: ScoreSet) -> None:
    """Check that the rows to score can be read."""
    try:
        columns = set(pq.read_schema(score_set.path).names)
    except (OSError, pa.ArrowException) as error:
        raise SpecRefusedError(f"score set {score_set.name}: {score_set.path} can't be read as Parquet: {error}") from error
    if missing := {"row_id", "input"} - columns:
        raise SpecRefusedError(f"score set {score_set.name}: {score_set.path} lacks the columns {sorted(missing)}")


def the_candidate(spec: Spec) -> Model:
    """The model to train; refused when it isn't there."""
    if spec.candidate is None:
        raise SpecRefusedError("candidate is missing: its name, prompt and labels are what is trained")
    return spec.candidate


def the_dataset(spec: Spec) -> Path:
    """The snapshot to learn from; refused when it isn't there."""
    if spec.dataset is None:
        raise SpecRefusedError(f"dataset is missing: method {spec.options.method!r} learns from a snapshot folder")
    return spec.dataset


def the_texts(spec: Spec) -> Path:
    """The texts to learn from; refused when it isn't there."""
    if spec.texts is None:
        raise SpecRefusedError("texts is missing: method 'pretrain' reads a .txt or .jsonl file, or a folder of them")
    return spec.texts
