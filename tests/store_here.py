"""The CacheStore actor's class as the GPU actor calls it, without Ray and without a process of its own."""

import os

from edit_ray.actors.cache_store import CacheStoreActor


class StoreHere:
    """Calls are carried out at once; `asked` has their names. `kill` ends the actor, and another takes its place."""

    def __init__(self, worker=0):
        self.pid, self.worker, self.asked = os.getpid(), worker, []
        self.actor = CacheStoreActor(worker)

    def call(self, method, *arguments):
        self.asked.append(method)
        answer = error = None
        try:
            answer = getattr(self.actor, method)(*arguments)
        except Exception as raised:
            error = raised

        def reply():
            if error is not None:
                raise error
            return answer

        return reply

    def kill(self):
        self.actor.close()
        self.actor = CacheStoreActor(self.worker)

    def close(self):
        self.actor.close()
