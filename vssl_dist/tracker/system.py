"""The machine's own curves, under the keys that MLflow's "System metrics" tab reads."""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import Any

from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

from vssl_dist.tracker.spool import Spool

_log = logging.getLogger(__name__)


class SystemSampler(threading.Thread):
    """Writes processor, memory, disk, network and GPU use of this machine to the spool.

    Its steps count samples over the whole run: a resumed run goes on counting.
    """

    def __init__(self, run_dir: Path, every_s: float) -> None:
        super().__init__(name="system-metrics", daemon=True)
        self._spool = Spool(run_dir, "system")
        self._sample_every_s = every_s
        self._end_event = threading.Event()
        self._monitors: list[Any] = []
        monitor_classes: list[Any] = [CPUMonitor, DiskMonitor, NetworkMonitor, GPUMonitor]
        for monitor_class in monitor_classes:
            try:
                self._monitors.append(monitor_class())
            except (ImportError, RuntimeError) as error:
                # The last one needs a GPU and the nvidia-ml-py package.
                _log.info("no %s: %s", monitor_class.__name__, error)

    def run(self) -> None:
        """Sample until `stop` is called."""
        step = self._spool.last_step() + 1
        # The first reading of processor use has no interval yet and is always 0.
        self._read_monitors()
        while not self._end_event.wait(self._sample_every_s):
            self._spool.metrics(self._read_monitors(), step)
            step += 1

    def stop(self) -> None:
        """End the thread; nothing is written afterwards."""
        self._end_event.set()
        self.join()
        self._spool.close()

    def _read_monitors(self) -> dict[str, float]:
        values: dict[str, float] = {}
        for monitor in self._monitors:
            monitor.collect_metrics()
            values |= {f"system/{k}": v for k, v in monitor.aggregate_metrics().items()}
            monitor.clear_metrics()
        return values
