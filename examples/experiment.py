"""The search of config.yml in Python: starts it, waits until it is done, prints the best trial.

python examples/experiment.py        and meanwhile its page: http://localhost:8080
"""

import os
from pathlib import Path

from nni.experiment import Experiment
from nni.experiment.config import CustomAlgorithmConfig

ROOT = Path(__file__).resolve().parents[1]


def search(options: str = "--epochs 25", trials: int = 20, port: int = 8080) -> None:
    """One experiment of so many trials of main_vit.py with these options; ends with NNI and its page."""
    os.environ["NODE_OPTIONS"] = f'--require="{ROOT / "loopback.cjs"}"'  # for this machine only
    experiment = Experiment("local")
    config = experiment.config
    config.trial_command = f"python main_vit.py --request-from-nni {options}"
    config.trial_code_directory = ROOT
    config.search_space_file = ROOT / "search_net_ViT.json"
    config.tuner = CustomAlgorithmConfig(
        code_directory=ROOT / "tuners",
        class_name="tpe_tuner.Tpe",
        class_args={"optimize_mode": "maximize"},
    )
    config.max_trial_number, config.trial_concurrency = trials, 2
    if not experiment.run(port):  # Ctrl-C, which has stopped it already, or an error
        raise SystemExit(f"it did not come to its end: nnictl resume {experiment.id}")
    if results := experiment.export_data():
        best = max(results, key=lambda trial: trial.value["default"])
        print(f"best: trial {best.trialJobId}, {best.value['default']:.2f} %, {best.parameter}")
    else:
        print("no trial has succeeded: the page shows why")
    experiment.stop()


if __name__ == "__main__":
    search()
