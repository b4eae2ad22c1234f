"""Processes that open the folder of a disk tier by chance: python -m tests.unit.store_holders FOLDER NAMESPACES."""

import ctypes
import fcntl
import os
import random
import signal
import socket
import sys
from pathlib import Path

import torch

from edit_ray.cache import DiskOffloadStore


class Holder:
    """A store in a process of its own, perhaps in a pid namespace of its own: its folder, and what it said at first."""

    def __init__(self, folder, mine, namespaces):
        self.folder, self.mine = folder, mine
        ours, theirs = socket.socketpair()
        self.pipe = ours.makefile("rw")
        self.process = os.fork()
        if self.process == 0:
            try:
                os.setsid()
                if namespaces:
                    assert ctypes.CDLL(None).unshare(0x30000000) == 0  # CLONE_NEWUSER | CLONE_NEWPID
                    if inner := os.fork():  # the first in the new namespace
                        os.waitpid(inner, 0)
                        os._exit(0)
                self._hold(theirs.makefile("rw"))
            finally:
                os._exit(1)
        theirs.close()
        self.said = self.pipe.readline().split(" ", 2)

    def _hold(self, pipe):
        try:
            store = DiskOffloadStore(self.folder, allow_tmpfs=True)
        except ValueError as error:
            print("refused", os.getpid(), error, file=pipe, flush=True)
            return
        print("open", os.getpid(), len(store), file=pipe, flush=True)
        while pipe.readline() == "put\n":
            store.put(("entry", self.mine), torch.full((3000,), self.mine))
            print(int((store.get(("entry", self.mine)) == self.mine).all()), file=pipe, flush=True)

    def put(self):
        print("put", file=self.pipe, flush=True)
        return self.pipe.readline()

    def end(self, how):
        if how == "killed":
            os.killpg(self.process, signal.SIGKILL)
        elif self.said[0] == "open":
            print("end", file=self.pipe, flush=True)
        os.waitpid(self.process, 0)
        self.pipe.close()
        if self.said[0] == "open":
            with open(self.folder / ".lock") as file:
                fcntl.flock(file, fcntl.LOCK_EX)  # the inner process may die a moment later than the outer one


def main(folder: Path, namespaces: bool) -> None:
    """Random opens, ends and kills: a store opens if and only if no other is, and finds what it should."""
    chosen, holder, put, refused, pids = random.Random(0), None, set(), 0, []
    for number in range(30):
        opened = Holder(folder, number, namespaces)
        if holder is not None:
            assert opened.said[0] == "refused"
            assert str(folder) in opened.said[2]
            opened.end("by itself")
            refused += 1
        else:
            assert opened.said[0] == "open"
            assert int(opened.said[2]) == len(put), "it finds what was there"
            holder = opened
            pids.append(int(opened.said[1]))
        put.add(holder.mine)
        assert holder.put() == "1\n"
        if chosen.random() < 0.6:
            holder.end(chosen.choice(["killed", "by itself"]))
            holder = None
    if holder is not None:
        holder.end("killed")
    store = DiskOffloadStore(folder, allow_tmpfs=True)
    assert {key[1] for key in store.sizes()} == put
    assert all((store.get(key) == key[1]).all() for key in store.sizes())
    assert refused > 5
    assert len(pids) > 5
    assert not namespaces or set(pids) == {1}, "equal pids, and different processes"


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] == "1")
