"""Pictures of NNI's page for the README, written beside this file.

python docs/take_screenshots.py http://localhost:8080      (a running experiment, or `nnictl view`)
"""

import shutil
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import Locator, Page, sync_playwright

FOLDER = Path(__file__).parent
ARGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update",
]  # fmt: skip
# The page's icons are a font from Microsoft's servers: without it they would be empty boxes. The
# summary and the trial numbers go side by side and the table below them, without what is between.
STYLE = """
[data-icon-name] { visibility: hidden }
.overviewWrapper { grid: auto / 500px 1fr; max-height: none; margin: 0 }
.overviewWrapper .duration, .overviewBestMetric { display: none }
.overviewWrapper .overviewBasicInfo { grid-area: 1 / 1; max-height: none }
.overviewBasicInfo * { white-space: normal !important; overflow-wrap: anywhere }
.overviewWrapper .trialCount { grid-area: 1 / 2; margin: 0; max-height: none }
.bestTable { grid-area: 2 / 1 / 3 / 3; max-height: none }
.header { display: none }
#succTable { height: 470px }
.trial .graph.intermediate-graph { height: 366px }
.intermediate-graph .xAxis { top: 336px }
.parcoords text { font-size: 13px }
"""


def save(page: Page, part: Locator, name: str) -> None:
    """Waits until nothing moves any more and writes docs/<name>.png."""
    path = FOLDER / f"{name}.png"
    page.wait_for_timeout(2000)
    part.screenshot(path=path, animations="disabled")
    Image.open(path).convert("RGB").quantize(256).save(path, optimize=True)


def remove_axes(page: Page, names: list[str]) -> None:
    """Takes axes off the hyperparameter plot, by its dialog."""
    page.get_by_role("button", name="Add/Remove axes").click()
    dialog = page.get_by_role("dialog")
    for name in names:
        dialog.get_by_text(name, exact=True).click()
    dialog.get_by_role("button", name="Save").click()
    dialog.wait_for(state="detached")


def main(url: str) -> None:
    """Three pictures of the experiment at `url`."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=ARGS)
        page = browser.new_page(viewport={"width": 1200, "height": 1000}, device_scale_factor=1.5)
        page.goto(f"{url}/oview")
        page.locator(".bestTable .ms-DetailsRow").first.wait_for()
        page.add_style_tag(content=STYLE)
        page.set_viewport_size({"width": 1190, "height": 1000})  # the table now takes its new width
        save(page, page.locator(".overviewWrapper"), "overview")

        page.set_viewport_size({"width": 1200, "height": 1000})
        page.goto(f"{url}/detail")
        page.locator(".ms-DetailsRow").first.wait_for()
        page.add_style_tag(content=STYLE)
        page.get_by_role("tab", name="Hyper-parameter").click()
        # "default" is the one of them that the search went by
        remove_axes(page, ["accuracy", "balanced_accuracy", "auc", "loss"])
        save(page, page.locator(".parcoords"), "hyperparameters")
        page.get_by_role("tab", name="Intermediate result").click()
        save(page, page.locator(".intermediate-graph"), "intermediate")
        browser.close()


if __name__ == "__main__":
    main(sys.argv[1].rstrip("/"))
