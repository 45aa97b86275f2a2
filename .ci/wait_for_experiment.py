"""Wait for the experiment at localhost:8080 to end; fail unless every trial reported what it saved."""

import json
import sys
import time
from pathlib import Path

import requests

URL = "http://localhost:8080/api/v1/nni"
deadline = time.monotonic() + 900
while (status := requests.get(f"{URL}/check-status", timeout=10).json()["status"]) != "DONE":
    if status not in ("INITIALIZED", "RUNNING", "NO_MORE_TRIAL", "TUNER_NO_MORE_TRIAL"):
        sys.exit(f"the experiment is {status}")
    if time.monotonic() > deadline:
        sys.exit("the experiment did not end within 15 minutes")
    time.sleep(2)

trials = requests.get(f"{URL}/trial-jobs", timeout=10).json()
for trial in trials:
    if trial["status"] != "SUCCEEDED":
        sys.exit(f"trial {trial['id']} is {trial['status']}")
    shown = json.loads(json.loads(trial["finalMetricData"][0]["data"]))["default"]
    results = json.loads((Path(trial["logPath"]) / "results.json").read_text())
    saved = results["validation"]["accuracy"]
    print(f"trial {trial['sequenceId']}: page {shown:.2f} %, results.json {saved:.2f} %")
    if shown != saved or not 20 < shown <= 100:
        sys.exit("which is not the same, or no better than chance")
if len(trials) != int(sys.argv[1]):
    sys.exit(f"{len(trials)} trials, not {sys.argv[1]}")
