"""A config.yml as NNI reads it, and what NNI does not say of it."""

import contextlib
import difflib
import io
import json
import logging.handlers
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from check_vit.space import error_text
from config_vit import UsageError, read_yaml


@dataclass
class Findings:
    """With an error the experiment cannot run, or not as it should; with a warning it can."""

    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


@contextlib.contextmanager
def quiet() -> Iterator[list[logging.LogRecord]]:
    """Keeps NNI's log, prints and warnings from the report; yields the records of its log."""
    memory, output = logging.handlers.BufferingHandler(10**6), io.StringIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import nni  # noqa: F401  # warns of pkg_resources, and sets up its log

        logger = logging.getLogger("nni")
        before, logger.handlers = logger.handlers, [memory]
        try:
            with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
                yield memory.buffer
        finally:
            logger.handlers = before


def load_experiment(file: Path, found: Findings) -> Any:
    """The ExperimentConfig that NNI makes of a YAML file of either schema. Raises UsageError."""
    content = read_yaml(file)
    found.warnings += repeated_keys(file)
    with quiet() as records:
        from nni.experiment.config import ExperimentConfig, convert, utils

        utils.set_base_path(file.parent)
        try:
            if content.get("trainingServicePlatform"):  # the test that nnictl makes
                content = convert.to_v2(content)
            config = ExperimentConfig(**content)
            if config.use_annotation:
                raise ValueError("useAnnotation ended with NNI 3: give a searchSpaceFile instead")
            # Of the next three NNI would only say which line of its own code failed.
            if not hasattr(config.training_service, "platform"):
                raise ValueError("trainingService is missing, a list, or of an unknown platform")
            complete_gpu(config, found)
            check_json(file.parent, config.search_space_file)
            config = config.canonical_copy()
            if config.search_space_file:
                found.warnings += repeated_keys(Path(config.search_space_file))
            if not isinstance(config.search_space, dict) or not config.search_space:
                raise ValueError("the search space has no keys")
        except Exception as error:  # NNI's are of every type
            raise UsageError(f"{file}: {error_text(error)}{hint(error)}") from None
        finally:
            utils.unset_base_path()
    lost = [record.getMessage() for record in records if record.levelno >= logging.ERROR]
    found.warnings += [f"NNI ignores a part of {file}: {text}" for text in lost]
    return config


def hint(error: Exception) -> str:
    """What NNI leaves out of two of its errors."""
    from nni.experiment import config

    if "could not convert string to float" in str(error):
        return " (maxExperimentDuration and maxTrialDuration are 30m, 12h or 7d)"
    if "does not have field" not in str(error):
        return ""
    kind, *_, unknown = str(error).split()
    names = {}  # as NNI compares them -> as its documentation writes them
    for known in fields(getattr(config, kind, config.ExperimentConfig)):
        first, *others = known.name.split("_")
        names[known.name.replace("_", "")] = first + "".join(map(str.title, others))
    near = difflib.get_close_matches(unknown, names, 1)
    if near:
        return f" (did you mean {names[near[0]]}?)"
    return " (older keys need trainingServicePlatform)"


def complete_gpu(config: Any, found: Findings) -> None:
    """without useActiveGpu NNI ends at once; said here, so that the rest can be judged too."""
    service = config.training_service
    asked = isinstance(config.trial_gpu_number, int) and config.trial_gpu_number
    if asked and getattr(service, "use_active_gpu", True) is None:
        found.errors.append(
            "trialGpuNumber (gpuNum) needs useActiveGpu in NNI 3.0, or leave it out"
        )
        service.use_active_gpu = True


def repeated_keys(file: Path) -> list[str]:
    """A warning for each key that a mapping in a YAML or JSON file has more than once."""
    try:
        nodes = [yaml.compose(file.read_text().replace("\t", " "), yaml.SafeLoader)]
    except yaml.YAMLError:  # JSON that is not YAML
        return []
    repeated, seen = [], set()
    while nodes:
        node = nodes.pop()
        if id(node) in seen or not isinstance(node, yaml.CollectionNode):
            continue
        seen.add(id(node))  # aliases
        if isinstance(node, yaml.SequenceNode):
            nodes += node.value
            continue
        nodes += [value for _, value in node.value]
        counts = Counter(str(key.value) for key, _ in node.value)
        repeated += [
            f"{file.name} has {name} {count} times in one mapping: only the last one counts"
            for name, count in counts.items()
            if count > 1
        ]
    return repeated


def check_json(folder: Path, name: Any) -> None:
    """Raises ValueError that says where a search space is not JSON; NNI says it of YAML, at length."""
    if name and Path(name).suffix == ".json":
        try:
            json.loads((folder / Path(name).expanduser()).read_text())
        except OSError as error:
            raise ValueError(f"searchSpaceFile {name} cannot be read: {error.strerror}") from None
        except ValueError as error:
            raise ValueError(f"searchSpaceFile {name} is not JSON: {error}") from None
