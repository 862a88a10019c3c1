"""The machine: memory, load, disks, the processes of the lab, GPUs where there are any, and what watching costs."""

from __future__ import annotations

from prometheus_client import Gauge

from monitoring import metrics as m
from monitoring.dashboards.plots import WINDOW, Board, Plot, Query, Variable

FOLDER = 'folder=~"$folder"'


def _max(metric: Gauge, where: str = "", by: str = "") -> str:
    """Gateway and training both show the machine; take one of them."""
    matcher, labels = f"{{{where}}}" if where else "", f" by ({by}) " if by else ""
    return f"max{labels}({m.series_name(metric)}{matcher})"


MACHINE = (
    Plot(
        "Memory of the machine",
        "bytes",
        "Available near zero: the next thing that grows is killed. Lower context_tokens or slots, or stop the training.",
        (Query(_max(m.MACHINE_MEMORY_AVAILABLE), "available"), Query(_max(m.MACHINE_MEMORY), "all")),
        width=8,
    ),
    Plot(
        "Load",
        "short",
        "Above the number of cores, everything waits for a core: fewer slots, fewer threads, or stop what else runs.",
        (Query(_max(m.MACHINE_LOAD), "load"), Query(_max(m.MACHINE_CPUS), "cores")),
        width=8,
    ),
    Plot(
        "Room on disk",
        "percentunit",
        "Below 10 % a training may lose its checkpoint and an index cannot be written: remove old runs (`llmlab runs list`) or "
        "reports.",
        (
            Query(
                f"min by (folder) ({m.series_name(m.DISK_FREE)}{{{FOLDER}}} / {m.series_name(m.DISK_SIZE)}{{{FOLDER}}})",
                "{{folder}}",
            ),
        ),
        width=8,
    ),
)

PROCESSES = (
    Plot(
        "Memory by process",
        "bytes",
        "The gateway grows with its index and stays there; steady growth is a leak. llama.cpp does not tell its own.",
        (Query("max by (job) (process_resident_memory_bytes)", "{{job}}"),),
        width=8,
    ),
    Plot(
        "CPU cores in use by process",
        "short",
        "The gateway needs a small part of one core; more at few requests: look at guards and embedding.",
        (Query(f"sum by (job) (rate(process_cpu_seconds_total[{WINDOW}]))", "{{job}}"),),
        width=8,
    ),
    Plot(
        "Open files",
        "percentunit",
        "Share of the files that a process may open; connections count. Near 100 %: raise `ulimit -n` or lower "
        "connections.limit.",
        (Query("max by (job) (process_open_fds / process_max_fds)", "{{job}}"),),
        width=8,
    ),
)

GPU = (
    Plot(
        "GPU busy",
        "percentunit",
        "Low while requests wait: the GPU is starved by a CPU, or slots are too few. No line: there is no GPU.",
        (Query(_max(m.GPU_BUSY, by="gpu"), "{{gpu}}"),),
    ),
    Plot(
        "GPU memory",
        "bytes",
        "vLLM fills gpu_memory_share of it on purpose. Full during training: lower schedule.max_tokens.",
        (Query(_max(m.GPU_MEMORY_USED, by="gpu"), "used {{gpu}}"), Query(_max(m.GPU_MEMORY, by="gpu"), "all {{gpu}}")),
    ),
    Plot(
        "GPU power",
        "watt",
        "At its limit all the time with falling tokens per second: the card is throttled.",
        (Query(_max(m.GPU_POWER, by="gpu"), "{{gpu}}"),),
    ),
    Plot(
        "GPU temperature",
        "celsius",
        "Above about 85 degrees most cards slow down: look after the air.",
        (Query(_max(m.GPU_TEMPERATURE, by="gpu"), "{{gpu}}"),),
    ),
)

WATCHING = (
    Plot(
        "Scrape duration",
        "s",
        "What watching costs: above 0.05 s the gateway does too much for each scrape; look at 'Samples per scrape'.",
        (Query('max by (job) (scrape_duration_seconds{job=~"llmlab-.*"})', "{{job}}"),),
        width=12,
        limit=0.05,
    ),
    Plot(
        "Samples per scrape",
        "short",
        "It grows with models, routes and statuses, never with users. Above 2,000 somebody has made a label of what clients "
        "choose.",
        (Query('max by (job) (scrape_samples_scraped{job=~"llmlab-.*"})', "{{job}}"),),
        width=12,
        limit=2000,
    ),
)

BOARD = Board(
    "hardware",
    "hardware",
    "The machine below: memory, load, disks, processes, GPUs where there are any, and the cost of watching.",
    {"Machine": MACHINE, "Processes": PROCESSES, "GPU": GPU, "Watching": WATCHING},
    (Variable("folder", "Folder", m.series_name(m.DISK_FREE)),),
)
