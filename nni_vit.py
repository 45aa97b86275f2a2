"""Everything that knows NNI 3.0: what a trial is given, what it reports, and the quirks around it."""

import ctypes
import fcntl
import json
import logging
import math
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec, module_from_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from config_vit import UsageError
from files_vit import json_object, replace_file

log = logging.getLogger("vit.nni")


class Trial:
    """One NNI trial: its parameters, reports and folder; without NNI {} and reports to nowhere."""

    def __init__(self, asked: bool = True) -> None:
        """`asked` on rank 0 under --request-from-nni; else it is a trial without NNI."""
        self.inside = asked and "NNI_TRIAL_JOB_ID" in os.environ
        self.id = os.environ.get("NNI_TRIAL_JOB_ID", "")
        self.sequence_id = int(os.environ.get("NNI_TRIAL_SEQ_ID", "0")) if self.inside else 0
        self.output_dir = Path(os.environ["NNI_OUTPUT_DIR"]) if self.inside else None
        self._record: dict[str, Any] = {"trial_id": self.id, "sequence_id": self.sequence_id}
        self._finished = False
        self._first_epoch = 1
        # Epoch and metrics that are yet to be told.
        self._last: tuple[int, dict[str, float]] | None = None
        if not self.inside:
            return
        end_with_parent()
        self._nni = trial_module()
        if os.environ["NNI_PLATFORM"] == "remote":
            # What "View trial log" shows; NNI puts a trial's output there on its own machine only.
            sys.stdout = open(self.output_dir / "trial.log", "a", buffering=1)  # noqa: SIM115
        logging.getLogger("nni.runtime.trial_command_channel").setLevel(logging.WARNING)
        # A trial in flight at `nnictl stop` starts again, after `nnictl resume`, in the same folder.
        record = self.output_dir / "nni.json"
        if record.exists():
            self._record["final"] = json_object(record.read_bytes()).get("final")

    def ask(self) -> dict[str, Any]:
        """The parameters that NNI's page shows for this trial; to be called once. Raises UsageError."""
        if not self.inside:
            return {}
        import requests

        try:
            self._nni.get_next_parameter()
        except requests.RequestException:
            raise UsageError(
                "NNI's manager is out of reach, was the search stopped? `nnictl resume` starts this trial again"
            ) from None
        received = self._nni._params
        # NNI hands queued parameters to whichever trial asks first but files them by trial. What is
        # filed under our id is what the page shows and what resume repeats, so that is what we use,
        # with its parameter_id, by which the tuner knows our results.
        used = self._filed() if self._manager() else received
        if used is None:
            log.warning("NNI's record of this trial is out of reach; using what was received.")
            used = received
        self._nni._params = used
        parameters = used["parameters"]
        self._save(parameter_id=used["parameter_id"], parameters=parameters, received=received)
        return dict(parameters)

    def begin_curve(
        self, under_way: int, earlier: dict[int, dict[str, float]], ended: Callable[[], object]
    ) -> None:
        """Before the first `report`: tells NNI what it does not know of the epochs before the one under way.

        `earlier` is {epoch: metrics} of this trial, from earlier starts or another trial's run. NNI's page
        stays empty where a curve has a hole, at its beginning too: the curve begins with the first epoch.
        Nothing more is told once `ended()`.
        """
        self._first_epoch = min(earlier, default=under_way)
        deadline = time.monotonic() + 30
        told = self._told()
        for epoch in sorted(earlier.keys() - (told or ())):
            if ended():
                return
            self.report(epoch, earlier[epoch])
            # NNI answers before it has stored a result, and stores those of one moment in any order.
            while told is not None and epoch not in told and time.monotonic() < deadline:
                if ended():
                    return
                time.sleep(0.01)
                told = self._told()

    def report(self, epoch: int, metrics: dict[str, float], last: bool = False) -> None:
        """Reports an epoch (from 1); metrics["default"] is what NNI plots and assesses.

        The `last` one goes out with the final result: an assessor may end the trial for it, before the
        results of all its epochs are written.
        """
        if not self.inside:
            return
        metrics = finite(metrics)
        if last:
            self._last = epoch, metrics
            return
        # A trial that was resumed goes on with its curve; NNI alone would start it again at 0.
        self._nni.overwrite_intermediate_seq(epoch - self._first_epoch)
        self._send(self._nni.report_intermediate_result, metrics)

    def finish(self, metrics: dict[str, float]) -> bool:
        """Reports the final result, once over all starts of the trial; whether it went out now."""
        if not self.inside:
            return False
        metrics = finite(metrics)
        if self._last:
            self.report(*self._last)
            self._last = None
        if self._finished:
            return False
        # A second final result can end the tuner. Whether one arrived before `nnictl stop` the manager
        # knows best; our record answers where the manager cannot be asked.
        delivered = self._rest(f"metric-data/{self.id}?type=FINAL")
        if delivered is None:
            delivered = self._record.get("final")
        self._finished = True  # before sending: a signal in between must not send it again
        if delivered or not self._send(self._nni.report_final_result, metrics):
            return False
        self._save(final=metrics)
        return True

    def link_tensorboard(self) -> None:
        """Lets the TensorBoard button of NNI's page find output_dir/tensorboard."""
        if not self.inside or os.environ["NNI_PLATFORM"] != "local":
            return  # the page can show what is on its own machine only
        # 3.0 looks in <experiment>/trials/<id>/output, not in <experiment>/environments/*/trials/<id>.
        link = self.output_dir.parents[3] / "trials" / self.id / "output"
        link.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):  # an earlier start made it, or NNI itself for its button
            link.symlink_to(self.output_dir, target_is_directory=True)

    def concurrency(self) -> int:
        """How many trials NNI runs at a time on this machine; 1 where it cannot be asked."""
        if not self.inside or os.environ["NNI_PLATFORM"] != "local":
            return 1  # elsewhere they are on several machines
        try:
            params = self._rest("experiment")["params"]
            return max(1, min(params["trialConcurrency"], params.get("maxTrialNumber", math.inf)))
        except (TypeError, KeyError):
            log.warning(
                "NNI does not say how many trials share the cores: this one takes all, --threads limits it."
            )
            return 1

    def _told(self) -> set[int] | None:
        """The epochs that NNI has stored of this trial, those of earlier starts too; None if it cannot be asked."""
        metrics = self._rest(f"metric-data/{self.id}?type=PERIODICAL")
        if metrics is None:
            return None
        return {metric["sequence"] + self._first_epoch for metric in metrics}

    def _filed(self) -> dict[str, Any] | None:
        """The parameter record that the manager has filed under this trial's id."""
        # The manager files it a moment after it starts the trial, so the first look may be too early.
        for _ in range(50):
            trial = self._rest(f"trial-jobs/{self.id}")
            if trial is not None:
                return json.loads(trial["hyperParameters"][0])
            time.sleep(0.2)
        return None

    def _rest(self, path: str) -> Any:
        """What the manager's REST answers, None if nothing or out of reach."""
        manager = self._manager()
        if manager is None:
            return None
        import requests

        try:
            answer = requests.get(f"{manager}/api/v1/nni/{path}", timeout=5)
            answer.raise_for_status()
            return answer.json()
        except requests.RequestException:  # an answer that is not JSON is one of them
            return None

    def _manager(self) -> str | None:
        """The address of the manager, http://HOST:PORT with its url prefix; None without one."""
        channel = os.environ.get("NNI_TRIAL_COMMAND_CHANNEL")
        if channel is None or not self.inside:  # in Kubernetes parameters and results are files
            return None
        # On another machine the channel leads to a keeper of trials, which knows where the manager is.
        # Every start of the manager starts a keeper in a folder of its own: the newest is ours.
        keepers = self.output_dir.parents[1].glob("trial_keeper*/trial_keeper_config.json")
        if newest := max(keepers, key=lambda file: file.stat().st_mtime_ns, default=None):
            websocket = json.loads(newest.read_text())["managerCommandChannel"]
            return websocket.replace("ws", "http", 1).rpartition("/platform/")[0]
        return channel.rpartition("/env/")[0]

    def _send(self, report: Callable[[Any], None], metrics: dict[str, float]) -> bool:
        """Reports; False if the manager is gone: `nnictl stop` ends it seconds before its trials."""
        import requests

        try:
            report(metrics)
        except requests.RequestException:
            log.warning("NNI's manager is out of reach, not reported: %s", metrics)
            return False
        return True

    def _save(self, **news: Any) -> None:
        self._record |= news
        replace_file(self.output_dir / "nni.json", json.dumps(self._record, indent=2).encode())


