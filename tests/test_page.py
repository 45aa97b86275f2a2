"""NNI's page itself, in a headless Chromium, over a small real experiment of main_vit.py."""

import base64
import io
import json
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

import numpy as np
import pytest
import yaml
from nni_tools import REPOSITORY, Experiment, experiment, read_config
from PIL import Image
from test_nni_live import assert_whole, endless, training

import demo_vit

playwright = pytest.importorskip("playwright.sync_api", reason="needs pip install playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM, reason="no chromium on this machine"),
]
ARGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update",
]  # fmt: skip
EPOCHS, TRIALS = 3, 4


def choice(*values: Any) -> dict[str, Any]:
    return {"_type": "choice", "_value": list(values)}


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Experiment]:
    """The repository's own config.yml, done with 4 trials of small models."""
    folder = tmp_path_factory.mktemp("page")
    config = read_config(REPOSITORY / "config.yml")
    space = json.loads(Path(config.pop("searchSpaceFile")).read_text())
    space |= {"patch_num": choice(2, 4), "vt_depth": choice(1, 2), "vt_dim": choice(16, 32)}
    config["trialCommand"] += f" --epochs {EPOCHS} --image-size 16 --channel 1" + "".join(
        f" {option} {shlex.quote(str(path))}"
        for option, path in {
            "--download-dir": demo_vit.make_digits(folder / "digits"),
            "--cache-dir": folder / "cache",
        }.items()
    )
    config["tuner"]["classArgs"]["seed"] = 0
    config |= {"searchSpace": space, "maxTrialNumber": TRIALS, "trialConcurrency": 2}
    with experiment(config, folder) as running:
        running.wait("DONE", 240)
        yield running


@pytest.fixture(scope="module")
def page() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=ARGS)
        yield browser.new_page(viewport={"width": 1400, "height": 1000})
        browser.close()


def written(running: Experiment, trial_id: str) -> tuple[float, dict[str, Any], list[float]]:
    """What the trial left in its folder: its result, its parameters, its validation by epoch."""
    folder = running.output(trial_id)
    results = json.loads((folder / "results.json").read_text())
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return (
        results["validation"][results["metric"]],
        yaml.safe_load((folder / "args.yaml").read_text()),
        [line[f"val_{results['metric']}"] for line in lines],
    )


def as_shown(value: float) -> str:
    """A metric as the page writes it."""
    return str(round(value, 6)).removesuffix(".0")


def texts(part: Any) -> list[str]:
    """The lines of text of a part of the page, without its icons: they are letters of a font."""
    lines = (line.strip() for line in part.inner_text().splitlines())
    return [line for line in lines if line and line.isprintable()]


def pixels(page: Any, canvas: str) -> np.ndarray:
    """What is drawn on a canvas, uint8 (height, width, RGBA)."""
    page.wait_for_timeout(1500)  # plots grow for a second
    url = page.locator(canvas).evaluate("canvas => canvas.toDataURL()")
    return np.array(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))))


def drawn_series(chart: Any) -> list[list[Any]]:
    """Names and points of the curves of a chart, which are nowhere but in the properties React keeps."""
    return chart.evaluate("""chart => {
        const fiber = chart[Object.keys(chart).find(key => key.startsWith("__reactFiber"))];
        return fiber.return.stateNode.props.option.series.map(({name, data}) => [name, data]);
    }""")


