"""`--check` of tuner and assessor: could NNI make them, would they search, and which way do they look?"""

import copy
import importlib
import inspect
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from check_vit.experiment import Findings, quiet
from check_vit.space import Sample, error_text
from config_vit import Parser
from report_vit import METRICS

# Of NNI 3.0's own that do not run with today's packages, and what to use instead.
REPLACEMENTS = {
    "anneal": ("anneal_tuner.Anneal", "its hyperopt 0.1.2 fails with numpy from 2.2 on"),
    "smac": ("smac_tuner.Smac", "its packages do not install any more"),
    "gp": ("nni_tuners.GP", "it fails with scipy from 1.11 on after cold_start_num trials"),
    "metis": ("nni_tuners.Metis", "it fails with scipy from 1.11 on after cold_start_num trials"),
    "hyperband": ("hyperband_tuner.Hyperband", "it fails on the ids of trials (issue 5263)"),
    "bohb": ("bohb_tuner.BOHB", "it fails on the ids of trials (issue 5263)"),
    "evolution": ("nni_tuners.Evolution", "a trial that is stopped ends the search without a word"),
    "pbt": ("pbt_tuner.PBT", "a trial that fails ends the search, or leaves it waiting for ever"),
    "dngo": ("dngo_tuner.Dngo", "it mixes up the keys and takes 0.95 for the best result"),
}
# What to use instead of those that raise KeyError where a sample lacks the outer of three choices.
SHALLOW = {
    "random": "tpe_tuner.Tpe",
    "tpe": "tpe_tuner.Tpe",
    "gridsearch": "nni_tuners.GridSearch",
}
# Of assessors, by the name of their class: the argument that is the first epoch they judge.
FIRST_JUDGED = {
    "Halving": "first",
    "MedianstopAssessor": "start_step",
    "CurvefittingAssessor": "start_step",
}


@dataclass
class Made:
    """A tuner or assessor as NNI would make it; None for an advisor that only NNI can make."""

    instance: Any
    arguments: dict[str, Any]
    added: Sample  # what trials get from it beside the search space


def is_batch(tuner: Any) -> bool:
    """Whether the one key of the search space stands for whole samples."""
    name = (tuner.name or "").lower()
    return name in ("batch", "batchtuner") or tuner.class_name == "nni_tuners.Batch"


def check_algorithm(
    kind: str,
    config: Any,
    space: dict[str, Any],
    metric: str | None,
    parser: Parser,
    errors: list[str],
) -> Made | None:
    """Make the tuner or assessor as NNI would and ask it once; which way it looks, where a metric is known.

    Returns None if it cannot be made.
    """
    name, path = config.name or config.class_name, sys.path[:]
    with quiet():
        try:
            algorithm, arguments = algorithm_class(kind, config)
            bound = inspect.signature(algorithm).bind(**arguments)
            bound.apply_defaults()
            check_depth(config, space)
            if kind == "assessor":
                instance, added = algorithm(**arguments), {}
                ask_assessor(instance)
            else:
                instance, added = ask_tuner(config, algorithm, arguments, space)
            parser.given_by("it adds a parameter", added)
        except Exception as error:  # of any package that a tuner may be made with
            errors.append(f"{kind} {name}: {error_text(error)}")
            return None
        finally:
            sys.path[:] = path
    mode = bound.arguments.get("optimize_mode", arguments.get("optimize_mode"))
    if (config.name or "").lower() == "curvefitting" and METRICS.get(metric) == "min":
        errors.append(f"{kind} {name} would end the best trials by {metric}: take Halving")
    wanted = {"max": "maximize", "min": "minimize"}.get(METRICS.get(metric))
    if wanted and mode not in (None, wanted):
        said = "has" if "optimize_mode" in arguments else "lacks optimize_mode, which then is"
        errors.append(
            f"{kind} {name} {said} {mode}: it would prefer the worst models by {metric}; "
            f"give classArgs: {{optimize_mode: {wanted}}}"
        )
    return Made(instance, bound.arguments, added)


def algorithm_class(kind: str, config: Any) -> tuple[type, dict[str, Any]]:
    """The class that NNI would make, and its arguments."""
    from nni.tools.package_utils import config_manager

    path, arguments = config.class_name, dict(config.class_args or {})
    replacement = REPLACEMENTS.get((config.name or "").lower().removesuffix("tuner"))
    if kind == "tuner" and replacement:
        raise ValueError(replaced(config, *replacement))
    if path:
        sys.path.append(str(config.code_directory))  # last, as NNI does: installed packages win
    else:
        known = [a for a in config_manager.get_all_algo_meta() if a.algo_type == kind]
        meta = config_manager.get_algo_meta(config.name)
        if meta not in known:
            names = " ".join(a.name for a in known)
            raise ValueError(f"NNI has no {kind} of this name; it has {names}")
        path, arguments = meta.class_name, {**(meta.class_args or {}), **arguments}
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name), arguments


def check_depth(config: Any, space: dict[str, Any]) -> None:
    """Raises ValueError for a key within choices within choices that NNI's own tuner fails on."""
    from nni.common.hpo_utils import format_search_space

    instead = SHALLOW.get((config.name or "").lower().removesuffix("tuner"))
    for key in format_search_space(space) if instead else ():
        if len(key) > 3:  # names, and numbers of options between them
            name = "/".join(part for part in key if isinstance(part, str))
            raise ValueError(
                replaced(config, instead, f"it fails on {name}, a choice inside of choices")
            )


def replaced(config: Any, class_name: str, reason: str) -> str:
    """What to write for a tuner of NNI that does not run."""
    return f"NNI 3.0's own does not work: {reason}; {instead_of(config, class_name)}"