def trial_module() -> ModuleType:
    """`nni.trial`, without what else `import nni` imports: SciPy above all, a second of every trial."""
    if "nni" not in sys.modules and (spec := find_spec("nni")):
        nni = sys.modules["nni"] = module_from_spec(spec)
        from nni.common import dump, load
        from nni.runtime.log import _init_logger

        nni.dump, nni.load = dump, load  # what nni.trial uses of its package
        _init_logger()
    import nni.trial

    return nni.trial


def finite(metrics: dict[str, float]) -> dict[str, float]:
    """The metrics that NNI can take: without what is not finite; ValueError without a default."""
    if not math.isfinite(metrics.get("default", math.nan)):
        raise ValueError(f"NNI needs a finite 'default' metric: {metrics}")
    return {name: float(value) for name, value in metrics.items() if math.isfinite(value)}


def end_with_parent() -> None:
    """Makes Linux send this process SIGTERM when its parent is gone; elsewhere nothing happens."""
    # NNI's manager, killed by a lack of memory say, leaves its trials running. The one that follows it
    # under `nnictl resume` starts them again, in the same folders. A bash that NNI kills but that hid
    # its signal from Python is such a parent too.
    parent_death_signal = 1  # PR_SET_PDEATHSIG of linux/prctl.h
    with suppress(AttributeError):
        ctypes.CDLL(None).prctl(parent_death_signal, signal.SIGTERM)


