"""Run every comparison, one after the other, and write benchmarks/results.md with a plot beside it.

python benchmarks/run_all.py --data chest_xray --fullsize chest_xray_fullsize
python benchmarks/run_all.py --gpu --data chest_xray      the part that is about a GPU
"""

import argparse
import contextlib
import datetime
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

from harness import GOALS_HEAD, Parser, image_folder, table

HERE = Path(__file__).resolve().parent
COMPUTED = (  # on a GPU whole trials are run
    " Those of whole trials are\ncomputed for 5,216 images and 5 epochs from the start and the epochs of "
    "shorter runs, see compare.py below."
)


def plan(args: argparse.Namespace) -> list[tuple[str, list[str] | None]]:
    """Scripts and their arguments; None where the images that one needs were not given."""
    data = ["--data", str(args.data)] if args.data else None
    fullsize = ["--data", str(args.fullsize)] if args.fullsize else None
    quick = ["--quick"] if args.quick else []
    gpu = ["--device", "cuda"] if args.gpu else []
    # Where an epoch takes a second, one computed from shorter runs would be mostly what is beside it.
    whole = ["--images", "5216", "--epochs", "5"] if args.gpu else []
    scripts = [
        ("compare.py", data and data + quick + gpu + whole),
        ("limits.py", (data or []) + quick + gpu),
        ("augment.py", quick),
        ("checkpoint_cost.py", quick),
    ]
    if not args.gpu:
        scripts += [
            ("startup.py", (data or []) + quick),
            ("memory.py", quick),
            ("reading.py", fullsize and fullsize + quick),
            ("ranks.py", quick),
            ("search_throughput.py", quick),
            ("early_stopping.py", quick),
        ]
    return scripts


def run_script(
    name: str, options: list[str] | None, limit: float, environment: dict[str, str]
) -> tuple[str, bool]:
    """What a script printed, or a line on why there is nothing; and whether it ended well."""
    if options is None:
        return "Not run: its images were not given.", True
    process = subprocess.Popen(
        [sys.executable, str(HERE / name), *options], cwd=HERE.parent, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, **environment},
    )  # fmt: skip
    try:
        output, messages = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)  # it may have an experiment of NNI to stop
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=120)
        process.kill()
        return f"Ended after {limit:.0f} s without a result.", False
    if process.returncode:
        last = messages.strip().splitlines()[-1:] or ["no message"]
        return f"{output}\nEnded with status {process.returncode}: {last[0]}".strip(), False
    return output.strip(), True


def goals_of(text: str) -> list[tuple[str, float, float, str]]:
    """The rows of the tables of goals in what a script printed, less those that were not measured."""
    head, rows, inside = table(GOALS_HEAD, []).splitlines()[0], [], False
    for line in text.splitlines():
        inside = line == head or (inside and line.startswith("|"))
        cells = [cell.strip() for cell in line.strip("| ").split(" | ")]
        if inside and line != head and set(cells[0]) != {"-"} and cells[2] != "not measured":
            rows.append((cells[0], float(cells[1]), float(cells[2]), cells[3]))
    return rows


def plot(rows: list[tuple[str, float, float, str]], file: Path) -> None:
    """Measured over wanted, one bar a goal; what reaches the line reaches its goal."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(10, 1 + 0.5 * len(rows)), layout="constrained")
    for i, (_, wanted, measured, _) in enumerate(rows):
        share = measured / wanted
        axes.barh(i, share, color="tab:green" if share >= 1 else "tab:orange")
        number = f"{measured:,.0f}" if measured >= 100 else f"{measured:.3g}"
        axes.text(share, i, f" {number} of {wanted:g}", va="center")
    axes.axvline(1, color="black", linewidth=1)
    axes.set(xscale="log", xlabel="measured / wanted", yticks=range(len(rows)))
    axes.set_yticklabels([textwrap.fill(what, 48) for what, _, _, _ in rows])
    axes.margins(x=0.25)
    axes.invert_yaxis()
    figure.savefig(file, dpi=120)


def main(argv: list[str] | None = None) -> int:
    # fmt: off
    parser = Parser(prog="run_all.py", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data", type=image_folder, metavar="DIR", help="chest X-rays of 224 pixels, with train/ and test/")
    add("--fullsize", type=image_folder, metavar="DIR", help="chest X-rays of full size, for reading.py")
    add("--gpu", action="store_true", help="the part that is about a GPU; writes results-gpu.md")
    add("--quick", action="store_true", help="small, once, one thread: shows that everything runs, not how fast")
    add("--limit", type=float, default=2400, metavar="SECONDS", help="of one script (default: %(default)s)")
    add("--out", type=Path, default=HERE, metavar="DIR", help="where the results go (default: beside this script)")
    # fmt: on
    args = parser.parse_args(argv)
    if not args.out.is_dir():
        parser.error(f"--out {args.out} is not a folder")
    import torch
    from timed import hardware

    if args.gpu and not torch.cuda.is_available():
        parser.error("--gpu: torch sees no GPU here")
    environment = {} if args.gpu else {"CUDA_VISIBLE_DEVICES": ""}
    if args.quick:  # on a busy machine several threads wait for each other, 20 times as long
        environment["OMP_NUM_THREADS"] = "1"
    began, texts, all_well = time.monotonic(), {}, True
    for name, options in plan(args):
        print(f"{name} ...", end=" ", file=sys.stderr, flush=True)
        since = time.monotonic()
        texts[name], well = run_script(name, options, args.limit, environment)
        all_well &= well
        end = f"{time.monotonic() - since:.0f} s"
        print(end if well else f"{end}: {texts[name]}", file=sys.stderr, flush=True)
    goals = [row for text in texts.values() for row in goals_of(text)]
    stem = "results-gpu" if args.gpu else "results"
    if goals:
        plot(goals, args.out / f"{stem}.png")
    rows = [
        (what, f">= {wanted:g}", f"{measured:.2f}", "yes" if measured >= wanted else "no", n)
        for what, wanted, measured, n in goals
    ]
    minutes = (time.monotonic() - began) / 60
    command = "python benchmarks/run_all.py " + " ".join(sys.argv[1:] if argv is None else argv)
    head = [
        "# Results of the benchmarks",
        f"{hardware()}. {datetime.date.today()}, {minutes:.0f} minutes, `{command.strip()}`."
        + (" A quick run: it shows that everything runs, not how fast." if args.quick else ""),
        "Medians; every ratio is of processes or steps that took turns in one session on one machine."
        + ("" if args.gpu else COMPUTED),
        table(("what", "goal", "measured", "reached", "n"), rows).strip(),
    ]
    head += [f"![Measured over wanted]({stem}.png)"] if goals else []
    sections = [f"## {name}\n\n{text}" for name, text in texts.items()]
    (args.out / f"{stem}.md").write_text("\n\n".join([*head, *sections]) + "\n")
    print(f"{args.out / stem}.md", file=sys.stderr)
    return 0 if all_well else 1


if __name__ == "__main__":
    sys.exit(main())
