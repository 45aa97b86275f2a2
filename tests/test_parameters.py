"""Whatever stands on the command line, in YAML, in a sample or in an experiment: it works or is one line."""

import contextlib
import io
import json
import math
import os
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import check_vit
import check_vit.space
import config_vit
import main_vit
from config_vit import NOT_SAVED, UsageError, resolve
from utils_vit import CheckpointError

REPOSITORY = Path(__file__).resolve().parents[1]
PARSER = main_vit.make_parser()
ACTIONS = [action for action in PARSER._actions if action.dest != "help"]
# Those of a run, less the one that few machines can take.
SAVED = [action for action in ACTIONS if action.dest not in NOT_SAVED | {"gpu"}]


@pytest.fixture(params=[1, pytest.param(3, marks=pytest.mark.slow)], ids=["few", "many"])
def times(request: pytest.FixtureRequest) -> int:
    """How many times the examples of a default run."""
    return request.param


def for_all(examples: int, **strategies: Any) -> Callable[[Callable[..., None]], None]:
    """Tries a property on as many examples, the same ones in every run."""
    unhurried = settings(
        max_examples=examples, derandomize=True, database=None, deadline=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    return lambda holds: unhurried(given(**strategies)(holds))()


# --- values --------------------------------------------------------------------------------------

# What the operating system can hand over: bytes of any encoding, but no NUL.
WORDS = st.one_of(
    st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20),
    st.binary(max_size=12).map(lambda b: os.fsdecode(b.replace(b"\0", b""))),
    st.sampled_from(["", "-", "--", "=", "~", "~nobody/x", "a\nb", "-1", "None", "x" * 3000]),
)
NUMBERS = st.one_of(
    st.integers(),
    st.integers(-(10**400), 10**400),
    st.floats(),
    st.sampled_from([0, -1, 2**31, 2**63 - 1, 2**63, 2**64, 10**308, 1e308, 5e-324, -0.0, 4.0]),
)
NUMBER_TEXTS = NUMBERS.map(str) | st.sampled_from(
    [
        "1e400",
        "-1e400",
        "1e-400",
        "0x10",
        "1_000",
        "\u0663",
        "\u00bd",
        "1.5\n",
        " 7 ",
        "+5",
        "9" * 5000,
    ]
)


def plausible(action: Any) -> st.SearchStrategy[Any]:
    """Values that the option takes, by themselves at least."""
    if action.nargs == 0:
        return st.booleans()
    if action.choices:
        return st.sampled_from(action.choices)
    if action.dest == "arch":
        return st.sampled_from(["vit", "simple_vit", "deepvit", "cait", "local_vit", "mae"])
    kind = action.type.__name__
    if kind == "whole number":
        return st.sampled_from([1, 2, 3, 4, 8, 16, 60, 2.0, "5"])
    return st.floats(0.0, 1.0) if kind == "number" else st.sampled_from(["d", "data/x y", "~/d"])


