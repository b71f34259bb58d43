#!/usr/bin/env python3
"""`stoker serve` with a thousand registered models: time until it is ready, and its resident memory.

    scripts/many_models.py [MODELS=1000]

Every name refers to one tiny model: only registration is measured. The first start indexes the files; the median of the
five starts after it is printed, as one JSON object.
"""

import json
import pathlib
import re
import statistics
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests/python"))
from stoker_server import Server  # noqa: E402

count = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
config = "".join(f'[models.m{n:05}]\npath = "{ROOT}/tests/data/tiny-llama"\n' for n in range(count))
ready, resident = [], []
with tempfile.TemporaryDirectory() as models:
    for _ in range(6):
        began = time.monotonic()
        with Server(config, models=pathlib.Path(models)) as server:
            ready.append((time.monotonic() - began) * 1e3)
            status = pathlib.Path(f"/proc/{server.process.pid}/status").read_text()
            resident.append(int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024)
print(
    json.dumps(
        {
            "models": count,
            "first_start_ms": round(ready[0], 1),
            "ready_ms": {"p50": round(statistics.median(ready[1:]), 1), "max": round(max(ready[1:]), 1)},
            "resident_mib": {"p50": round(statistics.median(resident[1:]), 1)},
        }
    )
)