def end_with_grandparent() -> None:
    """The same when the parent of the parent is gone: torchrun would outlive NNI's manager, and we with it."""
    status = Path(f"/proc/{os.getppid()}/stat")
    with suppress(AttributeError, OSError):  # not Linux, or torchrun is gone already
        grandparent = int(status.read_text().rpartition(")")[2].split()[1])
        descriptor = os.pidfd_open(grandparent)

        def wait() -> None:
            select.select([descriptor], [], [])
            os.kill(os.getpid(), signal.SIGTERM)

        threading.Thread(target=wait, daemon=True).start()


def least_used_gpu(folder: Path, first: int, gpus: int) -> int:
    """Of `gpus`, from number `first` on, the one that the fewest trials in `folder` compute on, this one included.

    Each holds a lock there until its process ends. By turns alone GPUs would be idle beside others with two
    trials, since trials take different times and an assessor ends some.
    """
    try:
        with open(folder / ".gpus.lock", "w") as turn:
            fcntl.flock(turn, fcntl.LOCK_EX)  # one trial chooses at a time
            numbers = [number % gpus for number in range(first, first + gpus)]
            gpu = min(numbers, key=lambda n: sum(map(is_held, folder.glob(f".gpu{n}-*.lock"))))
            own = os.open(folder / f".gpu{gpu}-{os.getpid()}.lock", os.O_RDWR | os.O_CREAT, 0o666)
            fcntl.flock(own, fcntl.LOCK_EX | fcntl.LOCK_NB)  # and stays open
            return gpu
    except OSError:  # a file system without locks: by turns
        return first % gpus


def is_held(file: Path) -> bool:
    """Whether the process that locked the file is still there; else the file is removed."""
    with open(file) as content:
        try:
            fcntl.flock(content, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        file.unlink()
        return False
