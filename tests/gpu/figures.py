"""What was measured on a GPU, as JSON: for docs/gpu.md."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch


class Figures:
    """The figures of one part, in `gpu-figures/PART.json` (or where GPU_FIGURES says), written with each that comes."""

    def __init__(self, part: str) -> None:
        self.path = Path(os.environ.get("GPU_FIGURES", "gpu-figures")) / f"{part}.json"
        self.found: dict[str, Any] = {"torch": torch.__version__, "device": "a CPU: not a figure of any GPU"}
        if torch.cuda.is_available():
            self.found |= {
                "device": torch.cuda.get_device_name(0),
                "cuda": torch.version.cuda,
                "cudnn": torch.backends.cudnn.version(),
                "nccl": ".".join(map(str, torch.cuda.nccl.version())),  # type: ignore[no-untyped-call]
            }

    def note(self, name: str, value: Any) -> None:
        self.found[name] = value
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.found, indent=1) + "\n", encoding="utf-8")
        print(f"{name}: {value}")
