"""A trialCommand, a line of bash: what of it main_vit.py is given, and what keeps signals from it."""

import itertools
import os
import re
import subprocess
from pathlib import Path
from typing import NamedTuple

from config_vit import Parser, UsageError
from folder_vit import printable

QUOTED = r"""'[^']*'|"(?:\\.|[^"\\])*"|\\."""
PARENTHESES = r"\((?:[^()]|\([^)]*\))*\)"
TOKEN = re.compile(
    r"""(?P<comment>(?<![^\s;&|()])#[^\n]*)|(?P<redirection>&?\d*[<>]+(?!\()[&|]?)|(?P<control>[;&|\n]+)"""
    rf"""|(?P<group>[()])|(?P<word>([$<>]{PARENTHESES}|\$\{{[^}}]*\}}|`[^`]*`|{QUOTED}|[^\s;&|<>()\\'"])+)"""
    r"""|(?P<unclosed>['"])""",
    re.DOTALL,
)
# The pieces of a word: what only bash can compute, variables and, outside of "", quotes and names of files.
COMPUTED = rf"(?P<computed>`[^`]*`|\${PARENTHESES}|\$\{{\w*[^\w}}][^}}]*\}}|\$[\d@*#?!$-])"
VARIABLE = r"\$(?P<name>\w+)|\$\{(?P<braced>\w+)\}"
WITHIN = re.compile(rf"""\\(?P<escaped>[$`"\\])|{COMPUTED}|{VARIABLE}""")
PIECE = re.compile(
    rf"""'(?P<single>[^']*)'|"(?P<double>(?:\\.|[^"\\])*)"|\\(?P<escaped>.)|{COMPUTED}|{VARIABLE}"""
    r"""|(?P<files>[*?]|\[[^\]\s]+\]|\{[^{}\s]*(?:,|\.\.)[^{}\s]*\})""",  # x*, [ab], {a,b}, {1..3}
    re.DOTALL,
)
# Set by bash itself, which this process does not have.
OF_BASH = ("RANDOM", "SRANDOM", "SECONDS", "UID", "EUID", "PPID", "HOSTNAME", "OLDPWD")
UNKNOWN = "\ue000"  # in place of what only bash will know
# What may stand before a program, and commands that change nothing about which programs there are.
AHEAD = re.compile(r"exec|command|time|[!{]|\w+\+?=.*", re.DOTALL)
HARMLESS = {"cd", "echo", "export", "mkdir", "sleep", "ulimit"}


class Call(NamedTuple):
    """How a trialCommand runs main_vit.py: where, with what, and by which program, None if that cannot be told.

    UNKNOWN is in the words that cannot be told from here, and a word by itself if that is the folder.
    """

    folder: Path
    argv: list[str]
    program: str | None


def without_comments(command: str) -> str:
    """The command without comments: words that begin with #, and the rest of their lines."""
    return TOKEN.sub(lambda token: "" if token["comment"] else token[0], command)


def trial_call(command: str, folder: Path) -> Call:
    """What bash makes of a trialCommand in `folder`. Raises UsageError if it does not run main_vit.py."""

    def piece(match: re.Match[str]) -> str:
        text = match[match.lastgroup]
        match match.lastgroup:
            case "single" | "escaped":
                return text
            case "double":
                return WITHIN.sub(piece, text)
            case "name" | "braced":
                later = (
                    text in OF_BASH or text.startswith("NNI_") or re.search(rf"\b{text}=", command)
                )
                # One that nobody sets stays as it is, and is named in the error that this leads to.
                values = {**os.environ, "PWD": str(now)}
                return values.get(text, UNKNOWN if later else match[0])
        return UNKNOWN

    calls: list[list[str]] = [[]]
    is_target = False  # of a redirection
    for token in TOKEN.finditer(without_comments(command).replace("\\\n", " ")):
        if token["unclosed"]:
            raise UsageError(f"No closing quotation: {command}")
        if token["word"] and not is_target:
            calls[-1].append(token[0])
        elif token["control"] or token["group"]:
            calls.append([])
        is_target = token["redirection"] is not None
    now, unknown, others = folder, False, False
    certain = not re.search(r"\bPATH\b|\|\|", command)  # which program it will be
    for words in calls:
        part = [PIECE.sub(piece, word) for word in words]
        call = [*itertools.dropwhile(AHEAD.fullmatch, part)]
        if call[:1] == ["cd"]:
            target = [word for word in call[1:] if not re.fullmatch("-[LPe]+|--", word)] or ["~"]
            now = now / (UNKNOWN if target[0] == "-" else os.path.expanduser(target[0]))
        for i, word in enumerate(call):
            if SHELL.search(word) or word == "eval":  # not looked into
                unknown = True
                break
            script = "main_vit.py" if call[max(i - 1, 0) : i + 1] == ["-m", "main_vit"] else word
            if Path(script).name == "main_vit.py":
                place = now / os.path.expanduser(script)
                if UNKNOWN in f"{now}{place}":
                    return Call(folder, [*call[i + 1 :], UNKNOWN], None)
                for needed, found in ((now, os.path.isdir(now)), (place, os.path.isfile(place))):
                    if not found:
                        raise UsageError(f"{needed} does not exist")
                certain &= not call[0].startswith("-") and UNKNOWN not in "".join(call[:i])
                program = os.path.expanduser(call[0]) if certain else None
                return Call(now, call[i + 1 :], program)
            unknown |= UNKNOWN in word
            others |= word.endswith(".py") and UNKNOWN not in Path(word).name
        certain &= not call or call[0] in HARMLESS
    if unknown and not others:
        return Call(folder, [UNKNOWN], None)
    raise UsageError(f"it does not run main_vit.py: {command}")