def wrong(words: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return words | NUMBER_TEXTS


# --- command lines -------------------------------------------------------------------------------


@st.composite
def options(draw: st.DrawFn, rarely: int = 4) -> list[str]:
    """One option as people type it: with a space, a =, neither, cut short; one of `rarely` is wrong."""
    if draw(st.integers(0, 3 * rarely)) == 0:
        return [draw(WORDS)]
    action = draw(st.sampled_from(ACTIONS))
    option = draw(st.sampled_from(action.option_strings))
    is_wrong = draw(st.integers(0, rarely)) == 0
    value = str(draw(wrong(WORDS) if is_wrong else plausible(action)))
    if is_wrong and draw(st.booleans()):
        option = option[: draw(st.integers(1, len(option)))]
    if action.nargs == 0 and not is_wrong:
        return [option]
    joined = [[option, value], [f"{option}={value}"], [option + value], [option]]
    return joined[draw(st.integers(0, 3 if is_wrong else 1))]


def command_lines(rarely: int = 4) -> st.SearchStrategy[list[str]]:
    lists = st.lists(options(rarely), max_size=6)
    return lists.map(lambda parts: [word for part in parts for word in part])


# --- YAML ----------------------------------------------------------------------------------------

NAMES = st.sampled_from(ACTIONS).flatmap(
    lambda action: st.sampled_from([action.dest, *(o[2:] for o in action.option_strings)])
)
LEAVES = st.one_of(
    st.none(), st.booleans(), NUMBERS, st.text(max_size=20), st.binary(max_size=9),
    st.dates(), st.datetimes(), NUMBER_TEXTS,
    st.text(st.characters(categories=["Cs", "Cc", "Zl", "Zp"]), max_size=5),
)  # fmt: skip
KEYS = st.one_of(
    NAMES, st.text(max_size=8), st.none(), st.booleans(), st.integers(), st.floats(), st.dates(),
    st.sampled_from(["lr=1", "config=x", "model_dir=x", "help", "h", "", "-", "_name", "a\nb"]),
)  # fmt: skip
TREES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3)
)
# Tags, anchors and scalars that PyYAML reads in its own way, or stumbles over.
FRAGMENTS = st.sampled_from(
    [
        "!!int x", "!!int ''", "!!bool x", "!!float x", "!!timestamp x", "!!binary x", "!!null 1",
        "!!set {a, b}", "!!omap [a: 1]", "!!pairs [a: 1]", "!!str 4", "!!python/object:os.system x",
        "!own {a: 1}", "2001-99-99", "2001-01-01", "12:30:45", "0x" + "f" * 5000, "9" * 5000, "=",
        "0o17", "017", "0b11", ".inf", ".nan", "1e-3", "1_000", "~", "yes", "<<", "*a", "&a 4",
        "&a [*a]", "&a {_name: sgd, momentum: *a}", "{<<: 3}", "{? [a] : 1}", "{_name: sgd, lr: 1}",
        "[" * 500, "'\\ud800'", '"\\ud800"', '"\\0"', "|\n  a\n  b", "\t", "@", "%x",
    ]
)  # fmt: skip


# A parameter and a value that it takes.
RIGHT = st.sampled_from(SAVED).flatmap(lambda a: st.tuples(st.just(a.dest), plausible(a)))


def mappings(rarely: int = 4) -> st.SearchStrategy[dict[Any, Any]]:
    """Parameters as Python reads them from YAML: mostly right ones."""
    pairs = st.integers(0, rarely).flatmap(lambda n: RIGHT if n else st.tuples(KEYS, TREES))
    return st.lists(pairs, max_size=6).map(dict)


@st.composite
def documents(draw: st.DrawFn) -> bytes:
    """The content of a YAML file."""
    kind = draw(st.integers(0, 5))
    if kind == 0:
        return draw(st.binary(max_size=60))
    if kind == 1:
        return yaml.safe_dump(draw(TREES)).encode()
    if kind == 2:
        names = st.sampled_from([action.dest for action in SAVED])
        pairs = st.lists(st.tuples(names, FRAGMENTS), min_size=1, max_size=3)
        return "".join(f"{name}: {fragment}\n" for name, fragment in draw(pairs)).encode()
    text = yaml.safe_dump(draw(mappings()), sort_keys=False).encode()
    if kind == 3:  # bytes lost, or others put in their place
        at = draw(st.integers(0, len(text)))
        return text[:at] + draw(st.binary(max_size=3)) + text[at + draw(st.integers(0, 3)) :]
    return text


# --- NNI: samples, search spaces, experiments ----------------------------------------------------

JSON_LEAVES = st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=12), NUMBER_TEXTS)
JSON = st.recursive(
    JSON_LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.just("_name") | NAMES | st.text(max_size=8), inner, max_size=3)
    ),
)


def nested(name: str, value: Any, inside: dict[Any, Any]) -> tuple[str, Any]:
    """A choice of NNI with what it brings along."""
    return name, {**inside, "_name": value}


SAMPLES = st.lists(
    st.one_of(
        *[RIGHT] * 4,
        st.builds(lambda outer, inner: nested(*outer, dict([inner])), RIGHT, RIGHT),
        st.tuples(NAMES | st.text(max_size=8), JSON),
    ),
    max_size=5,
).map(dict)

RANGES = [
    "randint", "uniform", "quniform", "loguniform", "qloguniform", "normal", "qnormal", "lognormal",
    "qlognormal",
]  # fmt: skip