def test_page_shows_results_parameters_and_statuses(running: Experiment, page: Any) -> None:
    """Overview and table of trials against results.json and args.yaml of every trial."""
    ids = [trial["trialJobId"] for trial in running.trials()]
    finals = {trial_id: written(running, trial_id)[0] for trial_id in ids}
    assert len(set(finals.values())) > 1, "all trials are alike: this test would show nothing"

    page.goto(f"{running.url}/oview")
    rows = page.locator(".bestTable .ms-DetailsRow")
    rows.nth(TRIALS - 1).wait_for()
    summary = texts(page.locator(".overviewBasicInfo"))
    assert summary[summary.index("Best metric") - 1] == as_shown(max(finals.values()))
    assert summary[summary.index("Status") - 1] == "DONE"
    numbers = texts(page.locator(".trialCount"))
    shown = {name: numbers[numbers.index(name) + 1] for name in ("Succeeded", "Failed", "Running")}
    assert shown == {"Succeeded": str(TRIALS), "Failed": "0", "Running": "0"}
    top = [texts(row) for row in rows.all()]
    assert [row[-1] for row in top] == [as_shown(v) for v in sorted(finals.values(), reverse=True)]
    assert {row[1]: row[-1] for row in top} == {i: as_shown(v) for i, v in finals.items()}

    page.goto(f"{running.url}/detail")
    rows = page.locator(".ms-DetailsRow")
    rows.nth(TRIALS - 1).wait_for()
    for number, trial_id in enumerate(ids):
        row = texts(rows.nth(number))
        assert row[:2] == [str(number), trial_id]
        assert row[-2:] == ["SUCCEEDED", f"{as_shown(finals[trial_id])} (FINAL)"]
        rows.nth(number).locator("[data-icon-name=ChevronRight]").click()
        pairs = texts(page.locator(".ms-List-cell").nth(number).locator(".bgHyper"))
        parameters = {k: json.loads(v) for k, v in (pair.split(":", 1) for pair in pairs)}
        assert len(parameters) == 9
        args = written(running, trial_id)[1]
        assert parameters == {name: args[name] for name in parameters}


def test_plots_are_drawn_and_tensorboard_opens(running: Experiment, page: Any) -> None:
    """Looks at the pixels of both plots, and at the curves behind the TensorBoard button."""
    curves = {t["trialJobId"]: written(running, t["trialJobId"])[2] for t in running.trials()}
    page.goto(f"{running.url}/detail")
    page.locator(".ms-DetailsRow").nth(TRIALS - 1).wait_for()

    page.get_by_role("tab", name="Hyper-parameter").click()
    drawn = pixels(page, ".parcoords canvas.foreground")[..., 3] > 100
    axes = page.locator(".parcoords .dimension .label").all_text_contents()
    names = list(running.trials()[0]["shown"]["parameters"])
    assert axes[: len(names) + 1] == [*names, "default"]
    assert drawn.any(axis=0).mean() > 0.9, "the lines do not reach from the first to the last axis"
    lines = (np.diff(drawn.astype(int), axis=0) == 1).sum(axis=0).max()
    assert lines == TRIALS, "where they lie apart there is a line for each trial"

    page.get_by_role("tab", name="Intermediate result").click()
    drawn = pixels(page, ".intermediate-graph canvas").reshape(-1, 4)
    # Axes and text are grey; a curve has a colour of its own, with few pixels where curves cross.
    colour = drawn[(drawn[:, 3] == 255) & (np.ptp(drawn[:, :3].astype(int), axis=1) > 60)]
    assert (np.unique(colour, axis=0, return_counts=True)[1] > 100).sum() == TRIALS
    assert dict(drawn_series(page.locator(".intermediate-graph .echarts-for-react"))) == curves
    assert {len(points) for points in curves.values()} == {EPOCHS}

    trial_id, curve = next(iter(curves.items()))
    page.locator(".ms-DetailsRow .ms-Checkbox").first.click()
    page.get_by_role("button", name="TensorBoard").first.click()
    with page.context.expect_page() as opened:
        page.get_by_role("button", name="Ok").click()
    board = opened.value
    board.get_by_text(f"0-{trial_id}").first.wait_for()
    run = f"0-{trial_id}/."
    query = {"run": run, "tag": "val/accuracy"}
    points = board.request.get(
        urljoin(board.url, "/data/plugin/scalars/scalars"), params=query
    ).json()
    assert [value for _, _, value in points] == pytest.approx(curve)
    images = board.request.get(urljoin(board.url, "/data/plugin/images/tags")).json()[run]
    matrices = {"confusion_matrix/validation", "confusion_matrix/test"}
    assert images.keys() == matrices | {"train/first_batch"}
    board.goto(f"{board.url.split('#')[0]}#images")
    board.wait_for_function("""() => {  // TensorBoard draws in shadow trees
        const images = node => [...node.querySelectorAll("*")].flatMap(
            e => [...(e.localName === "img" ? [e] : []), ...(e.shadowRoot ? images(e.shadowRoot) : [])]
        );
        return images(document).some(image => image.src.includes("images") && image.naturalWidth > 0);
    }""")
    board.close()


