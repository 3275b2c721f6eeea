"""The ranks of one launch, each of which starts a process of every one of several runs."""

from __future__ import annotations

import os
import time
from multiprocessing.process import BaseProcess
from typing import Any

from torch.distributed import PrefixStore, TCPStore, rendezvous

from ssm_train import distributed

SECONDS_TO_END = 60.0
"""That processes of other ranks have once rank 0's has ended by itself."""


class Launched:
    """This rank, which knows the others by the launcher's address; they form no process group.

    All ranks call the same methods in the same order.
    """

    def __init__(self) -> None:
        self.world = distributed.launched_processes()
        self.main = self.world == 1 or os.environ["RANK"] == "0"
        self._agreed = 0
        self._store: Any = None
        self._meeting: TCPStore | None = None
        if self.world > 1:
            self._store = PrefixStore("ssm_train/launched", next(rendezvous("env://"))[0])

    def agree(self, value: str = "") -> str:
        """Rank 0's value, as soon as that one has come here."""
        if self.world == 1:
            return value
        self._agreed += 1
        if self.main:
            self._store.set(str(self._agreed), value)
        return str(self._store.get(str(self._agreed)).decode())

    def meet(self) -> dict[str, str]:
        """Environment variables of the processes of one run, by which they find each other and
        none of a run before."""
        if self.world == 1:
            return {}
        if self.main:
            host = os.environ["MASTER_ADDR"]
            self._meeting = TCPStore(host, 0, is_master=True, wait_for_workers=False)
        port = self.agree(str(self._meeting.port) if self._meeting else "")
        return {"MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": "True"}

    def await_end(self, process: BaseProcess) -> int:
        """Exit code of rank 0's process. Those of the other ranks have ended then, too: at once
        where rank 0's was killed."""
        if self.main:
            process.join()
            return int(self.agree(str(process.exitcode)))
        while not self._store.check([str(self._agreed + 1)]):
            time.sleep(0.05)
        code = int(self.agree())
        process.join(SECONDS_TO_END if code >= 0 else 0)
        process.kill()
        process.join()
        return code