def instead_of(config: Any, class_name: str) -> str:
    """What to write to get one of ours."""
    tuners = os.path.realpath(Path(__file__).parents[1] / "tuners")
    folder = os.path.relpath(tuners, os.path.realpath(config._base_path))
    return (
        f"in place of its name give codeDirectory: {folder} (from where the file is) and "
        f"className: {class_name}"
    )


def ask_tuner(
    config: Any, algorithm: type, arguments: dict[str, Any], space: dict[str, Any]
) -> tuple[Any, Sample]:
    """A tuner, and what trials get from it beside the search space. Raises whatever it raises on the way."""
    from nni.runtime.msg_dispatcher_base import MsgDispatcherBase

    if issubclass(algorithm, MsgDispatcherBase):  # only ours can be made outside of NNI
        if not hasattr(algorithm, "largest_budget"):
            return None, {"TRIAL_BUDGET": 1}
        advisor = algorithm(**arguments)
        advisor.handle_update_search_space(copy.deepcopy(space))
        return advisor, {"TRIAL_BUDGET": advisor.largest_budget}
    os.environ.setdefault("NNI_CHECKPOINT_DIRECTORY", "checkpoint")  # PBT asks for it
    instance = algorithm(**arguments)
    instance.update_search_space(copy.deepcopy(space))
    sample = instance.generate_parameters(0)
    check_startup(instance)
    added = {} if is_batch(config) else {k: v for k, v in sample.items() if k not in space}
    return instance, added


def check_startup(tuner: Any) -> None:
    """Raises ValueError for NNI's own TPE that ends where its first results are not some good and some bad ones."""
    from nni.algorithms.hpo.tpe_tuner import TpeTuner

    if isinstance(tuner, TpeTuner) and any(spec.categorical for spec in tuner.space.values()):
        first, gamma = tuner.args.n_startup_jobs, tuner.args.gamma
        if not 0 < min(math.ceil(gamma * math.sqrt(first)), tuner.args.linear_forgetting) < first:
            raise ValueError(f"n_startup_jobs {first} does not go with gamma {gamma}: give more")


def ask_assessor(assessor: Any) -> None:
    """A trial of three epochs. Raises ValueError, or whatever the assessor does, which would end NNI."""
    from nni.assessor import Assessor, AssessResult

    if not isinstance(assessor, Assessor):
        raise ValueError("it is not an Assessor of NNI")
    history = []
    for value in (0.5, 0.6, 0.7):
        history.append({"default": value} | dict.fromkeys(METRICS, value))  # as main_vit.py reports
        answer = assessor.assess_trial("0", copy.deepcopy(history))
        if not isinstance(answer, bool | AssessResult):
            raise ValueError(f"assess_trial returns {answer!r}, not an AssessResult")
    assessor.trial_end("0", True)


# --- does it do anything? --------------------------------------------------------------------------


def check_tuner(config: Any, made: Made, found: Findings) -> None:
    """Would the tuner learn in as many trials as there are, on the machines that there are?"""
    maximum, platform = config.max_trial_number, config.training_service.platform
    if "load_checkpoint_dir" in made.added:
        members = made.arguments.get("population_size", 0)
        if maximum and maximum < 2 * members:
            found.warnings.append(
                f"maxTrialNumber {maximum} is less than two steps of a population of {members}: no "
                f"member would go on from a better one; give at least {2 * members}, or a smaller "
                "population_size"
            )
        if platform != "local" and not made.arguments.get("all_checkpoint_dir", "unknown"):
            found.errors.append(
                f"PBT on {platform}: trials would start again where the checkpoint they go on from is "
                "on another machine; give classArgs: {all_checkpoint_dir: a folder that all share}"
            )
    from nni.algorithms.hpo.tpe_tuner import TpeTuner

    if isinstance(made.instance, TpeTuner):
        check_tpe(config, made.instance, found)


def check_tpe(config: Any, tpe: Any, found: Findings) -> None:
    """What becomes of a search within the trials at random first, and with NNI's own of choices alone."""
    maximum, tuner = config.max_trial_number, config.tuner
    first, name = tpe.args.n_startup_jobs, tuner.name or tuner.class_name
    if maximum and maximum <= first:
        found.warnings.append(
            f"tuner {name} draws the first {first} trials at random, and maxTrialNumber is {maximum}: "
            "it would learn nothing; give more trials, or a smaller n_startup_jobs in tpe_args"
        )
    elif tuner.name and all(spec.categorical for spec in tpe.space.values()):
        found.warnings.append(
            f"tuner {name}: where all keys are choices NNI's own soon suggests its best again and takes "
            f"the next of a grid for it, from the first corner on; {instead_of(tuner, 'tpe_tuner.Tpe')}"
        )


def check_assessor(config: Any, made: Made, epochs: set[int], found: Findings) -> None:
    """Would the assessor judge trials of so many epochs, where these are known?"""
    name, kind, arguments = config.name or config.class_name, type(made.instance), made.arguments
    first = arguments.get(FIRST_JUDGED.get(kind.__name__, ""), 0)
    if epochs and first >= max(epochs):
        found.warnings.append(
            f"assessor {name} judges no trial before epoch {first}, and trials have {max(epochs)}: it "
            f"would end none; give a smaller {FIRST_JUDGED[kind.__name__]}"
        )
    if "epoch_num" in arguments and any(epoch != arguments["epoch_num"] for epoch in epochs):
        found.warnings.append(
            f"assessor {name}: epoch_num {arguments['epoch_num']} is not the "
            f"{', '.join(map(str, sorted(epochs)))} epochs of the trials, whose last result it is to "
            "foretell: give both the same"
        )