def test_logs_and_every_metric_can_be_seen(running: Experiment, page: Any) -> None:
    """The buttons of a trial: its log in a tab of its own, and the curve of each metric it reports."""
    trial = running.trials()[0]
    page.goto(f"{running.url}/detail")
    row = page.locator(".ms-DetailsRow").first
    row.locator("[data-icon-name=ChevronRight]").click()
    page.get_by_role("tab", name="Log", exact=True).click()
    with page.context.expect_page() as opened:
        page.get_by_role("button", name="View trial log").click()
    log = opened.value
    log.get_by_text(f"epoch   {EPOCHS}/{EPOCHS}").first.wait_for()
    log.close()

    lines = (running.output(trial["trialJobId"]) / "metrics.jsonl").read_text().splitlines()
    page.goto(f"{running.url}/detail")
    for metric in ("auc", "loss", "balanced_accuracy", "accuracy"):
        page.locator("button[title=Intermediate]").first.click()
        dialog = page.get_by_role("dialog")
        dialog.get_by_role("combobox").click()
        page.get_by_role("option", name=metric, exact=True).click()
        chart = dialog.locator(".echarts-for-react")
        points = [json.loads(line)[f"val_{metric}"] for line in lines]
        assert drawn_series(chart)[0][1] == pytest.approx(points)
        page.keyboard.press("Escape")
        dialog.wait_for(state="hidden")


def kill(page: Any, running: Experiment, trial: dict[str, Any]) -> None:
    page.goto(f"{running.url}/detail")
    row = page.locator(".ms-DetailsRow", has_text=trial["trialJobId"])
    row.locator("button[title=kill]").click()
    page.get_by_role("button", name="Yes").click()
    page.get_by_role("button", name="Close").click()


def test_buttons_change_a_running_search(
    tmp_path: Path, make_images: Callable[..., Path], page: Any
) -> None:
    """More at a time, more in all, a trial of one's own, the end of another: all in the page."""
    with endless(tmp_path, make_images) as running:
        [first] = training(running, 1)
        page.goto(f"{running.url}/oview")
        for box, value in ((".maxTrialNumber", 4), (".trialConcurrency", 2)):
            page.locator(box).click()
            page.locator(".edit-numbers input").fill(str(value))
            page.locator(".edit-numbers [data-icon-name=CheckMark]").click()
            page.locator(f"{box} .number", has_text=str(value)).wait_for()
        training(running, 2)

        page.goto(f"{running.url}/detail")
        page.locator("button[title='Customized trial']").first.click()
        page.get_by_role("dialog").get_by_role("textbox").fill("0.0123")
        page.get_by_role("button", name="Submit").click()
        page.get_by_role("button", name="Confirm").click()  # it is outside of the search space
        page.get_by_role("button", name="OK").click()
        kill(page, running, first)
        assert_whole(running, first["trialJobId"])
        *_, own = training(running, 2)
        args = yaml.safe_load((running.output(own["trialJobId"]) / "args.yaml").read_text())
        assert args["lr"] == own["shown"]["parameters"]["lr"] == 0.0123
        kill(page, running, own)
        assert_whole(running, own["trialJobId"])
        training(running, 2)  # the tuner, told of it, has gone on