def no_program(call: Call) -> list[str]:
    """An error if bash finds no such program on this machine, with the PATH that `nnictl` would have here."""
    if call.program is None:
        return []
    ask = ["/bin/bash", "-c", 'type -t -- "$0"', call.program]
    try:
        if subprocess.run(ask, cwd=call.folder, capture_output=True).returncode == 0:
            return []
    except ValueError:  # a null byte
        pass
    return [
        f"trialCommand: bash finds no program {printable(call.program)}: give the one that is to run "
        "main_vit.py, as python, or activate its environment first"
    ]


def known_arguments(argv: list[str], parser: Parser) -> tuple[list[str], set[str]]:
    """`argv` less what bash has yet to put in, and the parameters that this sets; "" is any of them."""
    actions = parser._option_string_actions
    known: list[str] = []
    unclear = set()
    for word in argv:
        if UNKNOWN not in word:
            known.append(word)
            continue
        option = word.partition("=")[0]
        before = actions.get(known[-1]) if known and option not in actions else None
        if before and before.nargs != 0:
            option = known.pop()
        unclear.add(actions[option].dest if option in actions else "")
    return known, unclear


# --- what gets NNI's SIGINT -----------------------------------------------------------------------

# torchrun passes the signal on to the processes that it started.
PYTHON = re.compile(r"""(^|[/"'])(python[\d.]*|torchrun)["']?$|\.py["']?$""")
SHELL = re.compile(r"""(^|/)(ba|da|z|k)?sh$|\.sh["']?$""")
BASH_C = re.compile(
    r"""(\S*/)?bash (-\w+ )*-\w*c\w* ('(?P<single>[^']*)'|"(?P<double>(\\.|[^"\\])*)")(?!\S)""",
    re.DOTALL,
)


def hides_signals(command: str) -> str | None:
    """The part of a trialCommand that keeps NNI's SIGINT from Python, None if it gets through."""
    # NNI signals bash, and only bash: Python gets it where bash turned into Python, which it does for
    # the last command of a line if that stands plain, and for whatever is exec'ed.
    command = without_comments(command).replace("\\\n", " ").strip().rstrip(";")
    words: list[str] = []
    places: list[int] = []  # of the words
    hiding = after_python = None
    for token in TOKEN.finditer(command):
        rest = command[token.start() :]
        if token["word"]:
            words.append(token[0])
            places.append(token.start())
        elif token["control"] and token[0] not in ("|", "|&", "&"):  # ; && || newline
            if words[:1] == ["trap"]:  # bash stays, to run it at the end
                return command
            if any(map(PYTHON.search, words)):
                after_python = rest
            words, places, hiding = [], [], None
        elif not token["redirection"] or "exec" not in words:
            hiding = hiding or rest
    python = next((i for i, word in enumerate(words) if PYTHON.search(word)), len(words))
    for i, word in enumerate(words[:python]):
        if SHELL.search(word):
            # With -c bash turns into its last command too; a sh, and whoever reads a file, stays.
            if inner := BASH_C.match(" ".join(words[i:])):
                text = inner["single"] or re.sub(r"\\(.)", r"\1", inner["double"] or "")
                return hiding or hides_signals(text)
            return hiding or command[places[i] :]
    program = next((word for word in words if "=" not in word), "")
    waits = program == "flock" and not {"-F", "--no-fork"} & set(words)
    if waits or program in ("time", "eval", "!"):
        hiding = hiding or command[command.rindex(program) :]
    return hiding or (None if python < len(words) else after_python)