@st.composite
def specs(draw: st.DrawFn, depth: int = 1) -> Any:
    """One key's values: right, of the wrong number or type, nested, or no specification at all."""
    kind = draw(st.integers(0, 6))
    if kind == 0:
        return draw(JSON)
    if kind == 1:
        values = draw(JSON | st.lists(JSON_LEAVES, max_size=4))
        return {"_type": draw(st.sampled_from([*RANGES, "choice", "x", None, 3])), "_value": values}
    if kind == 2 and depth:
        options = st.fixed_dictionaries(
            {"_name": st.sampled_from(["adam", "sgd", "vit", 3, None])},
            optional={"momentum": specs(depth=0), "lr": specs(depth=0), "x": specs(depth=0)},
        )
        return {"_type": "choice", "_value": draw(st.lists(options, max_size=3))}
    range_type = draw(st.sampled_from(RANGES))
    numbers = st.sampled_from([0, 1, 2, 4, 8, 0.001, 0.1, 0.5]) if kind < 6 else NUMBERS
    ends = [draw(numbers), draw(numbers)]
    if kind < 6 and "normal" not in range_type:
        ends.sort()
    return {
        "_type": range_type,
        "_value": [*ends, draw(numbers)][: 3 if range_type[0] == "q" else 2],
    }


CHOICES = st.sampled_from([a for a in SAVED if a.type is not Path]).flatmap(
    lambda a: st.lists(plausible(a), min_size=1, max_size=3).map(
        lambda values: (a.dest, {"_type": "choice", "_value": values})
    )
)
OTHERS = st.tuples(NAMES, specs()) | st.tuples(KEYS, specs())
SPACES = st.lists(st.one_of(*[CHOICES] * 6, OTHERS), min_size=1, max_size=4).map(dict)
COMMAND = "python main_vit.py --request-from-nni"
TRIAL_COMMANDS = st.one_of(
    *[st.just(COMMAND)] * 4,
    command_lines(rarely=10).map(lambda argv: f"{COMMAND} {shlex.join(argv)}"),
    st.text(max_size=20).map(lambda text: f"{COMMAND} {text}"),
    st.sampled_from(
        [
            "", ";", "cd ~nobody && python main_vit.py", "main_vit.py", f"{COMMAND} --help",
            f"{COMMAND} --config '\0'", f"{COMMAND} --download-dir {'x' * 300}",
            f"cd {'x' * 300} && {COMMAND}", "python '\0/main_vit.py'", f"{COMMAND} -a", "'main_vit.py",
        ]
    ),
)  # fmt: skip
TUNERS = st.sampled_from(
    ["TPE", "Random", "Evolution", "GridSearch", "Batch", "Hyperband", "Anneal", "PBT", "x", "", 3]
)
ARGUMENTS = st.sampled_from(
    [{"optimize_mode": "maximize"}, {}, None, [1], {"optimize_mode": 3}, {"x": 1}, {3: 1}]
)
SERVICES = st.sampled_from(
    [
        {"platform": "local", "trialGpuNumber": 1, "useActiveGpu": True, "maxTrialNumberPerGpu": 0},
        {"platform": "local", "trialGpuNumber": -1}, {"platform": "local", "trialCommand": 3},
        {"platform": "remote", "machineList": []}, {"platform": "openpai"}, {"platform": "kubeflow"},
        {"platform": "hybrid"}, {"platform": None}, [{"platform": "local"}], [], {}, "local", 3,
        {"platform": "frameworkcontroller"}, {"platform": ["local"]}, {1: 2},
    ]
)  # fmt: skip
FIELDS = [
    "experimentName", "searchSpace", "searchSpaceFile", "trialCommand", "trialCodeDirectory",
    "trialConcurrency", "trialGpuNumber", "maxExperimentDuration", "maxTrialNumber",
    "maxTrialDuration", "nniManagerIp", "useAnnotation", "debug", "logLevel", "tuner", "assessor",
    "advisor", "trainingService", "sharedStorage", "tunerGpuIndices", "experimentType",
    "trainingServicePlatform", "trial", "localConfig", "searchSpacePath", "maxTrialNum",
]  # fmt: skip


