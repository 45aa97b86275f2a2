"""NNI's search spaces: the samples that a tuner can draw from one, enumerated for `--check`."""

import itertools
import math
import random
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from config_vit import UsageError
from utils_vit import CheckpointError

LIMIT = 2000  # combinations, and values of one key, that are tried; of more a sample

Sample = dict[str, Any]
Variants = tuple[Sample, ...]  # one sample, or three that stand for one where a range is continuous


def samples_of(space: dict[str, Any]) -> tuple[list[Variants], bool]:
    """All combinations as NNI would sample them, or LIMIT random ones; and whether these are all."""
    from nni.common.hpo_utils import deformat_parameters, format_search_space

    specs = format_search_space(space)
    rng = random.Random(0)

    def products(rest: list[Any], chosen: dict[Any, Any], one: bool) -> Iterator[dict[Any, Any]]:
        if not rest:
            yield chosen
        elif not activated(rest[0], chosen):  # in a nested space: of another option
            yield from products(rest[1:], chosen, one)
        else:
            choices = points(rest[0])
            for point in [rng.choice(choices)] if one else choices:
                yield from products(rest[1:], chosen | {rest[0].key: point}, one)

    every = list(specs.values())
    picks = [*itertools.islice(products(every, {}, one=False), LIMIT + 1)]
    if more := len(picks) > LIMIT:
        picks = [next(products(every, {}, one=True)) for _ in range(LIMIT)]
    samples = {}
    for pick in picks:
        count = 3 if any(isinstance(point, tuple) for point in pick.values()) else 1
        variants = tuple(
            deformat_parameters(
                {k: p[i] if isinstance(p, tuple) else p for k, p in pick.items()}, specs
            )
            for i in range(count)
        )
        samples[repr(variants)] = variants  # once, if a choice holds a value twice
    return [*samples.values()], not more


def activated(spec: Any, chosen: dict[Any, Any]) -> bool:
    """As NNI's `is_activated_in`, which raises KeyError for a choice in a choice in a choice."""
    return not spec.is_nested() or chosen.get(spec.key[:-2]) == spec.key[-2]


def points(spec: Any) -> Sequence[Any]:
    """The numbers that NNI draws from for one key; three at once stand for a continuous range."""
    if spec.categorical:
        return range(spec.size)[:: math.ceil(spec.size / LIMIT)]
    if spec.normal_distributed:  # 95 % lie between these
        return [tuple(spec.mu + share * spec.sigma for share in (0, -2, 2))]
    if spec.q is not None:
        low, high = spec.clip
        steps = range(round(low / spec.q), round(high / spec.q) + 1)
        values = [max(k * spec.q, low) for k in steps[:: math.ceil(len(steps) / LIMIT)]]
        return [math.log(v) for v in values] if spec.log_distributed else values
    # Not the ends themselves, which are as good as never drawn, and no whole number by chance.
    return [tuple(spec.low + share * (spec.high - spec.low) for share in (0.371, 1e-4, 1 - 1e-4))]


def batch_samples(space: dict[str, Any]) -> list[Variants]:
    """What NNI's Batch tuner hands out, the values of the only key. Raises UsageError."""
    match [*space.values()]:
        case [{"_value": [*values]}] if values and all(isinstance(v, dict) for v in values):
            return [(value,) for value in values]
    raise UsageError("the Batch tuner needs a search space of one key, a choice of mappings")


def attempt(
    samples: list[Variants], function: Callable[[Sample], Any]
) -> tuple[list[Any], Counter[str], Counter[str]]:
    """Results of a function for all samples, and how many fail, wholly or for a part of a range."""
    results, failing, partly = [], Counter(), Counter()
    for variants in samples:
        messages = []
        for sample in variants:
            try:
                results.append(function(sample))
            except (UsageError, CheckpointError) as error:
                messages.append(str(error))
        if messages:
            (failing if len(messages) == len(variants) else partly)[messages[0]] += 1
    return results, failing, partly


def values_text(spec: Any) -> str:
    """The values of a key, short enough for a line."""
    text = str(spec)
    if isinstance(spec, dict) and isinstance(spec.get("_value"), list):
        values = (v.get("_name", v) if isinstance(v, dict) else v for v in spec["_value"])
        kind = [] if spec.get("_type") == "choice" else [f"{spec.get('_type')}:"]
        text = " ".join([*kind, *map(str, values)])
    return text if len(text) <= 70 else f"{text[:67]}..."


# --- what NNI would not take -------------------------------------------------------------------------


def spec_errors(name: str, spec: Any) -> Iterator[str]:
    """What NNI could not take of a key, or of those within its options as "optimizer/momentum"."""
    from nni.common.hpo_utils import validate_search_space

    match spec:
        case {"_type": "choice", "_value": [*options]}:
            given = [option for option in options if option is not None]  # null is "not given"
            plain = spec | {"_value": given}
        case _:
            plain, given = spec, []
    try:
        validate_search_space({name: plain}, raise_exception=True)
    except Exception as error:  # NNI trusts what it reads
        reason = error_text(error).removeprefix(f'search space "{name}" ')
        yield f"search space: {name}: {reason}"
        return
    for option in given:
        for key, inner in option.items() if isinstance(option, dict) else ():
            if key != "_name":
                yield from spec_errors(f"{name}/{key}", inner)


def error_text(error: Exception) -> str:
    """An error of other people's code in one line; of a bare assertion its condition."""
    text = " ".join(str(error).split())
    if not text:
        text = traceback.extract_tb(error.__traceback__)[-1].line or ""
    return text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}"
