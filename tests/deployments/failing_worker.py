"""A real worker of vLLM for tests, whose memory runs out in a step with requests."""

from typing import Any

import torch
from vllm.v1.worker.cpu_worker import CPUWorker

MESSAGE = (
    "CUDA out of memory. Tried to allocate 1.50 GiB. GPU 0 has a total capacity of 79.25 GiB of "
    "which 512.00 MiB is free."
)


class FailingWorker(CPUWorker):
    """Dies where torch would raise: below the worker's own `execute_model`."""

    def execute_model(self, scheduler_output: Any) -> Any:
        if scheduler_output.num_scheduled_tokens:
            self.allocate()
        return super().execute_model(scheduler_output)

    def allocate(self) -> None:
        raise torch.OutOfMemoryError(MESSAGE)