@st.composite
def experiments(draw: st.DrawFn) -> dict[Any, Any]:
    """A config.yml: a right one with a random space, and a random field now and then."""
    content = {
        "searchSpace": draw(SPACES),
        "trialCommand": draw(TRIAL_COMMANDS),
        "trialCodeDirectory": str(REPOSITORY),
        "trialConcurrency": 1,
        "maxTrialNumber": draw(st.sampled_from([None, 1, 10**6])),
        "tuner": {"name": "Random"},
        "trainingService": {"platform": "local"},
    }
    if draw(st.integers(0, 2)) == 0:
        content["tuner"] = {"name": draw(TUNERS), "classArgs": draw(ARGUMENTS)}
    if draw(st.integers(0, 9)) == 0:
        content["assessor"] = {
            "name": draw(st.sampled_from(["Medianstop", "x"])),
            "classArgs": draw(ARGUMENTS),
        }
    if draw(st.integers(0, 9)) == 0:
        content["trainingService"] = draw(SERVICES)
    if draw(st.integers(0, 9)) == 0:
        content[draw(st.sampled_from(FIELDS) | KEYS)] = draw(TREES)
    return content


# --- what holds for all of them ------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder."""
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def assert_one_line(text: str) -> None:
    assert 0 < len(text) < 1200
    assert len(text.splitlines()) == 1


def resolved(argv: list[str], sample: dict[str, Any] | None = None) -> Any:
    """The parameters, which must survive being written and read, or None after an error of one line."""
    try:
        args = resolve(PARSER, argv, sample)
    except (UsageError, CheckpointError) as error:
        assert_one_line(str(error))
        return None
    saved = config_vit.saved_parameters(args)
    assert all(math.isfinite(v) for v in saved.values() if isinstance(v, float))
    # "~" and "." are the folders of this run, wherever args.yaml is read.
    Path("saved.yaml").write_text(yaml.safe_dump(saved))
    assert config_vit.saved_parameters(resolve(PARSER, ["--config", "saved.yaml"])) == saved
    return args


@contextlib.contextmanager
def output() -> Iterator[Callable[[], tuple[str, str]]]:
    """What is printed, through streams that are as strict as those of a process."""
    out = io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True)
    err = io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace", write_through=True)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        yield lambda: (out.buffer.getvalue().decode(), err.buffer.getvalue().decode())


def run(argv: list[str]) -> tuple[int, str, str]:
    """The status of main without training, its standard output and its standard error."""
    with pytest.MonkeyPatch.context() as patch, output() as printed:
        patch.setattr(main_vit, "main_worker", lambda *_: None)
        try:
            status = main_vit.main(argv)
        except SystemExit as end:  # argparse's, after --help
            assert end.code == 0
            return 0, "", ""
        out, err = printed()
    assert "Traceback" not in out + err
    if status == 2 and err:
        assert err.startswith("main_vit.py: error: ") and err.endswith("\n")
        assert_one_line(err)
    else:
        assert err == ""
    return status, out, err


def test_command_lines(times: int, folder: Path) -> None:
    @for_all(200 * times, argv=command_lines(rarely=3))
    def holds(argv: list[str]) -> None:
        status, *_ = run(argv)
        assert status in (0, 2)
        with contextlib.suppress(SystemExit), output():
            args = resolved(argv)
            # --check ends before the rest of the command line is looked at
            assert (args is not None) == (status == 0) or "check" in PARSER.given(argv)


def test_yaml(times: int, folder: Path) -> None:
    @for_all(200 * times, content=documents())
    def holds(content: bytes) -> None:
        Path("parameters.yaml").write_bytes(content)
        status, *_ = run(["--config", "parameters.yaml"])
        assert status == (2 if resolved(["--config", "parameters.yaml"]) is None else 0)


def test_samples(times: int, folder: Path) -> None:
    @for_all(200 * times, sample=SAMPLES)
    def holds(sample: dict[str, Any]) -> None:
        resolved([], sample)
        # NNI hands over JSON, which knows no other types
        text = json.dumps(sample)
        assert str(resolved([], json.loads(text))) == str(resolved([], sample))


def test_all_sources_at_once(times: int, folder: Path) -> None:
    @for_all(
        150 * times,
        content=mappings(rarely=20).map(yaml.safe_dump),
        argv=command_lines(rarely=20),
        sample=SAMPLES,
    )
    def holds(content: str, argv: list[str], sample: dict[str, Any]) -> None:
        Path("parameters.yaml").write_text(content)
        with contextlib.suppress(SystemExit), output():
            resolved(["--config", "parameters.yaml", *argv], sample)


def test_no_source_sets_what_belongs_on_the_command_line(times: int) -> None:
    @for_all(200 * times, parameters=mappings(rarely=1))
    def holds(parameters: dict[Any, Any]) -> None:
        with contextlib.suppress(UsageError):
            assert not PARSER.given_by("a file", parameters).keys() & (NOT_SAVED | {"help"})


@pytest.mark.parametrize("in_file", [False, True], ids=["inline", "file"])
def test_experiments(times: int, folder: Path, monkeypatch, in_file: bool) -> None:
    for module in (check_vit, check_vit.space):  # enough for what is looked for here
        monkeypatch.setattr(module, "LIMIT", 20)

    @for_all(70 * times, content=experiments())
    def holds(content: dict[Any, Any]) -> None:
        if in_file:
            content = {**content, "searchSpaceFile": "space.json"}
            space = content.pop("searchSpace", {})
            Path("space.json").write_text(json.dumps(space, skipkeys=True, default=str))
        Path("config.yml").write_text(yaml.safe_dump(content))
        status, out, err = run(["--check", "config.yml"])
        assert status in (0, 2)
        if not err:
            verdict = {0: "can run", 2: "cannot run as it should"}[status]
            assert out.splitlines()[-1] == f"config.yml {verdict}"


def test_experiments_of_any_bytes(times: int, folder: Path) -> None:
    @for_all(40 * times, content=documents())
    def holds(content: bytes) -> None:
        Path("config.yml").write_bytes(content)
        assert run(["--check", "config.yml"])[0] == 2


# --- what these properties have found ------------------------------------------------------------


@pytest.mark.parametrize(
    "argv",
    [
        ["--epochs", "9" * 400], ["--epochs", "9" * 5000], ["--epochs", "1.5\n"], ["--ep\nochs", "1"],
        ["--config", "a\nb"], ["--arch", "x" * 5000], ["--image-size", str(2**62), "-p", "3"],
    ],
    ids=lambda argv: repr(argv)[:40],
)  # fmt: skip
def test_command_lines_that_ended_otherwise(argv: list[str], folder: Path) -> None:
    assert run(argv)[0] == 2


@pytest.mark.parametrize(
    "text",
    [
        "lr: !!int x", "lr: !!bool x", "lr: !!int ''", "lr: !!timestamp x", "lr: 2001-99-99",
        "lr: " + "9" * 5000, "lr: 0x" + "f" * 5000, "lr: " + "[" * 500, "config=x: 1",
        "momentum: &a {_name: 0.5, momentum: *a}", "patch_nums: null", f"lr: [{'1, ' * 2000}]",
        '"a\\nb": 1',
    ],
    ids=lambda text: text[:40],
)  # fmt: skip
def test_files_that_ended_otherwise(text: str, folder: Path) -> None:
    Path("parameters.yaml").write_text(text)
    assert run(["--config", "parameters.yaml"])[0] == 2


def test_the_home_of_nobody(folder: Path) -> None:
    """As in a shell, what cannot be expanded stays as it is: a folder that does not exist."""
    assert resolved(["--download-dir", "~nobody-here/x"]).download_dir == folder / "~nobody-here/x"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trialCommand": f"{COMMAND} --help"}, "--help ends every trial"),
        ({"trialCommand": f"cd ~nobody-here && {COMMAND}"}, "does not exist"),
        ({"trialCommand": f"cd {'x' * 300} && {COMMAND}"}, "does not exist"),
        ({"trialCommand": f"{COMMAND} --download-dir {'x' * 300}"}, "does not exist"),
        ({"trialCommand": f"{COMMAND} --config '\0'"}, "a path with a null byte"),
        ({"searchSpace": {"\ud800": 1}}, r"\ud800  WRONG"),
        (
            {"trainingService": {"platform": "local", "trialGpuNumber": 1, "useActiveGpu": True,
                                 "maxTrialNumberPerGpu": 0}},
            "trialGpuNumber (gpuNum) 1 does not work",
        ),
    ],
    ids=str,
)  # fmt: skip
def test_experiments_that_ended_otherwise(changes, message: str, folder: Path) -> None:
    content = {
        "searchSpace": {"lr": {"_type": "choice", "_value": [0.1]}},
        "trialCommand": COMMAND,
        "trialCodeDirectory": str(REPOSITORY),
        "trialConcurrency": 1,
        "tuner": {"name": "Random"},
        "trainingService": {"platform": "local"},
    }
    Path("config.yml").write_text(yaml.safe_dump({**content, **changes}))
    status, out, err = run(["--check", "config.yml"])
    assert (status, err) == (2, "")
    assert message in out
